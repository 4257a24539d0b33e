"""The mLSTM written as a matrix: its product with the values is what the recurrence gives."""

import math
from typing import Any

import pytest
import torch
from test_mlstm import DIRECTIONS, make_inputs, relative_error
from torch import Tensor

from vil_lightning.ops import mlstm, mlstm_weights


def values(*args: Any, **kwargs: Any) -> list[Tensor]:
    """q, k, v, igate, fgate without gradients."""
    return [x.detach() for x in make_inputs(*args, **kwargs)]


@DIRECTIONS
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 2, 5), (2, 4, 7, 4), (1, 2, 65, 24), (2, 1, 200, 3)])
def test_weights__times_values_is_the_recurrence(shape: tuple[int, int, int, int], reverse: bool) -> None:
    q, k, v, igate, fgate = values(*shape)
    weights = mlstm_weights(q, k, igate, fgate, reverse=reverse)
    assert weights.shape == (*shape[:3], shape[2])
    assert weights.dtype == torch.float64
    for backend in ("recurrent", "parallel"):
        expected = mlstm(q, k, v, igate, fgate, reverse=reverse, backend=backend)
        assert relative_error(weights @ v, expected) <= 1e-11


@DIRECTIONS
def test_weights__of_tokens_not_seen_yet_are_zero(reverse: bool) -> None:
    q, k, _, igate, fgate = values(2, 2, 9, 4)
    weights = mlstm_weights(q, k, igate, fgate, reverse=reverse)
    for t in range(9):
        for s in range(9):
            seen = s >= t if reverse else s <= t
            assert bool((weights[:, :, t, s] != 0).all()) == seen
            assert bool((weights[:, :, t, s] == 0).all()) != seen


def test_weights__worked_out_by_hand() -> None:
    q = torch.tensor([[2.0, 0.0], [0.0, 4.0]], dtype=torch.float64)[None, None]
    k = torch.tensor([[3.0, -1.0], [1.0, 2.0]], dtype=torch.float64)[None, None]
    igate = torch.tensor([0.5, -1.0], dtype=torch.float64)[None, None]
    fgate = torch.tensor([1.0, 2.0], dtype=torch.float64)[None, None]
    # q_t . k_s / sqrt(2) * decay * exp(igate_s), a row divided by max(|its sum|, 1) + eps * exp(its largest log decay).
    first = 6 / math.sqrt(2) * math.exp(0.5)
    decay = 1 / (1 + math.exp(-2.0))
    row = [-4 / math.sqrt(2) * decay * math.exp(0.5), 8 / math.sqrt(2) * math.exp(-1.0)]
    largest = max(math.log(decay) + 0.5, -1.0)
    eps = 0.125
    expected = [
        [first / (first + eps * math.exp(0.5)), 0.0],
        [x / (max(abs(sum(row)), 1) + eps * math.exp(largest)) for x in row],
    ]
    actual = mlstm_weights(q, k, igate, fgate, eps=eps)[0, 0]
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), atol=1e-14, rtol=1e-13)


@DIRECTIONS
def test_weights__rows_sum_to_at_most_one(reverse: bool) -> None:
    q, k, _, igate, fgate = values(2, 2, 50, 4)
    sums = mlstm_weights(q, k, igate, fgate, reverse=reverse).sum(-1)
    assert sums.abs().max() <= 1 + 1e-12
    assert sums.min() < -0.5
    assert sums.max() > 0.5


@DIRECTIONS
@pytest.mark.parametrize("size", [500.0, 1e4])
def test_weights__finite_for_hard_gates(size: float, reverse: bool) -> None:
    q, k, v, igate, fgate = values(1, 2, 23, 4)
    igate, fgate = size * igate, size * fgate
    weights = mlstm_weights(q, k, igate, fgate, reverse=reverse)
    assert weights.isfinite().all()
    expected = mlstm(q, k, v, igate, fgate, reverse=reverse, backend="recurrent")
    assert relative_error(weights @ v, expected) <= 1e-9


def test_weights__input_gate_minus_infinity_hides_a_token() -> None:
    q, k, _, igate, fgate = values(1, 2, 6, 4)
    igate[..., 3] = -torch.inf
    weights = mlstm_weights(q, k, igate, fgate)
    assert weights.isfinite().all()
    assert not weights[..., 3].any()
    igate[...] = -torch.inf
    assert not mlstm_weights(q, k, igate, fgate).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights__in_float32_or_better(dtype: torch.dtype) -> None:
    q, k, _, igate, fgate = values(1, 2, 20, 8, dtype=dtype)
    weights = mlstm_weights(q, k, igate, fgate)
    assert weights.dtype == torch.float32
    exact = mlstm_weights(*(x.double() for x in (q, k, igate, fgate)))
    assert relative_error(weights, exact) < (1e-5 if dtype == torch.float32 else 0.05)


def test_weights__autocast_rounds_q_and_k_but_not_the_gates() -> None:
    q, k, _, igate, fgate = values(1, 2, 100, 24, dtype=torch.float32, fgate_mean=5.0)
    q, k = q.abs(), k.abs()  # so that the normaliser is no difference of large numbers
    igate = igate + 60  # in bfloat16, numbers around 60 are 0.25 apart
    with torch.autocast("cpu", torch.bfloat16):
        weights = mlstm_weights(q, k, igate, fgate)
    assert weights.dtype == torch.float32
    rounded = [x.bfloat16().float() for x in (q, k)]
    assert relative_error(weights, mlstm_weights(*rounded, igate, fgate)) < 0.005
    assert not torch.equal(weights, mlstm_weights(q, k, igate, fgate))
    assert relative_error(mlstm_weights(*rounded, igate.bfloat16().float(), fgate), weights) > 0.04


@pytest.mark.parametrize(
    "name, shape",
    [("q", (1, 2, 5)), ("k", (1, 2, 6, 4)), ("igate", (1, 5, 2)), ("fgate", (1, 2, 4))],
)
def test_weights__shapes_that_do_not_fit(name: str, shape: tuple[int, ...]) -> None:
    args = {"q": (1, 2, 5, 4), "k": (1, 2, 5, 4), "igate": (1, 2, 5), "fgate": (1, 2, 5), name: shape}
    with pytest.raises(ValueError, match=r"mlstm_weights: q and k must share one shape .*got") as error:
        mlstm_weights(*(torch.zeros(size) for size in args.values()))
    assert str(shape) in str(error.value)
