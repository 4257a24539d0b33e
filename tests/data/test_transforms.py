"""Views: shapes, measured rates, measured crops, refusals."""

import math
from typing import Any

import pytest
import torch
from measured import assert_rate, count_calls, image

from vil_lightning.data import MultiCrop, transforms
from vil_lightning.data.transforms import EvalTransform, random_crop_box
from vil_lightning.errors import ConfigError

DRAWS = 1500


@pytest.mark.parametrize("num_local_views", [0, 1, 8])
@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 20, 31)])
def test_multi_crop__sizes_and_dtype(num_local_views: int, shape: tuple[int, int, int]) -> None:
    picture = torch.randint(0, 256, shape, dtype=torch.uint8)
    views = MultiCrop(16, 8, num_local_views, rotation=10.0)(picture)
    assert [tuple(view.shape) for view in views] == [(3, 16, 16)] * 2 + [(3, 8, 8)] * num_local_views
    assert all(view.dtype == torch.uint8 for view in views)


def test_multi_crop__leaves_the_image_alone() -> None:
    picture = image(16)
    before = picture.clone()
    MultiCrop(16, 8, 2, solarize_prob=1.0, hflip_prob=1.0)(picture)
    assert torch.equal(picture, before)


def test_multi_crop__rates_of_flip_jitter_and_grayscale(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(
        monkeypatch, "resized_crop", "horizontal_flip", "adjust_brightness", "adjust_hue", "rgb_to_grayscale"
    )
    transform = MultiCrop(8, 4, 1, color_jitter=(0.4, 0.0, 0.0, 0.1), blur_probs=(0.0, 0.0, 0.0), solarize_prob=0.0)
    for _ in range(DRAWS // 3):
        transform(image())
    assert calls["resized_crop"] == DRAWS
    assert_rate(calls["horizontal_flip"], DRAWS, 0.5)
    assert_rate(calls["adjust_brightness"], DRAWS, 0.8)
    assert calls["adjust_hue"] == calls["adjust_brightness"]
    assert_rate(calls["rgb_to_grayscale"], DRAWS, 0.2)


@pytest.mark.parametrize(("view", "probability"), [(0, 1.0), (1, 0.1), (2, 0.5)])
def test_multi_crop__rate_of_the_blur_of_each_view(
    monkeypatch: pytest.MonkeyPatch, view: int, probability: float
) -> None:
    calls = count_calls(monkeypatch, "resized_crop", "gaussian_blur")
    only = tuple(p if i == view else 0.0 for i, p in enumerate((1.0, 0.1, 0.5)))
    transform = MultiCrop(
        8, 4, 1, color_jitter_prob=0.0, grayscale_prob=0.0, blur_probs=only, blur_sigma=(0.5, 2.0), solarize_prob=0.0
    )
    for _ in range(DRAWS):
        transform(image())
    assert_rate(calls["gaussian_blur"], DRAWS, probability)


def test_multi_crop__rate_of_solarisation_and_its_view(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, "resized_crop", "solarize")
    transform = MultiCrop(8, 4, 2, color_jitter_prob=0.0, grayscale_prob=0.0, blur_probs=(0.0, 0.0, 0.0))
    for _ in range(DRAWS):
        transform(image())
    assert_rate(calls["solarize"], DRAWS, 0.2)


def test_multi_crop__solarises_the_second_view_only() -> None:
    bright = torch.full((3, 8, 8), 250, dtype=torch.uint8)
    transform = MultiCrop(
        8, 4, 2, color_jitter_prob=0.0, grayscale_prob=0.0, blur_probs=(0.0, 0.0, 0.0), solarize_prob=1.0
    )
    assert [int(view.max()) for view in transform(bright)] == [250, 5, 250, 250]


def test_multi_crop__ranges_of_the_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    factors: dict[str, list[float]] = {}
    for name in ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue"):

        def record(picture: torch.Tensor, factor: float, name: str = name) -> torch.Tensor:
            factors.setdefault(name, []).append(factor)
            return picture

        monkeypatch.setattr(transforms.TF, name, record)
    transform = MultiCrop(8, 4, 0, color_jitter=(0.4, 0.3, 0.2, 0.1), color_jitter_prob=1.0, blur_probs=(0, 0, 0))
    for _ in range(200):
        transform(image())
    for name, (low, high) in {
        "adjust_brightness": (0.6, 1.4),
        "adjust_contrast": (0.7, 1.3),
        "adjust_saturation": (0.8, 1.2),
        "adjust_hue": (-0.1, 0.1),
    }.items():
        values, width = factors[name], high - low
        assert len(values) == 400
        assert low <= min(values) < low + 0.05 * width
        assert high - 0.05 * width < max(values) <= high


@pytest.mark.parametrize(("name", "at_rest"), [("hflip_prob", 0.0), ("rotation", 0.0)])
def test_multi_crop__switched_off_draws_nothing(monkeypatch: pytest.MonkeyPatch, name: str, at_rest: float) -> None:
    calls = count_calls(monkeypatch, "horizontal_flip", "rotate")
    transform = MultiCrop(8, 4, 1, **{"hflip_prob": 1.0, "rotation": 5.0, name: at_rest})
    for _ in range(5):
        transform(image())
    operation = {"hflip_prob": "horizontal_flip", "rotation": "rotate"}[name]
    assert calls == {"horizontal_flip": 15, "rotate": 15, operation: 0}


def test_multi_crop__rotation_fills_with_the_edge_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "_uniform", lambda low, high: high)
    quiet = {"color_jitter_prob": 0.0, "grayscale_prob": 0.0, "blur_probs": (0.0, 0.0, 0.0), "solarize_prob": 0.0}
    whole = {"global_scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip_prob": 0.0}
    flat = torch.full((3, 16, 16), 200, dtype=torch.uint8)
    view = MultiCrop(16, 8, 0, rotation=45.0, **whole, **quiet)(flat)[0]
    corners = view[:, [0, 0, -1, -1], [0, -1, 0, -1]]  # what the rotated square does not cover
    assert torch.equal(corners, torch.full((3, 4), 200, dtype=torch.uint8))


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
@pytest.mark.parametrize(("height", "width"), [(200, 200), (150, 300)])
def test_random_crop_box__area_ratio_and_place(scale: tuple[float, float], height: int, width: int) -> None:
    boxes = [random_crop_box(height, width, scale, (3 / 4, 4 / 3)) for _ in range(DRAWS)]
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
    assert random_crop_box(4, 100, (1.0, 1.0), (1.0, 1.0)) == (0, 48, 4, 4)


def test_random_crop_box__whole_image() -> None:
    assert random_crop_box(10, 10, (1.0, 1.0), (1.0, 1.0)) == (0, 0, 10, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_scale": (0.0, 1.0)}, "global_scale"),
        ({"global_scale": (0.5, 1.1)}, "global_scale"),
        ({"local_scale": (0.4, 0.05)}, "local_scale"),
        ({"hflip_prob": 1.5}, "probabilities"),
        ({"solarize_prob": -0.1}, "probabilities"),
        ({"blur_probs": (1.0, 2.0, 0.5)}, "probabilities"),
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
    resized = transforms.TF.resize(picture, [short_side], interpolation=transforms._BICUBIC, antialias=True)
    top, left = (short_side - 224) // 2, round((resized.shape[2] - 224) / 2)
    assert torch.equal(EvalTransform(224, crop_pct)(picture), resized[:, top : top + 224, left : left + 224])


@pytest.mark.parametrize("crop_pct", [0.0, 1.1, -0.5])
def test_eval_transform__crop_pct_out_of_range(crop_pct: float) -> None:
    with pytest.raises(ConfigError, match=rf"data\.crop_pct={crop_pct} must satisfy 0 < crop_pct <= 1"):
        EvalTransform(8, crop_pct)
