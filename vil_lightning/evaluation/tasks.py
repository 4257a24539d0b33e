"""What can be measured: each task turns the features of a `Subject` into scores, by a protocol whose name stands beside them.

`tasks` of `configs/evaluate.yaml` lists those of a suite; a class of your own that derives from `Task` can stand there, too.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from vil_lightning.errors import ConfigError
from vil_lightning.evaluation.augmented import augmented_views, crop_transform
from vil_lightning.evaluation.features import FeatureSet
from vil_lightning.evaluation.inputs import few_labels
from vil_lightning.evaluation.knn import KS, knn_scores
from vil_lightning.evaluation.logistic import CS, logistic_regression
from vil_lightning.evaluation.probes import PROTOCOLS, probe
from vil_lightning.evaluation.processes import processes
from vil_lightning.evaluation.readouts import LAST4, READOUT_NAMES
from vil_lightning.evaluation.scores import Score
from vil_lightning.evaluation.subject import Subject


class Task:
    """A part of a suite."""

    def check(self, subject: Subject) -> None:
        """Refuse what cannot work, before any feature is computed.

        Raises:
            ConfigError: Naming the argument.
        """

    def run(self, subject: Subject) -> list[Score]:
        """The scores, in the order of a table."""
        raise NotImplementedError


class KNN(Task):
    """k nearest neighbours, the protocol of DINO.

    Args:
        ks: Numbers of neighbours.
        readout: One of `READOUT_NAMES`; `auto` is the one that the network is made for.
        temperature: Of the votes.
        sizes: Also at these resolutions in px, with resampled position embeddings: the curve from small to large images.
    """

    def __init__(
        self,
        ks: Sequence[int] = KS,
        readout: str = "auto",
        temperature: float = 0.07,
        sizes: Sequence[int] = (),
    ) -> None:
        if not ks or min(ks) < 1:
            raise ConfigError(f"KNN: ks={list(ks)} must be numbers from 1.")
        if temperature <= 0:
            raise ConfigError(f"KNN: temperature={temperature} must be positive.")
        if any(size < 1 for size in sizes):
            raise ConfigError(f"KNN: sizes={list(sizes)} must be px, from 1.")
        check_readouts("KNN", readout)
        self.ks = list(ks)
        self.readout = readout
        self.temperature = temperature
        self.sizes = list(sizes)

    def run(self, subject: Subject) -> list[Score]:
        scores = self._at(subject, self.ks)
        for size in self.sizes:
            for score in self._at(subject.at_size(size), self.ks[:1]):
                scores.append(renamed(score, f"{score.name}, {size} px", f"{score.protocol}/{size}px", score.readout))
        return scores

    def _at(self, subject: Subject, ks: list[int]) -> list[Score]:
        readout = subject.readout(self.readout)
        train, val = (features[readout] for features in pair(subject, [readout]))
        scores = knn_scores(
            train.features, train.labels, val.features, val.labels, ks, self.temperature, device=subject.place
        )
        return [renamed(score, score.name, f"{score.protocol}/{named(self.readout)}", readout) for score in scores]


def check_readouts(task: str, *readouts: str) -> None:
    for readout in readouts:
        if readout not in ("auto", f"auto{LAST4}", *READOUT_NAMES):
            allowed = ", ".join(("auto", f"auto{LAST4}", *READOUT_NAMES))
            raise ConfigError(f"{task}: readout {readout!r} is not known. Allowed: {allowed}.")


def named(readout: str) -> str:
    """A read-out in the name of a protocol: networks are compared by their own ones, too."""
    return f"own-readout{readout.removeprefix('auto')}" if readout.startswith("auto") else readout


def renamed(score: Score, name: str, protocol: str, readout: str) -> Score:
    return replace(score, name=name, protocol=protocol, readout=readout)


class LogisticRegression(Task):
    """Multinomial logistic regression of standardised features, strength chosen on held-out training images.

    Args:
        readout: One of `READOUT_NAMES`; `auto` is the one that the network is made for.
        Cs: Inverse strengths of the L2 penalty to choose from, as in scikit-learn.
        held_out: Share of the training images of each class to choose on.
    """

    def __init__(self, readout: str = "auto", Cs: Sequence[float] = CS, held_out: float = 0.1) -> None:
        check_readouts("LogisticRegression", readout)
        self.readout = readout
        self.Cs = list(Cs)
        self.held_out = held_out

    def run(self, subject: Subject) -> list[Score]:
        readout = subject.readout(self.readout)
        train, val = pair(subject, [readout])
        result = logistic_regression(
            train[readout].features,
            train[readout].labels,
            val[readout].features,
            val[readout].labels,
            Cs=self.Cs,
            held_out=self.held_out,
            seed=subject.seed,
            device=subject.place,
        )
        protocol = f"{result.score.protocol}/{named(self.readout)}"
        return [renamed(result.score, "logistic regression", protocol, readout)]


class LinearProbe(Task):
    """Linear classifiers by a protocol of `vil_lightning.evaluation.probes.PROTOCOLS`.

    With several read-outs, learning rates or weight decays, all are trained side by side, the winner is chosen on held-out
    training images, and reported on val.

    Args:
        protocol: `sweep` (this project's), `dino`, `mae`, `ibot` or `dinov2`.
        readouts: Read-outs to try; `auto` is the network's own.
        held_out: Share of the training images of each class to choose on.
        images: `cached` trains on features of unchanged images, which are computed once; `augmented` on a new random resized
            crop of every image in every epoch, flipped or not, as published. All heads share one pass over these.
        crop_scale: Share of an image's area in such a crop, smallest and largest.
        hflip_prob: Probability of a flip.
    """

    def __init__(
        self,
        protocol: str = "sweep",
        readouts: Sequence[str] = ("auto",),
        held_out: float = 0.1,
        images: Literal["cached", "augmented"] = "cached",
        crop_scale: tuple[float, float] = (0.08, 1.0),
        hflip_prob: float = 0.5,
    ) -> None:
        if protocol not in PROTOCOLS:
            raise ConfigError(f"LinearProbe: protocol={protocol!r} is not known. Allowed: {', '.join(PROTOCOLS)}.")
        if not readouts:
            raise ConfigError("LinearProbe: readouts is empty. Name at least one.")
        check_readouts("LinearProbe", *readouts)
        if images not in ("cached", "augmented"):
            raise ConfigError(f"LinearProbe: images={images!r} must be cached or augmented.")
        if images == "cached" and (tuple(crop_scale), hflip_prob) != ((0.08, 1.0), 0.5):
            raise ConfigError(
                "LinearProbe: crop_scale and hflip_prob change nothing with images=cached. Leave them unset."
            )
        crop_transform(32, crop_scale, hflip_prob)  # refuses what is out of range
        self.protocol = protocol
        self.readouts = list(readouts)
        self.held_out = held_out
        self.images = images
        self.crop_scale = (crop_scale[0], crop_scale[1])
        self.hflip_prob = hflip_prob

    def check(self, subject: Subject) -> None:
        if self.images == "augmented" and processes()[1] > 1:
            raise ConfigError("LinearProbe: images=augmented runs on one process. Use images=cached under torchrun.")

    def run(self, subject: Subject) -> list[Score]:
        readouts = list(dict.fromkeys(subject.readout(name) for name in self.readouts))
        train, val = pair(subject, readouts)
        first = readouts[0]
        views, augmentation = None, ""
        if self.images == "augmented":
            transform = crop_transform(subject.data.img_size, self.crop_scale, self.hflip_prob)
            views = augmented_views(subject, transform, readouts, train[first].indices)
            augmentation = f"/crops={self.crop_scale[0]:g}-{self.crop_scale[1]:g}/flips={self.hflip_prob:g}"
        result = probe(
            self.protocol,
            {name: features.features for name, features in train.items()},
            train[first].labels,
            {name: features.features for name, features in val.items()},
            val[first].labels,
            held_out=self.held_out,
            seed=subject.seed,
            device=subject.place,
            views=views,
        )
        tried = "+".join(named(name) for name in self.readouts)
        name = result.score.name + (", augmented" if views is not None else "")
        score = renamed(result.score, name, f"{result.score.protocol}{augmentation}/{tried}", result.winner.readout)
        return [replace(score, notes=result.notes)]


class FewLabels(Task):
    """Logistic regression on a few labelled images, mean over seeded draws of them.

    Args:
        fractions: Shares of the training images of each class, 0.01 for 1 %.
        per_class: Numbers of images of each class.
        num_draws: How often the images are drawn.
        readout: One of `READOUT_NAMES`; `auto` is the one that the network is made for.
        C: Inverse strength of the L2 penalty: too few images to choose it on.
    """

    def __init__(
        self,
        fractions: Sequence[float] = (0.01, 0.1),
        per_class: Sequence[int] = (1, 5),
        num_draws: int = 5,
        readout: str = "auto",
        C: float = 0.01,
    ) -> None:
        check_readouts("FewLabels", readout)
        if num_draws < 1 or C <= 0:
            raise ConfigError(f"FewLabels: num_draws={num_draws} must be at least 1, C={C} positive.")
        if not fractions and not per_class:
            raise ConfigError("FewLabels: fractions and per_class are both empty. Name at least one.")
        if any(not 0 < fraction <= 1 for fraction in fractions) or any(count < 1 for count in per_class):
            raise ConfigError(
                f"FewLabels: fractions={list(fractions)} must be above 0 and at most 1, per_class={list(per_class)} at least 1."
            )
        self.fractions = list(fractions)
        self.per_class = list(per_class)
        self.num_draws = num_draws
        self.readout = readout
        self.C = C

    def check(self, subject: Subject) -> None:
        labels = torch.tensor(subject.data.train_source.labels)
        for fraction, count in self._settings():
            few_labels(labels, fraction=fraction, per_class=count, seed=subject.seed)  # refuses what is not there

    def run(self, subject: Subject) -> list[Score]:
        readout = subject.readout(self.readout)
        train, val = (features[readout] for features in pair(subject, [readout]))
        scores = []
        for fraction, count in self._settings():
            hits = []
            for draw in range(self.num_draws):
                rows = few_labels(train.labels, fraction=fraction, per_class=count, seed=subject.seed + draw)
                result = logistic_regression(
                    train.features[rows],
                    train.labels[rows],
                    val.features,
                    val.labels,
                    Cs=[self.C],
                    seed=subject.seed,
                    device=subject.place,
                )
                hits.append(result.classifier.evaluate(val.features, val.labels)[0].double())
            what = f"{100 * fraction:g} % of the labels" if fraction is not None else f"{count} per class"
            share = torch.stack(hits).mean(0)  # of the draws in which an image was right, (M,)
            low, high = mean_interval(share)
            kind = f"{100 * fraction:g}%" if fraction is not None else f"{count}-per-class"
            protocol = f"few-labels/{kind}/logistic/C={self.C:g}/draws={self.num_draws}/{named(self.readout)}"
            scores.append(
                Score(f"logistic, {what}", 100 * float(share.mean()), low, high, protocol, len(share), readout)
            )
        return scores

    def _settings(self) -> list[tuple[float | None, int | None]]:
        return [(fraction, None) for fraction in self.fractions] + [(None, count) for count in self.per_class]


def pair(subject: Subject, readouts: Sequence[str]) -> tuple[dict[str, FeatureSet], dict[str, FeatureSet]]:
    """Features of train and val."""
    return subject.features("train", readouts), subject.features("val", readouts)


def mean_interval(values: Tensor, num_resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval, in percent, of the mean of values (M,) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [values[torch.randint(len(values), (len(values),), generator=generator)].mean() for _ in range(num_resamples)]
    )
    low, high = (100 * torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype))).tolist()
    return low, high
