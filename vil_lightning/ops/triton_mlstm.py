"""The mLSTM in fused Triton kernels, for GPUs; with `TRITON_INTERPRET=1` in the environment also on a CPU, slowly.

As in `parallel.py` a token reads the earlier ones with weights W_ts = q_t . k_s / sqrt(DH) * exp(F_t - F_s + a_s - stab_t). The
stabiliser needs nothing but the gates, so it is known beforehand (a cumulative maximum), and the sum over s can be taken block
by block without ever storing an S x S matrix:

- up to `ONE_PASS_UP_TO` tokens, every block of tokens reads all earlier blocks: one kernel;
- longer sequences are cut into chunks: a block reads its own chunk and the state that enters it, which one kernel computes for
  all chunks before. Time and memory are linear in S.

The backward pass stores no weights either: it computes them again, the gradients of q in one kernel by rows, those of k, v and
the gates in another by columns. No sum depends on the order in which programs run: the kernels' results are the same at every
run.

Plain torch sums the gates up, S numbers a head, and differentiates that; one kernel makes of the sums whatever the others read.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vil_lightning.ops import triton_kernels as kernels
from vil_lightning.ops.chunkwise import gate_sums

ONE_PASS_UP_TO = 512
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = not isinstance(kernels.forward_kernel, triton.runtime.JITFunction)


def mlstm_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    log_fgate: Tensor,
    *,
    reverse: bool,
    chunk_size: int,
    eps: float,
    block: int | None = None,
) -> Tensor:
    """Shapes as in `mlstm`, `log_fgate` as in `mlstm_recurrent`.

    Args:
        chunk_size: Of sequences above `ONE_PASS_UP_TO` tokens; rounded up to whole blocks.
        block: Tokens a program handles at a time, a power of 2 from 16; see `_Tiles` if None.

    Raises:
        ValueError: For a dtype that is not in `DTYPES`, or different ones, and on a CPU without Triton's interpreter.
    """
    if q.device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "mlstm: backend 'triton' runs on GPUs. On a CPU use another one; TRITON_INTERPRET=1 in the environment runs the "
            "kernels there for tests, very slowly."
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(
            f"mlstm: backend 'triton' takes q, k, v of one dtype, {allowed}; got {q.dtype}, {k.dtype}, {v.dtype}."
        )
    if reverse:
        # From here in the order of the scan. Gates have 1 / DH of the size of q, k or v.
        igate, log_fgate = igate.flip(-1), log_fgate.flip(-1)
    decay_sum, row_max = gate_sums(igate, log_fgate)
    block = block or _tiles(q).block
    seq_len = q.shape[2]
    one_pass = seq_len <= ONE_PASS_UP_TO
    chunk_blocks = -(-(seq_len if one_pass else chunk_size) // block)
    hidden, _ = _forward(q, k, v, decay_sum, igate.float(), row_max, reverse, chunk_blocks * block, block, eps)
    return hidden


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, whichever the tensors are on."""

    @functools.wraps(function)
    def run(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(tensor):
            return function(tensor, *args, **kwargs)

    return run


@torch.library.custom_op("vil_lightning::mlstm", mutates_args=())
@_on_its_device
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay_sum: Tensor,
    igate: Tensor,
    row_max: Tensor,
    reverse: bool,
    chunk_size: int,
    block: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, NH, S, DH) and the sums of the rows of weights (B, NH, S).

    Args:
        decay_sum: F (B, NH, S), float64, like the following in the order of the scan.
        igate: a (B, NH, S), float32.
        row_max: max over s of F_t - F_s + a_s, (B, NH, S), float64.
        chunk_size: A multiple of `block`.
    """
    q, k, v = (_token_major(x) for x in (q, k, v))
    gates = _Gates(q, decay_sum, igate, row_max, chunk_size, block, eps)
    hidden, read_sum = torch.empty_like(q), torch.empty_like(gates.igate)
    settings = _settings(q, reverse, block)
    states = _states(k, v, gates.write, gates.write, gates, settings, False)
    tiles = _tiles(q)
    kernels.forward_kernel[_grid(q, block, tiles.wide)](
        *(q, k, v),
        *(gates.coarse, gates.fine, gates.igate, gates.stab, gates.floor, gates.eps, gates.read),
        *states,
        *(hidden, read_sum, gates.scale, *gates.sizes),
        **settings,
        K_WIDTH=tiles.narrow,
        V_WIDTH=tiles.wide,
    )
    return hidden.transpose(1, 2), read_sum


@_forward.register_fake
def _(q, k, v, decay_sum, igate, row_max, reverse, chunk_size, block, eps):  # type: ignore[no-untyped-def]
    batch, heads, seq_len, head_dim = q.shape
    return q.new_empty(batch, seq_len, heads, head_dim).transpose(1, 2), igate.new_empty(batch, heads, seq_len)


@torch.library.custom_op("vil_lightning::mlstm_backward", mutates_args=())
@_on_its_device
def _backward(
    hidden_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay_sum: Tensor,
    igate: Tensor,
    row_max: Tensor,
    hidden: Tensor,
    read_sum: Tensor,
    reverse: bool,
    chunk_size: int,
    block: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, `decay_sum`, `igate` and `row_max`."""
    q, k, v, hidden, hidden_grad = (_token_major(x) for x in (q, k, v, hidden, hidden_grad))
    gates = _Gates(q, decay_sum, igate, row_max, chunk_size, block, eps)
    settings, tiles = _settings(q, reverse, block), _tiles(q)
    inverse, sum_grad, state_read, state_sum = igate.new_empty(4, *igate.shape).unbind()
    row_max_grad = torch.empty_like(gates.row_max)
    kernels.denominator_grad_kernel[_grid(q, block, q.shape[-1])](
        *(hidden, hidden_grad, read_sum, gates.floor, gates.eps, gates.read),
        *(inverse, sum_grad, row_max_grad, state_read, state_sum, *gates.sizes[:3]),
        DH=q.shape[-1],
        BLOCK=block,
        WIDTH=tiles.narrow,
        REVERSE=reverse,
        num_warps=4,
        enable_fp_fusion=True,
    )

    states = _states(k, v, gates.write, gates.write, gates, settings, False)
    q_grad = torch.empty_like(q)
    grid = _grid(q, block, tiles.wide)
    row_grad = q.new_empty(grid[0], grid[2], q.shape[1], dtype=torch.float32)
    kernels.query_grad_kernel[grid](
        *(q, k, v, hidden_grad),
        *(gates.coarse, gates.fine, gates.igate, gates.stab, inverse, sum_grad, gates.read),
        *(*states, q_grad, row_grad, gates.scale, *gates.sizes),
        **settings,
        K_WIDTH=tiles.wide,
        V_WIDTH=tiles.narrow,
    )
    del states
    state_grads = _states(q, hidden_grad, state_read, state_sum, gates, settings, True)
    k_grad, v_grad = torch.empty_like(k), torch.empty_like(v)
    grid = _grid(q, block, tiles.narrow)
    column_grad = q.new_empty(grid[0], grid[2], q.shape[1], dtype=torch.float32)
    kernels.key_value_grad_kernel[grid](
        *(q, k, v, hidden_grad),
        *(gates.coarse, gates.fine, gates.igate, gates.stab, inverse, sum_grad, gates.write),
        *(*state_grads, k_grad, v_grad, column_grad, gates.scale, *gates.sizes),
        **settings,
        WIDTH=tiles.narrow,
    )
    # The logarithm of a weight is F_t - F_s + a_s + ...: gradients summed over rows and over columns, from what is not yet
    # rounded to the dtype of q and k, since they nearly cancel.
    row_grad, column_grad = (x.sum(1).view_as(igate) for x in (row_grad, column_grad))
    decay_sum_grad = row_grad.double() - column_grad.double()
    q_grad, k_grad, v_grad = (x.transpose(1, 2) for x in (q_grad, k_grad, v_grad))
    return q_grad, k_grad, v_grad, decay_sum_grad, column_grad, row_max_grad


@_backward.register_fake
def _(hidden_grad, q, k, v, decay_sum, igate, row_max, hidden, read_sum, reverse, chunk_size, block, eps):  # type: ignore[no-untyped-def]
    batch, heads, seq_len, head_dim = q.shape
    vectors = (q.new_empty(batch, seq_len, heads, head_dim).transpose(1, 2) for _ in range(3))
    numbers = (igate.new_empty(batch, heads, seq_len, dtype=x) for x in (torch.float64, torch.float32, torch.float64))
    return *vectors, *numbers


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.reverse, ctx.chunk_size, ctx.block, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, hidden_grad, _):  # type: ignore[no-untyped-def]
    if hidden_grad is None:
        return (None,) * 10
    grads = _backward(hidden_grad, *ctx.saved_tensors, ctx.reverse, ctx.chunk_size, ctx.block, ctx.eps)
    return *grads, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


# --- what kernels are given -------------------------------------------------------------------------------------------


class _Gates:
    """What the gates amount to, in the order of the scan: see `gates_kernel`."""

    def __init__(
        self, q: Tensor, decay_sum: Tensor, igate: Tensor, row_max: Tensor, chunk_size: int, block: int, eps: float
    ) -> None:
        self.decay_sum, self.igate, self.row_max = (x.contiguous() for x in (decay_sum, igate, row_max))
        self.num_states = -(-igate.shape[-1] // chunk_size) - 1  # none enters the first chunk
        self.sizes = q.shape[1], q.shape[2], self.num_states, chunk_size
        self.scale = 1 / math.sqrt(q.shape[-1])
        numbers = igate.new_empty(7 if self.num_states else 5, *igate.shape).unbind()
        self.coarse, self.fine, self.stab, self.floor, self.eps = numbers[:5]
        self.read, self.write = numbers[5:] or (self.stab, self.stab)  # not read where there is no state
        kernels.gates_kernel[igate.shape[0] * igate.shape[1], -(-igate.shape[2] // block)](
            *(self.decay_sum, self.igate, self.row_max, *numbers[:5], self.read, self.write, eps, self.scale),
            *(q.shape[1], self.num_states, chunk_size),
            BLOCK=block,
            num_warps=1,
            enable_fp_fusion=True,
        )


def _states(
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    value_sum: Tensor,
    gates: _Gates,
    settings: dict[str, object],
    backward: bool,
) -> tuple[Tensor, Tensor]:
    """Memories (B * NH, N, DH, DH) and normalisers (B * NH, N, DH) that enter the chunks but the first, or their gradients."""
    batch, _, heads, head_dim = key.shape
    count, tiles = gates.num_states, _tiles(key)
    memory = key.new_empty(batch * heads, count, head_dim, head_dim, dtype=torch.float32)
    norm = key.new_empty(batch * heads, count, head_dim, dtype=torch.float32)
    if count == 0:
        return memory, norm
    grid = (batch * heads, -(-head_dim // tiles.narrow), -(-head_dim // tiles.wide))
    kernels.states_kernel[grid](
        *(key, value, weight, value_sum, gates.decay_sum, gates.row_max, memory, norm),
        *gates.sizes,
        **settings,
        K_WIDTH=tiles.narrow,
        V_WIDTH=tiles.wide,
        BACKWARD=backward,
    )
    return memory, norm


class _Tiles(NamedTuple):
    """How work is cut up. Chosen by what compilers make of it (`benchmarks/kernels.py`), not by timings: it fits the shared
    memory of common GPUs, and hardly a register is spilled.

    Args:
        block: Tokens a program handles at a time.
        narrow: Channels of the smaller side of a tile; without padding for 96, 192 and 384, the published widths of heads.
        wide: Channels of the larger side, a power of 2: of the result forwards and of the gradient of the queries. The fewer
            tiles, the fewer products are computed again. (Keys and values have two gradients, which take narrow tiles.)
        num_warps: Of a program.
    """

    block: int
    narrow: int
    wide: int
    num_warps: int


def _tiles(x: Tensor) -> _Tiles:
    # Exact products of float32 run outside of matrix units and hold their operands in registers: tiles are a quarter as large.
    block, narrow, wide = (32, 32, 64) if x.dtype == torch.float32 else (64, 64, 128)
    head_dim = x.shape[-1]
    widths = [width for width in (64, 32, 16) if width <= narrow]
    narrow = next((width for width in widths if head_dim % width == 0), 32 if head_dim > 16 else 16)
    wide = min(wide, max(16, 1 << (head_dim - 1).bit_length()))
    return _Tiles(block, narrow, wide, num_warps=4 if wide <= 32 else 8)


def _settings(x: Tensor, reverse: bool, block: int) -> dict[str, object]:
    """Compile-time arguments of the kernels that multiply."""
    exact = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    # AMD's compiler knows tf32 for some GPUs only.
    precision = "interpreted" if INTERPRETED else "ieee" if exact or torch.version.hip else "tf32"
    return {
        "DH": x.shape[-1],
        "BLOCK": block,
        "REVERSE": reverse,
        "PRECISION": precision,
        # States are kept in float32. Rounded to half, they would not agree on the gradient of what flows through them.
        "STATE_PRECISION": precision,
        "num_warps": _tiles(x).num_warps,
        "num_stages": 2,
        "enable_fp_fusion": True,  # said because Triton's default changes with 3.10
    }


def _grid(x: Tensor, block: int, width: int) -> tuple[int, int, int]:
    batch, seq_len, heads, head_dim = x.shape
    return batch * heads, -(-seq_len // block), -(-head_dim // width)


def _token_major(x: Tensor) -> Tensor:
    """(B, NH, S, DH) -> (B, S, NH, DH), contiguous; the backbones' tensors are without a copy."""
    return x.transpose(1, 2).contiguous()


def _flops(q_shape: torch.Size, chunk_size: int) -> int:
    """Multiply-adds x 2 of the forward pass, counted without the halves of tiles that are masked."""
    batch, heads, seq_len, head_dim = q_shape
    num_chunks = -(-seq_len // chunk_size)
    last = seq_len - (num_chunks - 1) * chunk_size
    pairs = (num_chunks - 1) * chunk_size * (chunk_size + 1) // 2 + last * (last + 1) // 2
    through_states = (num_chunks - 1) * chunk_size + (seq_len - chunk_size if num_chunks > 1 else 0)  # written, read
    return batch * heads * (4 * head_dim * pairs + 2 * head_dim * head_dim * through_states)


@register_flop_formula(torch.ops.vil_lightning.mlstm)
def _forward_flops(q_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _flops(q_shape, args[6])


@register_flop_formula(torch.ops.vil_lightning.mlstm_backward)
def _backward_flops(grad_shape, q_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * _flops(q_shape, args[8])
