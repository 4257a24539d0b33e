"""Corrupted val images, made on the fly with torchvision's operators: the same for every network, run and number of workers.

Names and strengths are those of ImageNet-C (Hendrycks & Dietterich 2019, arXiv:1903.12261, make_imagenet_c.py), as far as
torchvision or Pillow has the operator (packages made for this bring OpenCV and scikit-image along); strengths were chosen for
images of 224 px. The images are not those of ImageNet-C: operators round otherwise, and the noise is another draw. Left out are
weather, brightness, saturation, all other kinds of blur and noise, and the elastic transform; and so is the mean corruption
error, which needs AlexNet's errors. For published numbers, use the folders of ImageNet-C itself (`Robustness(corrupted=...)`).
"""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from vil_lightning.data.images import Picture
from vil_lightning.data.transforms import EvalTransform
from vil_lightning.errors import ConfigError

SEVERITIES = (1, 2, 3, 4, 5)
STRENGTHS: dict[str, tuple[float, ...]] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation, of values in [0, 1]
    "gaussian_blur": (1, 2, 3, 4, 6),  # standard deviation in px
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # what is left of the distance to the mean of a channel
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),  # of the side
    "jpeg_compression": (25, 18, 15, 10, 7),  # quality
}


def corrupt(image: Tensor, corruption: str, severity: int, generator: torch.Generator) -> Tensor:
    """A corrupted image, uint8 (3, H, W) -> uint8 (3, H, W)."""
    strength = STRENGTHS[corruption][severity - 1]
    if corruption == "gaussian_noise":
        noise = torch.randn(image.shape, generator=generator)
        return _to_uint8(image.float() + 255 * strength * noise)
    if corruption == "gaussian_blur":
        # Four deviations to either side, but a kernel must fit into the reflected image.
        reach = min(int(4 * strength + 0.5), min(image.shape[-2:]) - 1)
        return TF.gaussian_blur(image, [2 * reach + 1] * 2, [strength] * 2)
    if corruption == "contrast":
        mean = image.float().mean((1, 2), keepdim=True)
        return _to_uint8((image.float() - mean) * strength + mean)
    if corruption == "pixelate":
        height, width = image.shape[-2:]
        small = [max(1, int(height * strength)), max(1, int(width * strength))]
        picture = TF.to_pil_image(image)  # torchvision has no filter of boxes
        for size in (small, [height, width]):
            picture = picture.resize((size[1], size[0]), Image.Resampling.BOX)
        return TF.pil_to_tensor(picture)
    return TF.jpeg(image, int(strength))


def _to_uint8(image: Tensor) -> Tensor:
    return image.round().clamp(0, 255).to(torch.uint8)


class CorruptedEvalTransform(EvalTransform):
    """The evaluation transform, with its result corrupted.

    Args:
        img_size: Side of the view in px.
        crop_pct: As in `EvalTransform`.
        corruption: One of `STRENGTHS`.
        severity: 1 to 5.
    """

    def __init__(self, img_size: int, crop_pct: float, corruption: str, severity: int) -> None:
        super().__init__(img_size, crop_pct)
        check_corruption(corruption, severity)
        self.corruption, self.severity = corruption, severity
        self.options = {"corruption": corruption, "severity": severity}

    def __call__(self, picture: Picture, generators: Callable[[int], Any] | None = None) -> Tensor:
        assert generators is not None
        seed = int(generators(0).integers(2**62))  # of this image
        image = super().__call__(picture)
        return corrupt(image, self.corruption, self.severity, torch.Generator().manual_seed(seed))


def check_corruption(corruption: str, severity: int) -> None:
    """Refuse what is not known.

    Raises:
        ConfigError: Naming what is.
    """
    if corruption not in STRENGTHS:
        raise ConfigError(f"corruptions: {corruption!r} is not known. Available: {', '.join(STRENGTHS)}.")
    if severity not in SEVERITIES:
        raise ConfigError(f"severities: {severity} is not known. Available: 1 to 5.")
