"""Losses of self-distillation: a student predicts its teacher's soft assignment of an image, or of a patch, to K prototypes.

Letters: `T` views of the teacher, `V` views of the student (the teacher's first), `B` images, `N` patches, `M` hidden patches
of the whole batch, `K` prototypes.

References:
    Caron et al. 2021 (DINO), arXiv:2104.14294; Zhou et al. 2022 (iBOT), arXiv:2111.07832; Oquab et al. 2023 (DINOv2),
    arXiv:2304.07193; Caron et al. 2020 (SwAV, Sinkhorn-Knopp), arXiv:2006.09882.
"""

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def centered_targets(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """The teacher's probabilities (..., K): its logits less their running mean, sharpened."""
    return ((logits - center) / temperature).softmax(-1)


@torch.no_grad()
def sinkhorn_targets(logits: Tensor, temperature: float, num_iterations: int = 3) -> Tensor:
    """The teacher's probabilities (M, K), such that all prototypes together are used about equally by the batch.

    The batch is that of all processes, which may hold unequal numbers of rows, none included. (lightly's Sinkhorn weights the
    rows of a process by their number there, so that unequal numbers of hidden patches change the result.)
    """
    log_q = logits / temperature
    for _ in range(num_iterations):
        log_q = log_q - _logsumexp_of_all_rows(log_q)  # every prototype is used equally
        log_q = log_q - log_q.logsumexp(1, keepdim=True)  # every row is a distribution
    return log_q.exp()


def _logsumexp_of_all_rows(x: Tensor) -> Tensor:
    """(M, K) -> (1, K), over the rows of all processes."""
    x = torch.cat([x, x.new_full((1, x.shape[1]), -torch.inf)])  # a process may have none
    largest = x.amax(0, keepdim=True)
    distributed = dist.is_available() and dist.is_initialized()
    if distributed:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    total = (x - largest).exp().sum(0, keepdim=True)
    if distributed:
        dist.all_reduce(total)
    return largest + total.log()


def view_loss(student: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between the teacher's view of an image and every other view of it by the student.

        mean over t != v of  - sum_k targets[t, b, k] * log softmax(student[v, b] / temperature)[k]

    Args:
        student: Logits (V, B, K).
        targets: Probabilities (T, B, K) of the first T views.
        temperature: Of the student.

    Returns:
        A scalar, the mean over images and pairs of different views.
    """
    log_probs = (student / temperature).log_softmax(-1)
    pairs = -torch.einsum("tbk,vbk->tv", targets, log_probs) / student.shape[1]
    same = torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)
    return pairs.masked_fill(same, 0).sum() / (pairs.numel() - same.sum())


def patch_loss(student: Tensor, targets: Tensor, hidden: Tensor, temperature: float) -> Tensor:
    """Cross-entropy at hidden patches: the mean of an image's patches, then the mean over images.

    Args:
        student: Logits (M, K) of the hidden patches, in the order of `hidden.nonzero()`.
        targets: Probabilities (M, K).
        hidden: (B, N), True = hidden; M in all. Images without a hidden patch count as 0. May lie on the CPU, where reading it
            does not wait for the device of the logits.
        temperature: Of the student.
    """
    log_probs = (student / temperature).log_softmax(-1)
    per_patch = -(targets * log_probs).sum(-1)  # (M,)
    share = hidden.sum(1, keepdim=True).clamp(min=1).to(student.dtype).reciprocal().expand_as(hidden)[hidden]
    return (per_patch * share.to(student.device, non_blocking=True)).sum() / len(hidden)
