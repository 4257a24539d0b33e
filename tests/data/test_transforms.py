"""Multi-crop views and the evaluation view: shapes, measured rates, measured crops, refusals."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from measured import assert_rate, assert_uniform, draw, image, parameters_of
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from vil_lightning.data import MultiCrop, transforms
from vil_lightning.data.crops import random_crop_box
from vil_lightning.data.transforms import EvalTransform
from vil_lightning.errors import ConfigError

DRAWS = 1500


@pytest.mark.parametrize("num_local_views", [0, 1, 8])
@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 20, 31), (3, 1, 1), (3, 1, 70)])
def test_multi_crop__sizes_and_dtype(num_local_views: int, shape: tuple[int, int, int]) -> None:
    picture = torch.randint(0, 256, shape, dtype=torch.uint8)
    views = MultiCrop(16, 8, num_local_views, rotation=10.0)(picture, draw())
    assert [tuple(view.image.shape) for view in views] == [(3, 16, 16)] * 2 + [(3, 8, 8)] * num_local_views
    assert all(view.image.dtype == torch.uint8 for view in views)
    assert all((view.parameters.shape, view.parameters.dtype) == ((9,), torch.float32) for view in views)


def test_multi_crop__leaves_the_image_alone() -> None:
    picture = image(16)
    before = picture.clone()
    MultiCrop(16, 8, 2, solarize_prob=1.0, hflip_prob=1.0)(picture, draw())
    assert torch.equal(picture, before)


def test_multi_crop__rates() -> None:
    views = parameters_of(MultiCrop(8, 4, 1), DRAWS)
    for view, blur, solarize in zip(views, (1.0, 0.1, 0.5), (0.0, 0.2, 0.0), strict=True):
        assert_rate(view["flip"].sum(), DRAWS, 0.5)
        assert_rate(view["grayscale"].sum(), DRAWS, 0.2)
        assert_rate((view["sigma"] > 0).sum(), DRAWS, blur)
        assert_rate(view["solarize"].sum(), DRAWS, solarize)
        changed = {
            name: view[name] != (0 if name == "hue" else 1) for name in ("brightness", "contrast", "saturation", "hue")
        }
        assert_rate(changed["hue"].sum(), DRAWS, 0.8)
        assert all(torch.equal(which, changed["hue"]) for which in changed.values())  # all four or none


def test_multi_crop__ranges() -> None:
    transform = MultiCrop(8, 4, 0, color_jitter=(0.4, 0.3, 0.2, 0.1), color_jitter_prob=1.0, blur_probs=(1.0, 0.0, 0.0))
    first, second = parameters_of(transform, DRAWS)
    for view in (first, second):
        assert_uniform(view["brightness"], 0.6, 1.4)
        assert_uniform(view["contrast"], 0.7, 1.3)
        assert_uniform(view["saturation"], 0.8, 1.2)
        assert_uniform(view["hue"], -0.1, 0.1)
        for order in range(24):
            assert_rate((view["order"] == order).sum(), DRAWS, 1 / 24)
    assert_uniform(first["sigma"], 0.1, 2.0)
    assert not second["sigma"].any()
    assert abs(float(torch.corrcoef(torch.stack([first["hue"], second["hue"]]))[0, 1])) < 4 / math.sqrt(DRAWS)


def test_multi_crop__strong_jitter_has_the_range_of_torchvision() -> None:
    transform = MultiCrop(8, 4, 0, color_jitter=(1.5, 0.0, 0.0, 0.0), color_jitter_prob=1.0)
    view = parameters_of(transform, DRAWS)[0]
    assert_uniform(view["brightness"], 0.0, 2.5)
    assert bool((view["contrast"] == 1).all())
    assert bool((view["hue"] == 0).all())


def test_multi_crop__views_have_streams_of_their_own() -> None:
    picture = image(24)
    few, many = MultiCrop(16, 8, 1)(picture, draw(7)), MultiCrop(16, 8, 5)(picture, draw(7))
    for a, b in zip(few, many, strict=False):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.parameters, b.parameters)


def test_multi_crop__order_of_the_operations_is_that_of_dino() -> None:
    assert MultiCrop.stages == ("flip", "jitter", "grayscale", "blur", "solarize")


def test_multi_crop__rotation_fills_with_the_edge_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "uniform", lambda rng, low, high: high)
    whole = {"global_scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    flat = torch.full((3, 16, 16), 200, dtype=torch.uint8)
    view = MultiCrop(16, 8, 0, rotation=45.0, **whole)(flat, draw())[0].image
    corners = view[:, [0, 0, -1, -1], [0, -1, 0, -1]]  # what the rotated square does not cover
    assert torch.equal(corners, torch.full((3, 4), 200, dtype=torch.uint8))


def test_multi_crop__rotates_by_the_angle_drawn() -> None:
    picture = torch.zeros(3, 32, 32, dtype=torch.uint8)
    picture[:, 15:17, :] = 255  # a horizontal bar
    whole = {"global_scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    slopes = []
    for i in range(60):
        view = MultiCrop(32, 16, 0, rotation=30.0, **whole)(picture, draw(i))[0].image[0].float()
        rows = torch.arange(32.0)
        left, right = ((view[:, x] * rows).sum() / view[:, x].sum() for x in (8, 24))
        slopes.append(math.degrees(math.atan2(float(left - right), 16.0)))
    assert -31 < min(slopes) < -20
    assert 20 < max(slopes) < 31
    still = MultiCrop(32, 16, 0, **whole)(picture, draw())[0].image
    assert torch.equal(still, picture)


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
@pytest.mark.parametrize(("height", "width"), [(200, 200), (150, 300)])
def test_random_crop_box__area_ratio_and_place(scale: tuple[float, float], height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    boxes = [random_crop_box(rng, height, width, scale, (3 / 4, 4 / 3)) for _ in range(DRAWS)]
    assert all(0 <= top <= top + h <= height and 0 <= left <= left + w <= width for top, left, h, w in boxes)
    areas = [h * w / (height * width) for _, _, h, w in boxes]
    ratios = [w / h for _, _, h, w in boxes]
    slack = 0.03  # sides are whole pixels
    assert scale[0] * (1 - slack) <= min(areas) <= max(areas) <= scale[1] * (1 + slack)
    assert 3 / 4 * (1 - slack) <= min(ratios) <= max(ratios) <= 4 / 3 * (1 + slack)
    assert min(areas) < scale[0] + 0.1 * (scale[1] - scale[0])
    if scale[1] < 1:  # no box is too long for the image, so no draw is rejected
        assert min(ratios) < 0.8 < 1.25 < max(ratios)
        assert max(areas) > scale[1] - 0.1 * (scale[1] - scale[0])
        middle = sum(scale) / 2
        deviation = (scale[1] - scale[0]) / math.sqrt(12 * DRAWS)
        assert abs(sum(areas) / DRAWS - middle) < 4 * deviation  # uniform in area …
        spread = math.log(16 / 9) / math.sqrt(12 * DRAWS)
        assert abs(sum(map(math.log, ratios)) / DRAWS) < 4 * spread + 1e-3  # … and in the logarithm of the ratio
    assert len({(top, left) for top, left, _, _ in boxes}) > DRAWS / 4


def test_random_crop_box__centred_square_where_nothing_fits() -> None:
    assert random_crop_box(np.random.default_rng(0), 4, 100, (1.0, 1.0), (1.0, 1.0)) == (0, 48, 4, 4)


def test_random_crop_box__whole_image() -> None:
    assert random_crop_box(np.random.default_rng(0), 10, 10, (1.0, 1.0), (1.0, 1.0)) == (0, 0, 10, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_scale": (0.0, 1.0)}, "global_scale"),
        ({"global_scale": (0.5, 1.1)}, "global_scale"),
        ({"local_scale": (0.4, 0.05)}, "local_scale"),
        ({"hflip_prob": 1.5}, "hflip_prob=1.5"),
        ({"solarize_prob": -0.1}, "solarize_prob=-0.1"),
        ({"blur_probs": (1.0, 2.0, 0.5)}, "blur_probs"),
        ({"num_local_views": -1}, "num_local_views"),
        ({"global_size": 0}, "global_size"),
        ({"local_size": 0}, "local_size"),
        ({"global_size": 32, "local_size": 48}, "local_size=48 must not exceed global_size=32"),
        ({"ratio": (4 / 3, 3 / 4)}, "ratio"),
        ({"color_jitter": (0.4, 0.4, -0.2, 0.1)}, "color_jitter"),
    ],
)
def test_multi_crop__bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.train_transform.*{message}"):
        MultiCrop(**arguments)


def test_eval_transform__short_side_then_centre() -> None:
    picture = torch.zeros(3, 20, 40, dtype=torch.uint8)
    picture[:, :, 10:30] = 200  # exactly the part that must stay
    view = EvalTransform(20)(picture)
    assert view.dtype == torch.uint8
    assert torch.equal(view, torch.full((3, 20, 20), 200, dtype=torch.uint8))
    assert EvalTransform(8)(picture).shape == (3, 8, 8)
    assert EvalTransform(64)(picture).shape == (3, 64, 64)


@pytest.mark.parametrize(("crop_pct", "short_side"), [(1.0, 224), (0.875, 256), (0.9, 248)])
def test_eval_transform__crop_pct(crop_pct: float, short_side: int) -> None:
    picture = torch.randint(0, 256, (3, 300, 400), dtype=torch.uint8)
    resized = TF.resize(picture, [short_side], interpolation=InterpolationMode.BICUBIC, antialias=True)
    top, left = (short_side - 224) // 2, round((resized.shape[2] - 224) / 2)
    assert torch.equal(EvalTransform(224, crop_pct)(picture), resized[:, top : top + 224, left : left + 224])


@pytest.mark.parametrize("shape", [(3, 1, 50_000), (3, 50_000, 1), (3, 1, 1)])
def test_eval_transform__strips(shape: tuple[int, int, int]) -> None:
    assert EvalTransform(32)(torch.full(shape, 7, dtype=torch.uint8)).unique().tolist() == [7]


@pytest.mark.parametrize("crop_pct", [0.0, 1.1, -0.5])
def test_eval_transform__crop_pct_out_of_range(crop_pct: float) -> None:
    with pytest.raises(ConfigError, match=rf"data\.crop_pct={crop_pct} must satisfy 0 < crop_pct <= 1"):
        EvalTransform(8, crop_pct)
