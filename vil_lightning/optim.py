"""Parameter groups, learning-rate scaling, gradient clipping."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vil_lightning.sharding import local, sum_over_shards


def weight_decay_groups(
    module: nn.Module, weight_decay: float, lr_scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Groups named `decay` and `no_decay`; with `lr_scales` one such pair for every scale.

    Not decayed are biases, everything with at most one dimension (norm gains, skips, LayerScale) and what a timm model
    inside `module` names in `no_weight_decay()` (position embeddings). The rule goes by name and shape, not by layer
    class, so that it holds for any backbone.

    Args:
        lr_scales: Factor of the learning rate for each parameter name, see `layer_lr_scales`; recorded as the groups'
            `lr_scale` (1 if None).
    """
    excluded: set[str] = set()
    for prefix, child in module.named_modules():
        if callable(names := getattr(child, "no_weight_decay", None)):
            excluded.update(f"{prefix}.{name}" if prefix else name for name in names())
    groups: dict[tuple[float, str], list[nn.Parameter]] = {}
    if lr_scales is None:
        groups = {(1.0, "decay"): [], (1.0, "no_decay"): []}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        free = parameter.ndim <= 1 or name.endswith(".bias") or name in excluded
        scale = 1.0 if lr_scales is None else lr_scales[name]
        groups.setdefault((scale, "no_decay" if free else "decay"), []).append(parameter)
    return [
        {
            "name": kind if lr_scales is None else f"{kind} x {scale:.4g}",
            "params": parameters,
            "weight_decay": weight_decay if kind == "decay" else 0.0,
            "lr_scale": scale,
        }
        for (scale, kind), parameters in groups.items()
    ]


def layer_lr_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Layer-wise learning-rate decay: `layer_decay ** (distance from the head)` for each parameter of a timm model.

    Layers are those of the model's `group_matcher`: for ViL the stem, then pairs of scans, then norm and head. With 12
    pairs the stem has `layer_decay ** 13`, pair k `layer_decay ** (12 - k)`, the head 1.
    """
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    last = max(layers.values())
    return {name: layer_decay ** (last - layer) for name, layer in layers.items()}


def scale_lr(
    base_lr: float,
    global_batch_size: int,
    reference_batch_size: int = 256,
    rule: Literal["linear", "sqrt"] = "linear",
) -> float:
    """The learning rate for a batch, from the one per `reference_batch_size` images.

    Args:
        rule: `linear` (Goyal et al. 2017, arXiv:1706.02677), or with the square root of the batch (`sqrt`, DINOv2).
    """
    factor = global_batch_size / reference_batch_size
    return base_lr * (factor if rule == "linear" else math.sqrt(factor))


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
    norms = norms_of(grads)
    if max_norm is not None:
        factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local(grad) for grad in grads], list(factors.unbind()))
    return norms.norm()


def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each tensor; of the whole ones if they are sharded."""
    norms = torch.stack(torch._foreach_norm([local(tensor) for tensor in tensors]))
    if not isinstance(tensors[0], DTensor):
        return norms
    return sum_over_shards(norms.float().square(), tensors[0]).sqrt().to(norms.dtype)
