"""Views of an image. Input and output are uint8 tensors (3, H, W); randomness comes from torch's CPU generator."""

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from vil_lightning.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_BICUBIC = InterpolationMode.BICUBIC
_SOLARIZE_THRESHOLD = 128
_THREE_AUGMENT_SIGMA = (0.1, 2.0)
_SIMPLE_CROP_PADDING = 4
_RAND_AUGMENT = re.compile(r"rand(-((m|n|mmax)\d+|(p|mstd)\d+(\.\d+)?|inc[01]|tweights|t3a|t3aw))*")


def _uniform(low: float, high: float) -> float:
    return torch.empty(()).uniform_(low, high).item() if high > low else low


def _happens(probability: float) -> bool:
    return probability > 0 and torch.rand(()).item() < probability


class MultiCrop:
    """Multi-crop augmentation of DINO: two large views and several small ones.

    Order and values follow the official recipe: random resized crop (bicubic), horizontal flip, colour jitter, grayscale,
    Gaussian blur (probability 1.0, 0.1 and 0.5 on first global, second global and local views), solarisation of the
    second global view.

    Args:
        global_size: Side of the two global views in px.
        local_size: Side of the local views in px.
        num_local_views: Number of local views.
        global_scale: Share of the image's area covered by a global view, smallest and largest.
        local_scale: The same for local views.
        ratio: Aspect ratio of the crops, smallest and largest.
        hflip_prob: Probability of a horizontal flip. 0 where left and right matter (digits).
        rotation: Largest rotation of a view in degrees, either way. 0 (none) in the official recipe.
        color_jitter: Strengths for brightness, contrast, saturation and hue.
        color_jitter_prob: Probability of the colour jitter.
        grayscale_prob: Probability of dropping the colours.
        blur_probs: Probability of the blur on the first global, the second global and the local views.
        blur_sigma: Smallest and largest standard deviation of the blur, in px.
        solarize_prob: Probability of solarisation, on the second global view only.

    References:
        Caron et al. 2021, arXiv:2104.14294; the probabilities are those of facebookresearch/dino main_dino.py.
    """

    def __init__(
        self,
        global_size: int = 224,
        local_size: int = 96,
        num_local_views: int = 8,
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.4),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip_prob: float = 0.5,
        rotation: float = 0.0,
        color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
        color_jitter_prob: float = 0.8,
        grayscale_prob: float = 0.2,
        blur_probs: tuple[float, float, float] = (1.0, 0.1, 0.5),
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        solarize_prob: float = 0.2,
    ) -> None:
        _check_scale("global_scale", global_scale)
        _check_scale("local_scale", local_scale)
        _check_ratio(ratio)
        _check_color_jitter(color_jitter)
        probabilities = (hflip_prob, color_jitter_prob, grayscale_prob, *blur_probs, solarize_prob)
        if not all(0 <= p <= 1 for p in probabilities):
            raise ConfigError(f"data.train_transform: probabilities must be in [0, 1], got {probabilities}.")
        if num_local_views < 0 or global_size < 1 or local_size < 1:
            raise ConfigError(
                f"data.train_transform.num_local_views={num_local_views} must not be negative, global_size={global_size} and "
                f"local_size={local_size} must be at least 1 px."
            )
        if num_local_views and local_size > global_size:
            raise ConfigError(
                f"data.train_transform.local_size={local_size} must not exceed global_size={global_size}."
            )
        self.global_size = global_size
        self.local_size = local_size
        self.num_local_views = num_local_views
        self.global_scale = global_scale
        self.local_scale = local_scale
        self.ratio = ratio
        self.hflip_prob = hflip_prob
        self.rotation = rotation
        self.color_jitter = color_jitter
        self.color_jitter_prob = color_jitter_prob
        self.grayscale_prob = grayscale_prob
        self.blur_probs = blur_probs
        self.blur_sigma = blur_sigma
        self.solarize_prob = solarize_prob

    def __call__(self, image: Tensor) -> list[Tensor]:
        """The two global views, then the local views."""
        blur1, blur2, blur_local = self.blur_probs
        views = [
            self._view(image, self.global_size, self.global_scale, blur1, 0.0),
            self._view(image, self.global_size, self.global_scale, blur2, self.solarize_prob),
        ]
        for _ in range(self.num_local_views):
            views.append(self._view(image, self.local_size, self.local_scale, blur_local, 0.0))
        return views

    def _view(self, image: Tensor, size: int, scale: Sequence[float], blur: float, solarize: float) -> Tensor:
        image = _random_resized_crop(image, size, scale, self.ratio)
        if self.rotation:  # after resizing, when there are more pixels to interpolate
            image = _rotate(image, _uniform(-self.rotation, self.rotation))
        if _happens(self.hflip_prob):
            image = TF.horizontal_flip(image)
        if _happens(self.color_jitter_prob):
            image = _jitter(image, self.color_jitter)
        if _happens(self.grayscale_prob):
            image = TF.rgb_to_grayscale(image, num_output_channels=3)
        if _happens(blur):
            image = _blur(image, self.blur_sigma)
        return TF.solarize(image, _SOLARIZE_THRESHOLD) if _happens(solarize) else image


class TrainTransform:
    """One augmented view for supervised training, after the recipes of ViL and DeiT.

    In the order of the ViL paper: random resized crop (bicubic), horizontal flip, 3-Augment (exactly one of grayscale,
    solarisation and Gaussian blur, equally often) and colour jitter of brightness, contrast and saturation, in random order.
    With `crop="simple"` it is DeiT-III's; with `rand_augment` DeiT's, which has neither 3-Augment nor colour jitter: set
    `three_augment=False` and `color_jitter=(0, 0, 0, 0)` with it. (RandAugment and colour jitter are both applied if both are
    set; RandAugment and 3-Augment are refused.)

    Args:
        img_size: Side of the view in px.
        scale: Share of the image's area covered by the crop, smallest and largest.
        ratio: Aspect ratio of the crop, smallest and largest.
        crop: "random_resized", or "simple": the short side is resized to `img_size`, 4 px are added around by reflection,
            and a square is cut out anywhere. `scale` and `ratio` mean nothing to the latter.
        hflip_prob: Probability of a horizontal flip. 0 where left and right matter (digits).
        three_augment: Whether to apply 3-Augment.
        color_jitter: Strengths for brightness, contrast, saturation and hue.
        color_jitter_prob: Probability of the colour jitter.
        rand_augment: timm's name of a RandAugment policy, "rand-m9-mstd0.5-inc1" in DeiT. What comes into view is filled with
            the mean colour of ImageNet, as in timm.
        rotation: Largest rotation in degrees, either way. 0 (none) in the published recipes.

    References:
        Alkin et al. 2024 (ViL), arXiv:2406.04303; Touvron et al. 2021 (DeiT), arXiv:2012.12877; Touvron et al. 2022
        (DeiT III: 3-Augment, simple random crop), arXiv:2204.07118.
    """

    def __init__(
        self,
        img_size: int = 224,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        crop: str = "random_resized",
        hflip_prob: float = 0.5,
        three_augment: bool = True,
        color_jitter: tuple[float, float, float, float] = (0.3, 0.3, 0.3, 0.0),
        color_jitter_prob: float = 1.0,
        rand_augment: str | None = None,
        rotation: float = 0.0,
    ) -> None:
        if crop not in ("random_resized", "simple"):
            raise ConfigError(f"data.train_transform.crop={crop!r} must be 'random_resized' or 'simple'.")
        smallest = _SIMPLE_CROP_PADDING + 1 if crop == "simple" else 1  # reflection needs more pixels than it adds
        if img_size < smallest:
            raise ConfigError(
                f"data.train_transform.img_size={img_size} must be at least {smallest} with crop={crop!r}."
            )
        _check_scale("scale", scale)
        _check_ratio(ratio)
        _check_color_jitter(color_jitter)
        for name, probability in (("hflip_prob", hflip_prob), ("color_jitter_prob", color_jitter_prob)):
            if not 0 <= probability <= 1:
                raise ConfigError(f"data.train_transform.{name}={probability} must be in [0, 1].")
        if rotation < 0:
            raise ConfigError(f"data.train_transform.rotation={rotation} must not be negative.")
        if rand_augment is not None and three_augment:
            raise ConfigError(
                f"data.train_transform.rand_augment={rand_augment!r} replaces 3-Augment. Set "
                "data.train_transform.three_augment to false, or rand_augment to null."
            )
        self.img_size = img_size
        self.scale = scale
        self.ratio = ratio
        self.crop = crop
        self.hflip_prob = hflip_prob
        self.three_augment = three_augment
        self.color_jitter = color_jitter
        self.color_jitter_prob = color_jitter_prob
        self.rand_augment = rand_augment
        self.rotation = rotation
        self._policy = None if rand_augment is None else _rand_augment_policy(rand_augment, img_size)

    def __call__(self, image: Tensor) -> Tensor:
        if self.crop == "simple":
            image = _simple_random_crop(image, self.img_size)
        else:
            image = _random_resized_crop(image, self.img_size, self.scale, self.ratio)
        if self.rotation:
            image = _rotate(image, _uniform(-self.rotation, self.rotation))
        if _happens(self.hflip_prob):
            image = TF.horizontal_flip(image)
        if self.three_augment:
            image = _three_augment(image)
        if self._policy is not None:
            with _global_generators_seeded():
                image = TF.pil_to_tensor(self._policy(TF.to_pil_image(image)))
        if _happens(self.color_jitter_prob):
            image = _jitter(image, self.color_jitter)
        return image


class EvalTransform:
    """Resize the short side (bicubic), crop the centre.

    Args:
        img_size: Side of the view in px.
        crop_pct: `img_size` as a share of the resized short side. 1 in the paper of ViL, 0.875 in those of DeiT and Vim.
    """

    def __init__(self, img_size: int, crop_pct: float = 1.0) -> None:
        if not 0 < crop_pct <= 1:
            raise ConfigError(f"data.crop_pct={crop_pct} must satisfy 0 < crop_pct <= 1.")
        self.img_size = img_size
        self.crop_pct = crop_pct
        self.short_side = math.floor(img_size / crop_pct)

    def __call__(self, image: Tensor) -> Tensor:
        image = TF.resize(image, [self.short_side], interpolation=_BICUBIC, antialias=True)
        return TF.center_crop(image, [self.img_size, self.img_size])


# --- arguments --------------------------------------------------------------------------------------------------------


def _check_scale(name: str, scale: Sequence[float]) -> None:
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ConfigError(f"data.train_transform.{name}={scale} must satisfy 0 < smallest <= largest <= 1.")


def _check_ratio(ratio: Sequence[float]) -> None:
    if not 0 < ratio[0] <= ratio[1]:
        raise ConfigError(f"data.train_transform.ratio={ratio} must satisfy 0 < smallest <= largest.")


def _check_color_jitter(strengths: Sequence[float]) -> None:
    if len(strengths) != 4 or min(strengths) < 0 or strengths[3] > 0.5:
        raise ConfigError(
            f"data.train_transform.color_jitter={strengths} must be four numbers that are not negative (brightness, contrast, "
            "saturation, hue), the last at most 0.5."
        )


def _rand_augment_policy(name: str, img_size: int) -> Callable[[Image.Image], Image.Image]:
    """The policy with the settings of timm's own training transform, bicubic."""
    if not _RAND_AUGMENT.fullmatch(name):  # timm ignores some of what it does not know
        raise ConfigError(
            f"data.train_transform.rand_augment={name!r} is no RandAugment policy of timm. Allowed is 'rand' and any of -m9 "
            "(magnitude), -n2 (operations), -p0.5, -mstd0.5, -mmax10, -inc1, -tweights, such as 'rand-m9-mstd0.5-inc1'."
        )
    fill = tuple(round(255 * value) for value in IMAGENET_MEAN)
    settings = {"translate_const": int(0.45 * img_size), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
    return rand_augment_transform(name, settings)


# --- operations -------------------------------------------------------------------------------------------------------


def _random_resized_crop(image: Tensor, size: int, scale: Sequence[float], ratio: Sequence[float]) -> Tensor:
    top, left, height, width = random_crop_box(image.shape[-2], image.shape[-1], scale, ratio)
    return TF.resized_crop(image, top, left, height, width, [size, size], interpolation=_BICUBIC, antialias=True)


def _simple_random_crop(image: Tensor, size: int) -> Tensor:
    """Short side to `size`, a reflected border, and a square of this size from anywhere in it."""
    image = TF.resize(image, [size], interpolation=_BICUBIC, antialias=True)
    image = TF.pad(image, [_SIMPLE_CROP_PADDING], padding_mode="reflect")
    top, left = (int(torch.randint(0, side - size + 1, ())) for side in image.shape[-2:])
    return TF.crop(image, top, left, size, size)


def _three_augment(image: Tensor) -> Tensor:
    choice = int(torch.randint(3, ()))
    if choice == 0:
        return TF.rgb_to_grayscale(image, num_output_channels=3)
    if choice == 1:
        return TF.solarize(image, _SOLARIZE_THRESHOLD)
    return _blur(image, _THREE_AUGMENT_SIGMA)


def _blur(image: Tensor, sigmas: Sequence[float]) -> Tensor:
    sigma = _uniform(sigmas[0], sigmas[1])
    kernel = min(2 * round(3 * sigma) + 1, 2 * image.shape[-1] - 1)
    return TF.gaussian_blur(image, [kernel, kernel], [sigma, sigma]) if kernel > 1 else image


def _jitter(image: Tensor, strengths: Sequence[float]) -> Tensor:
    """Change brightness, contrast, saturation and hue, in random order."""
    brightness, contrast, saturation, hue = strengths
    adjust = (
        (brightness, TF.adjust_brightness, 1.0),
        (contrast, TF.adjust_contrast, 1.0),
        (saturation, TF.adjust_saturation, 1.0),
        (hue, TF.adjust_hue, 0.0),
    )
    for i in torch.randperm(4).tolist():
        strength, function, neutral = adjust[i]
        if strength > 0:
            image = function(image, max(neutral + _uniform(-strength, strength), -0.5 if i == 3 else 0.0))
    return image


@contextmanager
def _global_generators_seeded() -> Iterator[None]:
    """Run Python's and numpy's generators, which RandAugment draws from, on a seed from torch's; restore them afterwards."""
    seed = int(torch.randint(0, 2**32, ()))
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def random_crop_box(
    height: int, width: int, scale: Sequence[float], ratio: Sequence[float]
) -> tuple[int, int, int, int]:
    """Box (top, left, height, width) of a random area and aspect ratio (log-uniform); a centred square if ten draws fail."""
    log_ratio = torch.log(torch.tensor(ratio)).tolist()
    for _ in range(10):
        area = height * width * _uniform(scale[0], scale[1])
        aspect = float(torch.exp(torch.tensor(_uniform(log_ratio[0], log_ratio[1]))))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, ()))
            left = int(torch.randint(0, width - w + 1, ()))
            return top, left, h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def _rotate(image: Tensor, angle: float) -> Tensor:
    """Rotate about the centre, in degrees; what comes into view has the mean colour of the image's edge.

    That colour is moved to zero first: `rotate(fill=…)` would blend the seam with black.
    """
    border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], dim=1).float()
    edge = border.mean(dim=1).view(-1, 1, 1)
    rotated = TF.rotate(image.float() - edge, angle, interpolation=InterpolationMode.BILINEAR) + edge
    return rotated.round().clamp(0, 255).to(image.dtype)
