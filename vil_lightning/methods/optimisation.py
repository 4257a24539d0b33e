"""What happens around an optimiser step of the methods that train one network (MAE, SimMIM, LeJEPA and others).

AdamW, linear warm-up and cosine, the stop of a diverged run, what a checkpoint records. A method holds one `Optimisation` and
calls it from its hooks; which hook calls what is written at each function.
"""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from vil_lightning.checks import check_betas, check_not_negative, check_positive
from vil_lightning.methods.backbone import (
    CHECKPOINT_KEY,
    BackboneConfig,
    check_resumed_backbone,
    recorded_backbone,
)
from vil_lightning.methods.divergence import FiniteCheck
from vil_lightning.methods.optimisers import adamw, on_cpu, set_lr
from vil_lightning.methods.resuming import check_batch, check_settings, record_batch, record_settings
from vil_lightning.methods.run_length import global_batch_size, resolve_durations
from vil_lightning.optim import clip_grad_per_tensor, scale_lr
from vil_lightning.schedules import Duration, linear_cosine


class Optimisation:
    """AdamW and its schedule.

    Args:
        backbone_config: For the checkpoint.
        base_lr: Peak learning rate per `lr_batch_size` images of the global batch.
        lr_warmup: Linear warm-up of the learning rate (a duration).
        final_lr: Learning rate at the end of the cosine; absolute.
        betas: Of AdamW.
        weight_decay: Never on biases, norms, position embeddings and mask tokens.
        lr_batch_size: What `base_lr` refers to.
        clip: A gradient norm that tames this method, for the advice when a run has diverged.
    """

    def __init__(
        self,
        backbone_config: BackboneConfig,
        base_lr: float,
        lr_warmup: Duration,
        final_lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        *,
        lr_batch_size: int = 256,
        clip: float = 1.0,
    ) -> None:
        check_positive("model", base_lr=base_lr, lr_batch_size=lr_batch_size)
        check_not_negative("model", final_lr=final_lr, weight_decay=weight_decay)
        check_betas(betas)
        self.backbone_config = backbone_config
        self.base_lr = base_lr
        self.lr_warmup = lr_warmup
        self.final_lr = final_lr
        self.betas = tuple(betas)
        self.weight_decay = weight_decay
        self.lr_batch_size = lr_batch_size
        self.grad_norm = torch.zeros(())
        self.finite = FiniteCheck(
            f"a lower model.base_lr, a longer model.lr_warmup, trainer.gradient_clip_val={clip}, or "
            "trainer.precision=bf16-mixed instead of 16-mixed."
        )

    # --- in the order of a step ---------------------------------------------------------------------------------------

    def start(self, module: L.LightningModule) -> None:
        """First in `training_step`. Raises if the step before has diverged."""
        self.finite.raise_if_not_finite(module, self.lr_at(module))

    def watch(self, module: L.LightningModule, loss: Tensor) -> Tensor:
        """Last in `training_step`. Returns the loss."""
        module.log("train/loss", self.finite.watch_loss(module, loss), prog_bar=True)
        return loss

    def measure_gradients(self, module: nn.Module) -> None:
        """In `configure_gradient_clipping`, before `clip_gradients`."""
        self.grad_norm = clip_grad_per_tensor(module.parameters(), None)

    def before_step(self, module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """In `optimizer_step`, before `super()`."""
        self.lr = self.lr_at(module)
        set_lr(optimizer, self.lr)

    def after_step(self, module: L.LightningModule) -> None:
        """In `optimizer_step`, after `super()`."""
        self.finite.watch_grad_norm(module, self.grad_norm)
        module.log_dict({"schedule/lr": on_cpu(self.lr), "train/grad_norm": self.grad_norm})

    # --- optimiser ----------------------------------------------------------------------------------------------------

    def configure(self, module: L.LightningModule) -> torch.optim.AdamW:
        """In `configure_optimizers`: AdamW over everything in `module` that is trained."""
        self.steps = resolve_durations(module.trainer, {"lr_warmup": self.lr_warmup})
        self.global_batch_size = global_batch_size(module.trainer)
        self.peak_lr = scale_lr(self.base_lr, self.global_batch_size, self.lr_batch_size)
        return adamw(module, module, self.peak_lr, self.weight_decay, self.betas)  # type: ignore[arg-type]

    def lr_at(self, module: L.LightningModule) -> float:
        """Learning rate at the current optimiser step."""
        step, steps = module.trainer.global_step, self.steps
        return linear_cosine(step, steps["total"], steps["lr_warmup"], 0.0, self.peak_lr, self.final_lr)

    # --- reports and checkpoints --------------------------------------------------------------------------------------

    def run_info(self) -> dict[str, str]:
        """Lines for the module's `run_info`."""
        config, batch = self.backbone_config, f"{self.global_batch_size} / {self.lr_batch_size}"
        return {
            "backbone": f"{config.name} {config.kwargs or ''}",
            "learning rate": f"{self.peak_lr:.3g} = {self.base_lr:g} x {batch}, to {self.final_lr:g}",
            "schedules": f"{self.steps['total']} steps; warm-up {self.steps['lr_warmup']}",
        }

    def save(self, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """In `on_save_checkpoint`."""
        self.start(module)  # never overwrite a good checkpoint with a broken one
        checkpoint[CHECKPOINT_KEY] = recorded_backbone(self.backbone_config)
        record_settings(checkpoint, betas=self.betas, weight_decay=self.weight_decay)
        record_batch(module._trainer, checkpoint)

    def load(self, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """In `on_load_checkpoint`."""
        check_resumed_backbone(checkpoint, self.backbone_config)
        check_settings(module._trainer, checkpoint, betas=self.betas, weight_decay=self.weight_decay)
        check_batch(module._trainer, checkpoint)
