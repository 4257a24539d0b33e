"""DINO: self-distillation with no labels.

Caron et al. 2021, arXiv:2104.14294. A student sees all crops of an image, a teacher, its moving average, the two large
ones; the student learns to predict the teacher's soft assignment to K prototypes.

What ViL changes: there is no class token, so both networks are read out by their pooling (for ViL2 the concatenation of
first and last patch). Head and loss are lightly's, with two of its traps avoided: the teacher starts as a copy of the
student, and the loss is computed in float32 also under autocast.

Letters: `B` images per device, `V` views, `K` prototypes.
"""

import math
from typing import Any

import lightning as L
import torch
from lightly.loss import DINOLoss
from lightly.models.modules.heads import DINOProjectionHead
from lightly.models.utils import update_momentum
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from vil_lightning.errors import ConfigError
from vil_lightning.methods.backbone import (
    CHECKPOINT_KEY,
    BackboneConfig,
    build_backbone,
    check_input_size,
    check_resumed_backbone,
    feature_dim,
    recorded_backbone,
    resolve_backbone,
)
from vil_lightning.methods.commands import probe_command
from vil_lightning.methods.divergence import FiniteCheck
from vil_lightning.methods.optimisers import adamw
from vil_lightning.methods.randomness import seed_step
from vil_lightning.methods.run_length import global_batch_size, resolve_durations
from vil_lightning.optim import clip_grad_per_tensor, scale_lr
from vil_lightning.schedules import Duration, cosine, linear_then_constant, warmup_cosine


class DINO(L.LightningModule):
    """DINO with any timm backbone. Needs a data module whose `train_transform` is `MultiCrop`.

    The defaults are the official ones for a small model on ImageNet-1k.

    Args:
        backbone: The network; student and teacher start with the same weights. `drop_path_rate` applies to the student.
        num_prototypes: K, outputs of the head.
        head_hidden_dim: Width of the head's two hidden layers.
        head_bottleneck_dim: Width of the normalised vector that is compared with the prototypes.
        norm_last_layer: Keep the prototypes at unit length.
        freeze_last_layer: How long the prototypes stay fixed at the start of training (a duration).
        student_temp: Softmax temperature of the student.
        teacher_temp: Softmax temperature of the teacher after its warm-up.
        warmup_teacher_temp: Its value at the start.
        teacher_temp_warmup: How long it takes to get from one to the other (a duration).
        center_momentum: Of the moving average that is subtracted from the teacher's outputs.
        teacher_momentum: Of the teacher at the start; grows along a cosine.
        final_teacher_momentum: At the end.
        base_lr: Peak learning rate per 256 images of the global batch.
        lr_warmup: Linear warm-up of the learning rate (a duration).
        final_lr: Learning rate at the end of the cosine; absolute, not scaled by the batch.
        weight_decay: At the start; follows a cosine. Never on biases, norms and position embeddings.
        final_weight_decay: At the end.
        clip_grad: Largest L2 norm of a single tensor's gradient. `trainer.gradient_clip_val` (global norm) acts in addition.
        compile: Compile both backbones with torch.compile.

    Durations are `"10 epochs"`, `"500 steps"`, `"10%"` or a fraction of the run below 1.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        num_prototypes: int = 65536,
        head_hidden_dim: int = 2048,
        head_bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
        freeze_last_layer: Duration = "1 epoch",
        student_temp: float = 0.1,
        teacher_temp: float = 0.04,
        warmup_teacher_temp: float = 0.04,
        teacher_temp_warmup: Duration = "0 epochs",
        center_momentum: float = 0.9,
        teacher_momentum: float = 0.996,
        final_teacher_momentum: float = 1.0,
        base_lr: float = 5e-4,
        lr_warmup: Duration = "10 epochs",
        final_lr: float = 1e-6,
        weight_decay: float = 0.04,
        final_weight_decay: float = 0.4,
        clip_grad: float | None = 3.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("student_temp", student_temp), ("teacher_temp", teacher_temp), ("base_lr", base_lr)):
            if value <= 0:
                raise ConfigError(f"model.{name}={value} must be positive.")
        for name, value in (("teacher_momentum", teacher_momentum), ("center_momentum", center_momentum)):
            if not 0 <= value <= 1:
                raise ConfigError(f"model.{name}={value} must be in [0, 1].")
        self.backbone_config = resolve_backbone(backbone)
        self.num_prototypes = num_prototypes
        self.freeze_last_layer = freeze_last_layer
        self.student_temp = student_temp
        self.teacher_temp = teacher_temp
        self.warmup_teacher_temp = warmup_teacher_temp
        self.teacher_temp_warmup = teacher_temp_warmup
        self.teacher_momentum = teacher_momentum
        self.final_teacher_momentum = final_teacher_momentum
        self.base_lr = base_lr
        self.lr_warmup = lr_warmup
        self.final_lr = final_lr
        self.weight_decay = weight_decay
        self.final_weight_decay = final_weight_decay
        self.clip_grad = clip_grad

        def network() -> nn.ModuleDict:
            # Built twice instead of deep-copied, which old-style weight norm does not survive.
            body = build_backbone(self.backbone_config)
            head = DINOProjectionHead(
                feature_dim(body),
                head_hidden_dim,
                head_bottleneck_dim,
                num_prototypes,
                norm_last_layer=norm_last_layer,
            )
            return nn.ModuleDict({"backbone": body, "head": head})

        self.student = network()
        self.teacher = network()
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.teacher.eval()
        self.loss = DINOLoss(num_prototypes, student_temp=student_temp, center_momentum=center_momentum)
        if compile:
            self.student["backbone"].compile()
            self.teacher["backbone"].compile()
        self._grad_norm = torch.zeros(())
        self._finite = FiniteCheck(
            "a lower model.base_lr, a longer model.lr_warmup, a smaller model.clip_grad, or trainer.precision=bf16-mixed "
            "instead of 16-mixed."
        )
        self._symptoms = _Symptoms()

    # --- the method ---------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Pooled vectors of the teacher's backbone: what the run is for."""
        return self.teacher["backbone"](images)

    def train(self, mode: bool = True) -> "DINO":
        super().train(mode)
        self.teacher.eval()  # no drop path in the targets
        return self

    def training_step(self, batch: tuple[list[Tensor], Tensor], batch_idx: int) -> Tensor:
        self._finite.raise_if_not_finite(self, self.scheduled("lr"))
        views, _ = batch
        with torch.no_grad():
            teacher_logits = self.teacher["head"](self.teacher["backbone"](torch.cat(views[:2])))  # (2 B, K)
        features = torch.cat([self.student["backbone"](same_size) for same_size in concat_by_size(views)])
        student_logits = self.student["head"](features)  # (V B, K)

        teacher_temp = self.scheduled("teacher_temp")
        with torch.autocast(self.device.type, enabled=False):
            teacher_views = list(teacher_logits.float().chunk(2))
            student_views = list(student_logits.float().chunk(len(views)))
            center = self.loss.center.clone()  # the loss moves it
            loss = self.loss(teacher_views, student_views, teacher_temp=teacher_temp)
        self._finite.watch_loss(self, loss)
        self.log("train/loss", loss, prog_bar=True)
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log_health(loss.detach(), teacher_views, center, teacher_temp, features.detach())
        return loss

    # --- hooks, in the order in which they run in a step --------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_step(self.trainer, batch_idx)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Gradients are unscaled and accumulated here, and not clipped yet.
        if self.trainer.global_step < self.schedule_steps["freeze_last_layer"]:
            for parameter in self.student["head"].last_layer.parameters():  # type: ignore[union-attr]
                parameter.grad = None

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self._grad_norm = clip_grad_per_tensor(self.student.parameters(), self.clip_grad)
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Called once per optimiser step, however many batches it accumulates."""
        lr, weight_decay = self.scheduled("lr"), self.scheduled("weight_decay")
        for group in optimizer.param_groups:
            group["lr"] = lr
            if group["name"] == "decay":
                group["weight_decay"] = weight_decay
        momentum = self.scheduled("teacher_momentum")
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._finite.watch_grad_norm(self, self._grad_norm)
        # Here, not at the end of the batch: a checkpoint written there must hold this step's teacher.
        update_momentum(self.student, self.teacher, momentum)
        for teacher_buffer, student_buffer in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
            teacher_buffer.copy_(student_buffer)
        self.log_dict(
            {
                "schedule/lr": lr,
                "schedule/weight_decay": weight_decay,
                "schedule/teacher_momentum": momentum,
                "schedule/teacher_temp": self.scheduled("teacher_temp"),
                "train/grad_norm": self._grad_norm,
            }
        )

    # --- schedules and optimiser --------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.schedule_steps = resolve_durations(
            self.trainer,
            {
                "lr_warmup": self.lr_warmup,
                "teacher_temp_warmup": self.teacher_temp_warmup,
                "freeze_last_layer": self.freeze_last_layer,
            },
        )
        self.global_batch_size = global_batch_size(self.trainer)
        self.lr = scale_lr(self.base_lr, self.global_batch_size)
        return adamw(self, self.student, self.lr, self.weight_decay)

    def scheduled(self, name: str) -> float:
        """Value of a schedule at the current optimiser step."""
        step, total, steps = self.trainer.global_step, self.schedule_steps["total"], self.schedule_steps
        if name == "lr":
            return warmup_cosine(step, total, steps["lr_warmup"], self.lr, self.final_lr)
        if name == "weight_decay":
            return cosine(step, total, self.weight_decay, self.final_weight_decay)
        if name == "teacher_momentum":
            return cosine(step, total, self.teacher_momentum, self.final_teacher_momentum)
        if name == "teacher_temp":
            return linear_then_constant(step, steps["teacher_temp_warmup"], self.warmup_teacher_temp, self.teacher_temp)
        raise KeyError(name)

    # --- checks before the first step, and reports --------------------------------------------------------------------

    def on_fit_start(self) -> None:
        transform = getattr(getattr(self.trainer, "datamodule", None), "train_transform", None)
        if transform is None or not hasattr(transform, "num_local_views"):
            raise ConfigError(
                "DINO trains on several views of an image: set data.train_transform to a MultiCrop "
                f"(got {transform!r}), as configs/pretrain_dino.yaml does."
            )
        backbone = self.student["backbone"]
        check_input_size(backbone, transform.global_size, "data.train_transform.global_size")
        if transform.num_local_views:
            check_input_size(backbone, transform.local_size, "data.train_transform.local_size")
        self._check_memory(2 + transform.num_local_views)

    def _check_memory(self, num_views: int) -> None:
        """Refuse a run whose prototype scores alone cannot fit."""
        batch_size = self.trainer.datamodule.batch_size  # type: ignore[attr-defined]
        # float32 scores and log-probabilities of the student, scores and probabilities of the teacher, one gradient
        needed = 4 * batch_size * self.num_prototypes * (3 * num_views + 2 * 2)
        available = available_memory(self.device)
        if available is not None and needed > available:
            raise ConfigError(
                f"data.train_transform.num_local_views={num_views - 2} with data.batch_size={batch_size} and "
                f"model.num_prototypes={self.num_prototypes} needs {needed / 2**30:.1f} GiB for the scores alone, but "
                f"{available / 2**30:.1f} GiB are free. Reduce one of the three (trainer.accumulate_grad_batches keeps "
                "the effective batch)."
            )

    def run_info(self) -> dict[str, str]:
        """What the run's first lines say about the method."""
        steps = self.schedule_steps
        return {
            "method": f"DINO, {self.num_prototypes} prototypes",
            "backbone": f"{self.backbone_config.name} {self.backbone_config.kwargs or ''}",
            "learning rate": f"{self.lr:.3g} = {self.base_lr:g} x {self.global_batch_size} / 256, to {self.final_lr:g}",
            "schedules": (
                f"{steps['total']} steps; warm-up {steps['lr_warmup']}; teacher temperature "
                f"{self.warmup_teacher_temp} to {self.teacher_temp} over {steps['teacher_temp_warmup']}; last layer "
                f"frozen for {steps['freeze_last_layer']}; teacher momentum {self.teacher_momentum} to "
                f"{self.final_teacher_momentum}; weight decay {self.weight_decay} to {self.final_weight_decay}"
            ),
        }

    def next_command(self, checkpoint: str) -> str:
        """What to run when this run has ended."""
        return probe_command(self, checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Never overwrite a good checkpoint with a broken one.
        self._finite.raise_if_not_finite(self, self.scheduled("lr"))
        checkpoint[CHECKPOINT_KEY] = recorded_backbone(self.backbone_config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_resumed_backbone(checkpoint, self.backbone_config)
        shapes = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        for name, value in checkpoint["state_dict"].items():
            if name in shapes and tuple(value.shape) != shapes[name]:
                raise ConfigError(
                    f"ckpt_path: {name} is {tuple(value.shape)} in the checkpoint, but {shapes[name]} here. Resume with the "
                    "model.num_prototypes and head sizes of that run."
                )

    @torch.no_grad()
    def _log_health(
        self, loss: Tensor, teacher_views: list[Tensor], center: Tensor, teacher_temp: float, features: Tensor
    ) -> None:
        log_probs = ((torch.cat(teacher_views) - center[0]) / teacher_temp).log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
        # Deviation of unit-length features, relative to what it is for a uniform cloud (1 / sqrt(D)).
        unit = nn.functional.normalize(features.float(), dim=-1)
        feature_std = unit.std(0).mean() * math.sqrt(unit.shape[-1])
        health = {
            "health/loss_over_ln_k": loss / math.log(self.num_prototypes),
            "health/teacher_entropy": entropy,
            "health/kl": loss - entropy,
            "health/feature_std": feature_std,
        }
        self.log_dict(health)
        diagnosis = self._symptoms.update(
            entropy_ratio=float(entropy) / math.log(self.num_prototypes),
            loss_ratio=float(loss) / math.log(self.num_prototypes),
            feature_std=float(feature_std),
        )
        if diagnosis:
            rank_zero_warn(f"Step {self.trainer.global_step}: {diagnosis}")


class _Symptoms:
    """Watches for collapse, and names it once."""

    patience = 10  # consecutive observations, log_every_n_steps apart

    def __init__(self) -> None:
        self.counts = {"uniform": 0, "point": 0, "features": 0}
        self.reported: set[str] = set()

    def update(self, entropy_ratio: float, loss_ratio: float, feature_std: float) -> str | None:
        """Returns a diagnosis the first time a symptom has lasted.

        Args:
            entropy_ratio: Teacher entropy / ln K, 1 for a uniform teacher.
            loss_ratio: Loss / ln K.
            feature_std: Deviation of unit features, 1 for a uniform cloud.
        """
        seen = {
            "uniform": entropy_ratio > 0.99 and loss_ratio > 0.99,
            "point": entropy_ratio < 0.01 and loss_ratio < 0.02,
            "features": feature_std < 0.02,
        }
        for name, present in seen.items():
            self.counts[name] = self.counts[name] + 1 if present else 0
            if self.counts[name] >= self.patience and name not in self.reported:
                self.reported.add(name)
                return _DIAGNOSES[name]
        return None


_DIAGNOSES = {
    "uniform": (
        "Uniform collapse: the teacher gives every prototype the same probability and the loss stays at ln K. "
        "Lower model.teacher_temp or lengthen its warm-up, raise model.teacher_momentum, or use fewer model.num_prototypes."
    ),
    "point": (
        "Collapse to one prototype: all images get the same assignment and the loss goes to 0. "
        "Raise model.teacher_temp, check that model.center_momentum is below 1, or lower model.base_lr."
    ),
    "features": (
        "Feature collapse: all images have nearly the same feature vector. "
        "Lower model.base_lr or model.final_weight_decay, and check that the augmentation leaves something to see."
    ),
}


def concat_by_size(views: list[Tensor]) -> list[Tensor]:
    """Concatenate neighbouring views of one size: one forward pass per resolution."""
    groups: list[list[Tensor]] = []
    for view in views:
        if groups and groups[-1][0].shape == view.shape:
            groups[-1].append(view)
        else:
            groups.append([view])
    return [torch.cat(group) for group in groups]


def available_memory(device: torch.device) -> int | None:
    """Free memory in bytes of a CUDA device or of the host; None where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo") as meminfo:
            fields = dict(line.split(":", 1) for line in meminfo)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
