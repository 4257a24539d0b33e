"""Any directory of images."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torchvision.datasets.folder import IMG_EXTENSIONS

from vil_lightning.data.datamodule import ImageDataModule, class_numbers
from vil_lightning.data.files import FileSource, check_val_fraction, hold_out, image_paths, paths_of
from vil_lightning.data.loading import ImageSource
from vil_lightning.errors import ConfigError

UNLABELLED_VAL_FRACTION = 0.05  # of images without classes, where there is no val/


class ImageFolder(ImageDataModule):
    """Images in folders, in one of three arrangements.

    - `root/train/<class>/…` and `root/val/<class>/…`. Training needs both; validation and testing need `val`, prediction
      needs `predict_dir` or else `val`.
    - `root/<class>/…` (or only `root/train/<class>/…`) with `val_fraction`: a val set is held out, the same in every run.
    - With `labelled: false` images at any depth below `root`, for self-supervised pretraining. `root/train` and `root/val` are
      taken for what their names say; without `root/val`, 5 % or `val_fraction` of the images are held out.

    Without classes nothing can be scored by them, so what a recipe has for that must be replaced. On the command line, add

        --data ImageFolder --data.root <folder> --data.labelled false
        --trainer.callbacks '[{class_path: vil_lightning.callbacks.ViewPictures}]' --checkpoint.monitor null

    Without a monitor, `best.ckpt` is the network after the last epoch.

    Args:
        root: The directory.
        predict_dir: Images to predict, at any depth and without classes; those of the val set if None.
        val_fraction: Hold out this share of the images of every class for validation, at least one of a class that has two.
        split_seed: Draws them. The run's own seed has no influence.
        labelled: Whether folders are classes. Other arguments as in `ImageDataModule`.
    """

    def __init__(
        self,
        root: str | None = None,
        img_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 4,
        predict_dir: str | None = None,
        val_fraction: float | None = None,
        split_seed: int = 0,
        labelled: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(img_size, batch_size, num_workers, **kwargs)
        check_val_fraction(val_fraction)
        if root is not None and not Path(root).is_dir():
            raise ConfigError(
                f"data.root={root} is not a directory. Set --data.root to the one that holds train/ and val/."
            )
        if root is None and predict_dir is None:
            raise _root_not_set()
        if not labelled and self.class_subset is not None:
            raise ConfigError(
                f"data.classes={self.class_subset!r} chooses classes, of which data.labelled=false has none."
            )
        self.source_arguments = {
            "root": root,
            "val_fraction": val_fraction,
            "split_seed": split_seed,
            "labelled": labelled,
        }
        self.root = None if root is None else Path(root)
        self.predict_dir = None if predict_dir is None else Path(predict_dir)
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.read_labels = labelled

    def setup(self, stage: str | None = None) -> None:
        """Check and list what a stage needs and no earlier one has; None is everything but `predict_dir`."""
        if stage == "predict" and self.predict_dir is not None:
            self._setup_predict_dir(self.predict_dir)
            return
        if self.root is None:
            raise _root_not_set()
        needed = ("train", "val") if stage in ("fit", None) else ("val",)
        missing = [split for split in needed if not hasattr(self, f"{split}_source")]
        train_folder, val_folder = self._folders(self.root)
        if val_folder is None:
            if missing:
                self._divide(train_folder)
            return
        train = self._list(train_folder) if "train" in missing else None
        if "val" in missing:
            val = self._list(val_folder)
            if train is not None:
                self._check_same_classes(train[1], val[1])
            self.val_source, self.classes = val
        elif train is not None:
            self._check_same_classes(train[1], self.classes)
        if train is not None:
            self.train_source = self.take_fraction(train[0])

    def build_sources(self) -> tuple[ImageSource, ImageSource, list[str]]:
        self.setup("fit")
        return self.train_source, self.val_source, self.classes

    @property
    def predict_source(self) -> ImageSource:
        return self.val_source if self.predict_dir is None else self._predict_files

    @property
    def predict_names(self) -> list[str]:
        """Paths of the files."""
        return paths_of(self.predict_source)

    # --- what is on the disk ------------------------------------------------------------------------------------------

    def _folders(self, root: Path) -> tuple[Path, Path | None]:
        """The folders of the training and the val images; no second one if these are to be held out of the first."""
        train, val = root / "train", root / "val"
        # A class may be called "train", too: as a part of the data set the folder holds others.
        exists = _holds_folders if self.read_labels else Path.is_dir
        if self.val_fraction is not None and exists(val):
            raise ConfigError(
                f"data.val_fraction={self.val_fraction} would hold out training images, but there is {val}. Set "
                "data.val_fraction to null, or data.root to a directory without val/."
            )
        if self.val_fraction is None and (self.read_labels or exists(val)):
            return train, val
        return (train if exists(train) else root), None

    def _divide(self, folder: Path) -> None:
        source, self.classes = self._list(folder)
        train, self.val_source = hold_out(source, self.val_fraction or UNLABELLED_VAL_FRACTION, self.split_seed)
        if not len(self.val_source):
            raise ConfigError(
                f"data.root: {len(source)} image(s) in {folder} are too few to hold out any for validation."
            )
        rank_zero_info(f"{len(self.val_source)} of the {len(source)} images in {folder} are held out for validation.")
        self.train_source = self.take_fraction(train)

    def _list(self, folder: Path) -> tuple[FileSource, list[str]]:
        """Images of a part of the data set, and the names of its classes, as far as they are wanted."""
        if not folder.is_dir():
            expected = (
                f"Expected {folder}/<class>/<image>. If data.root holds the class folders themselves, or there is no val/, set "
                "data.val_fraction (such as 0.1) to hold out val images; without classes, set data.labelled=false."
            )
            raise ConfigError(
                f"data.root: there is no directory {folder}. {expected if self.read_labels else 'There is only val/.'}"
            )
        if not self.read_labels:
            paths = image_paths(folder)
            if not paths:
                raise ConfigError(f"data.root: {folder} holds no images ({', '.join(IMG_EXTENSIONS)}).")
            return FileSource([(path, 0) for path in paths]), []
        names = self._wanted_classes(folder)
        if not names:
            raise ConfigError(
                f"data.root: {folder} holds no class folders. Expected {folder}/<class>/<image>; set data.labelled=false for "
                "images without classes."
            )
        files = {name: self.files_of_class(folder, name) for name in names}
        empty = [name for name in names if not files[name]]
        if empty:
            raise ConfigError(
                f"data.root: {len(empty)} class folder(s) in {folder} hold no images: {', '.join(empty[:5])}. "
                f"Add images ({', '.join(IMG_EXTENSIONS)}) or remove the folder(s)."
            )
        return FileSource([(path, number) for number, name in enumerate(names) for path in files[name]]), names

    def _wanted_classes(self, folder: Path) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        names = self.class_names(folder)
        if self.class_subset is None or not names:
            return names
        return [names[number] for number in class_numbers(self.class_subset, names)]

    def class_names(self, folder: Path) -> list[str]:
        """Names of all classes in a part of the data set, sorted."""
        return sorted(path.name for path in folder.iterdir() if path.is_dir())

    def files_of_class(self, folder: Path, name: str) -> list[str]:
        """Paths of the images of a class in a part of the data set, sorted."""
        return image_paths(folder / name)

    def _setup_predict_dir(self, folder: Path) -> None:
        if hasattr(self, "_predict_files"):
            return
        if not folder.is_dir():
            raise ConfigError(f"data.predict_dir={folder} is not a directory. Set it to one that holds images.")
        paths = image_paths(folder)
        if not paths:
            raise ConfigError(f"data.predict_dir={folder} holds no images ({', '.join(IMG_EXTENSIONS)}).")
        self._predict_files = FileSource([(path, 0) for path in paths])
        if self.root is not None and self.read_labels and not self.classes:
            train_folder, val_folder = self._folders(self.root)
            if (val_folder or train_folder).is_dir():
                self.classes = self._wanted_classes(val_folder or train_folder)  # so that predictions can be named

    def _check_same_classes(self, train: list[str], val: list[str]) -> None:
        if train != val:
            difference = sorted(set(train) ^ set(val))
            raise ConfigError(
                f"data.root={self.root}: train/ and val/ must hold the same classes, but {', '.join(difference[:5])} "
                f"{'is' if len(difference) == 1 else 'are'} in only one of them."
            )


def _holds_folders(path: Path) -> bool:
    return path.is_dir() and any(entry.is_dir() for entry in path.iterdir())


def _root_not_set() -> ConfigError:
    return ConfigError("data.root is not set. Set --data.root to the directory that holds train/ and val/.")
