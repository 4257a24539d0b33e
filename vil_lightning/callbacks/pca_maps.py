"""What the patch tokens tell apart: their first three principal components as pictures."""

import itertools
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from vil_lightning.callbacks.backbone_of import backbone_of
from vil_lightning.callbacks.drawing import Tile, diverging, enlarge, sheet
from vil_lightning.callbacks.features import board_writers, check_counts, last_epoch, looks, observing, val_images
from vil_lightning.errors import ConfigError
from vil_lightning.representation import principal_components

NUM_COMPONENTS = 3
TAG = "pca/patch tokens of val images"


class PCAMaps(L.Callback):
    """Writes val images to TensorBoard: a row each, as they are, and the principal components of their patch tokens.

    The components are those of the tokens of all images together, so a colour means the same in every row. The second column
    shows the three largest as red, green and blue; grey is the mean token. The others show one of them each, from blue over
    white (the mean) to red. What the network takes for the same thing has the same colour.

    From picture to picture, order and signs stay with the components that are most alike, so that colours do not jump. The
    captions say which share of the tokens' variance a component holds; after some training the first need not be the largest.

    The images are the same every time. Pictures are drawn before the first step, every few epochs and at the end. The tokens
    come from `forward_intermediates`, which Vision-LSTM and nearly all models of timm have.

    Args:
        num_images: Rows; the images are spread over the val set.
        every_n_epochs: How often; the last epoch always counts.
        size: Side in px at which an image is shown.
    """

    def __init__(self, num_images: int = 8, every_n_epochs: int = 20, size: int = 96) -> None:
        check_counts(self, num_images=num_images, every_n_epochs=every_n_epochs, size=size)
        self.num_images = num_images
        self.every_n_epochs = every_n_epochs
        self.size = size
        self._images: Tensor | None = None
        self._basis: Tensor | None = None  # (D, 3), of the previous picture

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        backbone = backbone_of(pl_module)
        if not hasattr(backbone, "forward_intermediates"):
            raise ConfigError(
                f"PCAMaps: {type(backbone).__name__} has no forward_intermediates, from which the patch tokens are taken. Use "
                "another model.backbone.name, or take PCAMaps out of trainer.callbacks."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.global_step:
            self._draw(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0 or last_epoch(trainer):
            self._draw(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._basis is None else {"basis": self._basis}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._basis = state_dict.get("basis")

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not looks(trainer, pl_module):
            return
        if self._images is None:
            self._images, _ = val_images(trainer, self.num_images)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        with observing(trainer, pl_module):
            images = data.normalize(self._images.to(pl_module.device))
            maps = patch_maps(backbone_of(pl_module), images).float().cpu()  # (n, D, h, w)
        if not maps.isfinite().all():  # a run that has diverged; it says so itself
            return
        components, shares = self._components(maps)
        result = picture(self._images, components, shares, self.size)
        for writer in board_writers(trainer):
            writer.add_image(TAG, result, trainer.global_step)

    def _components(self, maps: Tensor) -> tuple[Tensor, list[float]]:
        """Components (n, 3, h, w) of tokens (n, D, h, w), and their shares of the variance; remembers the basis."""
        tokens = maps.permute(0, 2, 3, 1).flatten(0, 2)  # (n h w, D)
        mean, basis = principal_components(tokens, min(NUM_COMPONENTS, *tokens.shape))
        basis = F.pad(basis, (0, NUM_COMPONENTS - basis.shape[1]))  # fewer tokens than components
        if self._basis is not None and self._basis.shape == basis.shape:
            basis = match_basis(basis, self._basis)
        self._basis = basis
        scores = (tokens - mean) @ basis
        total = (tokens - mean).square().sum().clamp(min=torch.finfo(tokens.dtype).tiny)
        shares = (scores.square().sum(0) / total).tolist()
        return scores.view(len(maps), *maps.shape[2:], NUM_COMPONENTS).permute(0, 3, 1, 2), shares


def patch_maps(backbone: Any, images: Tensor) -> Tensor:
    """Patch tokens of the last block after the final norm, on their grid: (n, D, h, w)."""
    settings = {"indices": 1, "norm": True, "output_fmt": "NCHW", "intermediates_only": True}
    (maps,) = backbone.forward_intermediates(images, **settings)
    return maps


def match_basis(basis: Tensor, previous: Tensor) -> Tensor:
    """The columns of a basis (D, k) in the order and with the signs that are most like those of an earlier one (D, k)."""
    likeness = previous.T @ basis  # (k, k): earlier, new
    earlier = range(basis.shape[1])
    order = max(
        itertools.permutations(earlier),
        key=lambda new: sum(float(likeness[i, j].abs()) for i, j in zip(earlier, new, strict=True)),
    )
    signs = torch.where(likeness[list(earlier), list(order)] < 0, -1.0, 1.0)
    return basis[:, list(order)] * signs


def picture(images: Tensor, components: Tensor, shares: list[float], size: int) -> Tensor:
    """The sheet, uint8 (3, H, W).

    Args:
        images: uint8 (n, 3, H, W).
        components: (n, 3, h, w), 0 for the mean token.
        shares: Of the tokens' variance, of each component.
        size: Side of an image in px.
    """
    # The largest values are few; with them cut off, the colours of the others are better told apart.
    largest = components.abs().transpose(0, 1).flatten(1).quantile(0.98, dim=1)
    unit = components / largest.clamp(min=torch.finfo(components.dtype).tiny).view(-1, 1, 1)
    colours = (127.5 + 127.5 * unit.clamp(-1, 1)).round().to(torch.uint8)
    headings = ["image", "1, 2, 3 as colours", *(f"{i}: {share:.0%}" for i, share in enumerate(shares, start=1))]
    rows = []
    for row, (image, colour, maps) in enumerate(zip(images, colours, unit, strict=True)):
        pictures = [image, colour, *(diverging(one, 1.0) for one in maps)]
        above = headings if row == 0 else [""] * len(pictures)
        rows.append([Tile(enlarge(one, size), text) for one, text in zip(pictures, above, strict=True)])
    return sheet(rows, _TITLE, gap=4)


_TITLE = """\
Principal components of the patch tokens of all these images.
Colours: the first three as red, green and blue. Similar colours are similar tokens.
Blue to red: one component alone, with its share of the variance; white is the mean."""
