"""Colours for numbers, and sheets of captioned pictures. All pictures are uint8 (3, H, W), on the CPU."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

# Evenly spaced stops. Lightness rises from the first to the last, or falls from the middle to both ends: the order can be seen
# without seeing colours.
_HEAT = ((13, 8, 60), (70, 30, 135), (165, 45, 125), (230, 95, 70), (252, 170, 55), (252, 250, 180))
_DIVERGING = ((20, 50, 130), (85, 145, 205), (248, 248, 248), (225, 120, 85), (140, 20, 40))
_UNKNOWN = (170, 170, 170)  # of NaN
_FRAME = (40, 220, 90)  # in neither scale
_LINE = 14  # px from one line of text to the next
_ARROW = 16  # px that an arrow takes


def heat(values: Tensor, lowest: float, highest: float) -> Tensor:
    """Numbers (H, W), dark for `lowest` to bright for `highest`. What lies beyond has the colour of the end, NaN is grey."""
    span = highest - lowest
    return _colours((values - lowest) / span if span > 0 else values.where(values.isnan(), 0.5), _HEAT)


def diverging(values: Tensor, largest: float) -> Tensor:
    """Numbers (H, W), blue for -`largest`, white for 0, red for `largest`. NaN is grey."""
    return _colours(0.5 + 0.5 * values / largest if largest > 0 else values.where(values.isnan(), 0.5), _DIVERGING)


def enlarge(picture: Tensor, size: int) -> Tensor:
    """Resized without smoothing, so that the longer side has `size` px."""
    height, width = picture.shape[1:]
    scale = size / max(height, width)
    target = (max(1, round(height * scale)), max(1, round(width * scale)))
    return F.interpolate(picture[None].float(), size=target, mode="nearest-exact")[0].to(torch.uint8).cpu()


def frame(picture: Tensor, row: int, column: int, grid: tuple[int, int], width: int = 2) -> Tensor:
    """A copy with a frame around one cell of an even grid (rows, columns)."""
    height, length = picture.shape[1:]
    top, bottom = (round(i * height / grid[0]) for i in (row, row + 1))
    left, right = (round(i * length / grid[1]) for i in (column, column + 1))
    image = to_pil_image(picture)
    # Around the cell; over its edge where the picture ends.
    corners = [
        max(left - width, 0),
        max(top - width, 0),
        min(right + width, length) - 1,
        min(bottom + width, height) - 1,
    ]
    ImageDraw.Draw(image).rectangle(corners, outline=_FRAME, width=width)
    return pil_to_tensor(image)


def cell(
    text: str, width: int, height: int, colour: Sequence[int] = (255, 255, 255), arrow: str | None = None
) -> Tensor:
    """A rectangle with text amid it, black or white, whichever is readable on the colour; `arrow` as in `Tile`."""
    image = Image.new("RGB", (width, height), tuple(colour))
    draw = ImageDraw.Draw(image)
    dark = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] < 128
    x, y = (width - _text_width(text)) // 2, (height - _LINE) // 2
    if arrow is not None:
        x = (width - _text_width(text) - _ARROW) // 2
        _draw_arrow(draw, x, y, arrow)
        x += _ARROW
    draw.text((x, y), text, fill="white" if dark else "black", font=_font())
    return pil_to_tensor(image)


class Tile(NamedTuple):
    """A picture in a sheet, with lines of text above and below.

    `arrow` is drawn before the first line above: `right`, `left`, `down` or `up`. (The font has no arrows.)
    """

    picture: Tensor
    above: str = ""
    below: str = ""
    arrow: str | None = None


def sheet(rows: Sequence[Sequence[Tile]], title: str = "", gap: int = 8) -> Tensor:
    """Tiles in rows and aligned columns, on white, under a title of one or more lines."""
    num_columns = max(len(row) for row in rows)
    widths = [max(_width(row[j]) for row in rows if j < len(row)) for j in range(num_columns)]
    heights = [[max(parts) for parts in zip(*map(_heights, row), strict=True)] for row in rows]
    x0, y0 = 8, 8 + (_lines(title) + 8 if title else 0)
    width = max(x0 + sum(widths) + gap * (num_columns - 1), x0 + _text_width(title)) + 8
    canvas = Image.new("RGB", (width, y0 + sum(map(sum, heights)) + gap * (len(rows) - 1) + 8), "white")
    draw = ImageDraw.Draw(canvas)
    _write(draw, x0, 8, title)
    y = y0
    for row, (above, middle, below) in zip(rows, heights, strict=True):
        x = x0
        for tile, column_width in zip(row, widths, strict=False):
            indent = 0
            if tile.arrow is not None:
                _draw_arrow(draw, x, y, tile.arrow)
                indent = _ARROW
            _write(draw, x, y, tile.above, indent)
            canvas.paste(to_pil_image(tile.picture), (x, y + above))
            _write(draw, x, y + above + tile.picture.shape[1], tile.below)
            x += column_width + gap
        y += above + middle + below + gap
    return pil_to_tensor(canvas)


def _colours(shares: Tensor, stops: tuple[tuple[int, int, int], ...]) -> Tensor:
    """(H, W), 0 for the first stop to 1 for the last."""
    shares = shares.detach().float().cpu()
    table = torch.tensor(stops, dtype=torch.float32)
    place = shares.nan_to_num(0.0, 1.0, 0.0).clamp(0, 1) * (len(stops) - 1)
    below = place.long().clamp(max=len(stops) - 2)
    colours = torch.lerp(table[below], table[below + 1], (place - below)[..., None])  # (H, W, 3)
    colours[shares.isnan()] = torch.tensor(_UNKNOWN, dtype=torch.float32)
    return colours.round().to(torch.uint8).permute(2, 0, 1)


@functools.cache
def _font() -> Any:
    # Pillow without FreeType has a bitmap font of one size only.
    return ImageFont.load_default(12) if features.check("freetype2") else ImageFont.load_default()


def _write(draw: ImageDraw.ImageDraw, x: int, y: int, text: str, indent: int = 0) -> None:
    for i, line in enumerate(text.splitlines()):
        draw.text((x + (indent if i == 0 else 0), y + i * _LINE), line, fill="black", font=_font())


def _draw_arrow(draw: ImageDraw.ImageDraw, x: int, y: int, towards: str) -> None:
    centre_x, centre_y, half = x + 6, y + 8, 6
    dx, dy = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}[towards]
    tip = (centre_x + half * dx, centre_y + half * dy)
    draw.line([(centre_x - half * dx, centre_y - half * dy), tip], fill="black", width=2)
    # The head: from the tip back by 4 px, and 4 px to each side.
    wings = [(tip[0] - 4 * dx + side * dy, tip[1] - 4 * dy + side * dx) for side in (-4, 4)]
    draw.polygon([tip, *wings], fill="black")


def _lines(text: str) -> int:
    """Height in px."""
    return len(text.splitlines()) * _LINE + (2 if text else 0)


def _heights(tile: Tile) -> tuple[int, int, int]:
    """Of the text above, the picture and the text below, in px."""
    above = _lines(tile.above) if tile.above or tile.arrow is None else _lines(" ")
    return above, tile.picture.shape[1], _lines(tile.below)


def _text_width(text: str) -> int:
    return max((round(_font().getlength(line)) for line in text.splitlines()), default=0)


def _width(tile: Tile) -> int:
    indent = _ARROW if tile.arrow is not None else 0
    return max(tile.picture.shape[2], indent + _text_width(tile.above), _text_width(tile.below))
