"""Image files, decoded when needed, whatever state they are in.

What a source gives for an image is a `Picture`: a uint8 tensor (3, H, W), or an `EncodedImage` that becomes one.
"""

import io
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

REDUCTIONS = (8, 4, 2)  # scales at which a JPEG can be decoded
_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(Exception):
    """An image that cannot be read.

    Args:
        name: What to call it: a path, or a place in a shard.
        reason: What is wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both, so that it survives pickling
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class EncodedImage:
    """An image file of any kind that PIL reads, in a path or in memory.

    It comes as RGB: CMYK, palettes and 16 bits are converted, transparency is dropped, of an animation the first image is
    taken, and a photograph is turned upright if its EXIF data say so.

    Args:
        file: Path, or the content of the file.
        name: What to call it in messages; the path if None.
    """

    def __init__(self, file: str | Path | bytes, name: str | None = None) -> None:
        self.file = file
        self.name = name or ("an image in memory" if isinstance(file, bytes) else str(file))
        self._opened: Image.Image | None = None

    def encoded(self) -> bytes:
        """The file as it is.

        Raises:
            BadImageError: If it cannot be read.
        """
        if isinstance(self.file, bytes):
            return self.file
        try:
            return Path(self.file).read_bytes()
        except OSError as error:
            raise BadImageError(self.name, f"cannot be read ({error.strerror or error})") from error

    def size(self) -> tuple[int, int]:
        """Height and width in px, upright; the pixels are not decoded for this.

        Raises:
            BadImageError: If it is no image, or so large that PIL refuses it.
        """
        image = self._open()
        sideways = _orientation(image) in _SIDEWAYS
        return (image.width, image.height) if sideways else (image.height, image.width)

    def decode(self, reduction: int = 1) -> Tensor:
        """The pixels: uint8 (3, H, W), in memory as (H, W, 3).

        Args:
            reduction: A JPEG is decoded at this fraction of its size (1, 2, 4 or 8; sides are rounded up), which is faster.
                Other files come in full.

        Raises:
            BadImageError: If that fails.
        """
        image = self._open()
        self._opened = None  # a file is decoded once at most
        try:
            if reduction > 1:
                # What PIL chooses is never smaller than what it is asked for.
                image.draft(image.mode, (image.width // reduction, image.height // reduction))
            turn = _orientation(image)
            image.load()
            image = _to_rgb(image)
            if turn in _TURNS:
                image = image.transpose(_TURNS[turn])
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
        except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
            raise BadImageError(self.name, f"cannot be decoded ({error or type(error).__name__})") from error

    def _open(self) -> Image.Image:
        if self._opened is not None:
            return self._opened
        content = self.encoded()
        if not content:
            raise BadImageError(self.name, "is empty")
        try:
            image = Image.open(io.BytesIO(content))
            if image.format == "PNG":  # decoding does not look at its checksums, and makes zeros of what it cannot read
                Image.open(io.BytesIO(content)).verify()
        except Image.DecompressionBombError as error:  # above 179 million pixels
            raise BadImageError(self.name, f"is refused ({error})") from error
        except UnidentifiedImageError as error:
            raise BadImageError(self.name, "is no image that PIL can read") from error
        except Exception as error:
            raise BadImageError(self.name, f"is damaged ({error or type(error).__name__})") from error
        if min(image.size) < 1:
            raise BadImageError(self.name, f"has {image.width} x {image.height} px")
        self._opened = image
        return image


Picture: TypeAlias = Tensor | EncodedImage

_SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange height and width


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data say nothing; the pixels may be sound
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode."""
    if image.mode.startswith("I"):  # 16 bits per pixel, as `I;16` or, in some files, as 32-bit integers
        values = np.asarray(image, dtype=np.float64).clip(0, 65535) / 257
        return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
