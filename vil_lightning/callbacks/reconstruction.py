"""What a masked autoencoder makes of the same images, again and again."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

from vil_lightning.callbacks.features import check_counts, val_images
from vil_lightning.errors import ConfigError
from vil_lightning.sharding import gathered, is_sharded


class ReconstructionPictures(L.Callback):
    """Writes val images to TensorBoard: a row each, as they are, as the network saw them, and with hidden patches as predicted.

    The images and the mask are the same every time. Needs a module with `reconstruct(images)`, as `MAE`, `SimMIM` and
    `Autoregressive` have.

    Args:
        num_images: Rows; the images are spread over the val set.
        every_n_epochs: How often; epoch `trainer.max_epochs` always counts.
        size: Side in px at which an image is shown.
    """

    def __init__(self, num_images: int = 8, every_n_epochs: int = 10, size: int = 96) -> None:
        check_counts(self, num_images=num_images, every_n_epochs=every_n_epochs, size=size)
        self.num_images = num_images
        self.every_n_epochs = every_n_epochs
        self.size = size
        self._images: Tensor | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not hasattr(pl_module, "reconstruct"):
            raise ConfigError(
                f"ReconstructionPictures: {type(pl_module).__name__} predicts no pixels. Leave ReconstructionPictures out of "
                "trainer.callbacks, or use it with MAE, SimMIM or Autoregressive."
            )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        epoch = trainer.current_epoch + 1
        if epoch % self.every_n_epochs and epoch != trainer.max_epochs:
            return
        if not trainer.is_global_zero and not is_sharded(pl_module):  # where each process has a slice, all have to look
            return
        images = self._held_out(trainer).to(pl_module.device)
        data = trainer.datamodule  # type: ignore[attr-defined]
        modes = [(module, module.training) for module in pl_module.modules()]
        pl_module.eval()
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []  # masks are drawn there
        with (
            torch.random.fork_rng(devices=devices),
            trainer.precision_plugin.forward_context(),
            gathered(pl_module),
        ):
            torch.manual_seed(0)
            result = pl_module.reconstruct(data.normalize(images))
        for module, training in modes:  # a part may have been kept in evaluation mode
            module.training = training
        original = images.float() / 255
        seen = original * (1 - result["mask"]) + 0.5 * result["mask"]
        rows = torch.stack([original, seen, data.denormalize(result["reconstruction"])], dim=1).flatten(0, 1)
        rows = F.interpolate(rows, size=(self.size, self.size), mode="nearest-exact")
        sheet = make_grid(rows, nrow=3, padding=4, pad_value=1.0)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                tag = "reconstruction/image, seen, predicted"
                logger.experiment.add_image(tag, sheet.cpu(), trainer.global_step)

    def _held_out(self, trainer: L.Trainer) -> Tensor:
        """uint8 (n, 3, H, W)."""
        if self._images is None:
            self._images, _ = val_images(trainer, self.num_images)
        return self._images
