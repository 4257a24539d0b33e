"""Parameter groups, learning-rate scaling, gradient clipping."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def weight_decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, `decay` and `no_decay`.

    Not decayed are biases, everything with at most one dimension (norm gains, skips, LayerScale) and what a timm model
    inside `module` names in `no_weight_decay()` (position embeddings). The rule goes by name and shape, not by layer
    class, so that it holds for any backbone.
    """
    excluded: set[str] = set()
    for prefix, child in module.named_modules():
        if callable(names := getattr(child, "no_weight_decay", None)):
            excluded.update(f"{prefix}.{name}" if prefix else name for name in names())
    decay, no_decay = [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim <= 1 or name.endswith(".bias") or name in excluded:
            no_decay.append(parameter)
        else:
            decay.append(parameter)
    return [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
    ]


def scale_lr(base_lr: float, global_batch_size: int, reference_batch_size: int = 256) -> float:
    """Linear scaling rule: the learning rate for a batch, from the one per `reference_batch_size` images."""
    return base_lr * global_batch_size / reference_batch_size


@torch.no_grad()
def clip_grad_per_tensor(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Clip the L2 norm of each gradient on its own, as the official DINO code does (others clip the global norm).

    Args:
        max_norm: Largest norm of one parameter's gradient; None only measures.

    Returns:
        Global norm of all gradients before clipping, a scalar tensor.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norms = torch.stack(torch._foreach_norm(grads))  # one L2 norm each
    if max_norm is not None:
        factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, list(factors.unbind()))
    return norms.norm()
