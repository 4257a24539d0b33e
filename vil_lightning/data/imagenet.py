"""ImageNet-1k in the forms in which people have it."""

import os
import re
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from torchvision.datasets import imagenet as official

from vil_lightning.data.image_folder import ImageFolder
from vil_lightning.errors import ConfigError

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
META = "meta.bin"  # what torchvision makes of the devkit
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)


class ImageNet(ImageFolder):
    """ImageNet-1k. `root` holds any of these, for training and validation separately:

    - `train/<wnid>/…` and `val/<wnid>/…`;
    - `val/ILSVRC2012_val_….JPEG`, not divided by class, with the development kit (`ILSVRC2012_devkit_t12.tar.gz`, or the
      `meta.bin` that torchvision has made of it), which says what they are. Nothing is moved;
    - the official archives (`ILSVRC2012_img_train.tar`, `ILSVRC2012_img_val.tar` and the development kit). They are checked and
      unpacked to `train` and `val` before the first run that needs them, by one process (on several nodes, `root` must be
      shared); that takes as much space again. What an interrupted attempt has left is removed.

    Classes are named and numbered by their WordNet IDs in ascending order, as in all published weights.

    Args:
        root: The directory. Other arguments as in `ImageFolder`.
    """

    def __init__(self, root: str | None = None, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        self.prepare_data_per_node = False
        self._truth: dict[str, list[str]] | None = None

    def prepare_data(self) -> None:
        """Unpack the archives that are needed and have not been; Lightning calls this on one process."""
        state = None if self.trainer is None else self.trainer.state.fn
        if self.root is None or (state == "predict" and self.predict_dir is not None):
            return
        if state in (None, "fit"):
            self._unpack(self.root, TRAIN, "train")
        self._unpack(self.root, VAL, "val")

    # --- archives -----------------------------------------------------------------------------------------------------

    def _unpack(self, root: Path, archive: str, folder: str) -> None:
        """Unpack an archive, if there is one, to a folder, if there is none. It appears complete or not at all."""
        if (root / folder).exists() or not (root / archive).is_file():
            return
        unfinished = root / f"{folder}.unfinished"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            if folder == "train":
                official.parse_train_archive(root, folder=unfinished.name)
            else:
                official.parse_val_archive(root, wnids=self._val_wnids(root), folder=unfinished.name)
            os.rename(unfinished, root / folder)
        except (OSError, RuntimeError, tarfile.TarError) as error:
            raise ConfigError(
                f"data.root={root}: {archive} could not be unpacked to {folder}/ ({error}). Is it complete, is there enough "
                f"space, and may it be written there? Or unpack it by hand to {root / folder}/<wnid>/."
            ) from error

    def _val_wnids(self, root: Path) -> list[str]:
        """WordNet IDs of the val images, in their official order.

        Raises:
            ConfigError: If nothing says so.
        """
        if (root / META).is_file():
            try:
                return official.load_meta_file(root)[1]
            except Exception as error:  # a damaged file raises whatever its decoder stumbles over
                raise ConfigError(f"data.root: {root / META} is damaged. Delete it, and put {DEVKIT} there.") from error
        try:
            with tempfile.TemporaryDirectory() as place:  # root need not be writable
                official.parse_devkit_archive(place, str((root / DEVKIT).resolve()))
                return official.load_meta_file(place)[1]
        except Exception as error:  # as above
            raise ConfigError(
                f"data.root={root}: what the val images show is in {DEVKIT}, or in {META}, which cannot be read there "
                f"({error}). Put one of them into data.root, or the images into {root / 'val'}/<wnid>/."
            ) from error

    # --- val images that are not divided by class -----------------------------------------------------------------------

    def class_names(self, folder: Path) -> list[str]:
        return sorted(self._undivided(folder)) or super().class_names(folder)

    def files_of_class(self, folder: Path, name: str) -> list[str]:
        truth = self._undivided(folder)
        return truth[name] if truth else super().files_of_class(folder, name)

    def _undivided(self, folder: Path) -> dict[str, list[str]]:
        """Paths of official val images that lie in a folder itself, by WordNet ID; empty if there are none.

        Raises:
            ConfigError: If they are not all there.
        """
        if self.root is None or folder != self.root / "val":
            return {}
        if self._truth is not None:
            return self._truth
        numbers = {}
        with os.scandir(folder) as entries:
            for entry in entries:
                match = _VAL_IMAGE.fullmatch(entry.name)
                if match:
                    numbers[int(match[1])] = entry.path
        self._truth = {}
        if not numbers:
            return self._truth
        wnids = self._val_wnids(self.root)
        missing = set(range(1, len(wnids) + 1)) ^ set(numbers)
        if missing:
            raise ConfigError(
                f"data.root: of the {len(wnids)} images ILSVRC2012_val_….JPEG that {folder} should hold, {len(numbers)} are "
                f"there; number {min(missing)} is the first that differs. Copy them again."
            )
        for number, path in sorted(numbers.items()):
            self._truth.setdefault(wnids[number - 1], []).append(path)
        return self._truth
