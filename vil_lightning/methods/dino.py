"""DINO: self-distillation with no labels.

Caron et al. 2021, arXiv:2104.14294. A student sees all crops of an image, a teacher, its moving average, the two large
ones; the student learns to predict the teacher's soft assignment to K prototypes.

What ViL changes: there is no class token, so both networks are read out by their pooling (for ViL2 the concatenation of
first and last patch). Head and loss are lightly's, with two of its traps avoided: the teacher starts as a copy of the
student, and the loss is computed in float32 also under autocast.

Letters: `B` images per device, `V` views, `K` prototypes.
"""

from typing import Any

import lightning as L
import torch
from lightly.loss import DINOLoss
from lightly.models.modules.heads import DINOProjectionHead
from torch import Tensor, nn

from vil_lightning.checks import check_positive, check_sizes
from vil_lightning.errors import ConfigError
from vil_lightning.methods.backbone import (
    BackboneConfig,
    build_backbone,
    check_input_size,
    feature_dim,
    resolve_backbone,
)
from vil_lightning.methods.commands import probe_command
from vil_lightning.methods.compiling import CompileMode, begin_step, check_compile, compile_network, resolve_mode
from vil_lightning.methods.randomness import float32_weights, seed_step
from vil_lightning.methods.run_length import logs_this_step
from vil_lightning.methods.self_distillation import (
    Auto,
    CollapseWatch,
    SelfDistillation,
    check_score_memory,
    concat_by_size,
    prototype_health,
    start_teacher,
)
from vil_lightning.methods.small_data import choose_num_prototypes
from vil_lightning.schedules import Duration


class DINO(L.LightningModule):
    """DINO with any timm backbone. Needs a data module whose `train_transform` is `MultiCrop`.

    The defaults are the official ones for a small model on ImageNet-1k.

    Args:
        backbone: The network; student and teacher start with the same weights. `drop_path_rate` applies to the student.
        num_prototypes: K, outputs of the head; `"auto"` goes by the size of the training set.
        head_hidden_dim: Width of the head's two hidden layers.
        head_bottleneck_dim: Width of the normalised vector that is compared with the prototypes.
        norm_last_layer: Keep the prototypes at unit length.
        freeze_last_layer: How long the prototypes stay fixed at the start of training (a duration).
        student_temp: Softmax temperature of the student.
        teacher_temp: Softmax temperature of the teacher after its warm-up; `"auto"` goes by the length of the run.
        warmup_teacher_temp: Its value at the start.
        teacher_temp_warmup: How long it takes to get from one to the other (a duration).
        center_momentum: Of the moving average that is subtracted from the teacher's outputs.
        teacher_momentum: Of the teacher at the start; grows along a cosine. `"auto"` goes by the length of the run.
        final_teacher_momentum: At the end.
        base_lr: Peak learning rate per 256 images of the global batch.
        lr_warmup: Linear warm-up of the learning rate (a duration).
        final_lr: Learning rate at the end of the cosine; absolute, not scaled by the batch.
        weight_decay: At the start; follows a cosine. Never on biases, norms and position embeddings.
        final_weight_decay: At the end.
        clip_grad: Largest L2 norm of a single tensor's gradient. `trainer.gradient_clip_val` (global norm) acts in addition.
        compile: Compile both backbones: true, default, reduce-overhead or max-autotune, see `compiling`.

    What `"auto"` chooses is printed at the start of a run with its reason, see `vil_lightning.methods.small_data`; for
    ImageNet-1k it is the official value.

    Durations are `"10 epochs"`, `"500 steps"`, `"10%"` or a fraction of the run below 1.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        num_prototypes: int | Auto = "auto",
        head_hidden_dim: int = 2048,
        head_bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
        freeze_last_layer: Duration = "1 epoch",
        student_temp: float = 0.1,
        teacher_temp: float | Auto = 0.04,
        warmup_teacher_temp: float = 0.04,
        teacher_temp_warmup: Duration = "0 epochs",
        center_momentum: float = 0.9,
        teacher_momentum: float | Auto = "auto",
        final_teacher_momentum: float = 1.0,
        base_lr: float = 5e-4,
        lr_warmup: Duration = "10 epochs",
        final_lr: float = 1e-6,
        weight_decay: float = 0.04,
        final_weight_decay: float = 0.4,
        clip_grad: float | None = 3.0,
        compile: CompileMode = False,
    ) -> None:
        super().__init__()
        check_positive("model", student_temp=student_temp)
        check_sizes("model", head_hidden_dim=head_hidden_dim, head_bottleneck_dim=head_bottleneck_dim)
        check_sizes("model", num_prototypes=None if num_prototypes == "auto" else num_prototypes)
        if not 0 <= center_momentum <= 1:
            raise ConfigError(f"model.center_momentum={center_momentum} must be in [0, 1].")
        self.backbone_config = resolve_backbone(backbone)
        self.distillation = SelfDistillation(
            self.backbone_config,
            base_lr=base_lr,
            lr_warmup=lr_warmup,
            final_lr=final_lr,
            weight_decay=weight_decay,
            final_weight_decay=final_weight_decay,
            teacher_temp=teacher_temp,
            warmup_teacher_temp=warmup_teacher_temp,
            teacher_temp_warmup=teacher_temp_warmup,
            teacher_momentum=teacher_momentum,
            final_teacher_momentum=final_teacher_momentum,
            freeze_last_layer=freeze_last_layer,
            clip_grad=clip_grad,
        )
        self.head_sizes = (head_hidden_dim, head_bottleneck_dim)
        self.norm_last_layer = norm_last_layer
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.compile_mode = compile
        resolve_mode(compile)
        self.num_prototypes = num_prototypes
        self._collapse = CollapseWatch()
        self.student = nn.ModuleDict({"backbone": build_backbone(self.backbone_config)})
        if num_prototypes != "auto":
            self._complete(num_prototypes)

    @float32_weights()
    def configure_model(self) -> None:
        """Adds the heads, if their size had to wait for the data."""
        if self.num_prototypes == "auto":
            num_images = len(self.trainer.datamodule.train_source)  # type: ignore[attr-defined]
            self.num_prototypes, reason = choose_num_prototypes(num_images)
            self.distillation.chosen["num_prototypes"] = f"{self.num_prototypes} ({reason})"
            self._complete(self.num_prototypes)

    def _complete(self, num_prototypes: int) -> None:
        """Head and teacher."""

        def head() -> nn.Module:
            sizes = (feature_dim(self.student["backbone"]), *self.head_sizes, num_prototypes)
            return DINOProjectionHead(*sizes, norm_last_layer=self.norm_last_layer)

        self.student["head"] = head()
        teacher = nn.ModuleDict({"backbone": build_backbone(self.backbone_config), "head": head()})
        self.teacher = start_teacher(teacher, self.student)
        self.loss = DINOLoss(num_prototypes, student_temp=self.student_temp, center_momentum=self.center_momentum)
        compile_network(self.student["backbone"], self.compile_mode)
        compile_network(self.teacher["backbone"], self.compile_mode)

    # --- the method ---------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Pooled vectors of the teacher's backbone: what the run is for."""
        return self.teacher["backbone"](images)

    def train(self, mode: bool = True) -> "DINO":
        super().train(mode)
        if hasattr(self, "teacher"):
            self.teacher.eval()  # no drop path in the targets
        return self

    def training_step(self, batch: tuple[list[Tensor], Tensor], batch_idx: int) -> Tensor:
        begin_step(self.compile_mode)
        self.distillation.start(self)
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
        if logs_this_step(self.trainer):
            targets = ((torch.cat(teacher_views) - center[0]) / teacher_temp).softmax(-1)
            health = prototype_health(loss.detach(), targets, features.detach())
            self.log_dict(health)
            self._collapse.warn(self.trainer.global_step, health, targets.shape[-1])
        return self.distillation.watch(self, loss)

    # --- hooks, in the order in which they run in a step --------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_step(self.trainer, batch_idx)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.distillation.freeze_prototypes(self, [self.student["head"]])

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self.distillation.clip_gradients(self.student)
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Called once per optimiser step, however many batches it accumulates."""
        self.distillation.before_step(self, optimizer)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.distillation.after_step(self, self.student, self.teacher)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.distillation.configure(self, self.student)

    def scheduled(self, name: str) -> float:
        """Value of a schedule at the current optimiser step."""
        return self.distillation.scheduled(self, name)

    # --- checks before the first step, and reports --------------------------------------------------------------------

    def on_fit_start(self) -> None:
        check_compile(self, self.compile_mode)
        transform = getattr(getattr(self.trainer, "datamodule", None), "train_transform", None)
        if transform is None or not hasattr(transform, "num_local_views"):
            raise ConfigError(
                "model.class_path: DINO trains on several views of an image: set data.train_transform to a MultiCrop "
                f"(it is {type(transform).__name__}), as configs/pretrain_dino.yaml does."
            )
        backbone = self.student["backbone"]
        check_input_size(backbone, transform.global_size, "data.train_transform.global_size")
        if transform.num_local_views:
            check_input_size(backbone, transform.local_size, "data.train_transform.local_size")
        assert self.num_prototypes != "auto"
        check_score_memory(self, self.num_prototypes, 2 + transform.num_local_views)

    @property
    def micro_batch_statistics(self) -> str:
        """What is computed over the images of a micro batch, and so changes when batches are accumulated."""
        return "the centre moves"

    def run_info(self) -> dict[str, str]:
        """What the run's first lines say about the method."""
        return {"method": f"DINO, {self.num_prototypes} prototypes", **self.distillation.run_info()}

    def next_command(self, checkpoint: str) -> str:
        """What to run when this run has ended."""
        return probe_command(self, checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.distillation.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.distillation.load(self, checkpoint)
