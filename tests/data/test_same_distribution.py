"""Augmented views have the distribution of the published pipelines, which work on one PIL picture after another.

Both make thousands of views of the same picture; means of many statistics have to agree within their standard errors. There
is one thing more: Pillow's blending of brightness, contrast and saturation cuts the fraction off, half a level of 255 on
average each time, and the photometry here does not. So the reference is run twice: with the colour operations on floats, where
nothing but sampling errors and unbiased rounding may be left, and on PIL pictures, where that half level may be, too.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from measured import draw
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from vil_lightning.data import MultiCrop, TrainTransform
from vil_lightning.data.photometry import apply, plan
from vil_lightning.data.transforms import TrainingTransform, View

BICUBIC = T.InterpolationMode.BICUBIC
SIZE = 24


def picture() -> Image.Image:
    """Coloured, uneven, with detail: 64 x 48 px."""
    rng = np.random.default_rng(3)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)).resize((64, 48), Image.Resampling.BICUBIC)
    pixels = np.asarray(coarse, dtype=np.float64) * (0.4, 1.0, 0.7) + rng.normal(scale=25, size=(48, 64, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


class Blur:
    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        if float(torch.rand(())) >= self.probability:
            return image
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(0.1, 2.0))))


def on_floats(transform: Callable[[Tensor], Tensor]) -> T.Lambda:
    """Torchvision's operation on floats in place of that on a PIL picture, rounded to the nearest level once."""

    def changed(image: Image.Image) -> Image.Image:
        levels = 255 * transform(pil_to_tensor(image).float() / 255)
        return to_pil_image(levels.round().to(torch.uint8))

    return T.Lambda(changed)


def dino_view(blur: float, solarize: float, scale: tuple[float, float], floats: bool = False) -> T.Compose:
    """The operations of DINO, on PIL pictures."""
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
    return T.Compose(
        [
            T.RandomResizedCrop(SIZE, scale=scale, interpolation=BICUBIC),
            T.RandomHorizontalFlip(),
            on_floats(jitter) if floats else jitter,
            T.RandomGrayscale(0.2),
            Blur(blur),
            T.RandomApply([T.Lambda(ImageOps.solarize)], p=solarize),
        ]
    )


def three_augment(floats: bool = False) -> T.Compose:
    """The operations of ViL and DeiT III, on PIL pictures."""
    jitter = T.ColorJitter(0.3, 0.3, 0.3)
    return T.Compose(
        [
            T.RandomResizedCrop(SIZE, scale=(0.08, 1.0), interpolation=BICUBIC),
            T.RandomHorizontalFlip(),
            T.RandomChoice([T.Grayscale(3), T.Lambda(ImageOps.solarize), Blur(1.0)]),
            on_floats(jitter) if floats else jitter,
        ]
    )


def statistics_of(views: Tensor) -> dict[str, Tensor]:
    """Of every view: floats (N, 3, S, S) in 0 to 255 -> name -> (N,)."""
    found: dict[str, Tensor] = {}
    for channel, values in zip("rgb", views.unbind(1), strict=True):
        found[f"mean {channel}"] = values.mean(dim=(1, 2))
        found[f"variance {channel}"] = values.var(dim=(1, 2))
        for i in range(8):
            within = (values >= 32 * i - 0.5) & (values < 32 * i + 31.5)
            found[f"histogram {channel}{i}"] = within.float().mean(dim=(1, 2))
    grey = views.mean(1)
    found["left minus right"] = grey[..., : SIZE // 2].mean(dim=(1, 2)) - grey[..., SIZE // 2 :].mean(dim=(1, 2))
    found["top minus bottom"] = grey[:, : SIZE // 2].mean(dim=(1, 2)) - grey[:, SIZE // 2 :].mean(dim=(1, 2))
    found["detail along x"] = grey.diff(dim=2).abs().mean(dim=(1, 2))
    found["detail along y"] = grey.diff(dim=1).abs().mean(dim=(1, 2))
    found["colour"] = (views.amax(1) - views.amin(1)).mean(dim=(1, 2))
    found["without colour"] = ((views.amax(1) - views.amin(1)).amax(dim=(1, 2)) < 1.5).float()
    found["red against blue"] = (views[:, 0] - views[:, 2]).mean(dim=(1, 2))
    return found


def ours(transform: TrainingTransform, view: int, count: int) -> Tensor:
    image = pil_to_tensor(picture())
    made: list[View] = []
    for i in range(count):
        views: Any = transform(image, draw(i))
        made.append(views if isinstance(views, View) else views[view])
    parameters = torch.stack([one.parameters for one in made])
    return 255 * apply(torch.stack([one.image for one in made]), plan(parameters), transform.stages)


def theirs(transform: Callable[[Image.Image], Image.Image], count: int) -> Tensor:
    torch.manual_seed(1)
    image = picture()
    return torch.stack([pil_to_tensor(transform(image)) for _ in range(count)]).float()


@dataclasses.dataclass
class Case:
    transform: TrainingTransform
    view: int
    reference: Callable[..., T.Compose]  # of `floats`
    num_blends: float  # of brightness, contrast and saturation, on average


CASES = {
    "global 1": Case(MultiCrop(SIZE, SIZE, 0), 0, functools.partial(dino_view, 1.0, 0.0, (0.4, 1.0)), 2.4),
    "global 2": Case(MultiCrop(SIZE, SIZE, 0), 1, functools.partial(dino_view, 0.1, 0.2, (0.4, 1.0)), 2.4),
    "local": Case(MultiCrop(SIZE, SIZE, 1), 2, functools.partial(dino_view, 0.5, 0.0, (0.05, 0.4)), 2.4),
    "3-Augment": Case(TrainTransform(SIZE), 0, three_augment, 3.0),
}


@functools.cache
def reference_statistics(name: str, floats: bool, count: int) -> dict[str, Tensor]:
    return statistics_of(theirs(CASES[name].reference(floats=floats), count))


def assert_same(name: str, floats: bool, count: int, transform: TrainingTransform | None = None) -> None:
    case = CASES[name]
    mine = statistics_of(ours(transform or case.transform, case.view, count))
    other = reference_statistics(name, floats, count)
    cut = 0.0 if floats else 0.6 * case.num_blends  # levels by which a PIL picture is darker
    for statistic, a in mine.items():
        b = other[statistic]
        error = float((a.var() / count + b.var() / count).sqrt())
        slack = 0.15 + cut
        if statistic.startswith("histogram"):
            slack = 0.004 + 0.012 * cut  # the share of pixels that cross a bin's border
        elif statistic.startswith("variance"):
            slack = (0.01 + 0.01 * cut) * float(b.mean())
        elif statistic == "without colour":
            slack = 0.005
        difference = abs(float(a.mean() - b.mean()))
        assert difference <= 4 * error + slack, (
            f"{name}, {statistic}: {a.mean():.4f} against {b.mean():.4f} ± {error:.4f}"
        )


@pytest.mark.parametrize("floats", [True, False], ids=["floats", "pil"])
@pytest.mark.parametrize("name", CASES)
def test_distribution__of_1000_views(name: str, floats: bool) -> None:
    assert_same(name, floats, 1000)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("floats", [True, False], ids=["floats", "pil"])
@pytest.mark.parametrize("name", CASES)
def test_distribution__of_20000_views(name: str, floats: bool) -> None:
    assert_same(name, floats, 20_000)


def test_distribution__the_test_sees_a_wrong_probability() -> None:
    """Of the blur (inverted, as happened in DINOv2), the grey, the operations of 3-Augment, and the strength of the jitter."""
    wrong: dict[str, TrainingTransform] = {
        "global 1": MultiCrop(SIZE, SIZE, 0, blur_probs=(0.0, 0.9, 0.5)),
        "local": MultiCrop(SIZE, SIZE, 1, grayscale_prob=0.1),
        "3-Augment": TrainTransform(SIZE, three_augment=False),
        "global 2": MultiCrop(SIZE, SIZE, 0, color_jitter=(0.8, 0.4, 0.2, 0.1)),
    }
    for name, transform in wrong.items():
        with pytest.raises(AssertionError, match=name):
            assert_same(name, True, 1000, transform)
