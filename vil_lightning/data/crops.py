"""Cutting views out of a picture: boxes, resizing, rotation. Results are uint8 (3, S, S)."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from vil_lightning.data.images import REDUCTIONS, EncodedImage, Picture

BICUBIC = InterpolationMode.BICUBIC
SIMPLE_CROP_PADDING = 4
_LONGEST_STRIP = 16

Box = tuple[int, int, int, int]  # top, left, height, width in px
Rng = np.random.Generator


def uniform(rng: Rng, low: float, high: float) -> float:
    return float(rng.uniform(low, high)) if high > low else low


def size_of(picture: Picture) -> tuple[int, int]:
    """Height and width in px."""
    return picture.size() if isinstance(picture, EncodedImage) else (picture.shape[-2], picture.shape[-1])


def crop_all(picture: Picture, boxes: list[Box], sizes: list[int]) -> list[Tensor]:
    """Cut out boxes and resize each to a square (bicubic, antialiased). A file is decoded once, as small as that allows.

    Args:
        picture: Of any size.
        boxes: In px of the full picture. In a picture at reduced scale they end at the nearest pixel.
        sizes: Sides in px.

    Returns:
        uint8 (3, size, size) each.
    """
    full_height, full_width = size_of(picture)
    image = pixels(picture, min(min(box[2:]) / size for box, size in zip(boxes, sizes, strict=True)))
    y_scale, x_scale = image.shape[-2] / full_height, image.shape[-1] / full_width
    views = []
    for (top, left, height, width), size in zip(boxes, sizes, strict=True):
        y0, y1 = round(top * y_scale), round((top + height) * y_scale)
        x0, x1 = round(left * x_scale), round((left + width) * x_scale)
        crop = image[:, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
        views.append(TF.resize(crop, [size, size], interpolation=BICUBIC, antialias=True))
    return views


def pixels(picture: Picture, shrink: float = 1.0) -> Tensor:
    """uint8 (3, H, W); a JPEG at reduced scale if it will be shrunk to less than that anyway.

    Args:
        picture: An image file or its pixels.
        shrink: The smallest factor by which the picture, or a part of it, will be shrunk.
    """
    if isinstance(picture, Tensor):
        return picture
    return picture.decode(next((reduction for reduction in REDUCTIONS if reduction <= shrink), 1))


def resize_short_side(image: Tensor, size: int) -> Tensor:
    """Bicubic. Of a strip more than 16 times as long as it is wide only the middle is kept: 1 x N px would need 50,000 N."""
    longest = _LONGEST_STRIP * min(image.shape[-2:])
    if max(image.shape[-2:]) > longest:
        image = TF.center_crop(image, [min(side, longest) for side in image.shape[-2:]])
    return TF.resize(image, [size], interpolation=BICUBIC, antialias=True)


def simple_random_crop(rng: Rng, picture: Picture, size: int) -> Tensor:
    """Short side to `size`, a reflected border, and a square of this size from anywhere in it."""
    image = pixels(picture, min(size_of(picture)) / size)
    image = resize_short_side(image, size)
    image = TF.pad(image, [SIMPLE_CROP_PADDING], padding_mode="reflect")
    top, left = (int(rng.integers(side - size + 1)) for side in image.shape[-2:])
    return TF.crop(image, top, left, size, size)


def random_crop_box(rng: Rng, height: int, width: int, scale: Sequence[float], ratio: Sequence[float]) -> Box:
    """A box of random area and aspect ratio (log-uniform); a centred square if ten draws fail."""
    for _ in range(10):
        area = height * width * uniform(rng, scale[0], scale[1])
        aspect = math.exp(uniform(rng, math.log(ratio[0]), math.log(ratio[1])))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def rotate(image: Tensor, angle: float) -> Tensor:
    """Rotate about the centre, in degrees; what comes into view has the mean colour of the image's edge.

    That colour is moved to zero first: `rotate(fill=…)` would blend the seam with black.
    """
    border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], dim=1).float()
    edge = border.mean(dim=1).view(-1, 1, 1)
    rotated = TF.rotate(image.float() - edge, angle, interpolation=InterpolationMode.BILINEAR) + edge
    return rotated.round().clamp(0, 255).to(image.dtype)
