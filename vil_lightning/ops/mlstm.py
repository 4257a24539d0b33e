"""The mLSTM: a linear recurrence with a matrix memory and exponential gates.

One function, several backends that compute the same numbers:

| backend     | time        | memory      | use                                                |
| ----------- | ----------- | ----------- | -------------------------------------------------- |
| `recurrent` | S · DH²     | S · DH²     | the definition, token by token; the test oracle    |
| `parallel`  | S² · DH     | S²          | short sequences                                    |
| `chunkwise` | S · (L+DH)·DH | S · (L+DH²/L) | long sequences; L is the chunk length           |
| `triton`    | as `parallel` to 512 tokens, then as `chunkwise` | S · (1+DH²/L) | GPUs: fused kernels, no S x S matrix |

Letters used in this package: `B` batch, `NH` heads, `S` tokens, `DH` head width, `NC` chunks, `L` tokens per chunk.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from vil_lightning.ops.chunkwise import mlstm_chunkwise
from vil_lightning.ops.parallel import mlstm_parallel
from vil_lightning.ops.recurrent import mlstm_recurrent

MLSTMBackend = Literal["auto", "recurrent", "parallel", "chunkwise", "triton"]
MLSTM_BACKENDS: tuple[str, ...] = get_args(MLSTMBackend)

# Longest sequence for which `auto` takes the quadratic form. On a CPU the curves of `benchmarks/mlstm_backends.py` cross
# between 144 and 196 tokens, with 8 images of 4 heads (benchmarks/results/); a single image favours the quadratic form a little
# longer. Accelerators have not been measured and share the value.
_PARALLEL_UP_TO = 144


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    *,
    reverse: bool = False,
    backend: str = "auto",
    chunk_size: int = 64,
    eps: float = 1e-6,
) -> Tensor:
    r"""Mix tokens with the stabilised mLSTM.

    With `a_t = igate_t`, `F_t = sum_{r<=t} logsigmoid(fgate_r)` and `s <= t`:

        logD_ts = F_t - F_s + a_s            m_t = max_s logD_ts
        C_ts    = (q_t . k_s / sqrt(DH)) * exp(logD_ts - m_t)
        h_t     = sum_s C_ts v_s / (max(|sum_s C_ts|, exp(-m_t)) + eps)

    The result is finite, with finite gradients, for any finite gate values. Gates, decay sums and the normaliser are
    computed in float32 (float64 for float64 inputs), also under autocast; only the products with `q`, `k` and `v` run
    in the (autocast) dtype of those.

    `chunkwise` and `triton` can be differentiated once, by autograd; `parallel` and `recurrent` also twice, and under the
    transforms of `torch.func`.

    Args:
        q: Queries (B, NH, S, DH).
        k: Keys (B, NH, S, DH); divided by sqrt(DH) here.
        v: Values (B, NH, S, DH).
        igate: Input gate pre-activations (B, NH, S). `-inf` hides a token.
        fgate: Forget gate pre-activations (B, NH, S); the sigmoid is applied here.
        reverse: Scan from the last token to the first. Equals flipping every argument and the result along S, without
            copying `q`, `k` or `v`.
        backend: One of `MLSTM_BACKENDS`. `auto` chooses by S, from measurements.
        chunk_size: Largest number of tokens per chunk, for `chunkwise` and, above 512 tokens and rounded up to 64 (float32:
            32), `triton`.
        eps: Added to the normaliser.

    Returns:
        (B, NH, S, DH), in the dtype of `v` (the autocast dtype under autocast).

    Raises:
        ValueError: For shapes that do not fit, an unknown backend, one that cannot be used, or a chunk size below 1.

    References:
        Beck et al. 2024, xLSTM, arXiv:2405.04517; Alkin et al. 2024, Vision-LSTM, arXiv:2406.04303.
    """
    _check_arguments(q, k, v, igate, fgate, backend, chunk_size)
    seq_len = q.shape[2]
    if backend == "auto":
        backend = _choose(seq_len)

    device_type = q.device.type
    if torch.is_autocast_enabled(device_type):
        # What autocast would do to the matrix products; the regions below choose their own dtypes.
        dtype = torch.get_autocast_dtype(device_type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    gate_dtype = torch.promote_types(q.dtype, torch.float32)
    igate = igate.to(gate_dtype)
    log_fgate = torch.nn.functional.logsigmoid(fgate.to(gate_dtype))

    with torch.autocast(device_type, enabled=False):
        if backend == "recurrent":
            return mlstm_recurrent(q, k, v, igate, log_fgate, reverse=reverse, eps=eps)
        if backend == "triton":
            return _triton()(q, k, v, igate, log_fgate, reverse=reverse, chunk_size=chunk_size, eps=eps)
        if backend == "parallel":
            return mlstm_parallel(q, k, v, igate, log_fgate, reverse=reverse, eps=eps)
        return mlstm_chunkwise(q, k, v, igate, log_fgate, reverse=reverse, chunk_size=chunk_size, eps=eps)


def _choose(seq_len: int) -> str:
    """What `auto` is."""
    return "parallel" if seq_len <= _PARALLEL_UP_TO else "chunkwise"


def describe_backend(backend: str) -> str:
    """For a run's log: the backend, and for `auto` what it chooses and from which measurements."""
    if backend != "auto":
        return backend
    short, long = _choose(1), _choose(_PARALLEL_UP_TO + 1)
    return f"auto: {short} up to {_PARALLEL_UP_TO} tokens, {long} above (from measurements on CPUs)"


def _triton() -> Callable[..., Tensor]:
    """The Triton backend, which is imported where it is asked for: not every machine has it."""
    try:
        from vil_lightning.ops.triton_mlstm import mlstm_triton
    except ImportError as error:
        raise ValueError(
            f"mlstm: backend 'triton' cannot be used here ({error}). Install triton (Linux), or use another backend."
        ) from error
    return mlstm_triton


def _check_arguments(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, backend: str, chunk_size: int
) -> None:
    if backend not in MLSTM_BACKENDS:
        raise ValueError(f"mlstm: unknown backend {backend!r}. Available: {', '.join(MLSTM_BACKENDS)}.")
    if chunk_size < 1:
        raise ValueError(f"mlstm: chunk_size={chunk_size} must be at least 1.")
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape or 0 in q.shape[2:]:
        raise ValueError(
            "mlstm: q, k and v must share one shape (B, NH, S, DH) with S, DH >= 1; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if igate.shape != q.shape[:3] or fgate.shape != q.shape[:3]:
        raise ValueError(
            f"mlstm: igate and fgate must have shape (B, NH, S) = {tuple(q.shape[:3])}; "
            f"got {tuple(igate.shape)} and {tuple(fgate.shape)}."
        )
