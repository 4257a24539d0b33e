"""The built-in data set: scikit-learn's 1,797 handwritten digits, 8 x 8 px. Real images, nothing to download."""

from typing import Any

import torch
from sklearn.datasets import load_digits

from vil_lightning.data.datamodule import ImageDataModule
from vil_lightning.data.loading import ImageSource, TensorSource
from vil_lightning.data.transforms import TrainingTransform


class Digits(ImageDataModule):
    """1,438 training and 359 validation digits (a fixed, stratified split of 80 to 20), in 10 classes.

    Args as in `ImageDataModule`.
    """

    def __init__(
        self,
        img_size: int = 16,
        batch_size: int = 128,
        num_workers: int = 0,
        train_transform: TrainingTransform | None = None,
        eval_batch_size: int | None = 512,
        mean: tuple[float, float, float] = (0.305, 0.305, 0.305),
        std: tuple[float, float, float] = (0.376, 0.376, 0.376),
        **kwargs: Any,
    ) -> None:
        super().__init__(img_size, batch_size, num_workers, train_transform, eval_batch_size, mean, std, **kwargs)

    def build_sources(self) -> tuple[ImageSource, ImageSource, list[str]]:
        digits = load_digits()
        images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)  # (N, 8, 8), 0…16 originally
        images = images[:, None].expand(-1, 3, -1, -1).contiguous()
        labels = torch.from_numpy(digits.target)
        val = torch.zeros(len(labels), dtype=torch.bool)
        generator = torch.Generator().manual_seed(0)  # the split never depends on the run's seed
        for digit in range(10):
            members = (labels == digit).nonzero().squeeze(1)
            members = members[torch.randperm(len(members), generator=generator)]
            val[members[: round(0.2 * len(members))]] = True
        return (
            TensorSource(images[~val], labels[~val]),
            TensorSource(images[val], labels[val]),
            [str(digit) for digit in range(10)],
        )
