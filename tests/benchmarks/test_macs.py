"""The MAC counter reproduces the counts that are known by formula or from the papers."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from torch import nn

import vil_lightning  # noqa: F401

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "macs.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("macs_under_test", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


macs = load()


def count(name: str, size: int = 224, **kwargs: Any) -> Any:
    return macs.count_macs(timm.create_model(name, **kwargs), size)


@pytest.mark.parametrize(
    ("name", "full", "causal", "half_causal"),
    [("vil2_tiny_patch16_224", 1.86, 1.51, 1.33), ("vil2_small_patch16_224", 5.80, 5.09, 4.74)],
)
def test_count_macs__has_the_three_readings_of_vil(name: str, full: float, causal: float, half_causal: float) -> None:
    result = count(name)
    assert result.full / 1e9 == pytest.approx(full, abs=6e-3)
    assert result.causal / 1e9 == pytest.approx(causal, abs=6e-3)
    assert result.half_causal / 1e9 == pytest.approx(half_causal, abs=6e-3)


def vil_block(dim: int, seq_len: int, conv: int) -> float:
    """Per block, by formula: projections, q/k/v, convolution, gates and the whole S x S cell."""
    return seq_len * (6 * dim**2 + 24 * dim + 2 * dim * conv + 48 * dim + 4 * seq_len * dim)


@pytest.mark.parametrize(("version", "conv"), [("vil", 4), ("vil2", 9)])
@pytest.mark.parametrize("backend", ["parallel", "chunkwise", "recurrent"])
def test_count_macs__is_the_formula_whatever_is_executed(version: str, conv: int, backend: str) -> None:
    dim, depth, seq_len = 96, 3, 64
    kwargs = {"img_size": 32, "patch_size": 4, "embed_dim": dim, "depth": depth, "num_classes": 10}
    result = count(f"{version}_tiny_patch16_224", 32, mlstm_backend=backend, **kwargs)
    pooled = 2 * dim if version == "vil2" else dim
    expected = seq_len * 48 * dim + depth * vil_block(dim, seq_len, conv) + 10 * pooled
    assert result.full == expected
    assert result.cell == depth * 4 * seq_len**2 * dim


def test_count_macs__counts_every_scan_of_a_block() -> None:
    kwargs = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 2}
    one, two, shared = (
        count("vil2_tiny_patch16_224", 32, block_design=design, **kwargs)
        for design in ("alternating", "bidirectional", "bidirectional_shared")
    )
    assert two.cell == 2 * one.cell
    assert two.products - one.products == 2 * 64 * 96 * (24 + 18 + 48)
    assert shared == two  # shared weights are used twice


@pytest.mark.parametrize(
    ("name", "expected"),
    [("vit_small_patch16_224", 4.6), ("deit_tiny_patch16_224", 1.26), ("convnext_tiny", 4.46), ("resnet18", 1.82)],
)
def test_count_macs__agrees_with_published_counts(name: str, expected: float) -> None:
    result = count(name)
    assert result.full / 1e9 == pytest.approx(expected, rel=0.01)
    assert result.full == result.causal == result.half_causal


@pytest.mark.parametrize(("name", "dim", "products"), [("tiny", 192, 1.29), ("small", 384, 4.85)])
def test_count_macs__counts_vim_and_its_scan(name: str, dim: int, products: float) -> None:
    result = count(f"vim_{name}_patch16_224")
    assert result.products / 1e9 == pytest.approx(products, abs=6e-3)
    assert result.scan_ops == 9 * 197 * 2 * dim * 16 * 2 * 24
    assert result.full == result.causal == result.half_causal
    assert result.causal == result.products + result.scan_ops / 2


def test_count_macs__leaves_the_model_as_it_was() -> None:
    model = timm.create_model("vil2_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=32, depth=2, drop_rate=0.5)
    model.head_drop.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = macs.count_macs(model, 32)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert macs.count_macs(model, 32) == first


def test_count_macs__takes_other_channels_and_shapes() -> None:
    result = macs.count_macs(nn.Conv2d(1, 6, kernel_size=3, padding=1), (8, 4), in_chans=1)
    assert result.full == 8 * 4 * 9 * 6
