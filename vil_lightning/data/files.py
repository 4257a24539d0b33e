"""Sources of image files, and the share of a data set that is held out for validation."""

import os
from pathlib import Path

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from vil_lightning.data.images import EncodedImage, Picture
from vil_lightning.data.loading import ImageSource, SubsetSource
from vil_lightning.errors import ConfigError


class FileSource:
    """Image files, read when asked for.

    Args:
        samples: Paths and classes.
    """

    def __init__(self, samples: list[tuple[str, int]]) -> None:
        self.paths = [path for path, _ in samples]
        self.labels = [label for _, label in samples]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        return EncodedImage(self.paths[index]), self.labels[index]


def paths_of(source: ImageSource) -> list[str]:
    """The paths of the files of a `FileSource`, or of some of them."""
    if isinstance(source, SubsetSource):
        paths = paths_of(source.source)
        return [paths[i] for i in source.indices]
    assert isinstance(source, FileSource)
    return source.paths


def image_paths(folder: Path) -> list[str]:
    """All images below a folder, at any depth, sorted; links are followed."""
    return sorted(
        os.path.join(place, name)
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(IMG_EXTENSIONS)
    )


def hold_out(source: ImageSource, fraction: float, seed: int) -> tuple[SubsetSource, SubsetSource]:
    """Divide a source for training and validation, every class by itself.

    Of each class `fraction` of the images go to validation, but at least one goes to either side; of a class of a single
    image it goes to training.

    Args:
        fraction: In (0, 1).
        seed: Draws the images. The division depends on it, the labels and nothing else.
    """
    labels = torch.tensor(source.labels)
    held = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (
        SubsetSource(source, (~held).nonzero().squeeze(1).tolist()),
        SubsetSource(source, held.nonzero().squeeze(1).tolist()),
    )


def check_val_fraction(fraction: float | None) -> None:
    """Refuse a share of images that leaves nothing on one side.

    Raises:
        ConfigError: If it is not between 0 and 1.
    """
    if fraction is not None and not 0 < fraction < 1:
        raise ConfigError(f"data.val_fraction={fraction} must be between 0 and 1 (exclusive).")
