"""Pictures of what a classifier gets wrong."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from vil_lightning.callbacks.features import check_counts, check_labelled


class ClassificationPictures(L.Callback):
    """Writes to TensorBoard, after a validation or test: the confusion matrix, and the images with the highest loss.

    Needs a module whose `validation_step` returns `logits` (B, C), `labels` (B,) and `real` (B,), as `Supervised` does.

    Args:
        num_worst: Images to show, of the first process.
        every_n_epochs: In which epochs, as far as they are validated; also at the planned end of the run.
        max_classes: No confusion matrix for more classes, whose cells could not be seen.
        size: Side in px at which an image is shown.
    """

    def __init__(self, num_worst: int = 16, every_n_epochs: int = 10, max_classes: int = 200, size: int = 96) -> None:
        check_counts(self, num_worst=num_worst, every_n_epochs=every_n_epochs, max_classes=max_classes, size=size)
        self.num_worst = num_worst
        self.every_n_epochs = every_n_epochs
        self.max_classes = max_classes
        self.size = size
        self._counts: Tensor | None = None
        self._worst: list[tuple[float, Tensor, int, int]] = []  # loss, image in [0, 1], class, predicted class

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        check_labelled(self, trainer)

    def _wanted(self, trainer: L.Trainer) -> bool:
        if trainer.sanity_checking:
            return False
        if trainer.state.fn != "fit":
            return True
        epoch = trainer.current_epoch + 1
        last = epoch == trainer.max_epochs or trainer.global_step >= trainer.estimated_stepping_batches
        return last or epoch % self.every_n_epochs == 0

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not isinstance(outputs, dict) or "logits" not in outputs or not self._wanted(trainer):
            return
        real = outputs["real"]
        logits, labels, images = outputs["logits"][real], outputs["labels"][real], batch[0][real]
        num_classes, predictions = logits.shape[1], logits.argmax(1)
        if num_classes <= self.max_classes:
            if self._counts is None:
                self._counts = torch.zeros(num_classes, num_classes, dtype=torch.long, device=logits.device)
            cells = torch.bincount(labels * num_classes + predictions, minlength=num_classes**2)
            self._counts += cells.view(num_classes, num_classes)
        # Of no image, maybe; but all processes have to count, or the sum over them would wait for ever.
        losses = F.cross_entropy(logits, labels, reduction="none")
        for i in losses.topk(min(self.num_worst, len(losses))).indices.tolist():
            picture = trainer.datamodule.denormalize(images[i]).cpu()  # type: ignore[attr-defined]
            self._worst.append((losses[i].item(), picture, int(labels[i]), int(predictions[i])))
        self._worst = sorted(self._worst, key=lambda entry: -entry[0])[: self.num_worst]

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._counts is not None:
            self._counts = trainer.strategy.reduce(self._counts, reduce_op="sum")
        if trainer.is_global_zero:
            names = trainer.datamodule.classes  # type: ignore[attr-defined]
            for logger in trainer.loggers:
                if not isinstance(logger, TensorBoardLogger):
                    continue
                write = logger.experiment.add_image
                if self._counts is not None:
                    write("errors/confusion (rows: true class)", confusion_picture(self._counts), trainer.global_step)
                if self._worst:
                    sheet = worst_picture(self._worst, names, self.size)
                    write("errors/highest loss (true > predicted)", sheet, trainer.global_step)
        self._counts, self._worst = None, []

    on_test_epoch_end = on_validation_epoch_end


def confusion_picture(counts: Tensor) -> Tensor:
    """Counts (C, C), rows the true classes, as uint8 (3, H, W): the darker a cell, the larger its share of the row."""
    shares = counts.float().cpu() / counts.sum(1, keepdim=True).clamp(min=1).cpu()
    shares = shares.sqrt()  # errors are rare: make small shares visible
    side = max(1, 640 // len(counts))
    low, high = torch.tensor([255.0, 255.0, 255.0]), torch.tensor([20.0, 40.0, 120.0])
    colours = low + shares[..., None] * (high - low)  # (C, C, 3)
    picture = colours.repeat_interleave(side, 0).repeat_interleave(side, 1)
    if side >= 8:  # lines between the cells
        picture[::side] = picture[:, ::side] = 215
    return picture.permute(2, 0, 1).round().to(torch.uint8)


def worst_picture(worst: list[tuple[float, Tensor, int, int]], names: list[str], size: int, columns: int = 4) -> Tensor:
    """Captioned images as uint8 (3, H, W)."""
    caption, gap = 28, 6
    rows = (len(worst) + columns - 1) // columns
    sheet = Image.new("RGB", (columns * (size + gap), rows * (size + caption + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (loss, image, label, prediction) in enumerate(worst):
        x, y = i % columns * (size + gap), i // columns * (size + caption + gap)
        resized = F.interpolate(image[None].float(), size=(size, size), mode="nearest-exact")[0]
        sheet.paste(to_pil_image(resized), (x, y))
        widest = size // 12
        draw.text((x, y + size + 1), f"{names[label][:widest]} > {names[prediction][:widest]}", fill="black")
        draw.text((x, y + size + 13), f"loss {loss:.2f}", fill="grey")
    return pil_to_tensor(sheet)
