"""iBOT: self-distillation of images, as in DINO, and of hidden patches at once.

Zhou et al. 2022, arXiv:2111.07832. The student sees the two large views with some patches replaced by a learned token, and the
small views; the teacher, its moving average, sees the large views whole. The student predicts the teacher's assignment of the
image (from another view) and of every hidden patch (from the same view) to prototypes. `methods/dinov2.py` trains in the same
way with other settings.

What ViL changes. There is no class token: the image-level objective acts on the pooled vector (for ViL2 the concatenation of
the first and the last token), the patch-level one on all tokens, so the two pull at different vectors. First and last patch
may be hidden themselves: their tokens still sum up what the scans have read. Where patches and images share a head, a patch is
read out as if it were a sequence of its own; see `read_patches`.

Letters: `B` images per device, `V` views, `N` patches of a large view, `M` hidden ones of the batch, `K` prototypes.
"""

from typing import Any, Literal

import lightning as L
import torch
from lightly.loss import KoLeoLoss
from lightly.models.modules.center import Center
from lightly.models.modules.heads import DINOProjectionHead
from torch import Tensor, nn

from vil_lightning.backbones import VisionLSTM
from vil_lightning.checks import check_positive, check_sizes
from vil_lightning.errors import ConfigError
from vil_lightning.losses.prototypes import centered_targets, patch_loss, sinkhorn_targets, view_loss
from vil_lightning.masking import hidden_places, uneven_block_mask
from vil_lightning.methods.backbone import (
    BackboneConfig,
    build_backbone,
    check_input_size,
    feature_dim,
    patch_tokens,
    resolve_backbone,
)
from vil_lightning.methods.commands import probe_command
from vil_lightning.methods.compiling import CompileMode, check_compile, compile_blocks, resolve_mode
from vil_lightning.methods.masked import check_maskable, encode_masked
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


class IBOT(L.LightningModule):
    """iBOT with a ViL or a plain ViT of timm. Needs a data module whose `train_transform` is `MultiCrop`.

    The defaults are the official ones for ViT-S/16 on ImageNet-1k (800 epochs, README of bytedance/ibot).

    Args:
        backbone: The network; student and teacher start with the same weights. `drop_path_rate` applies to the student.
        num_prototypes: K, outputs of a head; `"auto"` goes by the size of the training set, up to the official 8192.
        head_hidden_dim: Width of a head's two hidden layers.
        head_bottleneck_dim: Width of the normalised vector that is compared with the prototypes.
        shared_head: One head for images and patches, or one for each.
        norm_last_layer: Keep the prototypes at unit length.
        freeze_last_layer: How long the prototypes stay fixed at the start of training (a duration).
        mask_prob: Share of the large views in which patches are hidden.
        mask_ratio: Smallest and largest share of hidden patches there; rectangles.
        image_weight: Weight of the image-level loss.
        patch_weight: Weight of the patch-level loss.
        koleo_weight: Weight of KoLeo (Sablayrolles et al. 2019, arXiv:1806.03198), which spreads the pooled vectors of a
            batch. 0 in iBOT.
        koleo_group: It compares groups of this many images of a device's batch; the whole of it if None. With a number, which
            has to divide `data.batch_size`, the loss does not depend on how many devices share a batch.
        targets: How the teacher's scores are kept from collapsing: `centering` subtracts their running mean, `sinkhorn`
            balances every batch over the prototypes (three Sinkhorn-Knopp iterations).
        student_temp: Softmax temperature of the student.
        teacher_temp: Softmax temperature of the teacher after its warm-up, for images and patches; `"auto"` goes by the
            length of the run.
        warmup_teacher_temp: Its value at the start.
        teacher_temp_warmup: How long it takes to get from one to the other (a duration).
        center_momentum: Of the two moving averages (of images; of all patches, hidden or not) that `centering` subtracts.
        teacher_momentum: Of the teacher at the start; grows along a cosine. `"auto"` goes by the length of the run.
        final_teacher_momentum: At the end.
        base_lr: Peak learning rate per 256 images of the global batch.
        lr_warmup: Linear warm-up of the learning rate (a duration).
        final_lr: Learning rate at the end of the cosine; absolute.
        layer_decay: Layer-wise decay of the backbone's learning rate; 1 for none.
        patch_embed_lr_scale: A further factor for the patch embedding.
        weight_decay: At the start; follows a cosine. Never on biases, norms, position embeddings and the mask token.
        final_weight_decay: At the end.
        clip_grad: Largest L2 norm of a single tensor's gradient. `trainer.gradient_clip_val` (global norm) acts in addition.
        compile: Compile the blocks of both backbones: true, default or max-autotune, see `compiling`.

    What `"auto"` chooses is printed at the start of a run with its reason, see `vil_lightning.methods.small_data`.
    Durations are `"10 epochs"`, `"500 steps"`, `"10%"` or a fraction of the run below 1.
    """

    title = "iBOT"
    recipe = "configs/pretrain_ibot.yaml"
    most_prototypes = 8192
    longest_memory = 0.996
    lr_batch_size = 256
    lr_rule: Literal["linear", "sqrt"] = "linear"

    def __init__(
        self,
        backbone: BackboneConfig,
        num_prototypes: int | Auto = "auto",
        head_hidden_dim: int = 2048,
        head_bottleneck_dim: int = 256,
        shared_head: bool = True,
        norm_last_layer: bool = False,
        freeze_last_layer: Duration = "1 epoch",
        mask_prob: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        image_weight: float = 1.0,
        patch_weight: float = 1.0,
        koleo_weight: float = 0.0,
        koleo_group: int | None = None,
        targets: Literal["centering", "sinkhorn"] = "centering",
        student_temp: float = 0.1,
        teacher_temp: float | Auto = "auto",
        warmup_teacher_temp: float = 0.04,
        teacher_temp_warmup: Duration = "30 epochs",
        center_momentum: float = 0.9,
        teacher_momentum: float | Auto = "auto",
        final_teacher_momentum: float = 1.0,
        base_lr: float = 5e-4,
        lr_warmup: Duration = "10 epochs",
        final_lr: float = 1e-6,
        layer_decay: float = 1.0,
        patch_embed_lr_scale: float = 1.0,
        weight_decay: float = 0.04,
        final_weight_decay: float = 0.4,
        clip_grad: float | None = 3.0,
        compile: CompileMode = False,
    ) -> None:
        super().__init__()
        check_positive("model", student_temp=student_temp)
        check_sizes("model", head_hidden_dim=head_hidden_dim, head_bottleneck_dim=head_bottleneck_dim)
        check_sizes("model", num_prototypes=None if num_prototypes == "auto" else num_prototypes)
        for key, value in (("mask_prob", mask_prob), ("center_momentum", center_momentum)):
            if not 0 <= value <= 1:
                raise ConfigError(f"model.{key}={value} must be in [0, 1].")
        if not 0 < mask_ratio[0] <= mask_ratio[1] < 1:
            raise ConfigError(f"model.mask_ratio={list(mask_ratio)} must satisfy 0 < smallest <= largest < 1.")
        weights = {"image_weight": image_weight, "patch_weight": patch_weight, "koleo_weight": koleo_weight}
        for key, value in weights.items():
            if value < 0:
                raise ConfigError(f"model.{key}={value} must not be negative.")
        if koleo_group is not None and koleo_group < 2:
            raise ConfigError(f"model.koleo_group={koleo_group} must be at least 2 images, or null.")
        self.backbone_config = resolve_backbone(backbone)
        self.distillation = SelfDistillation(
            self.backbone_config,
            base_lr=base_lr,
            lr_batch_size=self.lr_batch_size,
            lr_rule=self.lr_rule,
            lr_warmup=lr_warmup,
            final_lr=final_lr,
            layer_decay=layer_decay,
            patch_embed_lr_scale=patch_embed_lr_scale,
            weight_decay=weight_decay,
            final_weight_decay=final_weight_decay,
            teacher_temp=teacher_temp,
            warmup_teacher_temp=warmup_teacher_temp,
            teacher_temp_warmup=teacher_temp_warmup,
            teacher_momentum=teacher_momentum,
            final_teacher_momentum=final_teacher_momentum,
            longest_memory=self.longest_memory,
            freeze_last_layer=freeze_last_layer,
            clip_grad=clip_grad,
        )
        self.num_prototypes = num_prototypes
        self.head_sizes = (head_hidden_dim, head_bottleneck_dim)
        self.shared_head = shared_head
        self.norm_last_layer = norm_last_layer
        self.mask_prob = mask_prob
        self.mask_ratio = mask_ratio
        self.image_weight = image_weight
        self.patch_weight = patch_weight
        self.koleo_weight = koleo_weight
        self.koleo_group = koleo_group
        self.balance = targets
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.compile_mode = compile
        resolve_mode(compile)
        self.koleo = KoLeoLoss()
        self._collapse = CollapseWatch()
        body = build_backbone(self.backbone_config)
        check_maskable(body, self.title)
        dim = int(body.embed_dim)  # type: ignore[arg-type]
        if shared_head and feature_dim(body) != patch_width(body):
            raise ConfigError(
                f"model.shared_head: a pooled vector of {self.backbone_config.name} has {feature_dim(body)} channels, a patch "
                f"{patch_width(body)}, so they cannot share a head. Set model.shared_head=false, or another "
                "model.backbone.kwargs.global_pool."
            )
        self.student = nn.ModuleDict({"backbone": body, "mask_token": MaskToken(dim)})
        if num_prototypes != "auto":
            self._complete(num_prototypes)

    @float32_weights()
    def configure_model(self) -> None:
        """Adds the heads, if their size had to wait for the data."""
        if self.num_prototypes == "auto":
            num_images = len(self.trainer.datamodule.train_source)  # type: ignore[attr-defined]
            self.num_prototypes, reason = choose_num_prototypes(num_images, self.most_prototypes)
            self.distillation.chosen["num_prototypes"] = f"{self.num_prototypes} ({reason})"
            self._complete(self.num_prototypes)

    def _complete(self, num_prototypes: int) -> None:
        """Heads and teacher."""

        def add_heads(network: nn.ModuleDict) -> nn.ModuleDict:
            body = network["backbone"]
            widths = {"image_head": feature_dim(body)}
            if not self.shared_head:
                widths["patch_head"] = int(body.embed_dim)  # type: ignore[arg-type]
            for name, width in widths.items():
                sizes = (width, *self.head_sizes, num_prototypes)
                network[name] = DINOProjectionHead(*sizes, norm_last_layer=self.norm_last_layer)
            return network

        add_heads(self.student)
        dim = int(self.student["backbone"].embed_dim)  # type: ignore[arg-type]
        teacher = nn.ModuleDict({"backbone": build_backbone(self.backbone_config), "mask_token": MaskToken(dim)})
        self.teacher = start_teacher(add_heads(teacher), self.student)
        self.image_center = Center((1, num_prototypes), momentum=self.center_momentum)
        self.patch_center = Center((1, num_prototypes), momentum=self.center_momentum)
        compile_blocks(self.student["backbone"], self.compile_mode)
        compile_blocks(self.teacher["backbone"], self.compile_mode)

    # --- the method ---------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Pooled vectors of the teacher's backbone: what the run is for."""
        return self.teacher["backbone"](images)

    def train(self, mode: bool = True) -> "IBOT":
        super().train(mode)
        if hasattr(self, "teacher"):
            self.teacher.eval()  # no drop path in the targets
        return self

    def draw_mask(self, images: Tensor) -> Tensor:
        """A mask (B, N), True where hidden; on the CPU, where reading it waits for nothing."""
        embed: Any = self.student["backbone"].patch_embed
        grid_size = (images.shape[2] // embed.patch_size[0], images.shape[3] // embed.patch_size[1])
        return uneven_block_mask(len(images), grid_size, self.mask_prob, self.mask_ratio)

    @torch.no_grad()
    def teacher_scores(self, large: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of the images (2 B, K) and of the hidden patches (M, K), and the mean score of all patches (1, K)."""
        tokens = self.teacher["backbone"].forward_features(large)  # type: ignore[operator]
        images = self.teacher["image_head"](self.teacher["backbone"].forward_head(tokens))  # type: ignore[operator]
        head = self._patch_head(self.teacher)
        vectors = normalized(head, read_patches(self.teacher["backbone"], tokens, self.shared_head))  # (2 B, N, .)
        # The last layer is linear: the mean of all scores is the score of the mean, and 2 B N K numbers need not exist.
        mean = head.last_layer(vectors.flatten(0, 1).mean(0, keepdim=True))  # type: ignore[operator]
        chosen = take_patches(vectors, hidden)
        return images.float(), head.last_layer(chosen).float(), mean.float()  # type: ignore[operator]

    def student_scores(self, views: list[Tensor], hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of all views (V B, K) and of the hidden patches (M, K), and the pooled vectors of all views (V B, D)."""
        backbone, token = self.student["backbone"], self.student["mask_token"].weight
        large = torch.cat(views[:2])
        on_device = hidden.to(large.device, non_blocking=True)
        tokens = encode_masked(backbone, large, on_device, token)  # type: ignore[arg-type]
        pooled = [backbone.forward_head(tokens)]  # type: ignore[operator]
        pooled += [backbone(same_size) for same_size in concat_by_size(views[2:])]
        features = torch.cat(pooled)
        head = self._patch_head(self.student)
        patches = head(take_patches(read_patches(backbone, tokens, self.shared_head), hidden))
        return self.student["image_head"](features).float(), patches.float(), features.float()

    def _patch_head(self, network: nn.ModuleDict) -> nn.Module:
        return network["image_head" if self.shared_head else "patch_head"]

    def training_step(self, batch: tuple[list[Tensor], Tensor], batch_idx: int) -> Tensor:
        self.distillation.start(self)
        views, _ = batch
        large = torch.cat(views[:2])
        hidden = self.draw_mask(large)
        teacher_images, teacher_patches, mean_patch = self.teacher_scores(large, hidden)
        student_images, student_patches, features = self.student_scores(views, hidden)
        with torch.autocast(self.device.type, enabled=False):
            image_targets, patch_targets = self._targets(teacher_images, teacher_patches, mean_patch)
            shape = (-1, len(views[0]), image_targets.shape[-1])
            image_loss = view_loss(student_images.view(shape), image_targets.view(shape), self.student_temp)
            hidden_loss = patch_loss(student_patches, patch_targets, hidden, self.student_temp)
            loss = self.image_weight * image_loss + self.patch_weight * hidden_loss
            if self.koleo_weight:
                # Of each large view on its own: two views of one image should be close.
                koleo = sum(self._koleo_loss(view) for view in features[: len(large)].chunk(2))
                loss = loss + self.koleo_weight * koleo
                self.log("train/loss_koleo", koleo)
        self.log_dict({"train/loss_image": image_loss, "train/loss_patch": hidden_loss})
        if logs_this_step(self.trainer):
            health = prototype_health(image_loss.detach(), image_targets, features.detach())
            self.log_dict(health)
            self._collapse.warn(self.trainer.global_step, health, image_targets.shape[-1])
        return self.distillation.watch(self, loss)

    def _koleo_loss(self, vectors: Tensor) -> Tensor:
        """KoLeo of one view (B, D): the mean over its groups."""
        num_groups = len(vectors) // (self.koleo_group or len(vectors))
        # Images are dealt to the processes in turn. So are they to the groups: whoever has them, the same ones are together.
        return torch.stack([self.koleo(vectors[group::num_groups]) for group in range(num_groups)]).mean()

    def _targets(self, images: Tensor, patches: Tensor, mean_patch: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's probabilities from its scores; moves the centres."""
        temperature = self.scheduled("teacher_temp")
        if self.balance == "sinkhorn":
            return sinkhorn_targets(images, temperature), sinkhorn_targets(patches, temperature)
        targets = (
            centered_targets(images, self.image_center.value, temperature),
            centered_targets(patches, self.patch_center.value, temperature),
        )
        self.image_center.update(images)
        self.patch_center.update(mean_patch)
        return targets

    # --- hooks, in the order in which they run in a step --------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_step(self.trainer, batch_idx)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        heads = [module for name, module in self.student.items() if name.endswith("_head")]
        self.distillation.freeze_prototypes(self, heads)

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
        check_compile(self, self.compile_mode, by_blocks=True)
        data = getattr(self.trainer, "datamodule", None)
        transform = getattr(data, "train_transform", None)
        if transform is None or not hasattr(transform, "num_local_views"):
            raise ConfigError(
                f"model.class_path: {self.title} trains on several views of an image: set data.train_transform to a MultiCrop "
                f"(it is {type(transform).__name__}), as {self.recipe} does."
            )
        if self.koleo_weight and data.batch_size < 2:  # type: ignore[union-attr]
            raise ConfigError(
                f"model.koleo_weight={self.koleo_weight} spreads the images of a batch, but data.batch_size is "
                f"{data.batch_size}. Use at least 2, or set model.koleo_weight=0."  # type: ignore[union-attr]
            )
        if self.koleo_weight and self.koleo_group is not None and data.batch_size % self.koleo_group:  # type: ignore[union-attr]
            raise ConfigError(
                f"model.koleo_group={self.koleo_group} does not divide the {data.batch_size} images of a device "  # type: ignore[union-attr]
                "(data.batch_size, or less where global_batch_size gives a device less). Use a group that does, or null for "
                "all images of a device."
            )
        backbone = self.student["backbone"]
        check_input_size(backbone, transform.global_size, "data.train_transform.global_size")
        if transform.num_local_views:
            check_input_size(backbone, transform.local_size, "data.train_transform.local_size")
        assert self.num_prototypes != "auto"
        num_patches = self.draw_mask(torch.zeros(1, 3, transform.global_size, transform.global_size)).shape[1]
        most = round(self.mask_prob * self.mask_ratio[1] * num_patches)
        check_score_memory(self, self.num_prototypes, 2 + transform.num_local_views, most)

    @property
    def micro_batch_statistics(self) -> str:
        """What is computed over the images of a micro batch, and so changes when batches are accumulated."""
        names = ["the centres move" if self.balance == "centering" else "Sinkhorn balances"]
        if self.koleo_weight:
            names.append("KoLeo compares")
        return ", ".join(names)

    def run_info(self) -> dict[str, str]:
        """What the run's first lines say about the method."""
        heads = "a shared head" if self.shared_head else "separate heads"
        low, high = self.mask_ratio
        share = f"{low:g} to {high:g} of the patches hidden in {self.mask_prob:g} of the large views"
        weights = f"weights {self.image_weight:g} image, {self.patch_weight:g} patch, {self.koleo_weight:g} KoLeo"
        method = f"{self.title}, {self.num_prototypes} prototypes, {heads}, {self.balance}"
        return {"method": method, "masks": share, "losses": weights, **self.distillation.run_info()}

    def next_command(self, checkpoint: str) -> str:
        """What to run when this run has ended."""
        return probe_command(self, checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.distillation.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.distillation.load(self, checkpoint)


class MaskToken(nn.Module):
    """The learned vector (D,) that stands for a hidden patch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        nn.init.normal_(self.weight, std=0.02)


def reads_single_patches(backbone: nn.Module) -> bool:
    """Whether the network's read-out can be applied to a sequence of one patch."""
    return isinstance(backbone, VisionLSTM) and not any(backbone.cls_layout)


def patch_width(backbone: nn.Module) -> int:
    """Width of a patch as a shared head reads it."""
    return feature_dim(backbone) if reads_single_patches(backbone) else int(backbone.embed_dim)  # type: ignore[arg-type]


def read_patches(backbone: nn.Module, tokens: Tensor, as_images: bool) -> Tensor:
    """Patch vectors (B, N, D) of all tokens (B, S, D).

    Args:
        as_images: Read every patch out as a sequence of its own, so that a head for pooled vectors can take it: with
            ViL2 its token stands for the first and for the last one, (B, N, 2 D). Networks with a class token do not
            need this: there both have width D.
    """
    patches = patch_tokens(backbone, tokens)
    if not as_images or not reads_single_patches(backbone):
        return patches
    return backbone.forward_head(patches.flatten(0, 1)[:, None]).unflatten(0, patches.shape[:2])  # type: ignore[operator]


def take_patches(patches: Tensor, hidden: Tensor) -> Tensor:
    """The hidden ones (M, D) of all patches (B, N, D); `hidden` (B, N) may lie on the CPU."""
    places = hidden_places(hidden).to(patches.device, non_blocking=True)
    return patches.flatten(0, 1).index_select(0, places)


def normalized(head: nn.Module, x: Tensor) -> Tensor:
    """What a `DINOProjectionHead` compares with its prototypes: unit vectors."""
    return nn.functional.normalize(head.layers(x), dim=-1, p=2)  # type: ignore[operator]
