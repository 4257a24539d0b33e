"""Features of val images for TensorBoard's projector, where one can walk through them."""

import math
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from vil_lightning.callbacks.backbone_of import backbone_of
from vil_lightning.callbacks.features import (
    board_writers,
    check_counts,
    check_pooled,
    last_epoch,
    looks,
    observing,
    pooled_features,
    val_images,
)

TAG = "val_features"
MAX_SHEET_SIDE = 8192  # px; TensorBoard shows no larger sheet of small pictures


class EmbeddingProjector(L.Callback):
    """Writes pooled features of val images for TensorBoard's PROJECTOR page, each with its picture and the name of its class.

    Args:
        num_images: How many, spread over the val set.
        every_n_epochs: How often; None writes at the end of training only, which is always written.
        size: Side in px of the small pictures at most; smaller ones keep their size, and all are made to fit the sheet.
    """

    def __init__(self, num_images: int = 500, every_n_epochs: int | None = None, size: int = 64) -> None:
        check_counts(self, num_images=num_images, every_n_epochs=every_n_epochs, size=size)
        self.num_images = num_images
        self.every_n_epochs = every_n_epochs
        self.size = size

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        check_pooled(self, trainer, pl_module, partial(pooled_features, backbone_of(pl_module)))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        every = self.every_n_epochs
        if every is not None and (trainer.current_epoch + 1) % every == 0 and not last_epoch(trainer):
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not looks(trainer, pl_module):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        images, labels = val_images(trainer, self.num_images)
        backbone = backbone_of(pl_module)
        with observing(trainer, pl_module):
            features = torch.cat(
                [
                    pooled_features(backbone, data.normalize(part.to(pl_module.device))).float().cpu()
                    for part in images.split(data.eval_batch_size)
                ]
            )
        # One line per image: a name must not break it.
        names = [" ".join(data.classes[label].split()) if data.labelled else "no class" for label in labels]
        for writer in board_writers(trainer):
            writer.add_embedding(features, names, small_pictures(images, self.size), trainer.global_step, TAG)


def small_pictures(images: Tensor, size: int, max_sheet_side: int = MAX_SHEET_SIDE) -> Tensor:
    """uint8 (n, 3, S, S) as floats in [0, 1], at most `size` px wide, and such that a square sheet of them can be shown."""
    per_row = math.ceil(math.sqrt(len(images)))
    side = max(1, min(size, images.shape[-1], max_sheet_side // per_row))
    pictures = images.float() / 255
    if side < images.shape[-1]:
        pictures = F.interpolate(pictures, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return pictures
