"""Masks of images: a class per pixel, read from files, checked, and cut out together with their image."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from vil_lightning.data.crops import BICUBIC, Rng, pixels, uniform
from vil_lightning.data.images import BadImageError, Picture
from vil_lightning.data.transforms import (
    EvalTransform,
    TrainingTransform,
    View,
    _check_color_jitter,
    _draw_jitter,
)
from vil_lightning.dense import IGNORED
from vil_lightning.errors import ConfigError

_ATTEMPTS = 10  # at a crop in which one class does not cover too much


class MaskError(ConfigError):
    """A mask that does not fit its image or its classes. From a worker it comes without the traceback torch puts before it."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit("MaskError: ", 1)[-1].strip())


class Masked(NamedTuple):
    """An image with its mask."""

    image: Picture
    mask: Tensor  # int16 (H, W): classes from 0, or `IGNORED`


class MaskedView(NamedTuple):
    """A view as it leaves a worker, with its mask."""

    view: View
    mask: Tensor  # int16 (S, S)
    size: Tensor  # int64 (2,), height and width of what is image; the rest, at the bottom and on the right, is padding


@dataclasses.dataclass(frozen=True)
class LabelRule:
    """What the numbers in mask files mean.

    Args:
        num_classes: C.
        reduce_zero_label: 0 is ignored, and 1 to C are the classes, as in ADE20K. Otherwise the classes are 0 to C - 1.
        ignore_label: Another number that is ignored, or None.
    """

    num_classes: int
    reduce_zero_label: bool
    ignore_label: int | None

    @property
    def allowed(self) -> str:
        """In words, for messages."""
        first = int(self.reduce_zero_label)
        ignored = [str(0)] * self.reduce_zero_label + [str(self.ignore_label)] * (self.ignore_label is not None)
        also = f", and {' and '.join(ignored)} for pixels to ignore" if ignored else ""
        return f"{first} to {first + self.num_classes - 1}{also}"

    def labels(self, values: np.ndarray, name: str) -> Tensor:
        """Labels int16 (H, W) of the numbers in a file.

        Raises:
            MaskError: If one of them is no class.
        """
        labels = values.astype(np.int64) - int(self.reduce_zero_label)
        ignored = values == (-1 if self.ignore_label is None else self.ignore_label)
        if self.reduce_zero_label:
            ignored |= values == 0
        wrong = ~ignored & ((labels < 0) | (labels >= self.num_classes))
        if wrong.any():
            found = np.unique(values[wrong]).tolist()
            raise MaskError(
                f"{name}: {int(wrong.sum())} pixels have the label(s) {', '.join(map(str, found[:5]))}. Allowed are "
                f"{self.allowed}. Check data.num_classes={self.num_classes}, data.reduce_zero_label={self.reduce_zero_label} "
                f"and data.ignore_label={self.ignore_label}."
            )
        labels[ignored] = IGNORED
        return torch.from_numpy(labels.astype(np.int16))


def read_mask(path: str, rule: LabelRule, size: tuple[int, int]) -> Tensor:
    """The mask (H, W) in a file, int16.

    Args:
        path: An image with one number per pixel: grey of 8 or 16 bits, or a palette, of which the indices count.
        rule: What the numbers mean.
        size: Height and width of the image it belongs to.

    Raises:
        BadImageError: If it cannot be read.
        MaskError: If it has another size, or says what no class is.
    """
    try:
        content = Path(path).read_bytes()
        if path.lower().endswith(".png"):  # decoding does not look at the checksums
            Image.open(io.BytesIO(content)).verify()
        image = Image.open(io.BytesIO(content))
        image.load()
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
        raise BadImageError(path, f"cannot be read as a mask ({error or type(error).__name__})") from error
    if image.mode not in ("L", "P") and not image.mode.startswith("I"):
        raise MaskError(
            f"{path}: a mask of mode {image.mode}. Allowed is one number per pixel: grey of 8 or 16 bits (L, I;16), or a "
            "palette (P). Save the masks below data.root so."
        )
    if (image.height, image.width) != size:
        raise MaskError(
            f"{path}: the mask has {image.height} x {image.width} px, but its image {size[0]} x {size[1]}. A mask must have "
            "the size of its image (upright, if its EXIF data turn it). Correct the files below data.root."
        )
    return rule.labels(np.array(image), path)


class SegmentationTransform(TrainingTransform):
    """A random crop of an image and its mask, as in the segmentation recipe of ViL.

    Resized by a random factor, cropped, flipped, colours jittered (always), and padded where the image is smaller than the
    crop: with zeros after normalisation, and `IGNORED`.

    Args:
        img_size: Side of the crop in px.
        base_size: Longest long and short side of an image before the random factor; its aspect ratio stays.
        scale: The random factor, smallest and largest.
        max_class_share: Draw the crop anew, ten times in all, while one class covers at least this share of the pixels that are
            not ignored. 1 takes the first.
        hflip_prob: Probability of a horizontal flip.
        color_jitter: Strengths for brightness, contrast, saturation and hue.
    """

    # The flip is done here, with the mask's.
    stages = ("flip", "jitter", "grayscale", "blur", "solarize")

    def __init__(
        self,
        img_size: int = 512,
        base_size: tuple[int, int] = (2048, 512),
        scale: tuple[float, float] = (0.5, 2.0),
        max_class_share: float = 0.75,
        hflip_prob: float = 0.5,
        color_jitter: tuple[float, float, float, float] = (0.5, 0.5, 0.5, 0.25),
    ) -> None:
        _check_color_jitter(color_jitter)
        if img_size < 1 or min(base_size) < 1:
            raise ConfigError(
                f"data.train_transform.img_size={img_size} and base_size={list(base_size)} must be at least 1 px."
            )
        if not 0 < scale[0] <= scale[1]:
            raise ConfigError(f"data.train_transform.scale={list(scale)} must satisfy 0 < smallest <= largest.")
        if not 0 < max_class_share <= 1:
            raise ConfigError(f"data.train_transform.max_class_share={max_class_share} must be in (0, 1].")
        if not 0 <= hflip_prob <= 1:
            raise ConfigError(f"data.train_transform.hflip_prob={hflip_prob} must be in [0, 1].")
        self.img_size = img_size
        self.base_size = tuple(base_size)
        self.scale = scale
        self.max_class_share = max_class_share
        self.hflip_prob = hflip_prob
        self.color_jitter = color_jitter

    def __call__(self, picture: Picture, generators: Callable[[int], Rng]) -> MaskedView:  # type: ignore[override]
        if not isinstance(picture, Masked):
            raise ConfigError(
                "SegmentationTransform needs images with masks: use data.class_path=SegmentationFolder, or a TrainTransform."
            )
        rng = generators(0)
        image, mask = pixels(picture.image), picture.mask[None]
        size = self.resized(image.shape[-2], image.shape[-1], uniform(rng, *self.scale))
        image = TF.resize(image, size, interpolation=BICUBIC, antialias=True)
        mask = TF.resize(mask, size, interpolation=InterpolationMode.NEAREST_EXACT)
        top, left = self.corner(rng, mask)
        image, mask = (x[:, top : top + self.img_size, left : left + self.img_size] for x in (image, mask))
        if rng.random() < self.hflip_prob:
            image, mask = image.flip(-1), mask.flip(-1)
        parameters = torch.tensor([0, *_draw_jitter(rng, self.color_jitter, 1.0), 0, 0, 0], dtype=torch.float32)
        return self._padded(image, mask, parameters)

    def resized(self, height: int, width: int, factor: float) -> list[int]:
        """Height and width after resizing."""
        long, short = max(self.base_size), min(self.base_size)
        ratio = factor * min(long / max(height, width), short / min(height, width))
        return [max(round(height * ratio), 1), max(round(width * ratio), 1)]

    def corner(self, rng: Rng, mask: Tensor) -> tuple[int, int]:
        """Top and left of the crop out of a mask (1, H, W)."""
        free = [max(side - self.img_size, 0) for side in mask.shape[-2:]]
        top = left = 0
        for _ in range(_ATTEMPTS):
            top, left = (int(rng.integers(room + 1)) for room in free)
            crop = mask[:, top : top + self.img_size, left : left + self.img_size]
            counts = torch.bincount(crop[crop != IGNORED].long())
            if self.max_class_share == 1 or (counts.sum() and counts.max() < self.max_class_share * counts.sum()):
                break
        return top, left

    def _padded(self, image: Tensor, mask: Tensor, parameters: Tensor) -> MaskedView:
        height, width = image.shape[-2:]
        size = (self.img_size, self.img_size)
        # In the crop's mean colour, which leaves the contrast jitter's mean as it is; zeros follow on the device.
        canvas = image.float().mean((1, 2), keepdim=True).round().to(torch.uint8).expand(-1, *size).clone()
        canvas[:, :height, :width] = image
        labels = torch.full(size, IGNORED, dtype=mask.dtype)
        labels[:height, :width] = mask[0]
        return MaskedView(View(canvas, parameters), labels, torch.tensor([height, width]))


class WholeImage(EvalTransform):
    """Images as they are; those that are shown in pictures are cropped to `img_size`."""

    def __call__(self, picture: Picture, generators: Callable[[int], Rng] | None = None) -> Tensor:
        return pixels(picture.image if isinstance(picture, Masked) else picture)

    def square(self, picture: Picture) -> Tensor:
        """uint8 (3, img_size, img_size)."""
        return super().__call__(picture.image if isinstance(picture, Masked) else picture)
