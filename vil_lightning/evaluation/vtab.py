"""Transfer to other data sets from 1,000 images each: the protocol of VTAB-1k, as the authors of ViL ran it.

Zhai et al. 2019, arXiv:1910.04867 (VTAB); Alkin et al. 2024, arXiv:2406.04303 (ViL, whose settings are the defaults).
"""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, distributed

from vil_lightning.data.crops import Rng, crop_all, size_of
from vil_lightning.data.datamodule import ImageDataModule
from vil_lightning.data.images import Picture
from vil_lightning.data.loading import SubsetSource
from vil_lightning.data.transforms import IMAGENET_MEAN, IMAGENET_STD, EvalTransform
from vil_lightning.errors import ConfigError
from vil_lightning.evaluation.finetune import fine_tune
from vil_lightning.evaluation.inputs import check_labels
from vil_lightning.evaluation.scores import Score
from vil_lightning.evaluation.subject import Subject
from vil_lightning.evaluation.tasks import Task
from vil_lightning.methods.backbone import check_input_size
from vil_lightning.methods.supervised import Supervised

LRS = (1e-3, 7.5e-4, 5e-4, 2.5e-4, 1e-4)
LR_BATCH_SIZE = 64  # learning rates are for a batch of this size
# The 19 data sets. Names are compared without case and punctuation.
GROUPS = {
    "natural": ("caltech101", "cifar100", "dtd", "flowers102", "oxford_iiit_pet", "sun397", "svhn"),
    "specialized": ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy"),
    "structured": (
        "clevr_count",
        "clevr_distance",
        "dmlab",
        "kitti_distance",
        "dsprites_location",
        "dsprites_orientation",
        "smallnorb_azimuth",
        "smallnorb_elevation",
    ),
}


class VTAB1k(Task):
    """Fine-tuning on 1,000 images of a data set, scored on its whole val set, which is to be the official test set.

    Each learning rate is tried with all seeds: trained on 800 images, scored on 200 others. That of the best mean is trained
    again on the 1,000 with all seeds, and the score is the mean over these of the accuracy after the last epoch. AdamW, linear
    warm-up over 10 % of the steps and cosine to 0, cross-entropy, a new classifier; images are resized to a square, never
    cropped nor flipped; no stochastic depth.

    The lists of images are this project's, the same on every machine, not those of TensorFlow Datasets. Position embeddings are
    not decayed, and an epoch drops its last, smaller batch. `vil_lightning.methods.Supervised`, for one process.

    Args:
        datasets: Data modules by name; None takes the data of the evaluation. Under the names of `GROUPS`, the means of the
            groups are scores, too.
        lrs: Peak learning rates to choose from, per 64 images of the batch. A single one is taken as it is.
        num_seeds: Trainings per learning rate; the seeds count up from that of the evaluation.
        epochs: Of each training.
        num_train: Images to train on while the learning rate is chosen.
        num_val: Images to choose it on; then they are trained on, too.
        batch_size: Cut to the number of images.
        layer_decay: Factor of the learning rate per layer below the head (pairs of scans for ViL).
        weight_decay: Of AdamW.
    """

    def __init__(
        self,
        datasets: Mapping[str, ImageDataModule] | None = None,
        lrs: Sequence[float] = LRS,
        num_seeds: int = 5,
        epochs: int = 50,
        num_train: int = 800,
        num_val: int = 200,
        batch_size: int = 64,
        layer_decay: float = 0.65,
        weight_decay: float = 0.05,
    ) -> None:
        counts = {
            "num_seeds": num_seeds,
            "epochs": epochs,
            "num_train": num_train,
            "num_val": num_val,
            "batch_size": batch_size,
        }
        for key, count in counts.items():
            if count < 1:
                raise ConfigError(f"VTAB1k: {key}={count} must be at least 1.")
        if not lrs or min(lrs) <= 0 or len(set(lrs)) < len(lrs):
            raise ConfigError(f"VTAB1k: lrs={list(lrs)} must be different positive numbers, at least one.")
        if datasets is not None and not datasets:
            raise ConfigError(
                "VTAB1k: datasets is empty. Name at least one, or leave it out for the evaluation's data."
            )
        keys = [_key(name) for name in datasets or {}]
        if len(set(keys)) < len(keys):
            raise ConfigError(
                f"VTAB1k: datasets={', '.join(datasets or {})} are names that differ in punctuation only."
            )
        self.datasets = None if datasets is None else dict(datasets)
        self.lrs = list(lrs)
        self.num_seeds = num_seeds
        self.epochs = epochs
        self.num_train = num_train
        self.num_val = num_val
        self.batch_size = batch_size
        self.layer_decay = layer_decay
        self.weight_decay = weight_decay

    def check(self, subject: Subject) -> None:
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            raise ConfigError("VTAB1k trains on one process. Start `main.py evaluate` without torchrun for this task.")
        self._method(subject, self.lrs[0])  # refuses settings out of range
        network = subject.build()
        for data in (self.datasets or {}).values():
            data.prepare_data()
            data.setup("fit")
        for name, case in self._cases(subject).items():
            data = case.data
            if not data.labelled:
                raise ConfigError(f"VTAB1k: data set {name} has no classes. Use labelled images.")
            check_input_size(network, data.img_size, f"img_size of data set {name}")
            for split, source in (("train", data.train_source), ("val", data.val_source)):
                check_labels(torch.tensor(source.labels), data.num_classes, f"VTAB1k: {split} of data set {name}")
            wanted, found = self.num_train + self.num_val, len(data.train_source)
            if found < wanted or len(data.val_source) == 0:
                raise ConfigError(
                    f"VTAB1k: data set {name} has {found} training and {len(data.val_source)} val images; num_train="
                    f"{self.num_train} and num_val={self.num_val} need {wanted} to train, and one to score. Use fewer."
                )

    def run(self, subject: Subject) -> list[Score]:
        shares, scores = {}, []
        for name, case in self._cases(subject).items():
            shares[name], notes = self._share(case, f"VTAB, {name}" if subject.progress else None)
            scores.append(self._score(name, [name], shares, notes))
        found = {_key(name): name for name in self.datasets or {}}
        for group, members in GROUPS.items():
            names = [found[_key(member)] for member in members if _key(member) in found]
            if names:
                notes = (f"{len(names)} of the {len(members)} data sets",)
                scores.append(self._score(f"{group}, mean", names, shares, notes))
        if len(shares) > 1:
            scores.append(self._score("mean", list(shares), shares, (f"of {len(shares)} data sets",)))
        return scores

    def _cases(self, subject: Subject) -> dict[str, Subject]:
        """The network with each data set; the data modules are copies."""
        cases = {}
        for name, own in (self.datasets or {type(subject.data).__name__: subject.data}).items():
            case, data = copy.copy(subject), copy.copy(own)
            data.eval_transform = SquareTransform(data.img_size)
            data.seed = subject.data.seed  # of an untrained network
            data.repeats = 1
            case.data, case.progress = data, False  # the bar counts trainings, not batches
            cases[name] = case
        return cases

    def _share(self, case: Subject, title: str | None) -> tuple[Tensor, tuple[str, ...]]:
        """Share of the seeds in which each test image is classified correctly, float64 (M,), and what to know about it."""
        source = case.data.train_source
        train, val = fixed_rows(len(source), self.num_train, self.num_val)
        chooser = case.on_val(SubsetSource(source, val.tolist()))
        tried = self.lrs if len(self.lrs) > 1 else []
        means = [float(self._train(chooser, lr, train, title and f"{title}, lr {lr:g}").mean()) for lr in tried]
        best = max(range(len(means)), key=means.__getitem__, default=0)  # the first one of equals
        share = self._train(case, self.lrs[best], torch.cat([train, val]).sort().values, title)
        chosen = f", {100 * means[best]:.1f} % on the images it was chosen on" if tried else ", not chosen"
        notes = [f"learning rate {self.lrs[best]:g}{chosen}", "last epoch"]
        if case.precision != "bf16":
            notes.append("trained in float32, published: bfloat16")
        if (case.data.mean, case.data.std) != (IMAGENET_MEAN, IMAGENET_STD):
            notes.append("mean and deviation of pixels are the data set's, published: ImageNet's")
        return share, tuple(notes)

    def _train(self, case: Subject, lr: float, rows: Tensor, title: str | None) -> Tensor:
        """Share of the seeds in which each val image of the case is classified correctly, float64 (M,)."""
        hits = [
            fine_tune(
                case, self._method(case, lr), rows, None, self.epochs, self.batch_size, seed, gradient_clip_val=None
            )
            for seed in track(range(self.num_seeds), title or "", disable=title is None)
        ]
        return torch.stack(hits).double().mean(0)

    def _method(self, subject: Subject, lr: float) -> Supervised:
        config = copy.deepcopy(subject.backbone)
        config.kwargs.pop("drop_path_rate", None)  # that of pretraining
        return Supervised(
            config,
            new_head=True,
            mix_prob=0.0,
            base_lr=lr,
            lr_batch_size=LR_BATCH_SIZE,
            lr_warmup="10%",
            final_lr=0.0,
            weight_decay=self.weight_decay,
            layer_decay=self.layer_decay,
        )

    def _score(self, name: str, names: list[str], shares: dict[str, Tensor], notes: tuple[str, ...]) -> Score:
        """Mean over some of the data sets, each of which counts as much as any other."""
        values = [shares[each] for each in names]
        low, high = mean_of_means_interval(values)
        value = 100 * sum(float(share.mean()) for share in values) / len(values)
        num_images = sum(len(share) for share in values)
        return Score(
            f"VTAB-1k, {name}", value, low, high, f"{self._protocol()}/{'+'.join(names)}", num_images, "", notes
        )

    def _protocol(self) -> str:
        """All settings, and which of them are not the published ones."""
        lrs = ",".join(f"{lr:g}" for lr in self.lrs)
        settings: dict[str, tuple[Any, Any]] = {
            "images": (f"{self.num_train}+{self.num_val}", "800+200"),
            "lrs": (lrs, ",".join(f"{lr:g}" for lr in LRS)),
            "seeds": (self.num_seeds, 5),
            "epochs": (self.epochs, 50),
            "batch": (self.batch_size, LR_BATCH_SIZE),
            "layer_decay": (f"{self.layer_decay:g}", "0.65"),
            "weight_decay": (f"{self.weight_decay:g}", "0.05"),
        }
        changed = "+".join(key for key, (own, published) in settings.items() if own != published)
        return "/".join(
            [
                "vtab-1k",
                f"changed={changed or 'none'}",
                *(f"{key}={own}" for key, (own, _) in settings.items()),
                "own-lists",
            ]
        )


class SquareTransform(EvalTransform):
    """Resize to a square (bicubic), whatever the shape: the whole image is seen."""

    def __init__(self, img_size: int) -> None:
        super().__init__(img_size)
        self.options = {"resize": "square"}

    def __call__(self, picture: Picture, generators: Callable[[int], Rng] | None = None) -> Tensor:
        return crop_all(picture, [(0, 0, *size_of(picture))], [self.img_size])[0]


def fixed_rows(num_images: int, num_train: int, num_val: int) -> tuple[Tensor, Tensor]:
    """Sorted numbers of the images to train on and to choose on, the same in every run.

    The first ones in the order of the SHA-256 of `"vtab/{index}"`; classes are not balanced, as in VTAB.
    """
    order = sorted(range(num_images), key=lambda index: hashlib.sha256(f"vtab/{index}".encode()).digest())
    train, val = order[:num_train], order[num_train : num_train + num_val]
    return torch.tensor(sorted(train)), torch.tensor(sorted(val))


def mean_of_means_interval(values: Sequence[Tensor], num_resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval, in percent, of the mean of several sets' means; each set (M_i,) is resampled on its own."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.zeros(num_resamples, dtype=torch.float64)
    for value in values:
        for i in range(num_resamples):
            means[i] += value[torch.randint(len(value), (len(value),), generator=generator)].mean() / len(values)
    low, high = (100 * torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64))).tolist()
    return low, high


def _key(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
