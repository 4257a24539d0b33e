"""The mLSTM token by token: slow, and obviously right. Every other backend is tested against this one."""

import math

import torch
from torch import Tensor


def mlstm_recurrent(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, log_fgate: Tensor, *, reverse: bool, eps: float
) -> Tensor:
    """Run the recurrence

        C_t = f_t C_{t-1} + i_t (k_t / sqrt(DH)) v_t^T      n_t = f_t n_{t-1} + i_t k_t / sqrt(DH)
        h_t = q_t^T C_t / (max(|q_t^T n_t|, 1) + eps * exp(m_t)),   m_t = max(log f_t + m_{t-1}, log i_t)

    with C and n carried as `C_t * exp(-stab_t)`. The usual stabiliser is `stab_t = m_t`; here it is `max(m_t, 0)`. The
    result is the same, since the scale cancels, but `exp(-stab_t)`, which takes the place of the 1, can no longer
    overflow when all gates are very negative.

    Shapes as in `mlstm`. `log_fgate` is the `logsigmoid` of the forget gate pre-activations (B, NH, S), in the dtype
    used for all arithmetic here.
    """
    dtype = log_fgate.dtype
    batch, heads, seq_len, head_dim = q.shape
    queries, keys, values = q.to(dtype), k.to(dtype) / math.sqrt(head_dim), v.to(dtype)

    memory = queries.new_zeros(batch, heads, head_dim, head_dim)
    norm = queries.new_zeros(batch, heads, head_dim)
    row_max = queries.new_full((batch, heads), -math.inf)
    stab = queries.new_zeros(batch, heads)
    outputs: list[Tensor] = [queries] * seq_len
    for t in reversed(range(seq_len)) if reverse else range(seq_len):
        row_max = torch.maximum(log_fgate[:, :, t] + row_max, igate[:, :, t])
        new_stab = row_max.detach().clamp(min=0)
        decay = torch.exp(log_fgate[:, :, t] + stab - new_stab)
        write = torch.exp(igate[:, :, t] - new_stab)
        stab = new_stab

        key, value, query = keys[:, :, t], values[:, :, t], queries[:, :, t]  # (B, NH, DH)
        memory = decay[..., None, None] * memory + write[..., None, None] * key[..., :, None] * value[..., None, :]
        norm = decay[..., None] * norm + write[..., None] * key
        numerator = (query[..., :, None] * memory).sum(-2)  # (B, NH, DH)
        read_sum = (query * norm).sum(-1)  # (B, NH)
        denominator = torch.maximum(read_sum.abs(), torch.exp(-stab)) + eps * torch.exp(row_max - stab)
        outputs[t] = numerator / denominator[..., None]
    return torch.stack(outputs, dim=2).to(v.dtype)
