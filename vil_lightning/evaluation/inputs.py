"""What every protocol does with features (N, D) and labels (N,) first: check, split, count, scale.

Features may be memory-mapped and bfloat16: nothing here makes a float32 copy of more than a chunk of them.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from vil_lightning.errors import ConfigError


def check_features(features: Tensor, labels: Tensor, what: str) -> None:
    """Raise a ConfigError unless there are features (N, D), N at least 1, and as many labels."""
    if features.ndim != 2 or not features.is_floating_point() or len(features) == 0:
        raise ConfigError(
            f"{what} must be features (N, D) of at least one image, not {features.dtype} {tuple(features.shape)}."
        )
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise ConfigError(f"{what}: {tuple(labels.shape)} labels, {labels.dtype}, for {len(features)} images.")


def check_labels(labels: Tensor, num_classes: int, what: str) -> None:
    """Raise a ConfigError unless all labels (N,) are between 0 and `num_classes` - 1."""
    wrong = ((labels < 0) | (labels >= num_classes)).nonzero().flatten()
    if len(wrong):
        raise ConfigError(
            f"{what}: image {int(wrong[0])} has label {int(labels[wrong[0]])} ({len(wrong)} such images), but there are "
            f"{num_classes} classes, 0 to {num_classes - 1}. Train and val must name their classes alike."
        )


def few_labels(labels: Tensor, *, fraction: float | None = None, per_class: int | None = None, seed: int = 0) -> Tensor:
    """Sorted indices of a small part of the training images, the same on every machine and in every version.

    The images of a class are ordered by SHA-256 of `"{seed}/{index}"` and the first ones taken, so fewer labels are always
    a part of more labels. (These are not SimCLR's lists of 1 % and 10 % of ImageNet.)

    Args:
        labels: (N,), in the order of the data set.
        fraction: Share of each class, 0.01 for 1 %; rounded, at least one image.
        per_class: Or this many images of each class.

    Raises:
        ConfigError: If not exactly one of the two is given, is out of range, or a class has too few images.
    """
    if (fraction is None) == (per_class is None):
        raise ConfigError(f"few_labels: set fraction or per_class, one of them, not {fraction} and {per_class}.")
    if fraction is not None and not 0 < fraction <= 1:
        raise ConfigError(f"few_labels: fraction={fraction} must be above 0 and at most 1.")
    if per_class is not None and per_class < 1:
        raise ConfigError(f"few_labels: per_class={per_class} must be at least 1.")
    chosen = []
    for label, members in _members(labels, seed).items():
        count = per_class if per_class is not None else max(1, round(fraction * len(members)))  # type: ignore[operator]
        if count > len(members):
            raise ConfigError(f"few_labels: per_class={count}, but class {label} has {len(members)} training images.")
        chosen += members[:count]
    return torch.tensor(sorted(chosen))


def split_held_out(labels: Tensor, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sorted indices of the images to train on, and of those to choose on: `share` of each class, as nearly as whole images
    allow, but never the last image of a class.

    Args:
        labels: (N,).
        share: Between 0 and 1, exclusive.

    Raises:
        ConfigError: If there is nothing to hold out.
    """
    if not 0 < share < 1:
        raise ConfigError(f"held_out={share} must be between 0 and 1 (exclusive).")
    held: list[int] = []
    due = 0.0  # carried from class to class: small classes take turns
    for members in _members(labels, seed).values():
        due += share * len(members)
        count = min(round(due) - len(held), len(members) - 1)
        held += members[: max(count, 0)]
    if not held:
        raise ConfigError(
            f"held_out={share} of {len(labels)} training images leaves none to choose on without taking a class's only "
            "image. Raise held_out, use more images per class, or name other training images to choose on."
        )
    is_held = torch.zeros(len(labels), dtype=torch.bool)
    is_held[held] = True
    return (~is_held).nonzero().flatten(), is_held.nonzero().flatten()


def chunks(features: Tensor, rows: Tensor | None, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Row numbers and features, a chunk at a time, of all rows or of those in `rows`."""
    if rows is None:
        for first, x in enumerate(features.split(size)):  # views: read once, not copied
            yield torch.arange(first * size, first * size + len(x)), x
        return
    for part in rows.split(size):
        yield part, features[part]


def channel_statistics(features: Tensor, rows: Tensor | None = None, chunk_size: int = 8192) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,), float32, of features (N, D) or of their rows; a constant channel's deviation is 1."""
    shift = features[0].double()  # any vector near the features: their squares keep their digits
    total, squares, count = torch.zeros_like(shift), torch.zeros_like(shift), 0
    for _, x in chunks(features, rows, chunk_size):
        x = x.double() - shift
        total, squares, count = total + x.sum(0), squares + x.square().sum(0), count + len(x)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    mean = mean + shift
    return mean.float(), torch.where(std > 1e-6 * mean.abs(), std, 1.0).float()  # below: rounding errors of float32


def _members(labels: Tensor, seed: int) -> dict[int, list[int]]:
    """Indices of each class's images, classes in rising order, images in the order of their hashes."""
    members: dict[int, list[int]] = {label: [] for label in labels.unique().tolist()}
    for index, label in enumerate(labels.tolist()):
        members[label].append(index)
    for indices in members.values():
        indices.sort(key=lambda index: hashlib.sha256(f"{seed}/{index}".encode()).digest())
    return members
