"""Shares of gates in each state, counted from what the mLSTM is really given."""

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from vil_lightning.backbones import layers
from vil_lightning.callbacks.gates import STATES, GateWatch

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_classes": 0}


def network(spread: float = 0.0, **kwargs: Any) -> nn.Module:
    """With `spread`, gates that vary from token to token, by about this much."""
    model = timm.create_model("vil2_tiny_patch16_224", **{**SMALL, **kwargs}).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("igate.weight", "fgate.weight")):
            nn.init.normal_(parameter, std=20 * spread)
    return model


def watched(model: nn.Module, images: Tensor) -> tuple[GateWatch, Tensor]:
    watch = GateWatch(model)
    with torch.no_grad(), watch.watching():
        model(images)
    return watch, watch.take()


def shares_by_hand(igate: Tensor, fgate: Tensor) -> list[list[float]]:
    """(B, 3) from pre-activations (B, NH, S) of one scan."""
    rows = []
    for i, f in zip(igate.double().flatten(1).tolist(), fgate.double().flatten(1).tolist(), strict=True):
        kept = [1 / (1 + math.exp(-value)) for value in f]
        counts = (
            sum(value < 0.01 for value in kept),
            sum(value > 1 - 1e-5 for value in kept),
            sum(abs(value) > 15 for value in i),
        )
        rows.append([count / len(i) for count in counts])
    return rows


@pytest.mark.parametrize("kwargs", [{}, {"block_design": "bidirectional"}, {"global_pool": "middle_cls"}])
def test_gate_watch__counts_what_the_mlstm_is_given(monkeypatch: pytest.MonkeyPatch, kwargs: dict[str, Any]) -> None:
    model = network(spread=1.0, **kwargs)
    given: list[tuple[Tensor, Tensor]] = []
    mlstm = layers.mlstm

    def noted(q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, **settings: Any) -> Tensor:
        given.append((igate.clone(), fgate.clone()))
        return mlstm(q, k, v, igate, fgate, **settings)

    monkeypatch.setattr(layers, "mlstm", noted)
    watch, shares = watched(model, torch.randn(3, 3, 16, 16))
    expected = torch.tensor([shares_by_hand(*gates) for gates in given]).transpose(0, 1)  # (B, scans, 3)
    torch.testing.assert_close(shares, expected)
    assert shares.shape == (3, len(watch.branches), 3)
    assert (shares.mean((0, 1)) > 0.02).all()  # each state occurs
    assert (shares.mean((0, 1)) < 0.9).all()


def test_gate_watch__of_a_branch_that_several_scans_share_is_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(spread=1.0, block_design="bidirectional_shared")
    given: list[tuple[Tensor, Tensor]] = []
    mlstm = layers.mlstm
    monkeypatch.setattr(layers, "mlstm", lambda *args, **kw: (given.append(args[3:5]), mlstm(*args, **kw))[1])
    _, shares = watched(model, torch.randn(2, 3, 16, 16))
    by_scan = torch.tensor([shares_by_hand(*gates) for gates in given]).transpose(0, 1)  # (B, 2 per branch, 3)
    torch.testing.assert_close(shares, by_scan.unflatten(1, (-1, 2)).mean(2))


def test_gate_watch__at_the_initialisation_is_0() -> None:
    _, shares = watched(network(), torch.randn(2, 3, 16, 16))
    assert shares.shape == (2, 2, 3)
    assert float(shares.abs().max()) == 0


@pytest.mark.parametrize(
    ("gate", "bias", "state"),
    [
        ("fgate", -4.5, None),  # sigmoid 0.0110
        ("fgate", -4.7, "fgate_shut"),  # 0.0090
        ("fgate", 11.4, None),  # 1 - 1.1e-5
        ("fgate", 11.7, "fgate_stuck"),  # 1 - 0.8e-5
        ("igate", -14.9, None),
        ("igate", 15.1, "igate_extreme"),
        ("igate", -15.1, "igate_extreme"),
    ],
)
def test_gate_watch__thresholds(gate: str, bias: float, state: str | None) -> None:
    model = network()
    watch = GateWatch(model)
    first = next(iter(watch.branches.values()))
    num_heads = first.num_heads
    with torch.no_grad():
        getattr(first, gate).bias[0] = bias
    _, shares = watched(model, torch.randn(2, 3, 16, 16))
    expected = torch.zeros(2, 2, 3)
    if state is not None:
        expected[:, 0, STATES.index(state)] = 1 / num_heads
    torch.testing.assert_close(shares, expected)


def test_gate_watch__leaves_nothing_in_the_network() -> None:
    model = network(spread=1.0)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        alone = model(images)
        with GateWatch(model).watching():
            assert torch.equal(model(images), alone)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    watch, _ = watched(model, images)
    with torch.no_grad(), watch.watching():
        model(images[:1])
    assert watch.take().shape[0] == 1  # of the last pass only


def test_gate_watch__sees_compiled_blocks() -> None:
    model = network(spread=1.0)
    images = torch.randn(2, 3, 16, 16)
    _, expected = watched(model, images)
    for block in model.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        model(images)  # compiled here, without hooks
    _, shares = watched(model, images)
    torch.testing.assert_close(shares, expected)


def test_gate_watch__in_half_precision_reads_the_gates_in_float32() -> None:
    model = network(spread=1.0)
    images = torch.randn(2, 3, 16, 16)
    _, expected = watched(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, shares = watched(model, images)
    assert shares.dtype == torch.float32
    torch.testing.assert_close(shares, expected, atol=0.1, rtol=0)


def test_gate_watch__of_another_network_has_nothing_to_watch() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=48, depth=1)
    watch = GateWatch(model)
    assert watch.branches == {}
    with watch.watching():
        assert torch.compiler.is_compiling() is False
