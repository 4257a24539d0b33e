"""Pictures of what the scans of a Vision-LSTM do: where a patch looks, what is written and how long it is remembered."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

from vil_lightning.backbones import VisionLSTM
from vil_lightning.backbones.inspection import ScanRecord, between_patches, record_scans, rollout
from vil_lightning.backbones.vision_lstm import Scan
from vil_lightning.callbacks.backbone_of import backbone_of
from vil_lightning.callbacks.drawing import Tile, cell, diverging, enlarge, frame, heat, sheet
from vil_lightning.callbacks.features import board_writers, check_counts, last_epoch, looks, observing, val_images
from vil_lightning.errors import ConfigError

_ARROWS = "Arrow: direction of the scan, right: from the top left, left: from the bottom right; down, up: by columns."
_ATTENTION_TITLE = f"""\
Implicit attention: what the framed patch takes of the values of the patches scanned before it.
{_ARROWS}
Red: added, blue: subtracted, white: nothing, grey: not scanned yet.
Large: mean of the heads, each in shares of its absolute sum; colours up to the number below.
Small: the heads one by one, row by row; colours up to the largest share of each.
Rollout: how much of each patch reaches the framed one through all blocks: a heuristic without signs,
in which the corners where scans start gain with depth, also in an untrained network."""
_GATE_TITLE = f"""\
Gates of all patches of one image, a row for each block.
Each map has colours of its own, from its lowest to its highest value, which stand below it; fewer colours if these
are less than 10 % apart.
{_ARROWS}
Input gate: logarithm of the weight with which a patch is written into the memory.
Half-life: in how many tokens half of the memory is forgotten at the rate of this patch's forget gate."""
_HALF_LIFE_TITLE = f"""\
Memory half-life in tokens: after how many of the image's {{tokens}} tokens a head has forgotten half.
From the mean logarithm of its forget gate over all patches and images.
{_ARROWS}"""
# Maps of logarithms show differences of less than 10 % in less than all colours: they may be rounding.
_LEAST_SPAN = 0.1
_LEAST_SIZE = 16
_LONGEST = 1e6  # tokens; a longer half-life, which may be infinite, is shown as this one


class ScanPictures(L.Callback):
    """Writes to TensorBoard what the scans of a Vision-LSTM do with a few val images, the same every time.

    - `scans/implicit attention`: per image, how much one patch takes of every other one, in the first, middle and last blocks,
      and through the whole network (`rollout`, a heuristic).
    - `scans/gates`: of the first image, per block input gates and half-lives by the forget gates, for every patch and head.
    - `scans/half-life`: per head and block, after how many tokens half of the memory is forgotten.

    Looks at the network that the run is for, e.g. the teacher of a self-distillation method, in the first process alone: before
    the first step, every few epochs and at the end.

    Args:
        num_images: Rows of the first picture; the images are spread over the val set.
        every_n_epochs: How often; the last epoch always counts.
        size: Side in px at which an image is shown.
        query: The patch that looks, (row, column) from 0, or `center`.
    """

    def __init__(
        self,
        num_images: int = 4,
        every_n_epochs: int = 20,
        size: int = 96,
        query: Literal["center"] | tuple[int, int] = "center",
    ) -> None:
        check_counts(self, num_images=num_images, every_n_epochs=every_n_epochs)
        if size < _LEAST_SIZE:
            raise ConfigError(
                f"ScanPictures: size={size} must be at least {_LEAST_SIZE}. Set size in the callback's init_args."
            )
        self.num_images = num_images
        self.every_n_epochs = every_n_epochs
        self.size = size
        self.query = query
        self._images: Tensor | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        backbone = backbone_of(pl_module)
        if not isinstance(backbone, VisionLSTM):
            raise ConfigError(
                f"ScanPictures: the backbone of {type(pl_module).__name__} is a {type(backbone).__name__}, which has no mLSTM "
                "scans. Set model.backbone.name to a vil_… or vil2_… model, or take ScanPictures out of trainer.callbacks."
            )
        size = trainer.datamodule.img_size  # type: ignore[attr-defined]
        h, w = backbone.patch_embed.feat_grid((size, size))
        if self.query != "center" and not (0 <= self.query[0] < h and 0 <= self.query[1] < w):
            raise ConfigError(
                f"ScanPictures: query={tuple(self.query)} is none of the {h} x {w} patches of an image (data.img_size={size}). "
                f"Set query in the callback's init_args to (row, column) from (0, 0) to ({h - 1}, {w - 1}), or to center."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.global_step:  # not resumed
            self._draw(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0 or last_epoch(trainer):
            self._draw(trainer, pl_module)

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not looks(trainer, pl_module):
            return
        if self._images is None:
            self._images, _ = val_images(trainer, self.num_images)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        backbone: Any = backbone_of(pl_module)
        with observing(trainer, pl_module), record_scans(backbone) as records:
            backbone.forward_features(data.normalize(self._images.to(pl_module.device)))
        h, w = records[0].layout.h, records[0].layout.w
        query = (h // 2, w // 2) if self.query == "center" else self.query
        pictures = {
            "scans/implicit attention": attention_sheet(records, self._images, query, self.size),
            "scans/gates": gate_sheet(records, self._images[0], self.size),
            "scans/half-life": half_life_sheet(records),
        }
        for writer in board_writers(trainer):
            for tag, picture in pictures.items():
                writer.add_image(tag, picture, trainer.global_step)


def attention_sheet(records: Sequence[ScanRecord], images: Tensor, query: tuple[int, int], size: int) -> Tensor:
    """A row for each of the images, uint8 (B, 3, H, W): what the patch `query` (row, column) takes of every patch."""
    layout, depth = records[0].layout, records[-1].block + 1
    grid = (layout.h, layout.w)
    place = query[0] * layout.w + query[1]
    rows = [[Tile(frame(enlarge(image, size), *query, grid), "image")] for image in images]
    shown = shown_blocks(records)
    for record in records:
        if record.block in shown:
            for row, heads in zip(rows, _taken(record, place), strict=True):
                mean, largest = heads.mean(0), _largest(heads.mean(0))
                picture = frame(enlarge(diverging(mean, largest), size), *query, grid)
                small = [enlarge(diverging(head, _largest(head)), size // 2 - 1) for head in heads]
                caption = f"block {record.block + 1} of {depth}"
                if len(small) > 1:
                    picture = _below(picture, make_grid(small, nrow=2, padding=2, pad_value=255)[:, :, 2:-2])
                row.append(Tile(picture, caption, f"±{number(largest)}", _arrow(record.scan)))
    reaching = rollout(records)[:, place].cpu()  # (B, N)
    for row, shares in zip(rows, reaching, strict=True):
        own = float(shares[place])
        others = shares.masked_fill(torch.arange(len(shares)) == place, 0)
        picture = frame(enlarge(heat(shares.unflatten(0, grid), 0, float(others.max())), size), *query, grid)
        row.append(Tile(picture, "rollout", f"0 to {number(float(others.max()))},\nof itself {number(own)}"))
    return sheet(rows, _ATTENTION_TITLE)


def gate_sheet(records: Sequence[ScanRecord], image: Tensor, size: int) -> Tensor:
    """A row for each block: input gates and half-lives of all patches of the first image, for each scan and head."""
    depth, side = records[-1].block + 1, 2 * size // 3
    rows: list[list[Tile]] = [[] for _ in range(depth)]
    for record in records:
        row = rows[record.block]
        row.append(Tile(cell(f"{record.block + 1}", 44, side, arrow=_arrow(record.scan))))
        half_lives = record.half_life_map()[0].clamp(max=_LONGEST)
        for name, maps, written in (
            ("input gate", record.igate_map()[0], _hundredths),
            ("half-life", half_lives.log(), _exponential),
        ):
            for head, values in enumerate(maps.cpu()):
                low, high = float(values.min()), float(values.max())
                middle, half = (low + high) / 2, max(high - low, _LEAST_SPAN) / 2
                picture = enlarge(heat(values, middle - half, middle + half), side)
                above = f"{name}\nhead {head + 1}" if record.block == 0 else ""
                row.append(Tile(picture, above, f"{written(low)} to {written(high)}"))
    bar = heat(torch.linspace(0, 1, 128).expand(12, -1), 0, 1)
    top = sheet([[Tile(enlarge(image, size), "image"), Tile(bar, "colours", "lowest to highest")]], _GATE_TITLE)
    return _below(top, sheet(rows))


def half_life_sheet(records: Sequence[ScanRecord]) -> Tensor:
    """Half-lives in tokens: a row per head, a column per block; for blocks of several scans one such table per scan."""
    half_lives = torch.stack([record.half_life() for record in records], dim=1).clamp(max=_LONGEST).cpu()  # (NH, scans)
    colours = heat(half_lives.log(), float(half_lives.min().log()), float(half_lives.max().log()))
    num_scans = len(records) // (records[-1].block + 1)  # of a block
    rows = []
    for first in range(num_scans):
        columns = range(first, len(records), num_scans)
        names = [(f"{records[i].block + 1}", _arrow(records[i].scan)) for i in columns]
        rows.append([cell("block", 52, 24)] + [cell(name, 44, 24, arrow=arrow) for name, arrow in names])
        for head, values in enumerate(half_lives):
            cells = [cell(number(float(values[i])), 44, 24, colours[:, head, i].tolist()) for i in columns]
            rows.append([cell(f"head {head + 1}", 52, 24), *cells])
    tiles = [[Tile(picture) for picture in row] for row in rows]
    return sheet(tiles, _HALF_LIFE_TITLE.format(tokens=records[0].layout.seq_len), gap=2)


def shown_blocks(records: Sequence[ScanRecord]) -> list[int]:
    """The first, middle and last blocks: of each as many in a row as it takes to see every kind of scan of the network."""
    kinds = {record.scan for record in records}
    depth = records[-1].block + 1
    length = 1
    while {record.scan for record in records if record.block < length} != kinds:
        length += 1
    starts = (0, (depth - length) // 2, depth - length)
    return sorted({start + i for start in starts for i in range(length)})


def number(value: float) -> str:
    """In few letters: 5e-05, 0.031, 1.2, 45, 280, 12k, and >1M for the longest half-lives."""
    if value > 0.999 * _LONGEST:
        return ">1M"
    if abs(value) >= 1e4:
        return f"{value / 1000:.0f}k"
    if abs(value) >= 9.95:
        return f"{value:.0f}"
    return f"{value:.2g}" if abs(value) >= 1e-3 or not value else f"{value:.0e}"


def _hundredths(value: float) -> str:
    return f"{round(value, 2) + 0:.2f}"  # + 0 turns -0 into 0


def _exponential(log: float) -> str:
    return number(math.exp(log))


def _taken(record: ScanRecord, place: int) -> Tensor:
    """Shares (B, NH, h, w) of what a patch takes: their absolute values sum to 1. NaN where the scan has not been yet."""
    layout = record.layout
    taken = between_patches(record.attention(), layout)[:, :, place].cpu()  # (B, NH, N)
    # The norm after the mLSTM takes the size of a head's row away.
    taken = taken / taken.abs().sum(-1, keepdim=True).clamp(min=torch.finfo(taken.dtype).tiny)
    order = layout.split(record.order()[..., None])[0][..., 0].cpu()  # (B, N)
    unseen = order > order[:, place, None]
    return taken.masked_fill(unseen[:, None], math.nan).unflatten(-1, (layout.h, layout.w))


def _largest(values: Tensor) -> float:
    return float(values.nan_to_num().abs().max())


def _arrow(scan: Scan) -> str:
    if scan.columns:
        return "up" if scan.reverse else "down"
    return "left" if scan.reverse else "right"


def _below(top: Tensor, bottom: Tensor) -> Tensor:
    """Two pictures as one, on white."""
    width = max(top.shape[2], bottom.shape[2])
    return torch.cat([F.pad(part, (0, width - part.shape[2]), value=255) for part in (top, bottom)], dim=1)
