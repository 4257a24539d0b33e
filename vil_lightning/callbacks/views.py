"""Pictures of what the network is fed."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.nn import functional as F
from torchvision.utils import make_grid

from vil_lightning.callbacks.features import check_counts


class ViewPictures(L.Callback):
    """Writes what a few images look like after augmentation to TensorBoard.

    Under multi-crop a row per image and a column per view, global views first; otherwise one view of each image.

    Args:
        num_images: How many images.
        every_n_epochs: How often, from the first epoch on.
        size: Side in px at which every view is shown.
    """

    def __init__(self, num_images: int = 8, every_n_epochs: int = 20, size: int = 96) -> None:
        check_counts(self, num_images=num_images, every_n_epochs=every_n_epochs, size=size)
        self.num_images = num_images
        self.every_n_epochs = every_n_epochs
        self.size = size

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx != 0 or trainer.current_epoch % self.every_n_epochs or not trainer.is_global_zero:
            return
        several = isinstance(batch[0], list)
        views = batch[0] if several else [batch[0]]
        if views[0].ndim != 4:  # features, not images
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        columns = []
        for view in views:
            pictures = data.denormalize(view[: self.num_images]).float()
            # Local views keep their size relative to the global ones, on a grey ground.
            side = max(1, round(self.size * view.shape[-1] / views[0].shape[-1]))
            pictures = F.interpolate(pictures, size=(side, side), mode="nearest-exact")
            margin = self.size - side
            padding = (margin // 2, margin - margin // 2) * 2
            columns.append(F.pad(pictures, padding, value=0.5))
        rows = torch.stack(columns, dim=1).flatten(0, 1)
        sheet = make_grid(rows, nrow=len(columns) if several else 4, padding=4, pad_value=1.0)
        tag = "views/global_then_local" if several else "views/augmented"
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(tag, sheet.cpu(), trainer.global_step)
