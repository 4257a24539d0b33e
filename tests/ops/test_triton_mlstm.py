"""The Triton kernels against the recurrence in float64: on a GPU if there is one, else in Triton's interpreter.

`conftest.py` chooses the interpreter. It also fills memory that nobody has written with NaN, so that a forgotten element shows.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton", reason="Triton is made for Linux")
import triton

from vil_lightning.ops import mlstm, triton_mlstm
from vil_lightning.ops.triton_mlstm import mlstm_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton 3.6 was seen to fail with NumPy 2.4 and to work with 2.3; 3.9 works with 2.4 and 2.5.
TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])
INTERPRETER_FAILS = TRITON < (3, 9) and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
pytestmark = pytest.mark.skipif(
    INTERPRETER_FAILS and DEVICE == "cpu",
    reason=f"the interpreter of Triton {triton.__version__} cannot be used with NumPy {np.__version__}",
)
NAMES = ("output", "q", "k", "v", "igate", "fgate")
DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
Result = list[Tensor]


def make_inputs(seq_len: int, head_dim: int, fgate: float = 2.0, batch: int = 1, heads: int = 2) -> list[Tensor]:
    """q, k, v, igate, fgate in float64. Keys resemble the queries: sums of weights that cancel would test the dice."""
    shape = (batch, heads, seq_len)
    q, noise, v = (torch.randn(*shape, head_dim, dtype=torch.float64) for _ in range(3))
    gates = [2 * torch.randn(shape, dtype=torch.float64), fgate + 2 * torch.randn(shape, dtype=torch.float64)]
    return [q, (q.mean(-1, keepdim=True) + 1 + 0.3 * noise) / 2, v, *gates]


def gradients(op: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype, **kwargs: Any) -> Result:
    """Output and the gradients of a fixed random projection of it; gates stay in float32 or better."""
    gate_dtype = torch.promote_types(dtype, torch.float32)
    device = "cpu" if dtype == torch.float64 else DEVICE
    dtypes = [dtype] * 3 + [gate_dtype] * 2
    leaves = [x.to(device, d).requires_grad_() for x, d in zip(inputs, dtypes, strict=True)]
    out = op(*leaves, **kwargs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad((out * weight.to(out)).sum(), leaves)
    return [x.detach().cpu().double() for x in (out, *grads)]


def pieces(chunk_size: int, block: int = 16) -> Callable[..., Tensor]:
    """The backend in chunks whatever the length, with small blocks."""

    def op(q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, reverse: bool) -> Tensor:
        kwargs: dict[str, Any] = {"reverse": reverse, "chunk_size": chunk_size, "eps": 1e-6, "block": block}
        return mlstm_triton(q, k, v, igate, F.logsigmoid(fgate), **kwargs)

    return op


def errors(actual: Result, expected: Result) -> dict[str, float]:
    """Relative, in the norm. The gradients of both gates share their scale: that of a gate that is shut is next to nothing."""
    scales = [x.norm().clamp(min=1e-30) for x in expected]
    scales[5] = torch.maximum(scales[4], scales[5])
    return {
        name: ((a - e).norm() / scale).item() for name, a, e, scale in zip(NAMES, actual, expected, scales, strict=True)
    }


def assert_exact(actual: Result, expected: Result, limit: float = 1e-5) -> None:
    found = errors(actual, expected)
    assert max(found.values()) <= limit, found


# --- the same numbers -------------------------------------------------------------------------------------------------

SHORT = [(1, 16), (5, 24), (36, 16), (70, 40)]


@DIRECTIONS
@pytest.mark.parametrize(
    ("seq_len", "head_dim", "fgate"),
    [
        *((*sizes, fgate) for sizes in SHORT for fgate in (-50.0, -2.0, 2.0, 6.0)),
        *((*sizes, fgate) for sizes in ((144, 24), (36, 96), (5, 144)) for fgate in (-50.0, 2.0)),
    ],
)
def test_one_pass__is_the_recurrence(seq_len: int, head_dim: int, fgate: float, reverse: bool) -> None:
    inputs = make_inputs(seq_len, head_dim, fgate)
    expected = gradients(mlstm, inputs, torch.float64, backend="recurrent", reverse=reverse)
    assert_exact(gradients(mlstm, inputs, torch.float32, backend="triton", reverse=reverse), expected)


CHUNKS = [(16, 16, 16), (17, 24, 16), (48, 16, 16), (100, 24, 32)]


@DIRECTIONS
@pytest.mark.parametrize(
    ("seq_len", "head_dim", "chunk_size", "fgate"),
    [*((*sizes, fgate) for sizes in CHUNKS for fgate in (-50.0, 2.0, 6.0)), (70, 96, 64, 2.0), (20, 144, 16, 2.0)],
)
def test_chunks__are_the_recurrence(
    seq_len: int, head_dim: int, chunk_size: int, fgate: float, reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_mlstm, "ONE_PASS_UP_TO", 0)
    inputs = make_inputs(seq_len, head_dim, fgate)
    expected = gradients(mlstm, inputs, torch.float64, backend="recurrent", reverse=reverse)
    assert_exact(gradients(pieces(chunk_size), inputs, torch.float32, reverse=reverse), expected)


@pytest.mark.parametrize("chunk_size", [None, 16])
def test_long_sums_of_gates__keep_the_digits_of_their_differences(
    chunk_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(48, 16)
    inputs[4][:, :, :20] = -1e3  # F is about -20,000 from here on, of which float32 holds two digits behind the point
    expected = gradients(mlstm, inputs, torch.float64, backend="recurrent", reverse=False)
    if chunk_size is None:
        actual = gradients(mlstm, inputs, torch.float32, backend="triton", reverse=False)
    else:
        monkeypatch.setattr(triton_mlstm, "ONE_PASS_UP_TO", 0)
        actual = gradients(pieces(chunk_size), inputs, torch.float32, reverse=False)
    assert_exact(actual, expected)


@pytest.mark.slow
@DIRECTIONS
@pytest.mark.parametrize(
    ("seq_len", "head_dim"),
    [(144, 96), (196, 96), (197, 192), (36, 384), (729, 16), (1024, 24), (729, 96), (4096, 16)],
)
def test_published_sizes__are_the_recurrence(seq_len: int, head_dim: int, reverse: bool) -> None:
    inputs = make_inputs(seq_len, head_dim, heads=1)
    expected = gradients(mlstm, inputs, torch.float64, backend="chunkwise", reverse=reverse)
    assert_exact(gradients(mlstm, inputs, torch.float32, backend="triton", reverse=reverse), expected)


@pytest.mark.gpu
@DIRECTIONS
@pytest.mark.parametrize("head_dim", [16, 24, 96, 192, 384])
@pytest.mark.parametrize("seq_len", [1, 5, 36, 144, 196, 197, 729, 1024, 4096])
def test_gpu__all_sizes_and_the_same_at_every_run(seq_len: int, head_dim: int, reverse: bool) -> None:
    inputs = make_inputs(seq_len, head_dim, batch=2)
    expected = gradients(mlstm, inputs, torch.float64, backend="chunkwise", reverse=reverse)
    first = gradients(mlstm, inputs, torch.float32, backend="triton", reverse=reverse)
    assert_exact(first, expected)
    for _ in range(5):
        again = gradients(mlstm, inputs, torch.float32, backend="triton", reverse=reverse)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_size", [None, 32])
def test_half_precision__at_most_twice_the_error_of_plain_torch(
    dtype: torch.dtype, chunk_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [x.to(dtype).double() if i < 3 else x for i, x in enumerate(make_inputs(100, 24))]
    expected = gradients(mlstm, inputs, torch.float64, backend="recurrent")
    plain = errors(gradients(mlstm, inputs, dtype, backend="chunkwise" if chunk_size else "parallel"), expected)
    if chunk_size is None:
        own = gradients(mlstm, inputs, dtype, backend="triton")
    else:
        monkeypatch.setattr(triton_mlstm, "ONE_PASS_UP_TO", 0)
        own = gradients(pieces(chunk_size), inputs, dtype, reverse=False)
    # Triton's interpreter cuts bfloat16 off where a GPU rounds it.
    factor = 2.5 if DEVICE == "cpu" and dtype == torch.bfloat16 else 2.0
    for name, error in errors(own, expected).items():
        assert error <= factor * plain[name], name


@pytest.mark.parametrize("chunk_size", [None, 16])
@pytest.mark.parametrize(
    ("igate", "fgate"), [(-1e4, 2.0), (1e4, 2.0), (-100.0, -1e4), (100.0, 1e4), (80.0, -80.0), (-1e30, 1e30)]
)
def test_extreme_gates__finite_and_the_recurrence(
    igate: float, fgate: float, chunk_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v, *noise = make_inputs(40, 16)
    inputs = [q, k, v, noise[0] + igate, noise[1] + fgate]
    expected = gradients(mlstm, inputs, torch.float64, backend="recurrent", reverse=False)
    op = mlstm
    if chunk_size is not None:
        monkeypatch.setattr(triton_mlstm, "ONE_PASS_UP_TO", 0)
        op = pieces(chunk_size)
    actual = gradients(op, inputs, torch.float32, reverse=False, **({} if chunk_size else {"backend": "triton"}))
    assert all(x.isfinite().all() for x in actual)
    scale = max(abs(igate), 1.0) if abs(igate) < 1e20 else 1.0
    assert errors(actual, expected)["output"] <= 1e-5 + 2e-7 * scale  # a gate of 1e4 is itself rounded by 5e-4


def test_hidden_tokens__are_as_if_absent() -> None:
    inputs = make_inputs(36, 16)
    inputs[3][:, :, [0, 1, 20, 35]] = -torch.inf
    expected = gradients(mlstm, inputs, torch.float64, backend="recurrent")
    actual = gradients(mlstm, inputs, torch.float32, backend="triton")
    assert_exact(actual, expected)
    assert (actual[0][:, :, :2] == 0).all()


def test_several_images_and_strided_tensors__do_not_mix() -> None:
    inputs = make_inputs(20, 16, batch=3)
    expected = gradients(mlstm, inputs, torch.float64, backend="recurrent", reverse=True)
    # As in the backbones, (B, S, NH, DH) in memory; and one that is neither.
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    inputs[2] = torch.stack([inputs[2], inputs[2]], dim=-1)[..., 0]
    assert_exact(gradients(mlstm, inputs, torch.float32, backend="triton", reverse=True), expected)


# --- a good citizen of torch ------------------------------------------------------------------------------------------


def core_inputs(chunk_size: int = 16) -> tuple[Any, ...]:
    q, k, v, igate, fgate = (x.to(DEVICE, torch.float32) for x in make_inputs(20, 16))
    decay_sum = F.logsigmoid(fgate).double().cumsum(-1)
    row_max = decay_sum + (igate.double() - decay_sum).cummax(-1).values
    tensors = [x.detach().requires_grad_() for x in (q, k, v, decay_sum, igate, row_max)]
    return *tensors, True, chunk_size, 16, 1e-6


@pytest.mark.filterwarnings("ignore")
def test_custom_op__passes_the_checks_of_torch() -> None:
    torch.use_deterministic_algorithms(False)  # the checks compare memory that is filled with NaN
    torch.library.opcheck(triton_mlstm._forward, core_inputs())


def test_compile__one_graph_and_equal_numbers() -> None:
    inputs = [x.to(DEVICE, torch.float32).requires_grad_() for x in make_inputs(20, 16)]

    def run(*args: Tensor) -> Tensor:
        return mlstm(*args, backend="triton", reverse=True).sin()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for op in (run, compiled):
        out = op(*inputs)
        grads = torch.autograd.grad(out.sum(), inputs)
        if op is run:
            expected = (out, *grads)
    for actual, wanted in zip((out, *grads), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-7)


def test_autocast_and_checkpointing__change_nothing_else() -> None:
    inputs = [x.to(DEVICE, torch.float32).requires_grad_() for x in make_inputs(20, 16)]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = mlstm(*inputs, backend="triton")
        again = checkpoint(lambda *x: mlstm(*x, backend="triton"), *inputs, use_reentrant=False)
    assert out.dtype == torch.bfloat16
    plain = [x.bfloat16() if i < 3 else x for i, x in enumerate(inputs)]
    assert torch.equal(out, mlstm(*plain, backend="triton"))
    grads, others = (torch.autograd.grad(x.float().square().sum(), inputs) for x in (out, again))
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


def test_flops__are_counted_by_hand() -> None:
    *tensors, reverse, chunk_size, block, eps = core_inputs()
    with FlopCounterMode(display=False) as counter:
        triton_mlstm._forward(*tensors, reverse, chunk_size, block, eps)
    pairs = sum(1 for t in range(20) for s in range(t + 1) if t // 16 == s // 16)
    through_state = 16 + 4  # tokens written to the only state, tokens that read it
    assert counter.get_total_flops() == 2 * (2 * 2 * 16 * pairs + 2 * 16 * 16 * through_state)


def test_repeated_runs__are_equal() -> None:
    inputs = make_inputs(70, 24)
    first, second = (gradients(mlstm, inputs, torch.float32, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_the_output_is_needed__no_gradients() -> None:
    inputs = [x.to(DEVICE, torch.float32) for x in make_inputs(20, 16)]
    out = mlstm(*inputs, backend="triton")
    assert not out.requires_grad
    inputs[2].requires_grad_()
    (grad,) = torch.autograd.grad(mlstm(*inputs, backend="triton").sum(), inputs[2])
    assert grad.isfinite().all()


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_refused__dtypes() -> None:
    with pytest.raises(
        ValueError, match=r"'triton' takes q, k, v of one dtype, bfloat16, float16, float32; got torch.float64"
    ):
        mlstm(*(x.to(DEVICE) for x in make_inputs(4, 16)), backend="triton")


def test_refused__cpu_without_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_mlstm, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"backend 'triton' runs on GPUs\. On a CPU use another one"):
        mlstm(*(x.float() for x in make_inputs(4, 16)), backend="triton")


def test_refused__without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vil_lightning.ops.triton_mlstm")
    monkeypatch.delitem(sys.modules, "vil_lightning.ops.triton_kernels")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match=r"backend 'triton' cannot be used here .*triton.*\. Install triton \(Linux\)"):
        mlstm(*(x.float() for x in make_inputs(4, 16)), backend="triton")
