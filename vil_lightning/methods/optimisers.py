"""AdamW as all methods here use it, and its settings of a step."""

import lightning as L
import torch
from torch import Tensor, nn

from vil_lightning.optim import weight_decay_groups


def adamw(
    module: L.LightningModule,
    network: nn.Module,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    lr_scales: dict[str, float] | None = None,
) -> torch.optim.AdamW:
    """AdamW over the parameters of `network`, in the groups of `weight_decay_groups`."""
    # With a gradient scaler (16-mixed) fused AdamW would unscale inside step(), after the gradients were clipped.
    scaled = getattr(module.trainer.precision_plugin, "scaler", None) is not None
    fused = True if module.device.type in ("cpu", "cuda") and not scaled else None
    groups = weight_decay_groups(network, weight_decay, lr_scales)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)
    # There is no scaler whose work a fused step would do: Lightning would refuse to clip gradients (bf16-mixed) because of it.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of this step, times the `lr_scale` of each group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def on_cpu(value: float) -> Tensor:
    """A number as it is to be logged in every step: of a plain one, Lightning makes a tensor on the device and waits for it."""
    return torch.tensor(value)
