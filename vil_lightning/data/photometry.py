"""Colours, blur and flips of a batch of images, other for every image, where the batch lies.

The workers of a loader draw the parameters of every view (`PARAMETERS`) and cut it out; what changes its pixels happens here,
for all images of a batch at once, on the device that trains. `plan` sorts out on the CPU which images each operation
concerns, so `apply` asks the device for nothing and never waits for it: all that it decides hangs on shapes.

The operations are Pillow's, in which the published recipes are written, on floats that are not rounded in between.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Columns of the parameters of an image, all float32.
# - flip, grayscale, solarize: 0 or 1.
# - brightness, contrast, saturation: factors; 1 changes nothing.
# - hue: shift as a share of the colour circle, in [-0.5, 0.5]; 0 changes nothing.
# - order: 0 to 23, in which order those four act, a row of `itertools.permutations(range(4))`.
# - sigma: standard deviation of the Gaussian blur in px; 0 changes nothing.
PARAMETERS = ("flip", "brightness", "contrast", "saturation", "hue", "order", "grayscale", "sigma", "solarize")
STAGES = ("flip", "jitter", "grayscale", "blur", "solarize")

_NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # brightness, contrast, saturation, hue
_ORDERS = torch.tensor(list(itertools.permutations(range(4))))
_BLUR_PASSES = 3  # as many boxes as Pillow's Gaussian blur is made of
_CHUNK = 2**19  # numbers of a piece (2 MiB): it and what is made of it stay in the cache of a core


class Share(NamedTuple):
    """The images of a batch that an operation changes."""

    rows: Tensor  # (n,), their places in the batch
    amount: Tensor  # what the operation takes: (n, 1, 1, 1), or the taps of the blur (n, 2 radius + 1)


class Plan(NamedTuple):
    """What is to be done to a batch. Made of tensors alone, to be moved to the device of the images as it is."""

    flip: Share
    jitter: tuple[tuple[Share, ...], ...]  # first to last to act: brightness, contrast, saturation, hue
    grayscale: Share
    blur: Share
    solarize: Share


def plan(parameters: Tensor) -> Plan:
    """Which images every operation concerns, and how much.

    Args:
        parameters: (B, 9), the columns of `PARAMETERS`, on the CPU.
    """
    if parameters.ndim != 2 or parameters.shape[1] != len(PARAMETERS):
        raise ValueError(f"parameters of shape {tuple(parameters.shape)} must be (B, {len(PARAMETERS)}).")
    column = dict(zip(PARAMETERS, parameters.float().unbind(1), strict=True))
    amounts = [column[name] for name in ("brightness", "contrast", "saturation", "hue")]
    changes = [amount != neutral for amount, neutral in zip(amounts, _NEUTRAL, strict=True)]
    blur = _share(column["sigma"] != 0, column["sigma"])
    return Plan(
        flip=_share(column["flip"] != 0, column["flip"]),
        jitter=tuple(
            tuple(_share(changes[i] & (operation == i), amounts[i]) for i in range(4))
            for operation in _ORDERS[column["order"].long()].unbind(1)
        ),
        grayscale=_share(column["grayscale"] != 0, column["grayscale"]),
        blur=Share(blur.rows, _blur_taps(blur.amount.flatten())),
        solarize=_share(column["solarize"] != 0, column["solarize"]),
    )


def apply(images: Tensor, plan: Plan, stages: tuple[str, ...]) -> Tensor:
    """Change every image as planned; one of which nothing is asked is `images / 255`, bit for bit.

    Args:
        images: (B, 3, H, W), uint8.
        plan: Of the same B images, on the same device.
        stages: All of `STAGES`, in the order in which they act.

    Returns:
        (B, 3, H, W), float32, in [0, 1].
    """
    if sorted(stages) != sorted(STAGES):
        raise ValueError(f"stages={stages} must name each of {STAGES} once.")
    images = (images / 255).contiguous()
    for stage in stages:
        if stage == "flip":
            _change(images, plan.flip, _flip)
        elif stage == "jitter":
            for shares in plan.jitter:
                for operation, share in zip((_brightness, _contrast, _saturation, _hue), shares, strict=True):
                    _change(images, share, operation)
        elif stage == "grayscale":
            _change(images, plan.grayscale, _grayscale)
        elif stage == "blur":
            _change(images, plan.blur, _blur)
        else:
            _change(images, plan.solarize, _solarize)
    return images


def _share(concerned: Tensor, amount: Tensor) -> Share:
    rows = concerned.nonzero().flatten()
    return Share(rows, amount[rows].view(-1, 1, 1, 1))


def _change(images: Tensor, share: Share, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replace the images of a share by what the operation, which may overwrite its input, makes of them."""
    if not len(share.rows):
        return
    # On a CPU in pieces that stay in its cache: blur and hue of 224 px take a third of the time. On a GPU at once.
    pieces = math.ceil(len(share.rows) * images[0].numel() / _CHUNK) if images.device.type == "cpu" else 1
    for rows, amount in zip(share.rows.chunk(pieces), share.amount.chunk(pieces), strict=True):
        images.index_copy_(0, rows, operation(images.index_select(0, rows), amount))


# --- operations: images (n, 3, H, W) in [0, 1], amounts (n, 1, 1, 1) --------------------------------------------------


def _flip(images: Tensor, _: Tensor) -> Tensor:
    return images.flip(-1)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(factor).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _luma(images).mean((2, 3), keepdim=True), factor)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _luma(images), factor)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the colour circle of HSV by a share of it; value and saturation stay."""
    red, green, blue = images.split(1, dim=1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    # The hue in [0, 6), times the chroma: 0 is red, 2 green, 4 blue. Of grey it is 0 / tiny = 0, and not looked at.
    angle = torch.where(high == green, (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4))
    angle = torch.where(high == red, green - blue, angle)
    angle = angle.div_(chroma.clamp_min(torch.finfo(chroma.dtype).tiny)).add_(6 * shift).remainder_(6)
    shares = torch.cat([(angle - 3).abs_().sub_(1), 2 - (angle - 2).abs_(), 2 - (angle - 4).abs_()], dim=1)
    return shares.clamp_(0, 1).mul_(chroma).add_(low)


def _grayscale(images: Tensor, _: Tensor) -> Tensor:
    return _luma(images).expand_as(images)


def _solarize(images: Tensor, _: Tensor) -> Tensor:
    return torch.minimum(images, 1 - images)  # Pillow inverts integers from 128 on: here, what is over 127.5 / 255


def _blur(images: Tensor, taps: Tensor) -> Tensor:
    """Gaussian blur as Pillow's but for the rounding and the outermost pixels; beyond the edge, its pixels are repeated.

    One convolution with a group for every channel of every image: on a CPU thread it was faster than sums of shifted images,
    products with a banded matrix (H, H) for every image, and the three boxes in turn (benchmarks/photometry.py).
    """
    n, channels, height, width = images.shape
    radius = taps.shape[1] // 2
    taps = taps.repeat_interleave(channels, dim=0)
    images = F.pad(images, (radius, radius, radius, radius), mode="replicate").flatten(0, 1)[None]
    images = F.conv2d(images, taps[:, None, None, :], groups=n * channels)
    images = F.conv2d(images, taps[:, None, :, None], groups=n * channels)
    return images.view(n, channels, height, width).clamp_(0, 1)  # the taps sum to one but for rounding


def _luma(images: Tensor) -> Tensor:
    """Brightness of the pixels (n, 1, H, W) by the weights of ITU-R 601."""
    red, green, blue = images.split(1, dim=1)
    return (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(factor).add_(other * (1 - factor)).clamp_(0, 1)


def _blur_taps(sigma: Tensor) -> Tensor:
    """Weights (n, 2 radius + 1) of the Gaussian blurs of Pillow, standard deviations `sigma` (n,), padded to one radius.

    Three times a box of variance sigma²/3: 2 k + 1 equal weights and a smaller one at either end. A Gaussian that is
    sampled at the pixels would be another filter below half a pixel, where its variance falls far short of sigma².

    References:
        Gwosdek et al. 2011, Theoretical foundations of Gaussian convolution by extended box filtering.
    """
    if not len(sigma):
        return sigma.new_zeros(0, 1)  # torch 2.11 has no Fourier transform of nothing
    variance = sigma[:, None].double() ** 2 / _BLUR_PASSES
    k = ((12 * variance + 1).sqrt() - 1).div(2).floor()
    inner = 3 * ((k + 1) ** 2 - variance) / ((2 * k + 1) * (k + 1) * (2 * k + 3))
    outer = (1 - (2 * k + 1) * inner) / 2
    radius = int(k.max()) + 1
    distance = torch.arange(-radius, radius + 1).abs()
    box = torch.where(distance <= k, inner, outer * (distance == k + 1))
    length = _BLUR_PASSES * 2 * radius + 1
    spectrum = torch.fft.rfft(box, n=length) ** _BLUR_PASSES  # box after box: their spectra multiply
    return torch.fft.irfft(spectrum, n=length).float()
