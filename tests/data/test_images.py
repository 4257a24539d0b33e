"""Image files of every kind and in every state."""

import io
import pickle
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as TF

from vil_lightning.data import images as images_module
from vil_lightning.data.crops import crop_all
from vil_lightning.data.images import BadImageError, EncodedImage


def gradient(height: int = 24, width: int = 40) -> Image.Image:
    """A picture whose every corner has another colour."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * y / height, 255 * x / width, 60 + 0 * x], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def pixels_of(image: Image.Image) -> torch.Tensor:
    return TF.pil_to_tensor(image)


# --- kinds of files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_decode__as_pil(kind: str, tmp_path: Path) -> None:
    content = encoded(gradient(), kind)
    expected = pixels_of(Image.open(io.BytesIO(content)).convert("RGB"))
    path = tmp_path / "a"
    path.write_bytes(content)
    for file in (content, path, str(path)):
        picture = EncodedImage(file)
        assert picture.size() == (24, 40)
        decoded = picture.decode()
        assert (decoded.shape, decoded.dtype) == ((3, 24, 40), torch.uint8)
        assert torch.equal(decoded, expected)
        assert torch.equal(picture.decode(), expected)  # and again
        assert picture.encoded() == content


def test_decode__memory_is_channels_last() -> None:
    """The fast resizing of torchvision needs it."""
    assert EncodedImage(encoded(gradient(), "PNG")).decode().stride() == (1, 120, 3)


def test_decode__cmyk_jpeg() -> None:
    content = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    red, green, blue = EncodedImage(content).decode().float().mean(dim=(1, 2)).tolist()
    assert red > 240
    assert max(green, blue) < 15


def test_decode__grey_and_grey_with_alpha() -> None:
    for mode in ("L", "LA"):
        decoded = EncodedImage(encoded(gradient().convert(mode), "PNG")).decode()
        assert torch.equal(decoded, pixels_of(gradient().convert("L")).expand(3, -1, -1))


def test_decode__one_bit() -> None:
    image = Image.new("1", (9, 5), 1)
    image.putpixel((2, 3), 0)
    decoded = EncodedImage(encoded(image, "PNG")).decode()
    assert decoded[:, 3, 2].tolist() == [0, 0, 0]
    assert int(decoded.long().sum()) == 3 * 44 * 255


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_decode__sixteen_bits_keep_their_range(kind: str) -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16).repeat(3, axis=0)
    decoded = EncodedImage(encoded(Image.fromarray(values), kind)).decode()
    assert decoded[0, 0].tolist() == [0, 1, 128, 255]  # not clipped at 255
    assert torch.equal(decoded[0], decoded[2])


def test_decode__palette_with_and_without_transparency() -> None:
    image = gradient().quantize(16)
    expected = pixels_of(image.convert("RGB"))
    assert torch.equal(EncodedImage(encoded(image, "PNG")).decode(), expected)
    assert torch.equal(EncodedImage(encoded(image, "PNG", transparency=bytes([0] * 16))).decode(), expected)


def test_decode__transparency_is_dropped() -> None:
    image = gradient().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    assert torch.equal(EncodedImage(encoded(image, "PNG")).decode(), pixels_of(gradient()))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_decode__first_image_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue", "lime")]
    settings = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **settings)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert torch.equal(EncodedImage(content).decode(), pixels_of(frames[0]))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decode__upright_by_exif(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(gradient(), kind, exif=exif)
    picture = EncodedImage(content)
    expected = pixels_of(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    assert picture.size() == tuple(expected.shape[1:]) == ((24, 40) if orientation < 5 else (40, 24))
    assert torch.equal(picture.decode(), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_decode__damaged_exif_says_nothing() -> None:
    content = encoded(gradient(), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xffgarbage")
    picture = EncodedImage(content)
    assert picture.size() == (24, 40)
    assert picture.decode().shape == (3, 24, 40)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_decode__one_pixel_wide(size: tuple[int, int]) -> None:
    assert EncodedImage(encoded(Image.new("RGB", size, "red"), "PNG")).decode().shape == (3, size[1], size[0])


# --- reduced scale ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(320, 240), (321, 243), (17, 9)])
def test_decode__reduced_jpeg(reduction: int, size: tuple[int, int]) -> None:
    content = encoded(gradient(size[1], size[0]), "JPEG", quality=95)
    picture = EncodedImage(content)
    decoded = picture.decode(reduction)
    assert decoded.shape == (3, -(-size[1] // reduction), -(-size[0] // reduction))
    if size == (320, 240):  # elsewhere the last pixel covers less than the others
        whole = EncodedImage(content).decode()
        small = TF.resize(whole, list(decoded.shape[1:]), antialias=True)
        inside = (slice(None), slice(1, -1), slice(1, -1))
        assert int((decoded[inside].int() - small[inside].int()).abs().max()) <= 6
    assert picture.size() == (size[1], size[0])  # of the full picture, also afterwards


def test_decode__others_come_in_full() -> None:
    assert EncodedImage(encoded(gradient(), "PNG")).decode(8).shape == (3, 24, 40)


def test_decode__reduced_and_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = EncodedImage(encoded(gradient(160, 320), "JPEG", exif=exif, quality=95)).decode(4)
    assert decoded.shape == (3, 80, 40)
    assert int(decoded[1, 5].float().mean()) < 40  # the left edge, without green, is on top now
    assert int(decoded[1, -5].float().mean()) > 215


@pytest.mark.parametrize(("sizes", "reduction"), [([50], 4), ([50, 99], 2), ([50, 101], 1), ([20], 8), ([300], 1)])
def test_crop_all__decodes_once_as_small_as_the_boxes_allow(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], reduction: int
) -> None:
    seen: list[int] = []
    decode = EncodedImage.decode

    def record(self: EncodedImage, reduction: int = 1) -> torch.Tensor:
        seen.append(reduction)
        return decode(self, reduction)

    monkeypatch.setattr(EncodedImage, "decode", record)
    content = encoded(gradient(400, 600), "JPEG", quality=95)
    boxes = [(100, 200, 200, 250)] * len(sizes)
    views = crop_all(EncodedImage(content), boxes, sizes)
    assert seen == [reduction]
    exact = crop_all(EncodedImage(content).decode(), boxes, sizes)
    for view, whole, size in zip(views, exact, sizes, strict=True):
        assert view.shape == (3, size, size)
        assert int((view.int() - whole.int()).abs().max()) <= 4
        assert reduction > 1 or torch.equal(view, whole)


def test_crop_all__against_pil() -> None:
    """The bicubic resizing of torchvision and that of PIL agree within rounding."""
    image = gradient(90, 120)
    box = (10, 20, 60, 70)
    view = crop_all(pixels_of(image), [box], [32])[0]
    reference = image.crop((20, 10, 90, 70)).resize((32, 32), Image.Resampling.BICUBIC)
    assert int((view.int() - pixels_of(reference).int()).abs().max()) <= 1


# --- damaged files ----------------------------------------------------------------------------------------------------


def truncated(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: b"", "is empty"),
        (lambda: b"not a picture at all", "is no image"),
        (lambda: b"<html>404</html>", "is no image"),
        (lambda: encoded(gradient(), "PNG")[:20], "is damaged|cannot be decoded"),
        (lambda: truncated(encoded(gradient(), "PNG")), "is damaged|cannot be decoded"),
        (lambda: truncated(encoded(gradient(200, 300), "JPEG")), "cannot be decoded"),
        (lambda: truncated(encoded(gradient(200, 300), "JPEG", progressive=True)), "cannot be decoded"),
        (lambda: truncated(encoded(gradient(), "BMP")), "cannot be decoded"),
        (lambda: re.sub(rb"IDAT..", b"IDAT\0\0", encoded(gradient(), "PNG"), flags=re.DOTALL), "is damaged .*checksum"),
        (lambda: encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
    ],
)
def test_damaged__one_error_with_the_name(make: Callable[[], bytes], reason: str) -> None:
    picture = EncodedImage(make(), name="folder/bad.png")
    with pytest.raises(BadImageError, match=f"folder/bad.png: .*({reason})") as info:
        picture.decode()
    assert info.value.name == "folder/bad.png"
    assert "0x" not in info.value.reason  # no address in memory, so that logs of two runs are equal


def test_damaged__missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match=r"gone\.png: cannot be read \(No such file"):
        EncodedImage(tmp_path / "gone.png").decode()


def test_bomb__refused_by_its_header() -> None:
    content = encoded(Image.new("1", (8, 8)), "PNG")
    header = b"IHDR" + struct.pack(">II", 30_000, 30_000) + content[24:29]
    content = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
    with pytest.raises(BadImageError, match=r"bomb\.png: is refused .*900000000 pixels"):
        EncodedImage(content, name="bomb.png").size()


def test_bad_image_error__survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadImageError("a.png", "is empty")))
    assert (error.name, error.reason, str(error)) == ("a.png", "is empty", "a.png: is empty")


def test_reductions__are_those_of_jpeg() -> None:
    assert images_module.REDUCTIONS == (8, 4, 2)
