"""The mLSTM as one masked S x S product per head, the form in which the published models are trained."""

import math

import torch
from torch import Tensor


def mlstm_parallel(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, log_fgate: Tensor, *, reverse: bool, eps: float
) -> Tensor:
    """Quadratic form; shapes as in `mlstm`, `log_fgate` as in `mlstm_recurrent`."""
    scores, denominator = _scores(q, k, igate, log_fgate, reverse=reverse, eps=eps)
    # Divided after the product: DH numbers a token instead of S.
    return ((scores.to(v.dtype) @ v) / denominator).to(v.dtype)


def mlstm_weights(
    q: Tensor, k: Tensor, igate: Tensor, fgate: Tensor, *, reverse: bool = False, eps: float = 1e-6
) -> Tensor:
    """The mLSTM's implicit attention: A (B, NH, S, S) with `mlstm(q, k, v, igate, fgate) = A @ v`.

    Unlike a transformer's weights these have a sign, and their sum over a row is no 1 but between -1 and 1. A token (row)
    reads itself and the tokens (columns) scanned before it; the other weights are 0. It takes S² memory, and is meant for
    looking at a scan, not for training.

    Args:
        q: Queries (B, NH, S, DH).
        k: Keys (B, NH, S, DH); divided by sqrt(DH) here.
        igate: Input gate pre-activations (B, NH, S).
        fgate: Forget gate pre-activations (B, NH, S).
        reverse: The scan starts at the last token.
        eps: As in `mlstm`.

    Returns:
        (B, NH, S, S) in float32 (float64 for float64 inputs), also under autocast, which rounds `q` and `k` as in `mlstm`.

    Raises:
        ValueError: For shapes that do not fit.
    """
    if q.ndim != 4 or q.shape != k.shape or igate.shape != q.shape[:3] or fgate.shape != q.shape[:3]:
        raise ValueError(
            "mlstm_weights: q and k must share one shape (B, NH, S, DH), igate and fgate be (B, NH, S); "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(igate.shape)}, {tuple(fgate.shape)}."
        )
    device_type = q.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        q, k = q.to(dtype), k.to(dtype)
    gate_dtype = torch.promote_types(q.dtype, torch.float32)
    log_fgate = torch.nn.functional.logsigmoid(fgate.to(gate_dtype))
    with torch.autocast(device_type, enabled=False):
        scores, denominator = _scores(q, k, igate.to(gate_dtype), log_fgate, reverse=reverse, eps=eps)
        return scores / denominator


def _scores(
    q: Tensor, k: Tensor, igate: Tensor, log_fgate: Tensor, *, reverse: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Weights (B, NH, S, S) with which each token (rows) reads each token, and what a row is divided by (B, NH, S, 1)."""
    log_decay = log_decay_matrix(igate, log_fgate, reverse=reverse)  # (B, NH, S, S)
    row_max = log_decay.amax(-1, keepdim=True)  # (B, NH, S, 1)
    # Clamped at 0, and constant for autograd because it cancels: see mlstm_recurrent.
    stab = row_max.detach().clamp(min=0)

    scores = (q @ k.transpose(-1, -2)).to(log_decay.dtype) / math.sqrt(q.shape[-1])
    scores = scores * torch.exp(log_decay - stab)
    read_sum = scores.sum(-1, keepdim=True)
    denominator = torch.maximum(read_sum.abs(), torch.exp(-stab)) + eps * torch.exp(row_max - stab)
    return scores, denominator


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
