"""Any sizes, any gates: the fast backends of the mLSTM against the recurrence, in float64."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vil_lightning.ops import mlstm

FAST_BACKENDS = ("parallel", "chunkwise")
NAMES = ("q", "k", "v", "igate", "fgate")
# Gates reach +-1e4 and are summed over up to 40 tokens: sums near 4e5, whose last digit in float64 is 6e-11. It is an error of
# exponents, so of relative size in the result, and where a normaliser nearly cancels it is enlarged by as much.
FORWARD, BACKWARD = 1e-7, 1e-5


@dataclasses.dataclass
class Problem:
    """Arguments of the op: q, k, v (B, NH, S, DH) and gates (B, NH, S), float64, which require gradients."""

    inputs: list[Tensor]
    reverse: bool
    chunk_size: int


@st.composite
def problems(draw: st.DrawFn, hidden: bool = True) -> Problem:
    """Sizes and gates are hypothesis' choice; the numbers in q, k and v are torch's, from a seed of its choice."""
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 40)))
    width = draw(st.sampled_from([1, 2, 3, 5, 7, 8, 13, 17, 24, 31]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    vectors = [draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0])) * normal(*shape, width) for _ in range(3)]
    gates = []
    for _ in range(2):
        mean = draw(st.sampled_from([0.0, 3.0, -3.0, 100.0, -100.0, 1e4, -1e4]))
        gate = mean + draw(st.sampled_from([0.0, 1.0, 20.0, 1e3, 1e4])) * normal(*shape)
        # Never two alike: where two tokens are equally strong, the stabiliser has two derivatives, and either is right.
        gates.append(gate.clamp(-1e4, 1e4) * (1 - 1e-3 * normal(*shape).abs()) + 1e-3 * normal(*shape))
    if hidden and draw(st.booleans()):
        share = draw(st.sampled_from([0.1, 0.5, 1.0]))
        gates[0][torch.rand(shape, generator=generator) < share] = -torch.inf
    inputs = [x.requires_grad_() for x in (*vectors, *gates)]
    return Problem(inputs, draw(st.booleans()), draw(st.sampled_from([1, 2, 3, 7, 16, 64])))


def run(problem: Problem, backend: str) -> tuple[Tensor, ...]:
    """The result and the gradients of a random projection of it."""
    out = mlstm(*problem.inputs, reverse=problem.reverse, backend=backend, chunk_size=problem.chunk_size)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return out.detach(), *torch.autograd.grad((out * weight).sum(), problem.inputs)


def sizes(problem: Problem, outputs: tuple[Tensor, ...]) -> list[float]:
    """How large the result and each gradient are, which errors are relative to.

    A gate's gradient is a difference of products like those of v with its gradient, and can be very much smaller than they
    are: its rounding errors are theirs.
    """
    own = [float(x.abs().max()) for x in outputs]
    products = zip(problem.inputs[:3], outputs[1:4], strict=True)
    terms = max(float((x.detach() * grad).abs().sum(dim=-1).max()) for x, grad in products)
    return [max(size, 1e-9) for size in (*own[:4], *(max(size, terms) for size in own[4:]))]


def check(problem: Problem) -> None:
    expected = run(problem, "recurrent")
    for name, value in zip(("result", *NAMES), expected, strict=True):
        assert value.isfinite().all(), f"recurrent: {name}"
    for backend in FAST_BACKENDS:
        actual = run(problem, backend)
        for name, a, e, size in zip(("result", *NAMES), actual, expected, sizes(problem, expected), strict=True):
            assert a.isfinite().all(), f"{backend}: {name}"
            error = float((a - e).abs().max()) / size
            assert error <= (FORWARD if name == "result" else BACKWARD), f"{backend}: {name} is off by {error:.2e}"


@settings(max_examples=150)
@given(problems())
def test_mlstm__any_shape_and_gates_give_what_the_recurrence_gives(problem: Problem) -> None:
    check(problem)


@pytest.mark.slow
@settings(max_examples=10_000)
@given(problems())
def test_mlstm__ten_thousand_cases(problem: Problem) -> None:
    check(problem)


@settings(max_examples=40)
@given(problems(), st.data())
def test_mlstm__no_token_sees_the_ones_after_it(problem: Problem, data: st.DataObject) -> None:
    problem.reverse = False
    position = data.draw(st.integers(0, problem.inputs[0].shape[2] - 1))
    changed = [x.detach().clone() for x in problem.inputs]
    for x in changed:
        x[:, :, position:] = 1.0
    for backend in ("recurrent", *FAST_BACKENDS):
        before, after = (
            mlstm(*inputs, backend=backend, chunk_size=problem.chunk_size).detach()[:, :, :position]
            for inputs in (problem.inputs, changed)
        )
        torch.testing.assert_close(before, after, rtol=FORWARD, atol=FORWARD)
