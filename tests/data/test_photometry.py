"""Batched photometry: every operation against Pillow, the whole chain against torchvision, image by image."""

import colorsys
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from vil_lightning.data import photometry
from vil_lightning.data.photometry import PARAMETERS, STAGES, Plan, apply, plan

NEUTRAL = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0}
THREE_AUGMENT = ("flip", "grayscale", "blur", "solarize", "jitter")


def parameters(**values: Any) -> Tensor:
    """One row (1, 9), neutral but for what is given."""
    return torch.tensor([[float(values.get(name, NEUTRAL.get(name, 0.0))) for name in PARAMETERS]])


def random_parameters(n: int) -> Tensor:
    """Rows (n, 9) in which every operation acts on about half the images, stronger than in the recipes."""
    acts = torch.rand(n, 9) < 0.5
    factors = torch.where(acts[:, 1:4], torch.empty(n, 3).uniform_(0.2, 2.0), torch.ones(n, 3))
    hue = torch.empty(n).uniform_(-0.5, 0.5) * acts[:, 4]
    order = torch.randint(24, (n,)).float()
    sigma = torch.empty(n).uniform_(0.1, 3.0) * acts[:, 7]
    columns = [acts[:, 0], *factors.unbind(1), hue, order, acts[:, 6], sigma, acts[:, 8]]
    return torch.stack([column.float() for column in columns], dim=1)


def noise(n: int = 1, size: int = 32) -> Tensor:
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8)


def smooth(size: int = 32) -> Tensor:
    """Soft blobs of colour, as photographs have more of them than of noise."""
    blobs = F.interpolate(torch.rand(1, 3, size // 8 + 1, size // 8 + 1), size=(size, size), mode="bicubic")
    return (255 * blobs.clamp(0, 1)).round().byte()


def run(images: Tensor, rows: Tensor, stages: tuple[str, ...] = STAGES) -> Tensor:
    return apply(images, plan(rows), stages)


def to_pil(images: Tensor) -> Image.Image:
    return Image.fromarray(images[0].permute(1, 2, 0).numpy())


def from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()


# --- every operation against Pillow -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, values, tolerance",
    [
        # Pillow truncates the result: up to one level.
        ("brightness", (0.0, 0.6, 1.4, 2.5), 1.0),
        # It also rounds the grey that it blends with, and its mean: half a level each, times |1 - factor|.
        ("contrast", (0.0, 0.6, 1.4, 2.5), 2.5),
        ("saturation", (0.0, 0.8, 1.2, 2.5), 1.8),
    ],
)
@pytest.mark.parametrize("make", [noise, smooth])
def test_apply__factors_as_in_pillow(name: str, values: tuple[float, ...], tolerance: float, make: Any) -> None:
    enhance = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
    }
    images = make()
    for value in values:
        expected = from_pil(enhance[name](to_pil(images)).enhance(value))
        difference = (255 * run(images, parameters(**{name: value})) - expected).abs()
        assert difference.max() <= tolerance
        assert difference.mean() <= 0.75


def test_apply__hue_as_in_pillow() -> None:
    # Pillow has 256 hues, six levels of a channel apart: even without a shift it is up to 6 off, with one up to twice that.
    images = smooth(64)
    for shift in (-0.5, -0.3, -0.1, 0.05, 0.1, 0.4):
        hsv = np.array(to_pil(images).convert("HSV"))
        hsv[..., 0] += np.uint8(round(shift * 255) % 256)
        expected = from_pil(Image.fromarray(hsv, mode="HSV"))
        difference = (255 * run(images, parameters(hue=round(shift * 255) / 256)) - expected).abs()
        assert difference.max() <= 12
        assert difference.mean() <= 0.8


def test_apply__grayscale_as_in_pillow() -> None:
    images = noise()
    expected = from_pil(to_pil(images).convert("L"))
    torch.testing.assert_close(255 * run(images, parameters(grayscale=1)), expected, atol=0.51, rtol=0)  # rounded


def test_apply__solarize_as_in_pillow() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)  # all levels
    expected = from_pil(ImageOps.solarize(to_pil(images), 128))
    torch.testing.assert_close(255 * run(images, parameters(solarize=1)), expected, atol=1e-4, rtol=0)


def test_apply__flip_as_in_pillow() -> None:
    images = noise()
    assert torch.equal(255 * run(images, parameters(flip=1)), 255 * (from_pil(ImageOps.mirror(to_pil(images))) / 255))


@pytest.mark.parametrize("sigma", [0.1, 0.25, 0.5, 0.8, 1.0, 1.3, 1.7, 2.0, 3.0])
def test_apply__blur_as_in_pillow(sigma: float) -> None:
    # Pillow rounds after each of its six passes (three boxes, both directions): up to half a level each, 3 in all.
    pillow = ImageFilter.GaussianBlur(radius=sigma)
    images, rows = noise(size=64), parameters(sigma=sigma)
    difference = (255 * run(images, rows) - from_pil(to_pil(images).filter(pillow))).abs()
    inside = difference[..., 10:-10, 10:-10]
    assert inside.max() <= 3.0
    assert inside.mean() <= 1.1
    # At the edge, Pillow repeats the pixels anew for each box. That shows in noise, and hardly in a picture.
    images = smooth(64)
    difference = (255 * run(images, rows) - from_pil(to_pil(images).filter(pillow))).abs()
    assert difference.max() <= 5.0
    assert difference.mean() <= 0.9


# --- the blur ---------------------------------------------------------------------------------------------------------


def test_plan__taps_have_the_variance_asked_for() -> None:
    sigmas = torch.tensor([0.05, 0.1, 0.3, 0.5, 0.9, 1.0, 1.5, 2.0, 5.0])
    taps = plan(torch.cat([parameters(sigma=float(s)) for s in sigmas])).blur.amount.double()
    distance = torch.arange(taps.shape[1]) - taps.shape[1] // 2
    assert taps.min() > -1e-7
    torch.testing.assert_close(taps, taps.flip(1), atol=1e-7, rtol=0)
    torch.testing.assert_close(taps.sum(1), torch.ones(9).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close((taps * distance**2).sum(1), sigmas.double() ** 2, atol=2e-5, rtol=1e-5)
    gaussian = torch.exp(-(distance**2) / (2 * 5.0**2))
    assert (taps[-1] - gaussian / gaussian.sum()).abs().max() < 0.07 * taps[-1].max()  # nearly the bell


@pytest.mark.parametrize("size", [1, 2, 4, 8, 19])
def test_apply__blur_is_a_loop_over_pixels_and_taps(size: int) -> None:
    images = noise(size=size)
    chosen = plan(parameters(sigma=2.0))
    weights = chosen.blur.amount[0].tolist()
    radius = len(weights) // 2
    assert radius == 6  # three boxes of at most 5 pixels
    source = images[0].double().numpy() / 255
    expected = np.zeros_like(source)
    for y, x in itertools.product(range(size), repeat=2):
        for i, j in itertools.product(range(-radius, radius + 1), repeat=2):
            pixel = source[:, min(max(y + i, 0), size - 1), min(max(x + j, 0), size - 1)]
            expected[:, y, x] += weights[i + radius] * weights[j + radius] * pixel
    np.testing.assert_allclose(apply(images, chosen, STAGES)[0].numpy(), expected, atol=2e-6)


# --- the chain against torchvision ------------------------------------------------------------------------------------


def chain(image: Tensor, row: Tensor, stages: tuple[str, ...] = STAGES) -> Tensor:
    """What torchvision makes of one float image (3, H, W); its grey has 0.2989 where Pillow and ITU-R 601 have 0.299."""
    value = dict(zip(PARAMETERS, row.tolist(), strict=True))
    jitter = (
        lambda x: TF.adjust_brightness(x, value["brightness"]),
        lambda x: TF.adjust_contrast(x, value["contrast"]),
        lambda x: TF.adjust_saturation(x, value["saturation"]),
        lambda x: TF.adjust_hue(x, value["hue"]) if value["hue"] else x,
    )
    for stage in stages:
        if stage == "flip" and value["flip"]:
            image = TF.horizontal_flip(image)
        elif stage == "jitter":
            for i in list(itertools.permutations(range(4)))[int(value["order"])]:
                image = jitter[i](image)
        elif stage == "grayscale" and value["grayscale"]:
            image = TF.rgb_to_grayscale(image, num_output_channels=3)
        elif stage == "blur" and value["sigma"]:
            image = boxes(image, value["sigma"])
        elif stage == "solarize" and value["solarize"]:
            image = TF.solarize(image, 127.5 / 255)
    return image


def boxes(image: Tensor, sigma: float) -> Tensor:
    """Three boxes of real-valued radius in a row on an image whose edge was repeated once, by the formula in Pillow."""
    variance = sigma**2 / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    full, part = 1 / (2 * (whole + rest) + 1), rest / (2 * (whole + rest) + 1)
    weights = [part, *[full] * (2 * whole + 1), part]
    margin = 3 * (whole + 1)
    image = F.pad(image[None], [margin] * 4, mode="replicate")[0]
    for dim in (-1, -2):
        for _ in range(3):
            length = image.shape[dim] - len(weights) + 1
            image = torch.stack([w * image.narrow(dim, i, length) for i, w in enumerate(weights)]).sum(0)
    return image


@pytest.mark.parametrize(
    "name, value", [("brightness", 1.3), ("hue", 0.1), ("hue", -0.4), ("flip", 1), ("solarize", 1)]
)
def test_apply__same_formula_as_torchvision(name: str, value: float) -> None:
    images = torch.cat([noise(), smooth()])
    rows = parameters(**{name: value}).repeat(2, 1)
    expected = torch.stack([chain(image / 255, row) for image, row in zip(images, rows, strict=True)])
    torch.testing.assert_close(run(images, rows), expected, atol=1e-5, rtol=0)


def test_apply__all_orders_as_in_torchvision() -> None:
    rows = parameters(brightness=1.8, contrast=2.0, saturation=2.5, hue=0.2).repeat(24, 1)
    rows[:, PARAMETERS.index("order")] = torch.arange(24)
    image = noise()
    expected = torch.stack([chain(image[0] / 255, row) for row in rows])
    apart = (expected[:, None] - expected).abs().amax((2, 3, 4)) + torch.eye(24)
    assert apart.min() > 0.05  # every order gives a picture of its own
    # The 1e-4 of the greys, times three factors of about 2.
    torch.testing.assert_close(run(image.expand(24, -1, -1, -1), rows), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("stages", [STAGES, THREE_AUGMENT, ("solarize", "blur", "jitter", "grayscale", "flip")])
def test_apply__mixed_batch_as_torchvision_one_by_one(stages: tuple[str, ...]) -> None:
    images = torch.cat([noise(24), *[smooth() for _ in range(24)]])
    rows = random_parameters(48)
    got = run(images, rows, stages)
    for i, (image, row) in enumerate(zip(images, rows, strict=True)):
        torch.testing.assert_close(got[i], chain(image / 255, row, stages), atol=1e-3, rtol=0)  # the 1e-4 of the greys


def test_apply__order_of_the_stages_matters() -> None:
    images, rows = noise(), parameters(flip=1, brightness=1.5, hue=0.1, grayscale=1, sigma=1.0, solarize=1)
    got = {stages: run(images, rows, stages) for stages in itertools.permutations(STAGES)}
    for stages, result in got.items():
        torch.testing.assert_close(result[0], chain(images[0] / 255, rows[0], stages), atol=1e-3, rtol=0)
    assert (got[STAGES] - got[THREE_AUGMENT]).abs().max() > 0.1


# --- image by image ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 32])
@pytest.mark.parametrize("chunk", [1, 2**20])
def test_apply__mixed_batch_is_each_image_alone(monkeypatch: pytest.MonkeyPatch, size: int, chunk: int) -> None:
    images, rows = noise(40, size), random_parameters(40)
    alone = torch.cat([run(images[i : i + 1], rows[i : i + 1]) for i in range(40)])
    monkeypatch.setattr(photometry, "_CHUNK", chunk)
    torch.testing.assert_close(run(images, rows), alone, atol=2e-6, rtol=0)


def test_apply__neutral_images_are_bit_equal() -> None:
    images, rows = noise(30), random_parameters(30)
    neutral = torch.arange(0, 30, 3)
    rows[neutral] = parameters()
    rows[neutral, PARAMETERS.index("order")] = torch.arange(10).float()  # an order of nothing
    for stages in (STAGES, THREE_AUGMENT):
        got = run(images, rows, stages)
        assert torch.equal(got[neutral], images[neutral] / 255)
        assert not torch.equal(got, images / 255)


@pytest.mark.parametrize("n", [0, 1])
def test_apply__tiny_batches(n: int) -> None:
    images, rows = noise(n), random_parameters(n)
    assert run(images, rows).shape == (n, 3, 32, 32)


def test_apply__leaves_its_input_and_returns_float32() -> None:
    images = noise(8).contiguous(memory_format=torch.channels_last)
    before, rows = images.clone(), random_parameters(8)
    chosen = plan(rows)
    got = apply(images, chosen, STAGES)
    assert got.dtype == torch.float32
    assert torch.equal(images, before)
    assert got.is_contiguous()
    assert torch.equal(got, apply(images.contiguous(), chosen, STAGES))  # any layout, and the plan can be used again


def test_apply__rectangles() -> None:
    images = torch.randint(256, (6, 3, 5, 40), dtype=torch.uint8)
    rows = random_parameters(6)
    expected = torch.stack([chain(image / 255, row) for image, row in zip(images, rows, strict=True)])
    torch.testing.assert_close(run(images, rows), expected, atol=1e-3, rtol=0)


# --- values -----------------------------------------------------------------------------------------------------------


def test_apply__extreme_parameters_stay_in_range() -> None:
    grid = itertools.product((0.0, 1.0, 100.0), (0.0, 100.0), (0.0, 100.0), (-0.5, 0.5), (0, 9, 23), (1e-3, 50.0))
    names = ("brightness", "contrast", "saturation", "hue", "order", "sigma")
    rows = torch.cat([parameters(**dict(zip(names, values, strict=True))) for values in grid])
    images = noise(len(rows), 8)
    for stages in (STAGES, THREE_AUGMENT):
        got = run(images, rows, stages)
        assert got.isfinite().all()
        assert got.min() >= 0
        assert got.max() <= 1


def test_apply__blurred_white_is_not_brighter() -> None:
    images = torch.full((40, 3, 8, 8), 255, dtype=torch.uint8)
    got = run(images, torch.cat([parameters(sigma=0.05 * i) for i in range(1, 41)]))
    assert got.max() == 1
    assert got.min() > 1 - 1e-6


def corners() -> Tensor:
    """Grey, black and white, and all fully saturated colours of two levels: (3, 4, 16), every pixel one of them."""
    levels = list(itertools.product((0, 1, 128, 255), repeat=3))
    return torch.tensor(levels, dtype=torch.uint8).T.reshape(3, 4, 16)


@pytest.mark.parametrize("shift", [-0.5, -1 / 3, -0.01, 0.01, 1 / 6, 1 / 3, 0.5])
def test_apply__hue_of_pure_colours_is_that_of_colorsys(shift: float) -> None:
    images = corners()[None]
    got = run(images, parameters(hue=shift))[0].flatten(1).T
    for pixel, source in zip(got.tolist(), images[0].flatten(1).T.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*[level / 255 for level in source])
        np.testing.assert_allclose(pixel, colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value), atol=2e-6)


def test_apply__hue_leaves_grey_as_it_is() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    assert torch.equal(run(images, parameters(hue=0.3)), images / 255)


# --- the plan and the device ------------------------------------------------------------------------------------------


def test_apply__never_asks_the_device_for_a_value() -> None:
    # Tensors of the meta device have no values: whatever needs one (item, nonzero, boolean indices, `if`) fails on it.
    chosen = move_data_to_device(plan(random_parameters(48)), torch.device("meta"))
    assert {tensor.device.type for tensor in leaves(chosen)} == {"meta"}
    for stages in (STAGES, THREE_AUGMENT):
        got = apply(torch.empty(48, 3, 16, 16, dtype=torch.uint8, device="meta"), chosen, stages)
        assert got.shape == (48, 3, 16, 16)
        assert got.dtype == torch.float32


def test_plan__lightning_moves_all_of_it() -> None:
    rows, images = random_parameters(16), noise(16)
    chosen = plan(rows)
    moved = move_data_to_device(chosen, torch.device("cpu"))
    assert isinstance(moved, Plan)
    assert all(isinstance(leaf, Tensor) for leaf in leaves(chosen))
    assert torch.equal(apply(images, moved, STAGES), apply(images, chosen, STAGES))


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for part in value:
            yield from leaves(part)
    else:
        yield value


@pytest.mark.gpu
def test_apply__same_on_the_gpu_without_waiting() -> None:
    images, rows = noise(48), random_parameters(48)
    expected = run(images, rows)
    chosen = move_data_to_device(plan(rows), torch.device("cuda"))
    images = images.cuda()
    apply(images, chosen, STAGES)  # loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = apply(images, chosen, STAGES)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got.cpu(), expected, atol=1e-5, rtol=0)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [STAGES[:-1], (*STAGES, "flip"), (*STAGES[:-1], "solarise"), ()])
def test_apply__wrong_stages_are_an_error(stages: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="stages="):
        run(noise(), parameters(), stages)


@pytest.mark.parametrize("shape", [(9,), (2, 8), (1, 2, 9)])
def test_plan__wrong_shape_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        plan(torch.zeros(shape))
