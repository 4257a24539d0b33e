"""Accuracy on images of another kind than those the classifier learned from: ImageNet-A, -R, -Sketch, -C, and corruptions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vil_lightning.data.files import FileSource, image_paths
from vil_lightning.errors import ConfigError
from vil_lightning.evaluation.corruptions import SEVERITIES, CorruptedEvalTransform, check_corruption
from vil_lightning.evaluation.logistic import among, logistic_regression
from vil_lightning.evaluation.processes import on_first
from vil_lightning.evaluation.scores import Score
from vil_lightning.evaluation.subject import Subject
from vil_lightning.evaluation.tasks import Task, check_readouts, mean_interval, named, pair
from vil_lightning.methods.backbone import build_backbone, recorded_classes, recorded_num_classes

# Which images of a subject are classified correctly, bool (M,), if only some classes are possible.
Classifier = Callable[[Subject, Tensor | None], Tensor]


class Robustness(Task):
    """One classifier, trained on the training images as they are, on the val images and on shifted ones.

    Args:
        sets: Folders of shifted images by name, `<folder>/<class>/<image>`, such as ImageNet-A, -R (which hold 200 of the
            classes: only these are then possible) and -Sketch. Class folders are named as those of the data.
        corrupted: Folder in the layout of ImageNet-C, `<corruption>/<severity>/<class>/<image>`.
        corruptions: Or corruptions to be made on the fly, see `vil_lightning.evaluation.corruptions`.
        severities: From 1 to 5, for both; a corruption's score is their mean.
        classifier: `head` is the network's own, for a supervised checkpoint of the same classes; `logistic` is fitted to the
            features of the training images; `auto` takes the head if there is one.
        readout: For `logistic`: one of `READOUT_NAMES`; `auto` is the one that the network is made for.
        C: For `logistic`: inverse strength of the L2 penalty.
    """

    def __init__(
        self,
        sets: Mapping[str, str] | None = None,
        corrupted: str | None = None,
        corruptions: Sequence[str] = (),
        severities: Sequence[int] = SEVERITIES,
        classifier: Literal["auto", "head", "logistic"] = "auto",
        readout: str = "auto",
        C: float = 0.01,
    ) -> None:
        check_readouts("Robustness", readout)
        if not sets and corrupted is None and not corruptions:
            raise ConfigError("Robustness: sets, corrupted and corruptions are all empty. Name at least one.")
        if not severities or C <= 0:
            raise ConfigError(f"Robustness: severities={list(severities)} must not be empty, and C={C} positive.")
        for severity in severities:
            for corruption in corruptions or ("contrast",):
                check_corruption(corruption, severity)
        self.sets = {name: Path(folder) for name, folder in (sets or {}).items()}
        self.corrupted = None if corrupted is None else Path(corrupted)
        self.corruptions = list(corruptions)
        self.severities = list(severities)
        self.classifier = classifier
        self.readout = readout
        self.C = C

    def check(self, subject: Subject) -> None:
        for folder in [*self.sets.values(), *(folder for _, folder in self._corrupted_folders())]:
            folder_source(folder, subject.data.classes)
        self._kind(subject)

    def run(self, subject: Subject) -> list[Score]:
        kind = self._kind(subject)
        classify = own_head if kind == "head" else self._logistic(subject)
        how = "head" if kind == "head" else f"logistic/C={self.C:g}/{named(self.readout)}"
        readout = "" if kind == "head" else subject.readout(self.readout)
        notes: tuple[str, ...] = ()
        if kind == "head" and not recorded_classes(subject.backbone, len(subject.data.classes)):
            notes = ("the checkpoint does not name its classes; they are taken to be those of the data, in this order",)

        def score(name: str, protocol: str, share: Tensor) -> Score:
            low, high = mean_interval(share)
            return Score(name, 100 * float(share.mean()), low, high, f"{protocol}/{how}", len(share), readout, notes)

        scores = [score("val", "robustness/val", classify(subject, None).double())]
        for name, folder in self.sets.items():
            shifted = subject.on_val(folder_source(folder, subject.data.classes))
            classes = torch.tensor(shifted.data.val_source.labels).unique()
            hits = classify(shifted, classes).double()
            scores.append(score(name, f"robustness/{name}/classes={len(classes)}", hits))

        corrupted: dict[str, list[Tensor]] = {}
        for (corruption, _), folder in self._corrupted_folders():
            shifted = subject.on_val(folder_source(folder, subject.data.classes))
            classes = torch.tensor(shifted.data.val_source.labels).unique()
            corrupted.setdefault(f"{corruption}, folder", []).append(classify(shifted, classes).double())
        data = subject.data
        for corruption in self.corruptions:
            for severity in self.severities:
                transform = CorruptedEvalTransform(data.img_size, data.eval_transform.crop_pct, corruption, severity)
                hits = classify(subject.on_val(transform=transform), None).double()
                corrupted.setdefault(corruption, []).append(hits)
        severities = ",".join(map(str, self.severities))
        means = []
        for name, parts in corrupted.items():
            # An image counts once, with its share of the severities, where all show the same ones.
            equal = len({len(x) for x in parts}) == 1
            share = torch.stack(parts).mean(0) if equal else torch.cat(parts)
            scores.append(score(name, f"robustness/{name}/severities={severities}", share))
            means.append(share)
        if len(means) > 1 and len({len(x) for x in means}) == 1:
            share = torch.stack(means).mean(0)
            scores.append(
                score("corruptions, mean", f"robustness/{'+'.join(corrupted)}/severities={severities}", share)
            )
        return scores

    def _corrupted_folders(self) -> Iterator[tuple[tuple[str, int], Path]]:
        """By corruption and severity."""
        if self.corrupted is None:
            return
        if not self.corrupted.is_dir():
            raise ConfigError(f"Robustness: corrupted={self.corrupted} is no folder.")
        kinds = sorted(path for path in self.corrupted.iterdir() if path.is_dir())
        if not kinds:
            raise ConfigError(
                f"Robustness: corrupted={self.corrupted} holds no folders <corruption>/<severity>/<class>."
            )
        for kind in kinds:
            for severity in self.severities:
                yield (kind.name, severity), kind / str(severity)

    def _kind(self, subject: Subject) -> str:
        """`head` or `logistic`."""
        if self.classifier == "logistic":
            return "logistic"
        found, classes = recorded_num_classes(subject.backbone), subject.data.classes
        names = recorded_classes(subject.backbone, len(classes)) if found == len(classes) else []
        fits = found == len(classes) and names in ([], list(classes))
        if fits:
            return "head"
        if self.classifier == "head":
            what = "no classifier" if found is None else f"a classifier of {found} classes {names[:3] or ''}".rstrip()
            raise ConfigError(
                f"Robustness: classifier=head, but backbone.weights={subject.backbone.weights} holds {what}, and the data have "
                f"{len(classes)} classes. Use classifier=logistic, or the data it was trained on."
            )
        return "logistic"

    def _logistic(self, subject: Subject) -> Classifier:
        readout = subject.readout(self.readout)
        train, val = (features[readout] for features in pair(subject, [readout]))
        images = (train.features, train.labels, val.features, val.labels)
        result = logistic_regression(*images, Cs=[self.C], seed=subject.seed, device=subject.place)

        def classify(shifted: Subject, classes: Tensor | None) -> Tensor:
            features = shifted.features("val", [readout])[readout]
            return result.classifier.evaluate(features.features, features.labels, classes=classes)[0]

        return classify


@torch.no_grad()
def own_head(subject: Subject, classes: Tensor | None) -> Tensor:
    """Which val images the network's own classifier gets right, bool (M,), unreadable ones left out."""
    data, place = subject.data, torch.device(subject.place)
    network = build_backbone(subject.backbone, len(data.classes), quiet=True).eval().to(place)
    hits = []
    for images, labels in data.val_dataloader():
        with torch.autocast(place.type, torch.bfloat16, subject.precision == "bf16"):
            scores = network(data.normalize(images.to(place)))
        hits.append(among(scores.float(), classes).argmax(1).cpu() == labels)
    correct = torch.cat(hits)
    readable = torch.ones(len(correct), dtype=torch.bool)
    readable[list(data._eval_datasets["val"].unreadable)] = False
    return correct[readable]


def folder_source(folder: Path, classes: Sequence[str]) -> FileSource:
    """Images of `<folder>/<class>/<image>`, with the numbers that the classes have in the data.

    Raises:
        ConfigError: If there are none, or a folder is named as no class.
    """

    def listed() -> FileSource:
        names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        if not names:
            raise ConfigError(f"Robustness: {folder} holds no class folders. Expected {folder}/<class>/<image>.")
        unknown = [name for name in names if name not in classes]
        if unknown:
            raise ConfigError(
                f"Robustness: {len(unknown)} folder(s) in {folder} are named as no class of the data: "
                f"{', '.join(unknown[:5])}. The classes are {', '.join(classes[:5])}, … Rename them."
            )
        numbers = {name: number for number, name in enumerate(classes)}
        files = [(path, numbers[name]) for name in names for path in image_paths(folder / name)]
        if not files:
            raise ConfigError(f"Robustness: {folder} holds no images.")
        return FileSource(files)

    return on_first(listed)
