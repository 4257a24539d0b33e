"""The mLSTM as one masked S x S product per head, the form in which the published models are trained."""

import math

import torch
from torch import Tensor


def mlstm_parallel(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, log_fgate: Tensor, *, reverse: bool, eps: float
) -> Tensor:
    """Quadratic form; shapes as in `mlstm`, `log_fgate` as in `mlstm_recurrent`."""
    log_decay = log_decay_matrix(igate, log_fgate, reverse=reverse)  # (B, NH, S, S)
    row_max = log_decay.amax(-1, keepdim=True)  # (B, NH, S, 1)
    # Clamped at 0, and constant for autograd because it cancels: see mlstm_recurrent.
    stab = row_max.detach().clamp(min=0)

    scores = (q @ k.transpose(-1, -2)).to(log_decay.dtype) / math.sqrt(q.shape[-1])
    scores = scores * torch.exp(log_decay - stab)
    read_sum = scores.sum(-1, keepdim=True)
    denominator = torch.maximum(read_sum.abs(), torch.exp(-stab)) + eps * torch.exp(row_max - stab)
    return ((scores.to(v.dtype) @ v) / denominator).to(v.dtype)


def log_decay_matrix(igate: Tensor, log_fgate: Tensor, *, reverse: bool) -> Tensor:
    """Log weight with which each token (rows) reads each token (columns) that the scan has seen by then.

    Args:
        igate: (..., S).
        log_fgate: (..., S).
        reverse: Whether the scan starts at the last token.

    Returns:
        (..., S, S); `-inf` where the scan has not been yet.
    """
    seq_len = igate.shape[-1]
    decay_sum = cumulative_decay(log_fgate, reverse=reverse)
    log_decay = decay_sum[..., :, None] + (igate - decay_sum)[..., None, :]
    seen = torch.ones(seq_len, seq_len, dtype=torch.bool, device=igate.device)
    seen = seen.triu() if reverse else seen.tril()
    return log_decay.masked_fill(~seen, -math.inf)


def cumulative_decay(log_fgate: Tensor, *, reverse: bool) -> Tensor:
    """Sum of `log_fgate` over all tokens visited up to and including each one, along the last axis."""
    if reverse:
        return log_fgate.flip(-1).cumsum(-1).flip(-1)  # 1 / DH of the size of q, k or v
    return log_fgate.cumsum(-1)
