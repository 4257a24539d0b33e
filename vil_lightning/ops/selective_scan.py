"""The selective scan of Mamba (S6): a linear recurrence with a diagonal state whose step size depends on the token.

One function, several backends that compute the same numbers:

| backend     | steps in Python | memory              | use                                             |
| ----------- | --------------- | ------------------- | ----------------------------------------------- |
| `recurrent` | S               | S·E·N, a few times  | the definition, token by token; the test oracle |
| `chunked`   | 3 S / √T        | S·E·(1+N/T) + T·E·N | plain torch, any device                         |
| `mamba_ssm` | none            | S·E                 | the CUDA kernel of the mamba_ssm package        |

Letters: `B` batch, `S` tokens, `E` channels, `N` states per channel, `T` tokens per chunk.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SelectiveScanBackend = Literal["auto", "recurrent", "chunked", "mamba_ssm"]
SELECTIVE_SCAN_BACKENDS: tuple[str, ...] = get_args(SelectiveScanBackend)

# On a CPU, `chunked` takes so many images at a time that a (B, T, N, E) tensor of a chunk holds about this many numbers.
# Larger ones leave the caches and are given back to the system after every operation: at the sizes of Vim-T, batch 64,
# all images at once took three to four times as long. Between 0.3 and 1.6 million the time hardly changes.
_CPU_NUMBERS_PER_CHUNK = 2**20


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    reverse: bool = False,
    backend: str = "auto",
    chunk_size: int = 64,
) -> Tensor:
    r"""Mix tokens with a state-space model of N states per channel.

    For every channel e and state n, starting from h = 0:

        h_t[e, n] = exp(delta_t[e] A[e, n]) h_{t-1}[e, n] + delta_t[e] B_t[n] x_t[e]
        y_t[e]    = sum_n C_t[n] h_t[e, n]

    As in Mamba's code, only A is discretised exactly; B enters as delta · B. The skip `D · x` is left to the caller.

    Decays are exponentiated one token at a time and only ever multiplied: nothing is divided by a product of decays,
    which soon underflows. With `A <= 0 <= delta` the result is finite, with finite gradients, for steps of any size.
    All arithmetic is in float32 (float64 if an argument is), also under autocast.

    Args:
        x: Input (B, S, E).
        delta: Step sizes (B, S, E), positive: after the softplus.
        A: Decay rates (E, N), negative.
        B: Input weights (B, S, N), shared by the channels.
        C: Output weights (B, S, N), shared by the channels.
        reverse: Scan from the last token to the first. Equals flipping every argument but A and the result along S.
        backend: One of `SELECTIVE_SCAN_BACKENDS`. `auto` takes `mamba_ssm` where that package is installed and can do
            it (CUDA, no float64, not while torch.compile traces), else `chunked`.
        chunk_size: Largest number of tokens per chunk, for `chunked`.

    Returns:
        (B, S, E), in the dtype of `x`.

    Raises:
        ValueError: For shapes that do not fit, an unknown backend or a chunk size below 1.
        RuntimeError: If `mamba_ssm` is asked for and cannot be used.

    References:
        Gu and Dao 2023, Mamba, arXiv:2312.00752.
    """
    _check_arguments(x, delta, A, B, C, backend, chunk_size)
    out_dtype = x.dtype
    dtype = torch.float32
    for argument in (x, delta, A, B, C):
        dtype = torch.promote_types(dtype, argument.dtype)
    if backend == "auto":
        backend = "mamba_ssm" if _mamba_ssm_obstacle(x.device, dtype) is None else "chunked"

    with torch.autocast(x.device.type, enabled=False):
        x, delta, A, B, C = (argument.to(dtype) for argument in (x, delta, A, B, C))
        if backend == "recurrent":
            y = _recurrent(x, delta, A, B, C, reverse=reverse)
        elif backend == "mamba_ssm":
            y = _mamba_ssm(x, delta, A, B, C, reverse=reverse)
        else:
            y = _chunked(x, delta, A, B, C, reverse=reverse, chunk_size=chunk_size)
        return y.to(out_dtype)


# --- the definition ---------------------------------------------------------------------------------------------------


def _recurrent(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, reverse: bool) -> Tensor:
    """The recurrence as it is written: slow, and obviously right. Every other backend is tested against this one."""
    batch, seq_len, channels = x.shape
    state = x.new_zeros(batch, channels, A.shape[-1])
    outputs: list[Tensor] = [x] * seq_len
    for t in reversed(range(seq_len)) if reverse else range(seq_len):
        decay = torch.exp(delta[:, t, :, None] * A)  # (B, E, N)
        write = (delta[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        state = decay * state + write
        outputs[t] = (state * C[:, t, None, :]).sum(-1)
    return torch.stack(outputs, dim=1)


# --- in chunks --------------------------------------------------------------------------------------------------------


def _chunked(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, reverse: bool, chunk_size: int) -> Tensor:
    batch, seq_len, _ = x.shape
    images = batch
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        images = max(_CPU_NUMBERS_PER_CHUNK // (min(chunk_size, seq_len) * A.numel()), 1)
    parts = zip(*(t.split(images) for t in (x, delta, B, C)), strict=True)
    return torch.cat([_ChunkedScan.apply(x, delta, A, B, C, reverse, chunk_size) for x, delta, B, C in parts])


class _ChunkedScan(torch.autograd.Function):
    """Chunk after chunk, keeping of each only the state that enters it; the backward pass computes the rest again.

    States are (B, N, E) here and what a chunk makes of them (B, T, N, E): channels last, as in `x`, so that the short
    axis N is never the one that vectorised loops run along. Sums are written as products and sums, not as matrix
    products, which autocast or TF32 would round.

    The gradient is itself a scan, against the direction of the first. With `g_t = dL/dh_t` and `q_t = a_t g_t`, which is
    dL/dh_{t-1} by way of token t:

        g_t = C_t dy_t + q_{t+1}        q_t = a_t q_{t+1} + a_t C_t dy_t        dL/d(delta_t A) = q_t h_{t-1}
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool, chunk_size: int
    ) -> Tensor:
        rates = A.T.contiguous()  # (N, E)
        state = x.new_zeros(x.shape[0], *rates.shape)
        chunks = _chunks(x.shape[1], chunk_size)
        entering: list[Tensor] = [state] * len(chunks)
        outputs: list[Tensor] = [state] * len(chunks)
        for c in reversed(range(len(chunks))) if reverse else range(len(chunks)):
            tokens = chunks[c]
            entering[c] = state
            decay, write = _discretise(x[:, tokens], delta[:, tokens], rates, B[:, tokens])
            hidden = _scan(decay, write, state, reverse=reverse)
            outputs[c] = (hidden * C[:, tokens, :, None]).sum(2)
            state = hidden[:, 0 if reverse else -1].clone()
        ctx.save_for_backward(x, delta, A, B, C, torch.stack(entering))
        ctx.reverse, ctx.chunk_size = reverse, chunk_size
        return torch.cat(outputs, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, A, B, C, entering = ctx.saved_tensors
        reverse: bool = ctx.reverse
        rates = A.T.contiguous()
        chunks = _chunks(x.shape[1], ctx.chunk_size)
        grad_rates = torch.zeros_like(rates)
        grad_state = torch.zeros_like(entering[0])  # q of the token scanned next, (B, N, E)
        grads: list[tuple[Tensor, ...]] = [()] * len(chunks)
        for c in range(len(chunks)) if reverse else reversed(range(len(chunks))):
            tokens = chunks[c]
            x_c, delta_c, B_c, C_c, grad_y_c = (t[:, tokens] for t in (x, delta, B, C, grad_y))
            decay, write = _discretise(x_c, delta_c, rates, B_c)
            hidden = _scan(decay, write, entering[c], reverse=reverse)
            grad_C = (hidden * grad_y_c[:, :, None]).sum(-1)

            direct = C_c[..., None] * grad_y_c[:, :, None]  # (B, T, N, E)
            q = _scan(decay, decay * direct, grad_state, reverse=not reverse)
            grad_hidden = direct.add_(_shift(q, grad_state, reverse=not reverse))
            grad_state = q[:, -1 if reverse else 0].clone()
            grad_log_decay = q.mul_(_shift(hidden, entering[c], reverse=reverse))

            grad_rates += (grad_log_decay * delta_c[:, :, None]).sum((0, 1))
            grad_write = (grad_hidden * B_c[..., None]).sum(2)  # with respect to delta x, (B, T, E)
            grad_B = (grad_hidden * (delta_c * x_c)[:, :, None]).sum(-1)
            grad_delta = (grad_log_decay * rates).sum(2) + grad_write * x_c
            grads[c] = (grad_write * delta_c, grad_delta, grad_B, grad_C)
        grad_x, grad_delta, grad_B, grad_C = (torch.cat(parts, dim=1) for parts in zip(*grads, strict=True))
        return grad_x, grad_delta, grad_rates.T, grad_B, grad_C, None, None


def _chunks(seq_len: int, chunk_size: int) -> list[slice]:
    """The tokens of each chunk: as few chunks as `chunk_size` allows, of lengths as even as possible."""
    num_chunks = math.ceil(seq_len / chunk_size)
    bounds = [seq_len * c // num_chunks for c in range(num_chunks + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(bounds)]


def _discretise(x: Tensor, delta: Tensor, rates: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Decays exp(delta A) and writes delta B x of each token, (B, T, N, E) both."""
    decay = (delta[:, :, None] * rates).exp_()
    return decay, B[..., None] * (delta * x)[:, :, None]


def _scan(decay: Tensor, write: Tensor, state: Tensor, *, reverse: bool) -> Tensor:
    """All states `h_t = decay_t h_{t-1} + write_t` of a chunk; computed in place of `write`.

    The chunk is cut into about √T groups of √T tokens. All groups advance together from a zero state, one token at a
    time; the same steps multiply up the decays since the start of the group. Then, group after group, the state that
    enters it is added with that product. So 3 √T operations replace T, at three multiplications per number.

    Args:
        decay: (B, T, N, E).
        write: (B, T, N, E); overwritten.
        state: The state that enters, (B, N, E).
        reverse: Whether it enters at the last token.
    """
    length = decay.shape[1]
    stride = math.isqrt(length - 1) + 1
    hidden, product = write, decay.clone()
    for i in range(stride - 2, -1, -1) if reverse else range(1, stride):
        # The tokens at place i of every group, and those scanned just before; the last group may be shorter.
        previous = slice(i + 1 if reverse else i - 1, None, stride)
        count = len(range(max(i, previous.start), length, stride))
        previous_product, previous_hidden = product[:, previous][:, :count], hidden[:, previous][:, :count]
        hidden[:, i::stride][:, :count].addcmul_(decay[:, i::stride][:, :count], previous_hidden)
        product[:, i::stride][:, :count].mul_(previous_product)
    starts = range(0, length, stride)
    for start in reversed(starts) if reverse else starts:
        end = min(start + stride, length)
        hidden[:, start:end].addcmul_(product[:, start:end], state[:, None])
        state = hidden[:, start if reverse else end - 1]
    return hidden


def _shift(states: Tensor, entering: Tensor, *, reverse: bool) -> Tensor:
    """The state before each token was scanned, given (B, T, N, E) those after it and (B, N, E) the one that enters."""
    if reverse:
        return torch.cat([states[:, 1:], entering[:, None]], dim=1)
    return torch.cat([entering[:, None], states[:, :-1]], dim=1)


# --- the CUDA kernel --------------------------------------------------------------------------------------------------


@functools.cache
def _mamba_ssm_kernel() -> Callable[..., Tensor] | ImportError:
    """The function of the mamba_ssm package, or why it cannot be had (e.g. built for another version of torch)."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        return error
    return cast(Callable[..., Tensor], selective_scan_fn)


def _mamba_ssm_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `mamba_ssm` cannot be used, or None."""
    if device.type != "cuda":
        return f"the arguments are on {device.type}, its kernel needs CUDA"
    if dtype == torch.float64:
        return "its kernel has no float64"
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace its kernel"
    kernel = _mamba_ssm_kernel()
    if isinstance(kernel, ImportError):
        return f"the package cannot be imported ({kernel})"
    return None


def _mamba_ssm(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, reverse: bool) -> Tensor:
    obstacle = _mamba_ssm_obstacle(x.device, x.dtype)
    if obstacle is not None:
        raise RuntimeError(f"selective_scan: backend 'mamba_ssm' cannot be used: {obstacle}. Use 'chunked' or 'auto'.")
    kernel = cast(Callable[..., Tensor], _mamba_ssm_kernel())
    # The kernel wants (B, E, S) and scans forwards only.
    x, delta, B, C = ((t.flip(1) if reverse else t).transpose(1, 2).contiguous() for t in (x, delta, B, C))
    y = kernel(x, delta, A.contiguous(), B, C).transpose(1, 2)
    return y.flip(1) if reverse else y


def _check_arguments(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, backend: str, chunk_size: int) -> None:
    if backend not in SELECTIVE_SCAN_BACKENDS:
        raise ValueError(
            f"selective_scan: unknown backend {backend!r}. Available: {', '.join(SELECTIVE_SCAN_BACKENDS)}."
        )
    if chunk_size < 1:
        raise ValueError(f"selective_scan: chunk_size={chunk_size} must be at least 1.")
    if x.ndim != 3 or x.shape != delta.shape or x.shape[1] == 0:
        raise ValueError(
            "selective_scan: x and delta must share one shape (B, S, E) with S >= 1; "
            f"got {tuple(x.shape)} and {tuple(delta.shape)}."
        )
    if A.ndim != 2 or A.shape[0] != x.shape[2]:
        raise ValueError(f"selective_scan: A must have shape (E, N) with E = {x.shape[2]}; got {tuple(A.shape)}.")
    expected = (*x.shape[:2], A.shape[1])
    if B.shape != expected or C.shape != expected:
        raise ValueError(
            f"selective_scan: B and C must have shape (B, S, N) = {expected}; got {tuple(B.shape)} and {tuple(C.shape)}."
        )
