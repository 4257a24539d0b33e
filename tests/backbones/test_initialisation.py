"""Sizes and initial values of the registered models, against the published ones."""

import math

import pytest
import timm
import torch
from torch import Tensor

import vil_lightning  # noqa: F401  registers the models
from vil_lightning.backbones import VisionLSTM


@pytest.mark.parametrize(
    "name, img_size, count",
    [
        ("vil_tiny_patch16_224", 224, 6_088_360),
        ("vil_tinyplus_patch16_224", 224, 7_277_840),
        ("vil_small_patch16_224", 224, 22_792_360),
        ("vil_smallplus_patch16_224", 224, 24_628_664),
        ("vil_base_patch16_224", 224, 88_050_856),
        ("vil2_tiny_patch16_224", 192, 6_381_544),
        ("vil2_tiny_patch16_224", 224, 6_391_528),
        ("vil2_small_patch16_224", 192, 23_378_728),
        ("vil2_small_patch16_224", 224, 23_398_696),
        ("vil2_base_patch16_224", 192, 89_223_592),
        ("vil2_base_patch16_224", 224, 89_263_528),
    ],
)
def test_parameter_count__is_the_published_one(name: str, img_size: int, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, img_size=img_size)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.fixture(scope="module", params=["vil_tiny_patch16_224", "vil2_tiny_patch16_224"])
def model(request: pytest.FixtureRequest) -> VisionLSTM:
    torch.manual_seed(0)
    return timm.create_model(request.param)


def all_of(model: VisionLSTM, ending: str) -> Tensor:
    """All parameters whose names end so, flattened into one vector."""
    found = [p.detach().flatten() for n, p in model.named_parameters() if n.endswith(ending)]
    assert found, ending
    return torch.cat(found)


def assert_normal(x: Tensor, std: float) -> None:
    n = x.numel()
    assert abs(x.mean().item()) < 5 * std / math.sqrt(n)
    assert x.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n))
    if n > 10_000:
        assert (x.abs() > 2 * std).float().mean().item() == pytest.approx(0.0455, abs=0.01)


def assert_uniform(x: Tensor, bound: float) -> None:
    n = x.numel()
    assert 0.99 * bound < x.abs().max().item() <= bound
    assert x.std().item() == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(n))


@pytest.mark.parametrize("ending", ["proj_up.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight"])
def test_projections__are_normal_with_the_small_init_of_the_model_width(model: VisionLSTM, ending: str) -> None:
    assert_normal(all_of(model, ending), math.sqrt(2 / (5 * 192)))  # 0.0456


def test_down_projection__published(model: VisionLSTM) -> None:
    assert_normal(all_of(model, "proj_down.weight"), 2 / math.sqrt(192))  # 0.1443


@pytest.mark.parametrize("name", ["vil_tiny_patch16_224", "vil2_tiny_patch16_224"])
def test_down_projection__fixed(name: str) -> None:
    model = timm.create_model(name, weight_init="fixed")
    assert_normal(all_of(model, "proj_down.weight"), 0.006014)
    assert_normal(all_of(model, "proj_up.weight"), 0.045644)


@pytest.mark.parametrize("size, std_up, std_down", [("small", 0.032275, 0.102062), ("base", 0.022822, 0.072169)])
def test_projections__other_widths(size: str, std_up: float, std_down: float) -> None:
    model = timm.create_model(f"vil_{size}_patch16_224", depth=1)
    assert_normal(all_of(model, "proj_up.weight"), std_up)
    assert_normal(all_of(model, "q_proj.weight"), std_up)
    assert_normal(all_of(model, "proj_down.weight"), std_down)


def test_patch_projection__is_xavier_uniform_over_whole_patches(model: VisionLSTM) -> None:
    assert_uniform(all_of(model, "patch_embed.proj.weight"), math.sqrt(6 / (768 + 192)))


def test_position_embedding__is_normal(model: VisionLSTM) -> None:
    assert_normal(all_of(model, "pos_embed.embed"), 0.02)


def test_convolution__is_uniform_over_its_kernel(model: VisionLSTM) -> None:
    bound = 1 / 3 if model.blocks[0].mixer.branches[0].conv.weight.ndim == 4 else 1 / 2
    assert_uniform(all_of(model, "conv.weight"), bound)
    assert_uniform(all_of(model, "conv.bias"), bound)


def test_gates__start_from_their_biases_alone(model: VisionLSTM) -> None:
    assert (all_of(model, "igate.weight") == 0).all()
    assert (all_of(model, "fgate.weight") == 0).all()
    assert_normal(all_of(model, "igate.bias"), 0.1)
    torch.testing.assert_close(all_of(model, "fgate.bias").view(24, 4), torch.tensor([[3.0, 4.0, 5.0, 6.0]] * 24))


def test_head__is_tiny(model: VisionLSTM) -> None:
    assert_normal(model.head.weight.detach().flatten(), 2e-5)


def test_gains_are_one_and_biases_zero(model: VisionLSTM) -> None:
    drawn = ("conv.bias", "igate.bias", "fgate.bias")
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight") or name.endswith("skip"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias") and not name.endswith(drawn):
            assert (parameter == 0).all(), name


def test_init_weights__draws_every_parameter_again() -> None:
    again = timm.create_model("vil_tiny_patch16_224", depth=2)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.fill_(torch.nan)
    again.init_weights()
    assert all(p.isfinite().all() for p in again.parameters())
    assert_normal(all_of(again, "proj_down.weight"), 2 / math.sqrt(192))
