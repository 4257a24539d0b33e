"""CIFAR-10 and CIFAR-100: 50,000 training and 10,000 test images of 32 x 32 px, held in memory."""

from typing import Any, ClassVar

import torch
import torchvision.datasets

from vil_lightning.data.datamodule import ImageDataModule
from vil_lightning.data.loading import ImageSource, TensorSource
from vil_lightning.data.transforms import TrainingTransform
from vil_lightning.errors import ConfigError


class CIFAR10(ImageDataModule):
    """Ten classes. The official test images are the val set.

    Args:
        root: The directory that holds the extracted archive (`cifar-10-batches-py`), or is to hold it.
        download: Whether to fetch the archive (170 MB) if it is not there. Other arguments as in `ImageDataModule`.
    """

    dataset: ClassVar[str] = "CIFAR10"  # name in torchvision.datasets

    def __init__(
        self,
        root: str = "data",
        download: bool = True,
        img_size: int = 32,
        batch_size: int = 128,
        num_workers: int = 4,
        train_transform: TrainingTransform | None = None,
        eval_batch_size: int | None = 512,
        mean: tuple[float, float, float] = (0.4914, 0.4822, 0.4465),
        std: tuple[float, float, float] = (0.247, 0.2435, 0.2616),
        **kwargs: Any,
    ) -> None:
        super().__init__(img_size, batch_size, num_workers, train_transform, eval_batch_size, mean, std, **kwargs)
        self.source_arguments = {"root": root}
        self.root = root
        self.download = download

    def prepare_data(self) -> None:
        """Download; Lightning calls this on one process."""
        if not self.download:
            return
        try:
            self._open(train=True, download=True)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"data.root={self.root}: {self.dataset} could not be downloaded ({error}). Check the connection, or set "
                f"data.root to the directory that holds {self._folder}/."
            ) from error

    def build_sources(self) -> tuple[ImageSource, ImageSource, list[str]]:
        try:
            train, val = self._open(train=True), self._open(train=False)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"data.root={self.root}: there is no complete {self._folder}/. Set data.root to the directory that holds "
                f"it, or data.download (now {self.download}) to true."
            ) from error
        return _in_memory(train), _in_memory(val), list(train.classes)

    def _open(self, train: bool, download: bool = False) -> Any:
        return getattr(torchvision.datasets, self.dataset)(self.root, train=train, download=download)

    @property
    def _folder(self) -> str:
        return getattr(torchvision.datasets, self.dataset).base_folder


class CIFAR100(CIFAR10):
    """A hundred classes (`cifar-100-python`). Arguments as in `CIFAR10`."""

    dataset: ClassVar[str] = "CIFAR100"

    def __init__(
        self,
        root: str = "data",
        download: bool = True,
        img_size: int = 32,
        batch_size: int = 128,
        num_workers: int = 4,
        train_transform: TrainingTransform | None = None,
        eval_batch_size: int | None = 512,
        mean: tuple[float, float, float] = (0.5071, 0.4865, 0.4409),
        std: tuple[float, float, float] = (0.2673, 0.2564, 0.2762),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root, download, img_size, batch_size, num_workers, train_transform, eval_batch_size, mean, std, **kwargs
        )


def _in_memory(dataset: Any) -> TensorSource:
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()  # (N, 32, 32, 3) -> (N, 3, 32, 32)
    return TensorSource(images, torch.tensor(dataset.targets))
