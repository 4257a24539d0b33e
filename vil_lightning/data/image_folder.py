"""Any directory of images: `root/train/<class>/…` and `root/val/<class>/…`."""

import os
from pathlib import Path

from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader, make_dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from vil_lightning.data.datamodule import ImageDataModule
from vil_lightning.data.loading import ImageSource
from vil_lightning.data.transforms import IMAGENET_MEAN, IMAGENET_STD, MultiCrop, TrainTransform
from vil_lightning.errors import ConfigError


class FileSource:
    """Image files, decoded as RGB when asked for.

    Args:
        samples: Paths and classes.
    """

    def __init__(self, samples: list[tuple[str, int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return pil_to_tensor(default_loader(path)), label

    @property
    def labels(self) -> list[int]:
        return [label for _, label in self.samples]

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.samples]


class ImageFolder(ImageDataModule):
    """Images in `root/train/<class>/` and `root/val/<class>/`.

    Training needs both; validation and testing need `val`, prediction needs `predict_dir` or else `val`.

    Args:
        root: The directory that holds `train` and `val`. Other arguments as in `ImageDataModule`.
        predict_dir: Images to predict, at any depth and without classes; those of `val` if None.
        first_classes: Use this many classes only, the first ones by name.
    """

    val_source: FileSource

    def __init__(
        self,
        root: str | None = None,
        img_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 4,
        train_transform: MultiCrop | TrainTransform | None = None,
        eval_batch_size: int | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        seed: int | None = None,
        crop_pct: float = 1.0,
        repeats: int = 1,
        train_fraction: float = 1.0,
        predict_dir: str | None = None,
        first_classes: int | None = None,
    ) -> None:
        super().__init__(
            img_size,
            batch_size,
            num_workers,
            train_transform,
            eval_batch_size,
            mean,
            std,
            seed,
            crop_pct,
            repeats,
            train_fraction,
        )
        if root is not None and not Path(root).is_dir():
            raise ConfigError(
                f"data.root={root} is not a directory. Set --data.root to the one that holds train/ and val/."
            )
        if root is None and predict_dir is None:
            raise _root_not_set()
        if first_classes is not None and first_classes < 1:
            raise ConfigError(f"data.first_classes={first_classes} must be at least 1.")
        self.root = None if root is None else Path(root)
        self.predict_dir = None if predict_dir is None else Path(predict_dir)
        self.first_classes = first_classes

    def setup(self, stage: str | None = None) -> None:
        """Check and list what a stage needs and no earlier one has; None is everything but `predict_dir`."""
        if stage == "predict" and self.predict_dir is not None:
            self._setup_predict_dir(self.predict_dir)
            return
        if self.root is None:
            raise _root_not_set()
        needed = ("train", "val") if stage in ("fit", None) else ("val",)
        missing = [split for split in needed if not hasattr(self, f"{split}_source")]
        for split in missing:
            self._check_split(self.root / split)
        if "train" in missing:
            self._check_same_classes(self.root)
        for split in missing:
            self.classes, source = self._list_split(self.root / split)
            if split == "train":
                self.train_source = self._take_fraction(source)
            else:
                self.val_source = source

    def build_sources(self) -> tuple[ImageSource, ImageSource, list[str]]:
        self.setup("fit")
        return self.train_source, self.val_source, self.classes

    @property
    def predict_source(self) -> FileSource:
        return self.val_source if self.predict_dir is None else self._predict_files

    @property
    def predict_names(self) -> list[str]:
        """Paths of the files."""
        return self.predict_source.paths

    # --- what is on the disk ------------------------------------------------------------------------------------------

    def _list_split(self, folder: Path) -> tuple[list[str], FileSource]:
        classes = self._class_names(folder)
        numbers = {name: number for number, name in enumerate(classes)}
        return classes, FileSource(make_dataset(str(folder), numbers, IMG_EXTENSIONS, allow_empty=True))

    def _setup_predict_dir(self, folder: Path) -> None:
        if hasattr(self, "_predict_files"):
            return
        if not folder.is_dir():
            raise ConfigError(f"data.predict_dir={folder} is not a directory. Set it to one that holds images.")
        paths = sorted(
            os.path.join(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names
        )
        samples = [(path, 0) for path in paths if path.lower().endswith(IMG_EXTENSIONS)]
        if not samples:
            raise ConfigError(f"data.predict_dir={folder} holds no images ({', '.join(IMG_EXTENSIONS)}).")
        self._predict_files = FileSource(samples)
        if not self.classes and self.root is not None and (self.root / "val").is_dir():
            self.classes = self._class_names(self.root / "val")  # so that predictions can be named

    def _class_names(self, folder: Path) -> list[str]:
        """Names of the class folders, in the order of the class numbers."""
        return sorted(p.name for p in folder.iterdir() if p.is_dir())[: self.first_classes]

    def _check_split(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConfigError(f"data.root: there is no directory {folder}. Expected {folder}/<class>/<image>.")
        names = self._class_names(folder)
        if not names:
            raise ConfigError(f"data.root: {folder} holds no class folders. Expected {folder}/<class>/<image>.")
        if self.first_classes is not None and len(names) < self.first_classes:
            raise ConfigError(
                f"data.first_classes={self.first_classes} exceeds the {len(names)} class folder(s) in {folder}."
            )
        empty = [n for n in names if not any(p.suffix.lower() in IMG_EXTENSIONS for p in (folder / n).rglob("*"))]
        if empty:
            raise ConfigError(
                f"data.root: {len(empty)} class folder(s) in {folder} hold no images: {', '.join(empty[:5])}. "
                f"Add images ({', '.join(IMG_EXTENSIONS)}) or remove the folder(s)."
            )

    def _check_same_classes(self, root: Path) -> None:
        train, val = (self._class_names(root / split) for split in ("train", "val"))
        if train != val:
            difference = sorted(set(train) ^ set(val))
            raise ConfigError(
                f"data.root={root}: train/ and val/ must hold the same classes, but {', '.join(difference[:5])} "
                f"{'is' if len(difference) == 1 else 'are'} in only one of them."
            )


def _root_not_set() -> ConfigError:
    return ConfigError("data.root is not set. Set --data.root to the directory that holds train/ and val/.")
