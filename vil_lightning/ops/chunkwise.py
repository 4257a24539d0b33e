"""The mLSTM in chunks: quadratic inside a chunk, a recurrent state between chunks. Linear in S in time and memory."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vil_lightning.ops.parallel import cumulative_decay, log_decay_matrix


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
    """Chunkwise form; shapes as in `mlstm`, `log_fgate` as in `mlstm_recurrent`.

    All chunks are cut to one length, as even as possible (196 tokens with `chunk_size=64` make four chunks of 49), so
    that few padded tokens are ever computed. The state entering a chunk is the one of `mlstm_recurrent` after its last
    token: memory C, normaliser n, running maximum m and stabiliser.
    """
    batch, heads, seq_len, head_dim = q.shape
    dtype = log_fgate.dtype
    num_chunks = math.ceil(seq_len / chunk_size)
    length = math.ceil(seq_len / num_chunks)
    pad = num_chunks * length - seq_len
    if pad:
        # A padded token writes nothing (input gate -inf, key 0) and forgets nothing (log forget gate 0).
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        igate, log_fgate = F.pad(igate, (0, pad), value=-math.inf), F.pad(log_fgate, (0, pad))

    q, k, v = (x.reshape(batch, heads, num_chunks, length, head_dim) for x in (q, k, v))
    k = k / math.sqrt(head_dim)
    igate, log_fgate = (x.reshape(batch, heads, num_chunks, length) for x in (igate, log_fgate))

    states = _states_entering_chunks(k, v, igate, log_fgate, reverse=reverse)
    memory, norm, state_max, state_stab = states  # (B,NH,NC,DH,DH) (B,NH,NC,DH) (B,NH,NC) (B,NH,NC)

    # Logarithmic weights with which a token reads its own chunk and the state.
    log_decay = log_decay_matrix(igate, log_fgate, reverse=reverse)  # (B, NH, NC, L, L)
    decay_sum = cumulative_decay(log_fgate, reverse=reverse)  # (B, NH, NC, L)
    row_max = torch.maximum(log_decay.amax(-1), decay_sum + state_max[..., None])
    stab = row_max.detach().clamp(min=0)

    scores = (q @ k.transpose(-1, -2)).to(dtype) * torch.exp(log_decay - stab[..., None])
    state_weight = torch.exp(decay_sum + state_stab[..., None] - stab)[..., None]  # (B, NH, NC, L, 1)
    numerator = (scores.to(v.dtype) @ v).to(dtype) + state_weight * (q @ memory.to(q.dtype)).to(dtype)
    read_state = (q @ norm[..., None].to(q.dtype)).to(dtype)
    read_sum = scores.sum(-1, keepdim=True) + state_weight * read_state  # (B, NH, NC, L, 1)
    denominator = torch.maximum(read_sum.abs(), torch.exp(-stab)[..., None])
    denominator = denominator + eps * torch.exp(row_max - stab)[..., None]
    hidden = (numerator / denominator).to(v.dtype).reshape(batch, heads, num_chunks * length, head_dim)
    return hidden[:, :, :seq_len] if pad else hidden


def _states_entering_chunks(
    k: Tensor, v: Tensor, igate: Tensor, log_fgate: Tensor, *, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory, normaliser, running maximum and stabiliser before each chunk is scanned; `k` is already scaled.

    Returns:
        (B, NH, NC, DH, DH), (B, NH, NC, DH), (B, NH, NC), (B, NH, NC), in the dtype of the gates.
    """
    batch, heads, num_chunks, _, head_dim = k.shape
    dtype = igate.dtype
    # Log weight of each token in the state after its chunk: the gates of the tokens still to come decay it.
    chunk_decay = log_fgate.sum(-1)  # (B, NH, NC)
    log_write = chunk_decay[..., None] - cumulative_decay(log_fgate, reverse=reverse) + igate  # (B, NH, NC, L)
    write_max = log_write.amax(-1)
    write_stab = write_max.detach().clamp(min=0)
    write = torch.exp(log_write - write_stab[..., None])[..., None]  # (B, NH, NC, L, 1)
    weighted_keys = (k * write).to(k.dtype)
    chunk_memory = (weighted_keys.transpose(-1, -2) @ v).to(dtype)  # (B, NH, NC, DH, DH)
    chunk_norm = (k.to(dtype) * write).sum(-2)  # (B, NH, NC, DH)

    memory = chunk_memory.new_zeros(batch, heads, head_dim, head_dim)
    norm = chunk_memory.new_zeros(batch, heads, head_dim)
    state_max = chunk_memory.new_full((batch, heads), -math.inf)
    stab = chunk_memory.new_zeros(batch, heads)
    states: list[tuple[Tensor, Tensor, Tensor, Tensor]] = [(memory, norm, state_max, stab)] * num_chunks
    for c in reversed(range(num_chunks)) if reverse else range(num_chunks):
        states[c] = (memory, norm, state_max, stab)
        state_max = torch.maximum(chunk_decay[:, :, c] + state_max, write_max[:, :, c])
        new_stab = state_max.detach().clamp(min=0)
        keep = torch.exp(chunk_decay[:, :, c] + stab - new_stab)[..., None]
        add = torch.exp(write_stab[:, :, c] - new_stab)[..., None]
        memory = keep[..., None] * memory + add[..., None] * chunk_memory[:, :, c]
        norm = keep * norm + add * chunk_norm[:, :, c]
        stab = new_stab
    memory, norm, state_max, stab = (torch.stack(x, dim=2) for x in zip(*states, strict=True))
    return memory, norm, state_max, stab
