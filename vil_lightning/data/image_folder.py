"""Any directory of images: `root/train/<class>/…` and `root/val/<class>/…`."""

from pathlib import Path

from torch import Tensor
from torchvision.datasets import ImageFolder as TorchvisionImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import pil_to_tensor

from vil_lightning.data.datamodule import IMAGENET_MEAN, IMAGENET_STD, ImageDataModule
from vil_lightning.data.loading import ImageSource
from vil_lightning.data.transforms import MultiCrop
from vil_lightning.errors import ConfigError


class FolderSource:
    """Images of one folder per class, decoded as RGB when asked for."""

    def __init__(self, root: Path) -> None:
        self.folder = TorchvisionImageFolder(str(root), allow_empty=True)

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.folder[index]
        return pil_to_tensor(image), label


class ImageFolder(ImageDataModule):
    """Images in `root/train/<class>/` and `root/val/<class>/`.

    Args:
        root: The directory that holds `train` and `val`. Other arguments as in `ImageDataModule`.
    """

    def __init__(
        self,
        root: str,
        img_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 4,
        train_transform: MultiCrop | None = None,
        eval_batch_size: int | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        seed: int | None = None,
    ) -> None:
        super().__init__(img_size, batch_size, num_workers, train_transform, eval_batch_size, mean, std, seed)
        self.root = Path(root)
        if not self.root.is_dir():
            raise ConfigError(
                f"data.root={root} is not a directory. Set --data.root to the one that holds train/ and val/."
            )
        for split in ("train", "val"):
            self._check_split(self.root / split)
        train, val = (_class_names(self.root / split) for split in ("train", "val"))
        if train != val:
            difference = sorted(set(train) ^ set(val))
            raise ConfigError(
                f"data.root={root}: train/ and val/ must hold the same classes, but {', '.join(difference[:5])} "
                f"{'is' if len(difference) == 1 else 'are'} in only one of them."
            )

    @staticmethod
    def _check_split(folder: Path) -> None:
        if not folder.is_dir():
            raise ConfigError(f"data.root: there is no directory {folder}. Expected {folder}/<class>/<image>.")
        names = _class_names(folder)
        if not names:
            raise ConfigError(f"data.root: {folder} holds no class folders. Expected {folder}/<class>/<image>.")
        empty = [n for n in names if not any(p.suffix.lower() in IMG_EXTENSIONS for p in (folder / n).rglob("*"))]
        if empty:
            raise ConfigError(
                f"data.root: {len(empty)} class folder(s) in {folder} hold no images: {', '.join(empty[:5])}. "
                f"Add images ({', '.join(IMG_EXTENSIONS)}) or remove the folder(s)."
            )

    def build_sources(self) -> tuple[ImageSource, ImageSource, list[str]]:
        train, val = FolderSource(self.root / "train"), FolderSource(self.root / "val")
        return train, val, train.folder.classes


def _class_names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir())
