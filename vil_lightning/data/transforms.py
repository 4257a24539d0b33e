"""Views of an image: what the workers do.

They crop, as uint8, and draw at random how brightness, colours and sharpness are to change; `photometry` does that later, for
a whole batch on the device. All randomness of a view comes from the generator it is given.
"""

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from vil_lightning.checks import check_image_sizes, check_not_negative, check_shares
from vil_lightning.data.crops import (
    SIMPLE_CROP_PADDING,
    Rng,
    crop_all,
    pixels,
    random_crop_box,
    resize_short_side,
    rotate,
    simple_random_crop,
    size_of,
    uniform,
)
from vil_lightning.data.images import Picture
from vil_lightning.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_THREE_AUGMENT_SIGMA = (0.1, 2.0)
_RAND_AUGMENT = re.compile(r"rand(-((m|n|mmax)\d+|(p|mstd)\d+(\.\d+)?|inc[01]|tweights|t3a|t3aw))*")
_NUM_ORDERS = math.factorial(4)


class View(NamedTuple):
    """A view as it leaves a worker."""

    image: Tensor  # uint8 (3, S, S), cropped
    parameters: Tensor  # float32 (9,): `photometry.PARAMETERS`


class Transform(Protocol):
    """What a data set does to a picture. `generators(i)` is the random generator of the i-th view."""

    def __call__(self, picture: Picture, generators: Callable[[int], Rng]) -> Any: ...


class TrainingTransform:
    """Random views for training: the type of `data.train_transform`, open to classes of your own.

    `__call__(picture, generators)` gives a `View` or a list of them, drawn from `generators(0)`, `generators(1)`, ...; `stages`
    says in which order the photometry acts (`photometry.STAGES` in any order).
    """

    stages: tuple[str, ...]

    def __call__(self, picture: Picture, generators: Callable[[int], Rng]) -> View | list[View]:
        raise NotImplementedError


class MultiCrop(TrainingTransform):
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
        check_shares(
            "data.train_transform",
            hflip_prob=hflip_prob,
            color_jitter_prob=color_jitter_prob,
            grayscale_prob=grayscale_prob,
            solarize_prob=solarize_prob,
        )
        if not all(0 <= probability <= 1 for probability in blur_probs):
            raise ConfigError(f"data.train_transform.blur_probs={blur_probs} must be three numbers in [0, 1].")
        check_not_negative("data.train_transform", rotation=rotation)
        if not 0 < blur_sigma[0] <= blur_sigma[1]:
            raise ConfigError(f"data.train_transform.blur_sigma={blur_sigma} must satisfy 0 < smallest <= largest.")
        if num_local_views < 0 or global_size < 1 or local_size < 1:
            raise ConfigError(
                f"data.train_transform.num_local_views={num_local_views} must not be negative, global_size={global_size} and "
                f"local_size={local_size} must be at least 1 px."
            )
        check_image_sizes("data.train_transform", global_size=global_size, local_size=local_size)
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

    stages = ("flip", "jitter", "grayscale", "blur", "solarize")  # the order of the photometry

    def __call__(self, picture: Picture, generators: Callable[[int], Rng]) -> list[View]:
        """The two global views, then the local views."""
        blur1, blur2, blur_local = self.blur_probs
        local = (self.local_size, self.local_scale, blur_local, 0.0)
        plans = [
            (self.global_size, self.global_scale, blur1, 0.0),
            (self.global_size, self.global_scale, blur2, self.solarize_prob),
            *[local] * self.num_local_views,
        ]
        rngs = [generators(i) for i in range(len(plans))]
        height, width = size_of(picture)
        boxes = [
            random_crop_box(rng, height, width, scale, self.ratio)
            for rng, (_, scale, _, _) in zip(rngs, plans, strict=True)
        ]
        images = crop_all(picture, boxes, [size for size, *_ in plans])
        return [
            View(self._turned(image, rng), self._photometry(rng, blur, solarize))
            for image, rng, (_, _, blur, solarize) in zip(images, rngs, plans, strict=True)
        ]

    def _turned(self, image: Tensor, rng: Rng) -> Tensor:
        # After resizing, when there are more pixels to interpolate.
        return rotate(image, uniform(rng, -self.rotation, self.rotation)) if self.rotation else image

    def _photometry(self, rng: Rng, blur: float, solarize: float) -> Tensor:
        flip = _happens(rng, self.hflip_prob)
        jitter = _draw_jitter(rng, self.color_jitter, self.color_jitter_prob)
        grayscale = _happens(rng, self.grayscale_prob)
        sigma = uniform(rng, *self.blur_sigma) if _happens(rng, blur) else 0.0
        return torch.tensor([flip, *jitter, grayscale, sigma, _happens(rng, solarize)], dtype=torch.float32)


class TrainTransform(TrainingTransform):
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
        smallest = SIMPLE_CROP_PADDING + 1 if crop == "simple" else 1  # reflection needs more pixels than it adds
        if img_size < smallest:
            raise ConfigError(
                f"data.train_transform.img_size={img_size} must be at least {smallest} with crop={crop!r}."
            )
        check_image_sizes("data.train_transform", img_size=img_size)
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

    # Order of the photometry; 3-Augment is one of the three in the middle.
    stages = ("flip", "grayscale", "solarize", "blur", "jitter")

    def __call__(self, picture: Picture, generators: Callable[[int], Rng]) -> View:
        rng = generators(0)
        if self.crop == "simple":
            image = simple_random_crop(rng, picture, self.img_size)
        else:
            box = random_crop_box(rng, *size_of(picture), self.scale, self.ratio)
            image = crop_all(picture, [box], [self.img_size])[0]
        if self.rotation:
            image = rotate(image, uniform(rng, -self.rotation, self.rotation))
        flip = _happens(rng, self.hflip_prob)
        kind = int(rng.integers(3)) if self.three_augment else -1
        sigma = uniform(rng, *_THREE_AUGMENT_SIGMA) if kind == 2 else 0.0
        if self._policy is not None:
            # It acts on bytes of a picture that was flipped, so both happen here.
            image, flip = self._rand_augmented(rng, TF.horizontal_flip(image) if flip else image), False
        jitter = _draw_jitter(rng, self.color_jitter, self.color_jitter_prob)
        return View(image, torch.tensor([flip, *jitter, kind == 0, sigma, kind == 1], dtype=torch.float32))

    def _rand_augmented(self, rng: Rng, image: Tensor) -> Tensor:
        assert self._policy is not None
        with _global_generators_seeded(int(rng.integers(2**32))):
            return TF.pil_to_tensor(self._policy(TF.to_pil_image(image)))


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
        self.options: dict[str, Any] = {}  # what a subclass does besides: features in a cache are told apart by it

    def __call__(self, picture: Picture, generators: Callable[[int], Rng] | None = None) -> Tensor:
        image = resize_short_side(pixels(picture), self.short_side)
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


def _draw_jitter(rng: Rng, strengths: Sequence[float], probability: float) -> list[float]:
    """Factors of brightness, contrast and saturation, shift of the hue, and the number of their order."""
    brightness, contrast, saturation, hue = strengths
    if not _happens(rng, probability):
        return [1.0, 1.0, 1.0, 0.0, 0]
    factors = [uniform(rng, max(1 - strength, 0.0), 1 + strength) for strength in (brightness, contrast, saturation)]
    return [*factors, uniform(rng, -hue, hue), int(rng.integers(_NUM_ORDERS))]


def _happens(rng: Rng, probability: float) -> bool:
    return probability > 0 and bool(rng.random() < probability)


@contextmanager
def _global_generators_seeded(seed: int) -> Iterator[None]:
    """Seed Python's and numpy's global generators, which RandAugment draws from; restore them afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
