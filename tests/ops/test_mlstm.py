"""Every mLSTM backend against the recurrence, in float64, and what users rely on besides."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from vil_lightning.ops import MLSTM_BACKENDS, chunkwise, describe_backend, mlstm
from vil_lightning.ops.parallel import log_decay_matrix

BACKENDS = ("recurrent", "parallel", "chunkwise")
FAST_BACKENDS = ("parallel", "chunkwise")
NAMES = ("q", "k", "v", "igate", "fgate")
DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])

# `vil_lightning.ops.mlstm` as an attribute is the function; this is the module that holds it.
mlstm_module = importlib.import_module("vil_lightning.ops.mlstm")


def make_inputs(
    batch: int, heads: int, seq_len: int, head_dim: int, dtype: torch.dtype = torch.float64, fgate_mean: float = 2.0
) -> list[Tensor]:
    """Random q, k, v, igate, fgate; the forget gates span fast and slow decay."""
    shape = (batch, heads, seq_len)
    vectors = [torch.randn(*shape, head_dim, dtype=torch.float64) for _ in range(3)]
    gates = [2 * torch.randn(shape, dtype=torch.float64), fgate_mean + 2 * torch.randn(shape, dtype=torch.float64)]
    return [x.to(dtype).requires_grad_() for x in vectors + gates]


def run(inputs: list[Tensor], op: Callable[..., Tensor] = mlstm, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
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
        # A single token forgets nothing: the gradient of its forget gate is 0 on both sides.
        assert (a - e).abs().max() <= 1e-12 or relative_error(a, e) <= grad, name


# --- the same numbers -------------------------------------------------------------------------------------------------


@DIRECTIONS
@pytest.mark.parametrize("head_dim", [1, 4, 24, 96, 192])
@pytest.mark.parametrize("seq_len", [1, 2, 7, 63, 64, 65, 196, 729, 1000])
def test_backends_agree_with_recurrence__output_and_all_gradients(seq_len: int, head_dim: int, reverse: bool) -> None:
    batch, heads = (2, 2) if seq_len * head_dim**2 <= 100_000 else (1, 1)
    inputs = make_inputs(batch, heads, seq_len, head_dim)
    expected = run(inputs, backend="recurrent", reverse=reverse)
    for backend in FAST_BACKENDS:
        assert_same(run(inputs, backend=backend, reverse=reverse), expected, forward=1e-10, grad=1e-8)


@DIRECTIONS
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 17, 20, 21, 1000])
def test_chunk_size_changes_nothing__20_tokens(chunk_size: int, reverse: bool) -> None:
    inputs = make_inputs(2, 2, 20, 4)
    expected = run(inputs, backend="recurrent", reverse=reverse)
    actual = run(inputs, backend="chunkwise", chunk_size=chunk_size, reverse=reverse)
    assert_same(actual, expected, forward=1e-12, grad=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_equals_flipping__everything_before_and_after(backend: str) -> None:
    inputs = make_inputs(2, 2, 23, 4)

    def flipped(*args: Tensor, **kwargs: Any) -> Tensor:
        return mlstm(*(x.flip(2) for x in args), **kwargs).flip(2)

    actual = run(inputs, backend=backend, reverse=True, chunk_size=8)
    assert_same(actual, run(inputs, flipped, backend=backend, chunk_size=8), forward=1e-13, grad=1e-12)
    assert relative_error(actual[0], mlstm(*inputs, backend=backend).detach()) > 0.1


@DIRECTIONS
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_match_finite_differences__tiny(backend: str, reverse: bool) -> None:
    inputs = make_inputs(1, 2, 5, 3)
    assert torch.autograd.gradcheck(lambda *x: mlstm(*x, backend=backend, reverse=reverse, chunk_size=2), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_numbers__four_tokens_worked_out_by_hand(backend: str) -> None:
    q = torch.tensor([[1, 0], [0.5, -1], [2, 1], [-1, 0.5]], dtype=torch.float64)
    k = torch.tensor([[0.5, 1], [1, -0.5], [-1, 2], [0, 1]], dtype=torch.float64)
    v = torch.tensor([[1, 2], [3, -1], [0.5, 0.5], [-2, 4]], dtype=torch.float64)
    igate = torch.tensor([0.1, -0.2, 3.0, 0.0], dtype=torch.float64)
    fgate = torch.tensor([3.0, 4.0, 5.0, -1.0], dtype=torch.float64)
    expected = torch.tensor(
        [[0.390736, 0.781473], [1.161225, -1.730055], [1.722675, 0.915958], [0.324710, 0.695833]], dtype=torch.float64
    )
    args = [x[None, None] for x in (q, k, v, igate, fgate)]
    torch.testing.assert_close(mlstm(*args, backend=backend, chunk_size=2)[0, 0], expected, atol=6e-7, rtol=0)


def test_log_decay__four_tokens_worked_out_by_hand() -> None:
    igate = torch.tensor([0.1, -0.2, 3.0, 0.0], dtype=torch.float64)
    log_fgate = F.logsigmoid(torch.tensor([3.0, 4.0, 5.0, -1.0], dtype=torch.float64))
    inf = float("inf")
    expected = torch.tensor(
        [
            [0.1, -inf, -inf, -inf],
            [0.081850, -0.2, -inf, -inf],
            [0.075135, -0.206715, 3.0, -inf],
            [-1.238127, -1.519977, 1.686738, 0.0],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(log_decay_matrix(igate, log_fgate, reverse=False), expected, atol=6e-7, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps__enters_the_normaliser_unscaled(backend: str) -> None:
    q = k = v = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    gate = torch.zeros(1, 1, 1, dtype=torch.float64)
    # One token with q = k = v = 1 and input gate exp(0): 1 / (max(1, 1) + eps).
    torch.testing.assert_close(mlstm(q, k, v, gate, gate, backend=backend, eps=0.25).item(), 0.8)


# --- hard gates and precisions ----------------------------------------------------------------------------------------


@DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case",
    ["random", "igate_low", "igate_high", "fgate_low", "fgate_high", "all_low", "all_high", "low_high", "high_low"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_gates_stay_finite__up_to_1e4(backend: str, case: str, dtype: torch.dtype, reverse: bool) -> None:
    q, k, v, igate, fgate = (x.detach() for x in make_inputs(1, 2, 23, 4, dtype=dtype))
    signs = {"low": -1e4, "high": 1e4}
    if case == "random":
        igate, fgate = (1e4 * (2 * torch.rand_like(x) - 1) for x in (igate, fgate))
    elif case.startswith("igate"):
        igate = igate + signs[case.removeprefix("igate_")]
    elif case.startswith("fgate"):
        fgate = fgate + signs[case.removeprefix("fgate_")]
    else:
        first, second = case.removeprefix("all_").split("_") if case[:4] != "all_" else (case[4:], case[4:])
        igate, fgate = torch.full_like(igate, signs[first]), torch.full_like(fgate, signs[second])
    inputs = [x.requires_grad_() for x in (q, k, v, igate, fgate)]
    out, grads = run(inputs, backend=backend, reverse=reverse, chunk_size=8)
    assert out.isfinite().all()
    for name, grad in zip(NAMES, grads, strict=True):
        assert grad.isfinite().all(), name


@DIRECTIONS
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_extreme_gates_agree_with_recurrence__float64(backend: str, reverse: bool) -> None:
    inputs = make_inputs(1, 2, 23, 4)
    inputs[3:] = [(500 * x.detach()).requires_grad_() for x in inputs[3:]]
    expected = run(inputs, backend="recurrent", reverse=reverse)
    assert_same(run(inputs, backend=backend, reverse=reverse, chunk_size=8), expected, forward=1e-9, grad=1e-8)


@DIRECTIONS
@pytest.mark.parametrize("backend", BACKENDS)
def test_input_gate_minus_infinity__hides_the_token(backend: str, reverse: bool) -> None:
    inputs = make_inputs(1, 2, 20, 4)
    hidden = torch.zeros(20, dtype=torch.bool)
    hidden[[0, 1, 9, 13, 19]] = True
    with torch.no_grad():
        inputs[3][..., hidden], inputs[4][..., hidden] = -torch.inf, torch.inf
    kept = [x[:, :, ~hidden].detach().requires_grad_() for x in inputs]
    out, grads = run(inputs, backend=backend, reverse=reverse, chunk_size=8)
    assert out.isfinite().all()
    for name, grad in zip(NAMES, grads, strict=True):
        assert grad.isfinite().all(), name
    expected = mlstm(*kept, backend=backend, reverse=reverse, chunk_size=8).detach()
    assert relative_error(out[:, :, ~hidden], expected) <= 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_tokens_hidden__gives_zeros(backend: str) -> None:
    inputs = make_inputs(1, 1, 9, 4)
    with torch.no_grad():
        inputs[3].fill_(-torch.inf)
    out, grads = run(inputs, backend=backend, chunk_size=4)
    assert (out == 0).all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("seq_len", [64, 196, 729])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_float32_accuracy__against_float64(backend: str, seq_len: int) -> None:
    inputs = make_inputs(1, 2, seq_len, 24, fgate_mean=5.0)
    expected = run(inputs, backend=backend)
    inputs32 = [x.detach().float().requires_grad_() for x in inputs]
    actual = run(inputs32, backend=backend)
    assert actual[0].dtype == torch.float32
    assert_same(actual, expected, forward=5e-5, grad=5e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_dtype__is_that_of_v(backend: str, dtype: torch.dtype) -> None:
    assert mlstm(*make_inputs(1, 1, 9, 4, dtype=dtype), backend=backend).dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast__rounds_q_k_v_but_not_the_gates(backend: str) -> None:
    q, k, v, igate, fgate = make_inputs(1, 2, 100, 24, dtype=torch.float32, fgate_mean=5.0)
    # Positive, so that the normaliser is no difference of large numbers.
    q, k = (x.detach().abs().requires_grad_() for x in (q, k))
    # bfloat16 resolves numbers around 60 to 0.25, and an input gate that is off by 0.1 is off by 10 %.
    igate = (igate + 60).detach().requires_grad_()
    inputs = [q, k, v, igate, fgate]
    rounded = [x.detach().bfloat16().float() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        out = mlstm(*inputs, backend=backend, chunk_size=32)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 and x.grad.isfinite().all() for x in inputs)
    with torch.no_grad():
        expected = mlstm(*rounded, igate, fgate, backend=backend, chunk_size=32)
        coarse = mlstm(*rounded, igate.bfloat16().float(), fgate, backend=backend, chunk_size=32)
    assert relative_error(out, expected) < 0.02
    assert relative_error(coarse, expected) > 0.04  # so rounded gates would have shown


# --- torch transforms -------------------------------------------------------------------------------------------------


@DIRECTIONS
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_compile__in_one_graph(backend: str, reverse: bool) -> None:
    inputs = make_inputs(1, 2, 20, 4)
    kwargs: dict[str, Any] = {"backend": backend, "reverse": reverse, "chunk_size": 8}
    torch._dynamo.reset()
    compiled = torch.compile(mlstm, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_same(run(inputs, compiled, **kwargs), run(inputs, **kwargs), forward=1e-12, grad=1e-11)


def graph_of(function: Any, *args: Tensor) -> str:
    """What a compiler is given."""
    graphs: list[str] = []

    def look(module: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(module.code)
        return module.forward

    torch._dynamo.reset()
    torch.compile(function, fullgraph=True, backend=look, dynamic=False)(*args)
    return "".join(graphs)


def test_compile__the_chunkwise_form_is_one_operator_but_not_in_an_exported_program() -> None:
    inputs = [x.float() for x in make_inputs(1, 2, 20, 4)]

    def run_chunkwise(*args: Tensor) -> Tensor:
        return mlstm(*args, backend="chunkwise", chunk_size=8)

    assert "vil_lightning.mlstm_chunkwise" in graph_of(run_chunkwise, *inputs)

    class Module(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return run_chunkwise(*args)

    for strict in (False, True):  # with and without the compiler's tracer
        program = torch.export.export(Module(), tuple(inputs), strict=strict)
        assert "vil_lightning" not in str(program.graph)
        torch.testing.assert_close(program.module()(*inputs), run_chunkwise(*inputs))


def test_compile__the_operator_is_given_contiguous_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    # One image, gates cut from (B, S, 2 NH), tokens before heads: views remain views wherever one image allows it.
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in make_inputs(1, 2, 16, 4)[:3])
    igate, fgate = torch.randn(1, 16, 4, dtype=torch.float64).transpose(1, 2).chunk(2, dim=1)
    expected = mlstm(q, k, v, igate, fgate, backend="chunkwise", chunk_size=8)
    operator, called = chunkwise._forward_op, []

    def watch(*args: Any) -> Any:
        called.append([x.is_contiguous() for x in args[:6]])
        return operator(*args)

    monkeypatch.setattr(chunkwise, "_forward_op", watch)
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    torch.testing.assert_close(mlstm(q, k, v, igate, fgate, backend="chunkwise", chunk_size=8), expected)
    assert called == [[True] * 6]


@pytest.mark.slow
def test_compile__with_torchs_own_compiler_and_one_image() -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, 16, 2, 4, generator=generator).requires_grad_() for _ in range(3)]
    gates = torch.randn(1, 16, 4, generator=generator).requires_grad_()

    def run_one(*args: Tensor) -> Tensor:
        igate, fgate = args[3].transpose(1, 2).chunk(2, dim=1)
        return mlstm(*(x.transpose(1, 2) for x in args[:3]), igate, fgate, backend="chunkwise", chunk_size=8)

    torch._dynamo.reset()
    results = []
    for function in (run_one, torch.compile(run_one, fullgraph=True)):
        out = function(*qkv, gates)
        results.append((out, *torch.autograd.grad(out.square().sum(), (*qkv, gates))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunkwise_operator__passes_the_checks_of_torch(dtype: torch.dtype, reverse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    igate, log_fgate = torch.randn(2, 15, generator=generator), -torch.rand(2, 15, generator=generator)
    decay_sum, row_max = (x.view(2, 3, 5).requires_grad_() for x in chunkwise.gate_sums(igate, log_fgate))
    igate = igate.to(torch.promote_types(dtype, torch.float32)).view(2, 3, 5).requires_grad_()
    torch.use_deterministic_algorithms(False)  # the checks compare memory that is filled with NaN
    torch.library.opcheck(chunkwise._forward_op, (q, k, v, decay_sum, igate, row_max, reverse, 1e-6))


@DIRECTIONS
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_memory_order__heads_or_tokens_first_give_the_same_numbers(backend: str, reverse: bool) -> None:
    inputs = make_inputs(2, 3, 20, 4)
    kwargs: dict[str, Any] = {"backend": backend, "reverse": reverse, "chunk_size": 8}
    expected = run(inputs, **kwargs)
    for order in ((1, 0, 2, 3), (0, 2, 1, 3)):  # an involution each
        others = [x.permute(order).contiguous().permute(order) for x in inputs[:3]]
        assert_same(run((*others, *inputs[3:]), **kwargs), expected, forward=1e-14, grad=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp__is_zero_where_it_would_be_subnormal(dtype: torch.dtype) -> None:
    smallest = math.log(torch.finfo(dtype).tiny)
    x = torch.tensor([0.0, -1.0, smallest + 1, smallest - 1, -1e9, -math.inf, 3.0, math.inf, math.nan], dtype=dtype)
    torch.testing.assert_close(chunkwise._exp_(x.clone())[:3], x[:3].exp(), rtol=1e-6, atol=0)
    assert chunkwise._exp_(x.clone())[3:8].tolist() == [0, 0, 0, 1, 1]
    assert chunkwise._exp_(x.clone())[8].isnan()  # what is broken is not hidden


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpoint__gives_equal_gradients(backend: str) -> None:
    inputs = make_inputs(1, 2, 20, 4)

    def checkpointed(*args: Tensor, **kwargs: Any) -> Tensor:
        return checkpoint(mlstm, *args, use_reentrant=False, **kwargs)

    kwargs: dict[str, Any] = {"backend": backend, "chunk_size": 8}
    assert_same(run(inputs, checkpointed, **kwargs), run(inputs, **kwargs), forward=0, grad=0)


# --- memory and choice of backend -------------------------------------------------------------------------------------


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
    inputs = make_inputs(1, 1, seq_len, 16, dtype=torch.float32)
    with PeakMemory() as memory:
        run(inputs, backend=backend)
    return memory.peak


def test_peak_memory__grows_linearly_chunkwise_and_quadratically_parallel() -> None:
    assert peak_memory("chunkwise", 4096) <= 4.5 * peak_memory("chunkwise", 1024)
    assert peak_memory("parallel", 2048) >= 3.5 * peak_memory("parallel", 1024)  # twice the tokens
    assert peak_memory("chunkwise", 2048) < peak_memory("parallel", 2048) / 4


@pytest.mark.parametrize("above", [0, 1], ids=["at_threshold", "above_threshold"])
def test_auto__is_parallel_for_short_and_chunkwise_for_long_sequences(
    above: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    def spy_on(name: str) -> None:
        original = getattr(mlstm_module, name)
        monkeypatch.setattr(mlstm_module, name, lambda *a, **k: called.append(name) or original(*a, **k))

    for name in ("mlstm_parallel", "mlstm_chunkwise", "mlstm_recurrent"):
        spy_on(name)
    mlstm(*make_inputs(1, 1, mlstm_module._PARALLEL_UP_TO + above, 1))
    assert called == ["mlstm_chunkwise" if above else "mlstm_parallel"]


def test_describe_backend__says_what_auto_chooses() -> None:
    limit = mlstm_module._PARALLEL_UP_TO
    assert (
        describe_backend("auto") == f"auto: parallel up to {limit} tokens, chunkwise above (from measurements on CPUs)"
    )
    assert describe_backend("triton") == "triton"


# --- bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, match",
    [
        ({"backend": "fast"}, "unknown backend 'fast'. Available: " + ", ".join(MLSTM_BACKENDS)),
        ({"backend": "chunkwise", "chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"q": torch.zeros(2, 3, 4)}, r"share one shape \(B, NH, S, DH\)"),
        ({"k": torch.zeros(1, 2, 6, 4)}, r"share one shape .*got .*\(1, 2, 6, 4\)"),
        ({"v": torch.zeros(1, 2, 5, 3)}, r"share one shape .*got .*\(1, 2, 5, 3\)"),
        ({"igate": torch.zeros(1, 2, 4)}, r"igate and fgate must have shape \(B, NH, S\) = \(1, 2, 5\)"),
        ({"fgate": torch.zeros(1, 5, 2)}, r"igate and fgate must have shape .*got .*\(1, 5, 2\)"),
        ({name: torch.zeros(1, 2, 0, 4) for name in "qkv"}, "S, DH >= 1"),
    ],
    ids=["backend", "chunk_size", "q_3d", "k_tokens", "v_width", "igate_tokens", "fgate_order", "no_tokens"],
)
def test_bad_argument__is_named(change: dict[str, Any], match: str) -> None:
    args = dict(zip(NAMES, make_inputs(1, 2, 5, 4), strict=True))
    with pytest.raises(ValueError, match=match):
        mlstm(**{**args, **change})
