"""What DINO, iBOT and DINOv2 share: a student, a teacher that is its moving average, and their schedules.

A method holds one `SelfDistillation` and calls it from its hooks; which hook calls what is written at each function.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal

import lightning as L
import torch
from lightly.models.utils import update_momentum
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from vil_lightning.checks import check_not_negative, check_positive, check_shares
from vil_lightning.errors import ConfigError
from vil_lightning.methods.backbone import (
    CHECKPOINT_KEY,
    BackboneConfig,
    check_resumed_backbone,
    recorded_backbone,
)
from vil_lightning.methods.divergence import FiniteCheck
from vil_lightning.methods.optimisers import adamw, on_cpu, set_lr
from vil_lightning.methods.resuming import check_batch, record_batch
from vil_lightning.methods.run_length import global_batch_size, resolve_durations
from vil_lightning.methods.small_data import choose_teacher_momentum, choose_teacher_temp
from vil_lightning.optim import clip_grad_per_tensor, layer_lr_scales, scale_lr
from vil_lightning.schedules import Duration, cosine, linear_then_constant, warmup_cosine

Auto = Literal["auto"]


class SelfDistillation:
    """Schedules of a student and its teacher, and the step in which they apply.

    Args:
        backbone_config: For the checkpoint.
        base_lr: Peak learning rate per `lr_batch_size` images of the global batch.
        lr_warmup: Linear warm-up of the learning rate (a duration).
        final_lr: Learning rate at the end of the cosine; absolute.
        weight_decay: At the start; follows a cosine. Never on biases, norms and position embeddings.
        final_weight_decay: At the end.
        teacher_temp: Softmax temperature of the teacher after its warm-up; `"auto"` goes by the length of the run.
        warmup_teacher_temp: Its value at the start.
        teacher_temp_warmup: How long it takes to get from one to the other (a duration).
        teacher_momentum: Of the teacher at the start; grows along a cosine. `"auto"` goes by the length of the run.
        final_teacher_momentum: At the end.
        freeze_last_layer: How long the prototypes stay fixed at the start of training (a duration).
        clip_grad: Largest L2 norm of a single tensor's gradient.
        lr_batch_size: What `base_lr` refers to.
        lr_rule: How the learning rate grows with the batch, see `vil_lightning.optim.scale_lr`.
        longest_memory: The momentum of `"auto"` in long runs.
        layer_decay: Layer-wise decay of the backbone's learning rate; 1 for none.
        patch_embed_lr_scale: A further factor for the patch embedding.
    """

    def __init__(
        self,
        backbone_config: BackboneConfig,
        *,
        base_lr: float,
        lr_warmup: Duration,
        final_lr: float,
        weight_decay: float,
        final_weight_decay: float,
        teacher_temp: float | Auto,
        warmup_teacher_temp: float,
        teacher_temp_warmup: Duration,
        teacher_momentum: float | Auto,
        final_teacher_momentum: float,
        freeze_last_layer: Duration,
        clip_grad: float | None,
        lr_batch_size: int = 256,
        lr_rule: Literal["linear", "sqrt"] = "linear",
        longest_memory: float = 0.996,
        layer_decay: float = 1.0,
        patch_embed_lr_scale: float = 1.0,
    ) -> None:
        fixed_temp, fixed_momentum = (None if x == "auto" else x for x in (teacher_temp, teacher_momentum))
        check_positive("model", teacher_temp=fixed_temp, warmup_teacher_temp=warmup_teacher_temp, base_lr=base_lr)
        check_positive("model", lr_batch_size=lr_batch_size, clip_grad=clip_grad)
        check_not_negative("model", final_lr=final_lr, weight_decay=weight_decay, final_weight_decay=final_weight_decay)
        check_shares("model", teacher_momentum=fixed_momentum, final_teacher_momentum=final_teacher_momentum)
        for name, value in (("layer_decay", layer_decay), ("patch_embed_lr_scale", patch_embed_lr_scale)):
            if not 0 < value <= 1:
                raise ConfigError(f"model.{name}={value} must be in (0, 1].")
        self.backbone_config = backbone_config
        self.base_lr = base_lr
        self.lr_warmup = lr_warmup
        self.final_lr = final_lr
        self.weight_decay = weight_decay
        self.final_weight_decay = final_weight_decay
        self.wanted_teacher_temp = teacher_temp
        self.warmup_teacher_temp = warmup_teacher_temp
        self.teacher_temp_warmup = teacher_temp_warmup
        self.wanted_teacher_momentum = teacher_momentum
        self.final_teacher_momentum = final_teacher_momentum
        self.freeze_last_layer = freeze_last_layer
        self.clip_grad = clip_grad
        self.lr_batch_size = lr_batch_size
        self.lr_rule = lr_rule
        self.longest_memory = longest_memory
        self.layer_decay = layer_decay
        self.patch_embed_lr_scale = patch_embed_lr_scale
        self.chosen: dict[str, str] = {}  # what "auto" has become, and why
        self.grad_norm = torch.zeros(())
        self.finite = FiniteCheck(
            "a lower model.base_lr, a longer model.lr_warmup, a smaller model.clip_grad, or trainer.precision=bf16-mixed "
            "instead of 16-mixed."
        )

    # --- in the order of a step ---------------------------------------------------------------------------------------

    def start(self, module: L.LightningModule) -> None:
        """First in `training_step`. Raises if the step before has diverged."""
        self.finite.raise_if_not_finite(module, self.scheduled(module, "lr"))

    def watch(self, module: L.LightningModule, loss: Tensor) -> Tensor:
        """Last in `training_step`. Returns the loss."""
        module.log("train/loss", self.finite.watch_loss(module, loss), prog_bar=True)
        return loss

    def freeze_prototypes(self, module: L.LightningModule, heads: Iterable[nn.Module]) -> None:
        """In `on_before_optimizer_step`, where gradients are unscaled and accumulated, and not clipped yet."""
        if module.trainer.global_step < self.steps["freeze_last_layer"]:
            for head in heads:
                for parameter in head.last_layer.parameters():  # type: ignore[union-attr]
                    parameter.grad = None

    def clip_gradients(self, student: nn.Module) -> None:
        """In `configure_gradient_clipping`, before Lightning's `clip_gradients` (global norm)."""
        self.grad_norm = clip_grad_per_tensor(student.parameters(), self.clip_grad)

    def before_step(self, module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """In `optimizer_step`, before `super()`."""
        names = ("lr", "weight_decay", "teacher_momentum", "teacher_temp")
        self.applied = {name: self.scheduled(module, name) for name in names}
        set_lr(optimizer, self.applied["lr"])
        for group in optimizer.param_groups:
            if not group["name"].startswith("no_decay"):
                group["weight_decay"] = self.applied["weight_decay"]

    def after_step(self, module: L.LightningModule, student: nn.Module, teacher: nn.Module) -> None:
        """In `optimizer_step`, after `super()`: not at the end of the batch, since a checkpoint written there must hold
        this step's teacher.
        """
        self.finite.watch_grad_norm(module, self.grad_norm)
        update_momentum(student, teacher, self.applied["teacher_momentum"])
        for teacher_buffer, student_buffer in zip(teacher.buffers(), student.buffers(), strict=True):
            teacher_buffer.copy_(student_buffer)
        module.log_dict({f"schedule/{name}": on_cpu(value) for name, value in self.applied.items()})
        module.log("train/grad_norm", self.grad_norm)

    # --- schedules and optimiser --------------------------------------------------------------------------------------

    def configure(self, module: L.LightningModule, student: nn.Module) -> torch.optim.AdamW:
        """In `configure_optimizers`. `student` holds the `backbone` and heads."""
        durations = {
            "lr_warmup": self.lr_warmup,
            "teacher_temp_warmup": self.teacher_temp_warmup,
            "freeze_last_layer": self.freeze_last_layer,
        }
        self.steps = resolve_durations(module.trainer, durations)
        self.global_batch_size = global_batch_size(module.trainer)
        self.peak_lr = scale_lr(self.base_lr, self.global_batch_size, self.lr_batch_size, self.lr_rule)
        self._choose(self.steps["total"])
        scales = None
        if self.layer_decay != 1 or self.patch_embed_lr_scale != 1:
            scales = {name: 1.0 for name, _ in student.named_parameters()}
            for name, scale in layer_lr_scales(student.backbone, self.layer_decay).items():  # type: ignore[arg-type]
                embed = self.patch_embed_lr_scale if name.startswith("patch_embed.") else 1.0
                scales[f"backbone.{name}"] = scale * embed
        return adamw(module, student, self.peak_lr, self.weight_decay, lr_scales=scales)

    def _choose(self, total_steps: int) -> None:
        if self.wanted_teacher_temp == "auto":
            self.teacher_temp, reason = choose_teacher_temp(total_steps * self.global_batch_size)
            self.chosen["teacher_temp"] = f"{self.teacher_temp} ({reason})"
        else:
            self.teacher_temp = self.wanted_teacher_temp
        if self.wanted_teacher_momentum == "auto":
            self.teacher_momentum, reason = choose_teacher_momentum(total_steps, self.longest_memory)
            self.chosen["teacher_momentum"] = f"{self.teacher_momentum:.4g} ({reason})"
        else:
            self.teacher_momentum = self.wanted_teacher_momentum

    def scheduled(self, module: L.LightningModule, name: str) -> float:
        """Value of a schedule at the current optimiser step: `lr`, `weight_decay`, `teacher_momentum` or `teacher_temp`."""
        step, total, steps = module.trainer.global_step, self.steps["total"], self.steps
        if name == "lr":
            return warmup_cosine(step, total, steps["lr_warmup"], self.peak_lr, self.final_lr)
        if name == "weight_decay":
            return cosine(step, total, self.weight_decay, self.final_weight_decay)
        if name == "teacher_momentum":
            return cosine(step, total, self.teacher_momentum, self.final_teacher_momentum)
        if name == "teacher_temp":
            return linear_then_constant(step, steps["teacher_temp_warmup"], self.warmup_teacher_temp, self.teacher_temp)
        raise KeyError(name)

    # --- reports and checkpoints --------------------------------------------------------------------------------------

    def run_info(self) -> dict[str, str]:
        """Lines for the module's `run_info`."""
        steps, config = self.steps, self.backbone_config
        factor = f"{self.global_batch_size} / {self.lr_batch_size}"
        factor = f"sqrt({factor})" if self.lr_rule == "sqrt" else factor
        lines = {
            "backbone": f"{config.name} {config.kwargs or ''}",
            "learning rate": f"{self.peak_lr:.3g} = {self.base_lr:g} x {factor}, to {self.final_lr:g}",
            "schedules": (
                f"{steps['total']} steps; warm-up {steps['lr_warmup']}; teacher temperature "
                f"{self.warmup_teacher_temp} to {self.teacher_temp} over {steps['teacher_temp_warmup']}; last layer "
                f"frozen for {steps['freeze_last_layer']}; teacher momentum {self.teacher_momentum:.4g} to "
                f"{self.final_teacher_momentum}; weight decay {self.weight_decay} to {self.final_weight_decay}"
            ),
        }
        return lines | {f"model.{name}": text for name, text in self.chosen.items()}

    def save(self, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """In `on_save_checkpoint`."""
        self.start(module)  # never overwrite a good checkpoint with a broken one
        checkpoint[CHECKPOINT_KEY] = recorded_backbone(self.backbone_config)
        record_batch(module._trainer, checkpoint)

    def load(self, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """In `on_load_checkpoint`. Refuses a checkpoint of another backbone or other heads."""
        check_resumed_backbone(checkpoint, self.backbone_config)
        check_batch(module._trainer, checkpoint)
        shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        for name, value in checkpoint["state_dict"].items():
            if name in shapes and tuple(value.shape) != shapes[name]:
                raise ConfigError(
                    f"ckpt_path: {name} is {tuple(value.shape)} in the checkpoint, but {shapes[name]} here. Resume with the "
                    "model.num_prototypes and head sizes of that run."
                )


def start_teacher(teacher: nn.ModuleDict, student: nn.ModuleDict) -> nn.ModuleDict:
    """Give a teacher its student's weights, and keep it out of training.

    The teacher is a second network, not a deep copy, which old-style weight norm (in lightly's heads) does not survive.
    """
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    return teacher.eval()


class CollapseWatch:
    """Watches for collapse, and names it once."""

    patience = 10  # consecutive observations, log_every_n_steps apart

    def __init__(self) -> None:
        self.counts = {"uniform": 0, "point": 0, "features": 0}
        self.reported: set[str] = set()

    def warn(self, step: int, health: dict[str, Tensor], num_prototypes: int) -> None:
        """Take in what `prototype_health` found, and say what is wrong if something is."""
        diagnosis = self.update(
            entropy_ratio=float(health["health/teacher_entropy"]) / math.log(num_prototypes),
            loss_ratio=float(health["health/loss_over_ln_k"]),
            feature_std=float(health["health/feature_std"]),
        )
        if diagnosis:
            rank_zero_warn(f"Step {step}: {diagnosis}")

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


@torch.no_grad()
def prototype_health(loss: Tensor, targets: Tensor, features: Tensor) -> dict[str, Tensor]:
    """What tells a learning run from a collapsing one.

    Args:
        loss: Cross-entropy of the student.
        targets: Teacher's probabilities (..., K).
        features: Pooled vectors of the student (B, D).
    """
    entropy = -(targets * targets.clamp(min=1e-30).log()).sum(-1).mean()
    # Deviation of unit-length features, relative to what it is for a uniform cloud (1 / sqrt(D)).
    unit = nn.functional.normalize(features.float(), dim=-1)
    return {
        "health/loss_over_ln_k": loss / math.log(targets.shape[-1]),
        "health/teacher_entropy": entropy,
        "health/kl": loss - entropy,
        "health/feature_std": unit.std(0).mean() * math.sqrt(unit.shape[-1]),
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


def check_score_memory(module: L.LightningModule, num_prototypes: int, num_views: int, num_patches: int = 0) -> None:
    """Refuse a run whose prototype scores alone cannot fit.

    Args:
        num_prototypes: K.
        num_views: Views of an image, two of them global.
        num_patches: Hidden patches per global view whose scores are needed, too.
    """
    batch_size = module.trainer.datamodule.batch_size  # type: ignore[attr-defined]
    # float32 scores and log-probabilities of the student, scores and probabilities of the teacher, one gradient
    vectors = 3 * (num_views + 2 * num_patches) + 2 * (2 + 2 * num_patches)
    needed, available = 4 * batch_size * num_prototypes * vectors, available_memory(module.device)
    if available is not None and needed > available:
        raise ConfigError(
            f"data.train_transform.num_local_views={num_views - 2} with data.batch_size={batch_size} and "
            f"model.num_prototypes={num_prototypes} needs {needed / 2**30:.1f} GiB for the scores alone, but "
            f"{available / 2**30:.1f} GiB are free. Reduce one of the three (trainer.accumulate_grad_batches keeps "
            "the effective batch)."
        )


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
