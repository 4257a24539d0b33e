"""The mLSTM in chunks: quadratic inside a chunk, a recurrent state between chunks. Linear in S in time and memory.

The backward pass is written out. What autograd would keep for it, several L x L matrices a chunk and a state each, is computed
again instead, from q, k, v and the gates; and it needs fewer passes over them than there are operators forwards.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def mlstm_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    log_fgate: Tensor,
    *,
    reverse: bool,
    chunk_size: int,
    eps: float,
) -> Tensor:
    """Chunkwise form; shapes as in `mlstm`, `log_fgate` as in `mlstm_recurrent`. It can be differentiated once.

    All chunks are cut to one length, as even as possible (196 tokens with `chunk_size=64` make four chunks of 49), so
    that few padded tokens are ever computed.
    """
    if q.stride(1) > q.stride(0):  # the heads come first in memory: then here, too, so that nothing is copied
        q, k, v, igate, log_fgate = (x.transpose(0, 1) for x in (q, k, v, igate, log_fgate))
        hidden = mlstm_chunkwise(q, k, v, igate, log_fgate, reverse=reverse, chunk_size=chunk_size, eps=eps)
        return hidden.transpose(0, 1)
    batch, heads, seq_len, head_dim = q.shape
    num_chunks = math.ceil(seq_len / chunk_size)
    length = math.ceil(seq_len / num_chunks)
    pad = num_chunks * length - seq_len
    if pad:
        # A padded token writes nothing (input gate -inf, key 0) and forgets nothing (log forget gate 0).
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        igate, log_fgate = F.pad(igate, (0, pad), value=-math.inf), F.pad(log_fgate, (0, pad))
    if reverse:
        decay_sum, row_max = (x.flip(-1) for x in gate_sums(igate.flip(-1), log_fgate.flip(-1)))
    else:
        decay_sum, row_max = gate_sums(igate, log_fgate)
    q, k, v = (x.reshape(batch * heads, num_chunks, length, head_dim) for x in (q, k, v))
    numbers = (x.reshape(batch * heads, num_chunks, length) for x in (decay_sum, igate, row_max))
    if torch.compiler.is_dynamo_compiling():
        hidden, _ = _forward_op(*(x.contiguous() for x in (q, k, v, *numbers)), reverse, eps)
    else:
        hidden = _Chunkwise.apply(q, k, v, *numbers, reverse, eps)
    hidden = hidden.view(batch, heads, num_chunks * length, head_dim)
    return hidden[:, :, :seq_len] if pad else hidden


def gate_sums(igate: Tensor, log_fgate: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the gates from the first token on, in float64, since differences of them are needed later.

    MPS has no float64: there, rounding grows with the sum. 4,096 tokens that forget half of the state each cost two digits.

    Args:
        igate: a (B, NH, S).
        log_fgate: (B, NH, S).

    Returns:
        F_t, the sum of `log_fgate` up to token t, and max over s <= t of F_t - F_s + a_s; (B, NH, S).
    """
    wide = log_fgate.dtype if log_fgate.device.type == "mps" else torch.float64
    igate, log_fgate = igate.to(wide), log_fgate.to(wide)
    decay_sum = log_fgate.cumsum(-1)
    return decay_sum, decay_sum + (igate - decay_sum).cummax(-1).values


class _Gates(NamedTuple):
    """Weights from the gates. N sequences, NC chunks of L tokens; in the order of tokens, also if the scan is reversed.

    With the stabiliser m_t >= 0, and e the last token of a chunk in scan order, p that of the chunk before. All exponents that
    are used are at most 0.

    Args:
        reverse: The direction of the scan.
        decay: exp(F_t - F_s + a_s - m_t) / sqrt(DH), 0 for s after t; (N, NC, L, L).
        read: exp(F_t - F_p + m_p - m_t), with which a token reads the state that enters its chunk; (N, NC, L, 1).
        write: exp(F_e - F_s + a_s - m_e) / sqrt(DH), with which it writes to the one that leaves; (N, NC, L, 1).
        keep: exp(F_e - F_p + m_p - m_e), with which a chunk keeps the state that enters it; (N, NC).
        floor: exp(-m_t), the smallest normaliser; (N, NC, L).
        eps: eps exp(max_s - m_t), what is added to the normaliser; (N, NC, L).
    """

    reverse: bool
    decay: Tensor
    read: Tensor
    write: Tensor
    keep: Tensor
    floor: Tensor
    eps: Tensor

    @property
    def readers(self) -> slice:
        """Chunks that a state enters."""
        return slice(None, -1) if self.reverse else slice(1, None)

    @property
    def writers(self) -> slice:
        """Chunks whose state enters another one: that of `writers` number i enters `readers` number i."""
        return slice(1, None) if self.reverse else slice(None, -1)


def _gates(
    decay_sum: Tensor, igate: Tensor, row_max: Tensor, reverse: bool, eps: float, head_dim: int, dtype: torch.dtype
) -> _Gates:
    num_chunks, length = igate.shape[1:]
    stab = row_max.clamp(min=0)
    sums = decay_sum - stab  # F_t - m_t; `rows`, `read` and `keep` are differences of two of them
    end = sums[..., 0 if reverse else length - 1]  # (N, NC)
    enter = F.pad(end[:, 1:], (0, 1)) if reverse else F.pad(end[:, :-1], (1, 0))
    rows = sums - end[..., None]
    columns = igate - stab - rows - math.log(head_dim) / 2
    decay = _exp_(rows.to(dtype)[..., :, None] + columns.to(dtype)[..., None, :])
    # Later tokens, for which exponents may be positive, are not read.
    decay = decay.triu_() if reverse else decay.tril_()
    if num_chunks == 1:
        read = write = decay[:, :0]  # there is no state
    else:
        read = torch.exp(sums - enter[..., None]).to(dtype)[..., None]
        write = torch.exp(columns).to(dtype)[..., None]
    keep = torch.exp(end - enter).to(dtype)
    floor = torch.exp(-stab).to(dtype)
    return _Gates(reverse, decay, read, write, keep, floor, eps * torch.exp(row_max - stab).to(dtype))


def _exp_(x: Tensor) -> Tensor:
    """exp(min(x, 0)) in place, with 0 for what a normal number cannot hold.

    On CPUs exp takes a hundred times longer where the result is subnormal, ten times where it is 0 or infinite.
    """
    smallest = math.log(torch.finfo(x.dtype).tiny)
    return torch.threshold_(x.clamp_(smallest, 0).exp_(), 1.01 * torch.finfo(x.dtype).tiny, 0)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, decay_sum: Tensor, igate: Tensor, row_max: Tensor, reverse: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """N sequences, NC chunks, L tokens. Products run in the dtype of q, k and v; states, sums and weights in at least float32.

    Args:
        q, k, v: (N, NC, L, DH).
        decay_sum, igate, row_max: (N, NC, L), see `gate_sums`.

    Returns:
        The output (N, NC, L, DH), and the sums of tokens' weights (N, NC, L).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    gates = _gates(decay_sum, igate, row_max, reverse, eps, q.shape[-1], dtype)
    weights = _bmm(q, k.mT).to(dtype).mul_(gates.decay)  # (N, NC, L, L)
    numerator = _bmm(weights.to(v.dtype), v).to(dtype)
    read_sum = weights.sum(-1)
    del weights
    if q.shape[1] > 1:
        memory, norm = _states(k, v, gates)
        readers, writers = gates.readers, gates.writers
        read = gates.read[:, readers]
        numerator[:, readers].addcmul_(_bmm_shifted(q, memory.to(q.dtype), reverse), read)
        norm_read = (q[:, readers] * norm[:, writers, None]).sum(-1)
        read_sum[:, readers].addcmul_(norm_read, read[..., 0])
    denominator = torch.maximum(read_sum.abs(), gates.floor).add_(gates.eps)
    hidden = numerator.div_(denominator[..., None]).to(v.dtype)
    return hidden, read_sum


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
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of what `_forward` was given, from that of its output (N, NC, L, DH), and what it returned."""
    dtype = read_sum.dtype
    gates = _gates(decay_sum, igate, row_max, reverse, eps, q.shape[-1], dtype)

    # h = numerator / (max(|n|, floor) + eps), with the sum n of a token's weights.
    inverse = 1 / torch.maximum(read_sum.abs(), gates.floor).add_(gates.eps)
    denominator_grad = -(hidden_grad * hidden).sum(-1, dtype=dtype) * inverse
    row_max_grad = denominator_grad * gates.eps
    sum_grad = torch.where(read_sum.abs() > gates.floor, denominator_grad * read_sum.sign(), 0)[..., None]
    grad = hidden_grad * inverse[..., None]  # of the numerator, (N, NC, L, DH)
    rounded_grad = grad.to(q.dtype)  # for products with q, k and v

    # Inside the chunks.
    scores = _bmm(q, k.mT).to(dtype)
    scores_grad = _bmm(rounded_grad, v.mT).to(dtype).add_(sum_grad).mul_(gates.decay)
    weights = (scores * gates.decay).to(v.dtype)
    v_grad = _bmm(weights.mT, rounded_grad).to(dtype)
    del weights
    log_grad = scores.mul_(scores_grad)  # of the logarithms of the weights
    row_grad, column_grad = log_grad.sum(-1), log_grad.sum(-2)
    del scores, log_grad
    scores_grad = scores_grad.to(q.dtype)
    q_grad, k_grad = _bmm(scores_grad, k).to(dtype), _bmm(scores_grad.mT, q).to(dtype)
    del scores_grad

    if q.shape[1] > 1:
        readers, writers, write = gates.readers, gates.writers, gates.write[:, gates.writers]
        memory, norm = _states(k, v, gates)
        grad.mul_(gates.read)  # of what is read from the state
        sum_grad = sum_grad * gates.read
        memory_grad = _bmm(q.mT, grad.to(q.dtype)).to(dtype)
        norm_grad = (q * sum_grad).sum(-2)
        _scan(memory_grad, gates.keep, reverse=not reverse)
        _scan(norm_grad, gates.keep, reverse=not reverse)

        from_state = _bmm_shifted(grad.to(q.dtype), memory.mT.to(q.dtype), reverse).to(dtype)
        from_state.addcmul_(sum_grad[:, readers], norm[:, writers, None])
        row_grad[:, readers] += (q[:, readers] * from_state).sum(-1)
        q_grad[:, readers] += from_state
        del memory, norm, from_state

        memory_grad = memory_grad.to(v.dtype)
        from_state = _bmm_shifted(v, memory_grad.mT, not reverse).to(dtype)
        from_state.add_(norm_grad[:, readers, None]).mul_(write)
        column_grad[:, writers] += (k[:, writers] * from_state).sum(-1)
        k_grad[:, writers] += from_state
        v_grad[:, writers].addcmul_(_bmm_shifted(k, memory_grad, not reverse), write)

    # The logarithm of a weight is F_t - F_s + a_s, less a stabiliser that cancels.
    return (
        q_grad.to(q.dtype),
        k_grad.to(k.dtype),
        v_grad.to(v.dtype),
        (row_grad - column_grad).to(decay_sum.dtype),
        column_grad.to(igate.dtype),
        row_max_grad.to(row_max.dtype),
    )


class _Chunkwise(torch.autograd.Function):
    """`_forward`, differentiated by `_backward`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        hidden, read_sum = _forward(*args)
        ctx.save_for_backward(*args[:6], hidden, read_sum)
        ctx.settings = args[6:]
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, hidden_grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(hidden_grad, *ctx.saved_tensors, *ctx.settings), None, None


# The same as one operator, for torch.compile. Traced through by torch 2.11, `_Chunkwise` has gradients of zero, without a word;
# and on CPUs the compiler may choose strides for operands of a product with which the matrices of a batch lie between each
# other, and every one of them is copied (benchmarks/PERFORMANCE.md).
_forward_op = torch.library.custom_op("vil_lightning::mlstm_chunkwise", _forward, mutates_args=())
_backward_op = torch.library.custom_op("vil_lightning::mlstm_chunkwise_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(q, k, v, decay_sum, igate, row_max, reverse, eps):  # type: ignore[no-untyped-def]
    return v.new_empty(v.shape), igate.new_empty(igate.shape, dtype=torch.promote_types(q.dtype, torch.float32))


@_backward_op.register_fake
def _(hidden_grad, q, k, v, decay_sum, igate, row_max, *args):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in (q, k, v, decay_sum, igate, row_max))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.settings = inputs[6:]


def _differentiate(ctx, hidden_grad, read_sum_grad):  # type: ignore[no-untyped-def]
    return *_backward_op(hidden_grad.contiguous(), *ctx.saved_tensors, *ctx.settings), None, None


_forward_op.register_autograd(_differentiate, setup_context=_setup_context)


def _states(k: Tensor, v: Tensor, gates: _Gates) -> tuple[Tensor, Tensor]:
    """Memories (N, NC, DH, DH) and normalisers (N, NC, DH) after each chunk, divided by exp(m_e)."""
    keys = k * gates.write
    memory = _bmm(keys.mT.to(v.dtype), v).to(keys.dtype)
    norm = keys.sum(-2)
    _scan(memory, gates.keep, reverse=gates.reverse)
    _scan(norm, gates.keep, reverse=gates.reverse)
    return memory, norm


def _scan(x: Tensor, keep: Tensor, *, reverse: bool) -> None:
    """In place, x_c += keep_c x_b with b the chunk before c in the direction of this scan. x is (N, NC, ...)."""
    num_chunks = x.shape[1]
    keep = keep.view(*keep.shape, *[1] * (x.ndim - 2))
    order = range(num_chunks - 2, -1, -1) if reverse else range(1, num_chunks)
    for c in order:
        x[:, c].addcmul_(keep[:, c], x[:, c + 1 if reverse else c - 1])


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """(N, NC, i, j) @ (N, NC, j, k), without the copies that matmul makes of transposed operands."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def _bmm_shifted(a: Tensor, b: Tensor, reverse: bool) -> Tensor:
    """Chunks c of (N, NC, i, j) times chunks c - 1 (c + 1 if `reverse`) of (N, NC, j, k), where there is one.

    Returns:
        (N, NC - 1, i, k).
    """
    a, b, shape = a.flatten(0, 1), b.flatten(0, 1), a.shape
    product = torch.bmm(a[:-1], b[1:]) if reverse else torch.bmm(a[1:], b[:-1])
    # In one product over all sequences; where one ends and the next one begins it pairs chunks of both, which is not read.
    rows, columns = product.shape[1:]
    size = rows * columns
    return product.as_strided((shape[0], shape[1] - 1, rows, columns), (shape[1] * size, size, columns, 1))
