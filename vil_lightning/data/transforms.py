"""Views of an image. Input and output are uint8 tensors (3, H, W); randomness comes from torch's CPU generator."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from vil_lightning.errors import ConfigError

_BICUBIC = InterpolationMode.BICUBIC


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
        for name, scale in (("global_scale", global_scale), ("local_scale", local_scale)):
            if not 0 < scale[0] <= scale[1] <= 1:
                raise ConfigError(f"data.train_transform.{name}={scale} must satisfy 0 < smallest <= largest <= 1.")
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
        top, left, height, width = random_crop_box(image.shape[-2], image.shape[-1], scale, self.ratio)
        image = TF.resized_crop(image, top, left, height, width, [size, size], interpolation=_BICUBIC, antialias=True)
        if self.rotation:  # after resizing, when there are more pixels to interpolate
            image = _rotate(image, _uniform(-self.rotation, self.rotation))
        if _happens(self.hflip_prob):
            image = TF.horizontal_flip(image)
        if _happens(self.color_jitter_prob):
            image = self._jitter(image)
        if _happens(self.grayscale_prob):
            image = TF.rgb_to_grayscale(image, num_output_channels=3)
        if _happens(blur):
            sigma = _uniform(*self.blur_sigma)
            kernel = min(2 * round(3 * sigma) + 1, 2 * size - 1)
            image = TF.gaussian_blur(image, [kernel, kernel], [sigma, sigma]) if kernel > 1 else image
        return TF.solarize(image, 128) if _happens(solarize) else image

    def _jitter(self, image: Tensor) -> Tensor:
        brightness, contrast, saturation, hue = self.color_jitter
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


class EvalTransform:
    """Resize the short side (bicubic), crop the centre: the reference evaluation, with crop ratio 1."""

    def __init__(self, img_size: int) -> None:
        self.img_size = img_size

    def __call__(self, image: Tensor) -> Tensor:
        image = TF.resize(image, [self.img_size], interpolation=_BICUBIC, antialias=True)
        return TF.center_crop(image, [self.img_size, self.img_size])
