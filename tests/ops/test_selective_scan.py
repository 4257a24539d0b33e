"""Every selective-scan backend against the recurrence, in float64, and what users rely on besides."""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from vil_lightning.ops import SELECTIVE_SCAN_BACKENDS, selective_scan

NAMES = ("x", "delta", "A", "B", "C")
BACKENDS = pytest.mark.parametrize("backend", ["recurrent", "chunked"])
DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])

# `vil_lightning.ops.selective_scan` as an attribute is the function; this is the module that holds it.
scan_module = importlib.import_module("vil_lightning.ops.selective_scan")


def make_inputs(
    batch: int, seq_len: int, channels: int = 5, states: int = 3, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Random x, delta, A, B, C; the steps are such that some states forget at once and some hardly at all."""
    x = torch.randn(batch, seq_len, channels, dtype=torch.float64)
    delta = F.softplus(2 * torch.randn(batch, seq_len, channels, dtype=torch.float64) - 2)
    rates = -torch.exp(torch.randn(channels, states, dtype=torch.float64))
    weights = [torch.randn(batch, seq_len, states, dtype=torch.float64) for _ in range(2)]
    return [t.to(dtype).requires_grad_() for t in (x, delta, rates, *weights)]


def run(
    inputs: list[Tensor], op: Callable[..., Tensor] = selective_scan, **kwargs: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output, and the gradients of a fixed random projection of it."""
    out = op(*inputs, **kwargs)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return out.detach(), torch.autograd.grad((out * weight).sum(), inputs)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def assert_same(
    actual: tuple[Tensor, tuple[Tensor, ...]], expected: tuple[Tensor, tuple[Tensor, ...]], forward: float, grad: float
) -> None:
    assert relative_error(actual[0], expected[0]) <= forward
    for name, a, e in zip(NAMES, actual[1], expected[1], strict=True):
        # A single token forgets nothing: the gradient of A is 0 on both sides.
        assert (a - e).abs().max() <= 1e-14 or relative_error(a, e) <= grad, name


# --- the same numbers -------------------------------------------------------------------------------------------------


@DIRECTIONS
@pytest.mark.parametrize("batch, channels, states", [(1, 1, 1), (3, 5, 3), (2, 24, 16)], ids=str)
@pytest.mark.parametrize("seq_len", [1, 2, 7, 64, 65, 197])
def test_chunked_agrees_with_recurrence__output_and_all_gradients(
    seq_len: int, batch: int, channels: int, states: int, reverse: bool
) -> None:
    inputs = make_inputs(batch, seq_len, channels, states)
    expected = run(inputs, backend="recurrent", reverse=reverse)
    assert_same(run(inputs, backend="chunked", reverse=reverse), expected, forward=1e-12, grad=1e-11)


@DIRECTIONS
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 17, 20, 21, 1000])
def test_chunk_size_changes_nothing__20_tokens(chunk_size: int, reverse: bool) -> None:
    inputs = make_inputs(2, 20)
    expected = run(inputs, backend="recurrent", reverse=reverse)
    actual = run(inputs, backend="chunked", chunk_size=chunk_size, reverse=reverse)
    assert_same(actual, expected, forward=1e-12, grad=1e-11)


@pytest.mark.parametrize("numbers", [1, 8 * 5 * 3, 3 * 8 * 5 * 3, 10**6], ids=["one", "one_image", "three", "all"])
def test_images_at_a_time__changes_nothing(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(5, 20)
    expected = run(inputs, backend="recurrent")
    monkeypatch.setattr(scan_module, "_CPU_NUMBERS_PER_CHUNK", numbers)
    assert_same(run(inputs, backend="chunked", chunk_size=8), expected, forward=1e-12, grad=1e-11)


@BACKENDS
def test_reverse_equals_flipping__everything_before_and_after(backend: str) -> None:
    inputs = make_inputs(2, 23)

    def flipped(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, **kwargs: Any) -> Tensor:
        x, delta, B, C = (t.flip(1) for t in (x, delta, B, C))
        return selective_scan(x, delta, A, B, C, **kwargs).flip(1)

    actual = run(inputs, backend=backend, reverse=True, chunk_size=8)
    assert_same(actual, run(inputs, flipped, backend=backend, chunk_size=8), forward=1e-13, grad=1e-12)
    assert relative_error(actual[0], selective_scan(*inputs, backend=backend).detach()) > 0.1


@DIRECTIONS
@BACKENDS
def test_gradients_match_finite_differences__tiny(backend: str, reverse: bool) -> None:
    inputs = make_inputs(2, 7, 2, 3)
    assert torch.autograd.gradcheck(
        lambda *t: selective_scan(*t, backend=backend, reverse=reverse, chunk_size=4), inputs
    )


@BACKENDS
def test_known_numbers__three_tokens_worked_out_by_hand(backend: str) -> None:
    # One channel, two states of rates -1 and -2 and steps of log 2: decays 1/2 and 1/4. x / log 2 makes delta x whole.
    log2 = torch.tensor(2.0, dtype=torch.float64).log()
    x = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64).view(1, 3, 1) / log2
    delta = log2.expand(1, 3, 1)
    A = torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
    B = torch.tensor([[[1.0, 4.0], [1.0, 0.0], [0.5, 1.0]]], dtype=torch.float64)
    C = torch.tensor([[[1.0, 1.0], [2.0, 3.0], [1.0, -4.0]]], dtype=torch.float64)
    # h: (1, 4), (1/2 + 2, 1), (5/4 + 2, 1/4 + 4).
    expected = torch.tensor([5.0, 5.0 + 3.0, 3.25 - 17.0], dtype=torch.float64)
    y = selective_scan(x, delta, A, B, C, backend=backend, chunk_size=2)
    torch.testing.assert_close(y.flatten(), expected, rtol=1e-14, atol=0)


@DIRECTIONS
@BACKENDS
def test_step_of_zero__hides_the_token(backend: str, reverse: bool) -> None:
    inputs = make_inputs(1, 20)
    hidden = torch.zeros(20, dtype=torch.bool)
    hidden[[0, 1, 9, 13, 19]] = True
    with torch.no_grad():
        inputs[1][:, hidden] = 0
    x, delta, A, B, C = inputs
    y = selective_scan(*inputs, backend=backend, reverse=reverse, chunk_size=8)
    x, delta, B, C = (t[:, ~hidden] for t in (x, delta, B, C))
    torch.testing.assert_close(y[:, ~hidden], selective_scan(x, delta, A, B, C, backend=backend, reverse=reverse))


# --- hard steps and precisions ----------------------------------------------------------------------------------------


@DIRECTIONS
@pytest.mark.parametrize("case", ["tiny", "huge", "mixed", "published_start"])
@BACKENDS
def test_extreme_steps_stay_finite_and_right__float32(backend: str, case: str, reverse: bool) -> None:
    x, delta, _, B, C = make_inputs(1, 100, 5, 16, dtype=torch.float32)
    exponent = {"tiny": -30.0, "huge": 4.0}.get(case, 0.0)
    delta = torch.full_like(delta, 10.0**exponent)
    if case == "mixed":
        delta = 10 ** (8 * torch.rand_like(delta) - 4)
    elif case == "published_start":
        delta = torch.full_like(delta, 0.69)  # the backward direction of Vim: 1.5e-5 per token in the fastest state
    A = -torch.arange(1.0, 17).expand(5, 16)
    inputs = [t.detach().clone().requires_grad_() for t in (x, delta, A, B, C)]
    actual = run(inputs, backend=backend, reverse=reverse)
    assert actual[0].isfinite().all()
    for name, grad in zip(NAMES, actual[1], strict=True):
        assert grad.isfinite().all(), name
    exact = [t.detach().double().requires_grad_() for t in inputs]
    assert_same(actual, run(exact, backend="recurrent", reverse=reverse), forward=1e-5, grad=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])
@BACKENDS
def test_output_dtype__is_that_of_x(backend: str, dtype: torch.dtype) -> None:
    out, grads = run(make_inputs(1, 9, dtype=dtype), backend=backend)
    assert out.dtype == dtype
    assert all(grad.dtype == dtype for grad in grads)


@BACKENDS
def test_bfloat16__is_rounded_at_the_ends_only(backend: str) -> None:
    inputs = make_inputs(1, 100, dtype=torch.bfloat16)
    exact = [t.detach().float().requires_grad_() for t in inputs]
    out = selective_scan(*inputs, backend=backend).detach()
    assert torch.equal(out, selective_scan(*exact, backend=backend).detach().bfloat16())


@BACKENDS
def test_mixed_dtypes__compute_in_the_widest(backend: str) -> None:
    inputs = make_inputs(1, 9)
    x = inputs[0].detach().bfloat16()
    out = selective_scan(x, *inputs[1:], backend=backend)
    assert torch.equal(out, selective_scan(x.double(), *inputs[1:], backend=backend).bfloat16())


@BACKENDS
def test_autocast__changes_nothing(backend: str) -> None:
    inputs = make_inputs(2, 40, 24, 16, dtype=torch.float32)
    expected = run(inputs, backend=backend, chunk_size=8)
    with torch.autocast("cpu", torch.bfloat16):  # the backward pass, too
        actual = run(inputs, backend=backend, chunk_size=8)
    assert_same(actual, expected, forward=0, grad=0)


# --- torch transforms -------------------------------------------------------------------------------------------------


@DIRECTIONS
def test_compile__in_one_graph(reverse: bool) -> None:
    inputs = make_inputs(2, 9)
    kwargs: dict[str, Any] = {"reverse": reverse, "chunk_size": 5}
    torch._dynamo.reset()
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_same(run(inputs, compiled, **kwargs), run(inputs, **kwargs), forward=1e-13, grad=1e-12)


@BACKENDS
def test_activation_checkpoint__gives_equal_gradients(backend: str) -> None:
    inputs = make_inputs(2, 20)

    def checkpointed(*args: Tensor, **kwargs: Any) -> Tensor:
        return checkpoint(selective_scan, *args, use_reentrant=False, **kwargs)

    kwargs: dict[str, Any] = {"backend": backend, "chunk_size": 8}
    assert_same(run(inputs, checkpointed, **kwargs), run(inputs, **kwargs), forward=0, grad=0)


@BACKENDS
def test_partial_gradients__of_single_arguments(backend: str) -> None:
    inputs = make_inputs(1, 20)
    _, expected = run(inputs, backend=backend, chunk_size=8)
    for i, name in enumerate(NAMES):
        args = [t.detach().requires_grad_(j == i) for j, t in enumerate(inputs)]
        weight = torch.randn(1, 20, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (selective_scan(*args, backend=backend, chunk_size=8) * weight).sum().backward()
        assert args[i].grad is not None
        torch.testing.assert_close(args[i].grad, expected[i], msg=name)


@BACKENDS
def test_arguments__are_left_as_they_were(backend: str) -> None:
    inputs = make_inputs(1, 20)
    before = [t.detach().clone() for t in inputs]
    run(inputs, backend=backend, chunk_size=8)
    assert all(torch.equal(t.detach(), b) for t, b in zip(inputs, before, strict=True))


# --- memory -----------------------------------------------------------------------------------------------------------


class PeakMemory(TorchDispatchMode):
    """Largest sum of bytes in tensors alive at once, counted after every operator, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {key: value for key, value in self._live.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._live.values()))
        return result


def peak_memory(backend: str, seq_len: int) -> int:
    inputs = make_inputs(1, seq_len, 32, 16, dtype=torch.float32)
    with PeakMemory() as memory:
        run(inputs, backend=backend)
    return memory.peak


def test_peak_memory__is_linear_and_never_holds_all_states() -> None:
    states = 4 * 32 * 16  # bytes of one token in a (B, S, E, N)

    def per_token(backend: str, short: int, long: int) -> float:
        return (peak_memory(backend, long) - peak_memory(backend, short)) / (long - short)

    # The arguments and results alone, each 1 / N of a (B, S, E, N), come to more than half of one.
    assert per_token("chunked", 256, 512) < states
    assert per_token("chunked", 512, 1024) == pytest.approx(per_token("chunked", 256, 512), rel=0.1)
    assert per_token("recurrent", 32, 64) > 2 * states


# --- the CUDA kernel --------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_kernel(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """A stand-in for mamba_ssm with the layout of its arguments, (B, E, S) and (B, N, S); returns what it was given."""
    calls: list[tuple[Tensor, ...]] = []

    def selective_scan_fn(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        calls.append((u, delta, A, B, C))
        assert all(t.is_contiguous() for t in (u, delta, A, B, C))
        u, delta, B, C = (t.transpose(1, 2) for t in (u, delta, B, C))
        return selective_scan(u, delta, A, B, C, backend="recurrent").transpose(1, 2)

    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn  # type: ignore[attr-defined]
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    scan_module._mamba_ssm_kernel.cache_clear()
    yield calls
    scan_module._mamba_ssm_kernel.cache_clear()


@DIRECTIONS
def test_mamba_ssm__is_handed_its_own_layout(
    reverse: bool, fake_kernel: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "_mamba_ssm_obstacle", lambda device, dtype: None)  # on a CPU, too
    inputs = make_inputs(2, 9, dtype=torch.float32)
    expected = run(inputs, backend="recurrent", reverse=reverse)
    assert_same(run(inputs, backend="mamba_ssm", reverse=reverse), expected, forward=1e-6, grad=1e-5)
    assert_same(run(inputs, backend="auto", reverse=reverse), expected, forward=0, grad=1e-5)
    assert len(fake_kernel) == 2
    assert fake_kernel[0][0].shape == (2, 5, 9)


def test_mamba_ssm__obstacles(fake_kernel: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    obstacle, cuda = scan_module._mamba_ssm_obstacle, torch.device("cuda")
    assert obstacle(cuda, torch.float32) is None
    assert obstacle(torch.device("cpu"), torch.float32) == "the arguments are on cpu, its kernel needs CUDA"
    assert obstacle(cuda, torch.float64) == "its kernel has no float64"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert obstacle(cuda, torch.float32) == "torch.compile cannot trace its kernel"


def test_mamba_ssm__missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)  # what `import` takes for not installed
    scan_module._mamba_ssm_kernel.cache_clear()
    obstacle = scan_module._mamba_ssm_obstacle(torch.device("cuda"), torch.float32)
    scan_module._mamba_ssm_kernel.cache_clear()
    assert obstacle.startswith("the package cannot be imported (")
    assert "mamba_ssm" in obstacle


def test_mamba_ssm__asked_for_on_a_cpu() -> None:
    with pytest.raises(RuntimeError, match=r"'mamba_ssm' cannot be used: the arguments are on cpu.*Use 'chunked'"):
        selective_scan(*make_inputs(1, 3, dtype=torch.float32), backend="mamba_ssm")


@pytest.mark.gpu
@DIRECTIONS
def test_cuda__agrees_with_recurrence(reverse: bool) -> None:
    inputs = [t.detach().cuda().requires_grad_() for t in make_inputs(2, 197, 24, 16)]
    expected = run(inputs, backend="recurrent", reverse=reverse)
    assert_same(run(inputs, backend="auto", reverse=reverse), expected, forward=1e-12, grad=1e-11)
    singles = [t.detach().float().requires_grad_() for t in inputs]
    for backend in ("auto", "chunked"):
        assert_same(run(singles, backend=backend, reverse=reverse), expected, forward=1e-5, grad=1e-4)


# --- bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, match",
    [
        ({"backend": "fast"}, "unknown backend 'fast'. Available: " + ", ".join(SELECTIVE_SCAN_BACKENDS)),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"x": torch.zeros(7, 5)}, r"share one shape \(B, S, E\)"),
        ({"delta": torch.zeros(1, 7, 1)}, r"share one shape .*got .*\(1, 7, 1\)"),
        ({"x": torch.zeros(1, 0, 5), "delta": torch.zeros(1, 0, 5)}, "S >= 1"),
        ({"A": torch.zeros(3, 5)}, r"A must have shape \(E, N\) with E = 5; got \(3, 5\)"),
        ({"B": torch.zeros(1, 7, 5)}, r"B and C must have shape \(B, S, N\) = \(1, 7, 3\); got \(1, 7, 5\)"),
        ({"C": torch.zeros(1, 3, 7)}, r"B and C must have shape .*and \(1, 3, 7\)"),
    ],
    ids=["backend", "chunk_size", "x_2d", "delta_width", "no_tokens", "A_order", "B_width", "C_order"],
)
def test_bad_argument__is_named(change: dict[str, Any], match: str) -> None:
    args = dict(zip(NAMES, make_inputs(1, 7), strict=True))
    with pytest.raises(ValueError, match=match):
        selective_scan(**{**args, **change})
