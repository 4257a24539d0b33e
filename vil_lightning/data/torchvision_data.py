"""Classification data sets that torchvision knows."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision.datasets
from torch import Tensor

from vil_lightning.data.datamodule import ImageDataModule
from vil_lightning.data.files import FileSource, check_val_fraction, hold_out
from vil_lightning.data.loading import ImageSource, TensorSource
from vil_lightning.errors import ConfigError

Samples = list[tuple[str, int]]
UNDIVIDED_VAL_FRACTION = 0.2  # of data sets without an official division


class Entry(NamedTuple):
    """How to use a data set of torchvision."""

    folder: str  # what `root` has to hold
    samples: Callable[[Any], Samples] | None = None  # paths and classes of its files; None: it is in memory
    train: str | None = "train"  # splits to train on; None: there is no official division
    val: str | None = "test"  # splits to validate on
    splits: tuple[str, ...] = ("train", "test")  # all there are
    by: str = "split"  # the argument that chooses a split: its name, or whether it is the training set


# --- how the data sets hold their files -------------------------------------------------------------------------------


def _samples(dataset: Any) -> Samples:
    return [(str(path), int(label)) for path, label in getattr(dataset, "samples", None) or dataset._samples]


def _image_files(dataset: Any) -> Samples:
    paths = getattr(dataset, "_image_files", None) or dataset._images
    return [(str(path), int(label)) for path, label in zip(paths, dataset._labels, strict=True)]


def _caltech101(dataset: Any) -> Samples:
    folders = [os.path.join(dataset.root, "101_ObjectCategories", name) for name in dataset.categories]
    return [
        (os.path.join(folders[label], f"image_{number:04d}.jpg"), label)
        for label, number in zip(dataset.y, dataset.index, strict=True)
    ]


def _caltech256(dataset: Any) -> Samples:
    folders = [os.path.join(dataset.root, "256_ObjectCategories", name) for name in dataset.categories]
    return [
        (os.path.join(folders[label], f"{label + 1:03d}_{number:04d}.jpg"), label)
        for label, number in zip(dataset.y, dataset.index, strict=True)
    ]


_UNDIVIDED: dict[str, Any] = {"train": None, "val": None, "splits": ()}
_THREE: dict[str, Any] = {"train": "train+val", "splits": ("train", "val", "test")}
# Unless an entry says otherwise, the val set is the official test set, on which results are published. Where there are three
# parts, the other two are for training. `train_split` and `val_split` choose differently.
DATASETS: dict[str, Entry] = {
    "CIFAR10": Entry("cifar-10-batches-py", by="train"),
    "CIFAR100": Entry("cifar-100-python", by="train"),
    "Caltech101": Entry("caltech101", _caltech101, **_UNDIVIDED),
    "Caltech256": Entry("caltech256", _caltech256, **_UNDIVIDED),
    "Country211": Entry("country211", _samples, train="train+valid", splits=("train", "valid", "test")),
    "DTD": Entry("dtd", _image_files, **_THREE),  # the first of its ten divisions
    "EuroSAT": Entry("eurosat", _samples, **_UNDIVIDED),
    "FGVCAircraft": Entry("fgvc-aircraft-2013b", _image_files, **_THREE),
    "FashionMNIST": Entry("FashionMNIST", by="train"),
    "Flowers102": Entry("flowers-102", _image_files, **_THREE),
    "Food101": Entry("food-101", _image_files),
    "GTSRB": Entry("gtsrb", _samples),
    "Imagenette": Entry("imagenette2", _samples, val="val", splits=("train", "val")),
    "KMNIST": Entry("KMNIST", by="train"),
    "MNIST": Entry("MNIST", by="train"),
    "OxfordIIITPet": Entry("oxford-iiit-pet", _image_files, train="trainval", splits=("trainval", "test")),
    "RenderedSST2": Entry("rendered-sst2", _samples, **_THREE),
    "STL10": Entry("stl10_binary", splits=("train", "test", "unlabeled")),
    "SUN397": Entry("SUN397", _image_files, **_UNDIVIDED),
    "SVHN": Entry("{split}_32x32.mat", splits=("train", "test", "extra")),
    # Its makers took the pictures down, so that it has to be put in place by hand.
    "StanfordCars": Entry("stanford_cars", _samples),
    "USPS": Entry("usps.bz2", by="train"),
}


class TorchvisionData(ImageDataModule):
    """A data set of `torchvision.datasets`, by name; grey pictures come as RGB.

    The val set is the official test set (for Imagenette its "val"); `DATASETS` above says it for each. Data sets without a
    division (Caltech101, Caltech256, EuroSAT, SUN397) are divided 80 to 20, the same way in every run.

    For self-supervised pretraining on STL10: `--data.name STL10 --data.train_split train+unlabeled`. There are then no classes,
    and what scores by them must be left out, as `ImageFolder` explains.

    Args:
        name: Of the class in `torchvision.datasets`.
        root: The directory that holds the data set, as torchvision arranges it, or is to hold it.
        download: Whether to fetch it if it is not there.
        train_split: Splits to train on, such as "train+val"; see `DATASETS` if None.
        val_split: Splits to validate on.
        val_fraction: Hold out this share of the images of every training class for validation in place of a split.
        split_seed: Draws them. The run's own seed has no influence. Other arguments as in `ImageDataModule`.
    """

    def __init__(
        self,
        name: str,
        root: str = "data",
        download: bool = False,
        img_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 4,
        train_split: str | None = None,
        val_split: str | None = None,
        val_fraction: float | None = None,
        split_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(img_size, batch_size, num_workers, **kwargs)
        if name not in DATASETS:
            raise ConfigError(f"data.name={name!r} is not known. Available: {', '.join(DATASETS)}.")
        check_val_fraction(val_fraction)
        self.entry = DATASETS[name]
        if val_split is not None and val_fraction is not None:
            raise ConfigError(
                f"data.val_split={val_split!r} and data.val_fraction={val_fraction} both say what to validate on. Set one of "
                "them to null."
            )
        self.source_arguments = {
            "name": name,
            "root": root,
            "train_split": train_split,
            "val_split": val_split,
            "val_fraction": val_fraction,
            "split_seed": split_seed,
        }
        self.dataset = name
        self.root = root
        self.download = download
        self.train_splits = self._splits("train_split", train_split, self.entry.train)
        self.val_splits = [] if val_fraction is not None else self._splits("val_split", val_split, self.entry.val)
        if set(self.train_splits) & set(self.val_splits):
            raise ConfigError(
                f"data.train_split={'+'.join(self.train_splits)!r} and data.val_split={'+'.join(self.val_splits)!r} must have "
                "nothing in common."
            )
        self.val_fraction = UNDIVIDED_VAL_FRACTION if val_fraction is None else val_fraction
        self.split_seed = split_seed

    def _splits(self, key: str, chosen: str | None, default: str | None) -> list[str]:
        """Names of splits in "train+val"."""
        spec = chosen or default
        splits = [] if spec is None else spec.split("+")
        if not set(splits) <= set(self.entry.splits) or len(set(splits)) < len(splits):
            allowed = (
                f"any of {', '.join(self.entry.splits)}, joined by +"
                if self.entry.splits
                else "none (it is not divided)"
            )
            raise ConfigError(f"data.{key}={spec!r} of {self.dataset}: allowed is {allowed}.")
        return splits

    def prepare_data(self) -> None:
        """Download; Lightning calls this on one process."""
        if not self.download:
            return
        try:
            for split in [*self.train_splits, *self.val_splits] or [""]:
                self._open(split, download=True)
        except (OSError, RuntimeError, ValueError) as error:  # torchvision's, by data set
            raise ConfigError(
                f"data.name={self.dataset}: could not be downloaded to data.root={self.root} ({error}). Check the connection, "
                f"or put {self._folder(self.train_splits)} there by hand, as torchvision.datasets.{self.dataset} expects it."
            ) from error

    def build_sources(self) -> tuple[ImageSource, ImageSource, list[str]]:
        train: ImageSource
        val: ImageSource
        train, names = self._source(self.train_splits)
        if self.val_splits:
            val, _ = self._source(self.val_splits)
        else:
            train, val = hold_out(train, self.val_fraction, self.split_seed)
        if min(train.labels) < 0:  # STL10's unlabelled images have the class -1
            if self.class_subset is not None:
                raise ConfigError(
                    f"data.classes={self.class_subset!r} chooses classes, but data.train_split={'+'.join(self.train_splits)} "
                    f"of {self.dataset} has images without."
                )
            return UnlabelledSource(train), UnlabelledSource(val), []
        return train, val, names or [str(number) for number in range(max(max(train.labels), max(val.labels)) + 1)]

    def _source(self, splits: list[str]) -> tuple[ImageSource, list[str]]:
        """The images of some splits (of the whole for none) and the names of the classes, as far as there are names."""
        try:
            parts = [self._open(split) for split in splits or [""]]
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"data.root={self.root}: there is no complete {self._folder(splits)} for data.name={self.dataset} ({error}). "
                f"Set data.root to the directory that holds it, or data.download (now {self.download}) to true."
            ) from error
        names = [as_text(name) for name in getattr(parts[0], "classes", getattr(parts[0], "categories", []))]
        if self.entry.samples is not None:
            # Sorted, as some data sets are listed in the file system's order.
            return FileSource(sorted(sample for part in parts for sample in self.entry.samples(part))), names
        images = [rgb(part.data) for part in parts]
        labels = [torch.as_tensor(part.targets if hasattr(part, "targets") else part.labels) for part in parts]
        return TensorSource(images[0] if len(images) == 1 else torch.cat(images), torch.cat(labels).long()), names

    def _open(self, split: str, download: bool = False) -> Any:
        chosen: dict[str, Any] = {}
        if split:
            chosen = {"split": split} if self.entry.by == "split" else {"train": split == "train"}
        return getattr(torchvision.datasets, self.dataset)(self.root, download=download, **chosen)

    def _folder(self, splits: list[str]) -> str:
        return " and ".join(dict.fromkeys(self.entry.folder.format(split=split) for split in splits or [""]))


class UnlabelledSource:
    """The images of another source, without their classes."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source
        self.labels = [0] * len(source)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.source[index][0], 0


def rgb(images: Tensor | np.ndarray) -> Tensor:
    """uint8 images (N, H, W), (N, H, W, 3) or (N, 3, H, W) as (N, 3, H, W), without a copy."""
    images = torch.as_tensor(images)
    if images.ndim == 3:
        return images[:, None].expand(-1, 3, -1, -1)
    return images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)


def as_text(name: str | tuple[str, ...]) -> str:
    """Name of a class; torchvision gives some of them as several synonyms."""
    return name if isinstance(name, str) else ", ".join(name)
