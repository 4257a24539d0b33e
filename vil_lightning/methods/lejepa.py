"""LeJEPA: views of an image agree, and embeddings are kept Gaussian instead of being kept apart by a teacher.

Balestriero and LeCun 2025, arXiv:2511.08544. All views of an image are pulled towards the mean of its global ones; that alone
would collapse, and SIGReg prevents it: along random directions the embeddings' characteristic function has to be that of a
standard Gaussian. No teacher, no centring, no temperature, hardly a hyper-parameter, and nothing that asks for a class token.
Loss and projector are lightly's; the loss is computed in float32 also under autocast.

Letters: `B` images per device, `V` views, `P` width of the projection.
"""

import math
from typing import Any

import lightning as L
import torch
from lightly.loss import LeJEPALoss
from lightly.loss.lejepa_loss import lejepa_invariance_loss
from lightly.models.modules.heads import LeJEPAProjectionHead
from torch import Tensor, nn

from vil_lightning.checks import check_sizes
from vil_lightning.errors import ConfigError
from vil_lightning.methods.backbone import (
    BackboneConfig,
    build_backbone,
    check_input_size,
    feature_dim,
    resolve_backbone,
)
from vil_lightning.methods.commands import probe_command
from vil_lightning.methods.compiling import CompileMode, begin_step, check_compile, compile_network
from vil_lightning.methods.optimisation import Optimisation
from vil_lightning.methods.randomness import seed_step
from vil_lightning.methods.run_length import logs_this_step
from vil_lightning.methods.self_distillation import concat_by_size
from vil_lightning.schedules import Duration


class LeJEPA(L.LightningModule):
    """LeJEPA with any timm backbone. Needs a data module whose `train_transform` is `MultiCrop` with local views.

    Args:
        backbone: The network.
        head_hidden_dim: Width of the projector's two hidden layers (with batch norm).
        proj_dim: P, width of its output.
        sigreg_weight: λ of the paper, weight of SIGReg; agreement has 1 - λ.
        num_directions: Random directions per step.
        base_lr: Peak learning rate per 256 images of the global batch.
        lr_warmup: Linear warm-up of the learning rate (a duration).
        final_lr: Learning rate at the end of the cosine; absolute.
        betas: Of AdamW.
        weight_decay: Never on biases, norms and position embeddings.
        compile: Compile the backbone: true, default, reduce-overhead or max-autotune, see `compiling`.

    Durations are `"10 epochs"`, `"500 steps"`, `"10%"` or a fraction of the run below 1. SIGReg looks at the images of one
    device's batch, or of all devices' under DDP; accumulated batches are looked at one by one.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        head_hidden_dim: int = 2048,
        proj_dim: int = 64,
        sigreg_weight: float = 0.05,
        num_directions: int = 1024,
        base_lr: float = 5e-4,
        lr_warmup: Duration = "10 epochs",
        final_lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.05,
        compile: CompileMode = False,
    ) -> None:
        super().__init__()
        if not 0 < sigreg_weight <= 1:
            raise ConfigError(
                f"model.sigreg_weight={sigreg_weight} must be in (0, 1]: without SIGReg all embeddings become one."
            )
        check_sizes("model", num_directions=num_directions, head_hidden_dim=head_hidden_dim, proj_dim=proj_dim)
        self.backbone_config = resolve_backbone(backbone)
        self.optimisation = Optimisation(self.backbone_config, base_lr, lr_warmup, final_lr, betas, weight_decay)
        self.sigreg_weight = sigreg_weight
        self.backbone = build_backbone(self.backbone_config)
        self.head = LeJEPAProjectionHead(feature_dim(self.backbone), head_hidden_dim, proj_dim)
        # Gathering does nothing on a single process.
        self.loss = LeJEPALoss(sigreg_weight, gather_distributed=True, sigreg_num_vectors=num_directions)
        self.compile_mode = compile
        compile_network(self.backbone, compile)

    # --- the method ---------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Pooled vectors of the backbone: what the run is for."""
        return self.backbone(images)

    def training_step(self, batch: tuple[list[Tensor], Tensor], batch_idx: int) -> Tensor:
        begin_step(self.compile_mode)
        self.optimisation.start(self)
        views, _ = batch
        features = torch.cat([self.backbone(same_size) for same_size in concat_by_size(views)])  # (V B, D)
        projected = self.head(features)
        with torch.autocast(self.device.type, enabled=False):
            projected = projected.float().unflatten(0, (len(views), -1))  # (V, B, P)
            loss = self.loss(global_proj=projected[:2], local_proj=projected[2:])
        if logs_this_step(self.trainer):
            self._log_health(projected.detach(), features.detach(), loss.detach())
        return self.optimisation.watch(self, loss)

    @torch.no_grad()
    def _log_health(self, projected: Tensor, features: Tensor, loss: Tensor) -> None:
        agreement = lejepa_invariance_loss(all_proj=projected, global_proj=projected[:2])
        unit = nn.functional.normalize(features.float(), dim=-1)
        self.log_dict(
            {
                "health/agreement": agreement,
                "health/sigreg": (loss - (1 - self.sigreg_weight) * agreement) / self.sigreg_weight,
                # Deviation of unit-length features, relative to what it is for a uniform cloud (1 / sqrt(D)).
                "health/feature_std": unit.std(0).mean() * math.sqrt(unit.shape[-1]),
            }
        )

    # --- hooks, in the order in which they run in a step --------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_step(self.trainer, batch_idx)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self.optimisation.measure_gradients(self)
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Called once per optimiser step, however many batches it accumulates."""
        self.optimisation.before_step(self, optimizer)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.optimisation.after_step(self)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimisation.configure(self)

    # --- checks before the first step, and reports --------------------------------------------------------------------

    def on_fit_start(self) -> None:
        check_compile(self, self.compile_mode)
        transform: Any = getattr(getattr(self.trainer, "datamodule", None), "train_transform", None)
        if not getattr(transform, "num_local_views", 0):
            raise ConfigError(
                "model.class_path: LeJEPA trains on global and local views of an image: set data.train_transform to a "
                f"MultiCrop with num_local_views of at least 1 (it is {type(transform).__name__}), as "
                "configs/pretrain_lejepa.yaml does."
            )
        check_input_size(self.backbone, transform.global_size, "data.train_transform.global_size")
        check_input_size(self.backbone, transform.local_size, "data.train_transform.local_size")

    @property
    def micro_batch_statistics(self) -> str:
        """What is computed over the images of a micro batch, and so changes when batches are accumulated."""
        return "SIGReg looks"

    def run_info(self) -> dict[str, str]:
        """What the run's first lines say about the method."""
        return {
            "method": f"LeJEPA, SIGReg weight {self.sigreg_weight:g}",
            **self.optimisation.run_info(),
        }

    def next_command(self, checkpoint: str) -> str:
        """What to run when this run has ended."""
        return probe_command(self, checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.optimisation.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.optimisation.load(self, checkpoint)
