"""A score in percent with its 95 % interval over the images, and the protocol that made it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """One number of an evaluation.

    Args:
        name: What is measured, for a table.
        value: Percent.
        low: Lower end of the 95 % interval, percent.
        high: Upper end.
        protocol: How it was measured, such as `knn/dino/k=20`.
        num_images: Images that were scored.
        readout: Of the features, where the protocol leaves it to the network.
        notes: What a reader should know: what was chosen, what differs from the published protocol.
    """

    name: str
    value: float
    low: float
    high: float
    protocol: str
    num_images: int
    readout: str = ""
    notes: tuple[str, ...] = ()


def accuracy_score(name: str, correct: Tensor, protocol: str) -> Score:
    """Top-1 accuracy of images that were classified correctly or not, bool (M,)."""
    low, high = bootstrap_interval(correct)
    return Score(name, 100 * float(correct.double().mean()), low, high, protocol, len(correct))


def class_mean_score(name: str, correct: Tensor, labels: Tensor, protocol: str) -> Score:
    """Mean over the classes of their accuracies, from correct (M,), bool, and labels (M,)."""
    value = float(_class_mean(_cells(correct, labels)[None].double()))
    low, high = class_mean_interval(correct, labels)
    return Score(name, value, low, high, protocol, len(correct))


def bootstrap_interval(correct: Tensor, num_resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval, in percent, of the mean of correct (M,), bool.

    Resampling images with replacement changes nothing but the number of correct ones, so that number is drawn itself. The
    interval of images that are all correct has no width: the bootstrap knows of no other kind.
    """
    counts = torch.stack([(~correct).sum(), correct.sum()])
    return interval(counts, lambda draws: 100 * draws[:, 1] / draws.sum(1), num_resamples, seed)


def class_mean_interval(
    correct: Tensor, labels: Tensor, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval, in percent, of the mean of the classes' accuracies, from correct (M,) and labels (M,).

    Images are drawn from all classes at once; a class that a resample lacks does not count in its mean.
    """
    return interval(_cells(correct, labels), _class_mean, num_resamples, seed)


def interval(
    counts: Tensor, statistic: Callable[[Tensor], Tensor], num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of a statistic that depends on how many images fall into each of K cells.

    Args:
        counts: (K,), the images of each cell.
        statistic: Of counts (R, K), float64, the values (R,).
    """
    values = statistic(resample(counts, num_resamples, seed))
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def resample(counts: Tensor, num_resamples: int, seed: int) -> Tensor:
    """Counts (R, K), float64, of as many images drawn with replacement from cells of the given counts (K,).

    A draw from a multinomial, one cell after the other: how many of the images that are still left fall into it.
    """
    generator = torch.Generator().manual_seed(seed)
    left, draws = float(counts.sum()), []  # images of the cells to come
    remaining = torch.full((num_resamples,), left, dtype=torch.float64)  # drawn images without a cell so far
    for count in counts.tolist():
        share = torch.full_like(remaining, count / left if left else 0.0)
        draws.append(torch.binomial(remaining, share, generator=generator))
        remaining = remaining - draws[-1]
        left -= count
    return torch.stack(draws, dim=1)


def _cells(correct: Tensor, labels: Tensor) -> Tensor:
    """Wrong and correct images of each class, flat (2 C,)."""
    return torch.bincount(2 * labels + correct, minlength=2 * (int(labels.max()) + 1))


def _class_mean(counts: Tensor) -> Tensor:
    """Mean accuracy (R,) in percent of the classes that have images, from counts (R, 2 C)."""
    wrong, right = counts.view(len(counts), -1, 2).unbind(-1)
    total = wrong + right
    return 100 * (right / total.clamp(min=1)).sum(1) / (total > 0).sum(1)
