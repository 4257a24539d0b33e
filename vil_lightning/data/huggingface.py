"""Data sets of the Hugging Face hub, or in its formats on disk: parquet files, or what `save_to_disk` writes."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vil_lightning.data.datamodule import ImageDataModule
from vil_lightning.data.files import check_val_fraction, hold_out
from vil_lightning.data.images import BadImageError, EncodedImage, Picture
from vil_lightning.data.loading import ImageSource
from vil_lightning.errors import ConfigError


class HuggingFaceSource:
    """A split of a data set, whose images are decoded when asked for.

    Args:
        dataset: Of the package `datasets`, with the images left as they are in the file.
        image_key: Their column.
        labels: Classes of all images.
        name: Of the split, for messages.
        roots: Folders in which image files may lie that the table names instead of holding them. A table comes from anywhere,
            and must not have other files of this machine read.
    """

    def __init__(
        self, dataset: Any, image_key: str, labels: list[int], name: str, roots: Sequence[str | Path] = ()
    ) -> None:
        self.dataset = dataset
        self.image_key = image_key
        self.labels = labels
        self.name = name
        self.roots = [os.path.abspath(root) for root in roots]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        image, name = self.dataset[index][self.image_key], f"{self.name}[{index}]"
        if image is None:
            raise BadImageError(name, "is missing")
        if image["bytes"] is None:
            path = os.path.abspath(image["path"])
            if not any(path.startswith(os.path.join(root, "")) for root in self.roots):
                raise BadImageError(name, f"is {image['path']}, a file outside of the data set")
            return EncodedImage(path), self.labels[index]
        return EncodedImage(image["bytes"], name), self.labels[index]


class HuggingFaceData(ImageDataModule):
    """Images and classes in a data set that the package `datasets` reads.

    `--data HuggingFaceData --data.path ILSVRC/imagenet-1k` is ImageNet-1k as published on the hub (log in with
    `hf auth login` first). What is downloaded goes to the package's own cache (environment variable `HF_HOME`); where a
    machine has no network, fill the cache before and set `HF_HUB_OFFLINE=1`.

    Args:
        path: A name on the hub, a folder of parquet files, or one that `save_to_disk` has written.
        name: Of the configuration, for data sets that have several.
        train_split: The training images; also a part of a split, such as "train[:10%]".
        val_split: The val images; "validation" if neither this nor `val_fraction` is given.
        image_key: The column of the images; None takes the only one that holds images.
        label_key: The column of the classes; None takes the only one of the type `ClassLabel`. In other columns every value is
            a class.
        val_fraction: Hold out this share of the training images of every class for validation in place of a split.
        split_seed: Draws them. The run's own seed has no influence.
        labelled: False leaves classes out, for self-supervised pretraining; see `ImageFolder` for what else to set. Other
            arguments as in `ImageDataModule`.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        img_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 4,
        train_split: str = "train",
        val_split: str | None = None,
        image_key: str | None = None,
        label_key: str | None = None,
        val_fraction: float | None = None,
        split_seed: int = 0,
        labelled: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(img_size, batch_size, num_workers, **kwargs)
        check_val_fraction(val_fraction)
        if val_split is not None and val_fraction is not None:
            raise ConfigError(
                f"data.val_split={val_split!r} and data.val_fraction={val_fraction} both say what to validate on. Set one of "
                "them to null."
            )
        for key, value in (("classes", self.class_subset), ("label_key", label_key)):
            if not labelled and value is not None:
                raise ConfigError(f"data.{key}={value!r} is about classes, which data.labelled=false leaves out.")
        self.source_arguments = {
            "path": path,
            "name": name,
            "train_split": train_split,
            "val_split": val_split,
            "image_key": image_key,
            "label_key": label_key,
            "val_fraction": val_fraction,
            "split_seed": split_seed,
            "labelled": labelled,
        }
        self.path = path
        self.config_name = name
        self.train_split = train_split
        self.val_split = val_split or (None if val_fraction is not None else "validation")
        if self.train_split == self.val_split:
            raise ConfigError(f"data.val_split={val_split!r} must not be data.train_split.")
        self.image_key = image_key
        self.label_key = label_key
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.read_labels = labelled

    def prepare_data(self) -> None:
        """Download and convert; Lightning calls this on one process."""
        self._load()

    def build_sources(self) -> tuple[ImageSource, ImageSource, list[str]]:
        parts = self._load()
        names = [split for split in (self.train_split, self.val_split) if split is not None]
        image_key = self.image_key or self._only_column(parts[0].features, "Image", "image_key")
        if self.read_labels:
            labels, classes = self._labels(parts)
        else:
            labels, classes = [[0] * len(part) for part in parts], []
        config = _datasets().config
        caches = [
            getattr(config, key, None) for key in ("HF_CACHE_HOME", "HF_DATASETS_CACHE", "EXTRACTED_DATASETS_PATH")
        ]
        roots = [self.path, *(root for root in (*caches, os.environ.get("HF_HUB_CACHE")) if root)]
        sources = [
            HuggingFaceSource(self._encoded(part, image_key), image_key, part_labels, f"{self.path}:{name}", roots)
            for part, part_labels, name in zip(parts, labels, names, strict=True)
        ]
        if len(sources) == 2:
            return sources[0], sources[1], classes
        assert self.val_fraction is not None
        return *hold_out(sources[0], self.val_fraction, self.split_seed), classes

    def _load(self) -> list[Any]:
        """The training images and, if they are a split of their own, the val images."""
        datasets = _datasets()
        saved_here = any((Path(self.path) / file).is_file() for file in ("dataset_dict.json", "state.json"))
        if saved_here and self.config_name is not None:
            raise ConfigError(
                f"data.name={self.config_name!r}: {self.path} holds a single configuration. Set data.name to null."
            )
        splits = [split for split in (self.train_split, self.val_split) if split is not None]
        try:
            if not saved_here:
                return [
                    part.with_format(None) for part in datasets.load_dataset(self.path, self.config_name, split=splits)
                ]
            saved = datasets.load_from_disk(self.path)
            saved = saved if isinstance(saved, dict) else {"train": saved}
            if not set(splits) <= set(saved):
                raise ValueError(f"of the splits {', '.join(splits)} only {', '.join(saved)} can be found")
            return [saved[split].with_format(None) for split in splits]
        except Exception as error:  # the package lets through those of the libraries it is made of
            raise ConfigError(
                f"data.path={self.path} (data.name={self.config_name}): the splits {', '.join(splits)} could not be loaded: "
                f"{error} Check the name or the folder, data.train_split and data.val_split (or set data.val_fraction, such as "
                "0.1, if there are no val images), the connection, and for data sets that ask for it `hf auth login`."
            ) from error

    def _only_column(self, features: Any, kind: str, key: str) -> str:
        """The name of the only column of a type of `datasets`."""
        columns = [name for name, feature in features.items() if type(feature).__name__ == kind]
        if len(columns) == 1:
            return columns[0]
        hint = ", or data.labelled=false" if key == "label_key" else ""
        listed = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        raise ConfigError(
            f"data.{key} is not set, and {len(columns)} columns of {self.path} have the type {kind}. Set data.{key} to one of "
            f"the columns{hint}: {listed}."
        )

    def _labels(self, parts: list[Any]) -> tuple[list[list[int]], list[str]]:
        """Classes of all images of every part, and their names. No image is read."""
        features = parts[0].features
        key = self.label_key or self._only_column(features, "ClassLabel", "label_key")
        self._check_column("label_key", key, features)
        columns = [part.select_columns([key])[:][key] for part in parts]
        values = {value for column in columns for value in column}
        wrong = [value for value in values if not isinstance(value, int | str) or value == -1]
        if wrong:
            raise ConfigError(
                f"data.label_key={key}: {wrong[0]!r} is no class. Images of {self.path} without classes (such as a test split) "
                "can only be used with data.labelled=false."
            )
        if hasattr(features[key], "names"):
            return columns, list(features[key].names)
        numbers = {value: number for number, value in enumerate(sorted(values))}
        return [[numbers[value] for value in column] for column in columns], [str(value) for value in numbers]

    def _encoded(self, part: Any, key: str) -> Any:
        """The column of images alone, as they are in the files."""
        self._check_column("image_key", key, part.features)
        try:
            return part.select_columns([key]).cast_column(key, _datasets().Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ConfigError(f"data.image_key={key} of {self.path} holds no images ({part.features[key]}).") from error

    def _check_column(self, option: str, key: str, features: Any) -> None:
        if key not in features:
            raise ConfigError(f"data.{option}={key!r}: {self.path} has the columns {', '.join(features)}.")


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("HuggingFaceData needs the package datasets: pip install datasets.") from error
    return datasets
