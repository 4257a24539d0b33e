"""Distillation: a student learns the features of a trained, frozen teacher, without labels.

Hinton et al. 2015, arXiv:1503.02531, match a teacher's outputs; FitNets (Romero et al. 2015, arXiv:1412.6550) its hidden
features, through a learned map of the student's. This is the feature distillation of Wei et al. 2022, arXiv:2205.14141: both
networks see the same view, the teacher's tokens are whitened by a layer norm without gain and bias, and a linear layer on the
student's tokens has to predict them, under a smooth L1 loss with β = 2 (official code: SwinTransformer/Feature-Distillation).

What differs. Student and teacher need not be alike, any timm model can be either: so the teacher's token map is resampled to
the student's grid (patches of 14 px make 16 x 16 tokens of 224 px, patches of 16 px 14 x 14) and whitened after that, so that
every target has the same scale. (Wei et al. choose an input size for the teacher that makes the grids agree:
`teacher_img_size`.) The student may have no class token, so pooled vectors are compared instead of class tokens, with a loss of
their own. No shared relative positions. A cosine loss and heads of two layers, both found in AM-RADIO (Ranzinger et al. 2024,
arXiv:2312.06709), are options.

Letters: `B` images, `h, w` the student's grid of patches, `D` the width of a token, `P` that of a pooled vector.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vil_lightning.checks import check_image_sizes, check_sizes
from vil_lightning.errors import ConfigError
from vil_lightning.methods.backbone import (
    BackboneConfig,
    build_backbone,
    check_input_size,
    feature_dim,
    patch_tokens,
    recorded_backbone,
    resolve_backbone,
    weights_hash,
)
from vil_lightning.methods.commands import probe_command
from vil_lightning.methods.compiling import CompileMode, begin_step, check_compile, compile_function
from vil_lightning.methods.masked import freeze_readout
from vil_lightning.methods.optimisation import Optimisation
from vil_lightning.methods.randomness import seed_step
from vil_lightning.methods.run_length import logs_this_step
from vil_lightning.schedules import Duration

TEACHER_KEY = "teacher"  # what a checkpoint records instead of the teacher's weights
_SMOOTH_L1_BETA = 2.0
_TARGET = "target."


class Distillation(L.LightningModule):
    """Feature distillation between any two timm models. Needs a data module whose `train_transform` is a `TrainTransform`.

    The defaults are those of the official code for ViT-B, rescaled from a learning rate per 512 images.

    Checkpoints hold the student and its heads, but not the teacher, which a resumed run builds from its own weights again. They
    record a hash of it, and another teacher is refused.

    Args:
        backbone: The student. `drop_path_rate` acts on it.
        teacher: A trained network: with `weights`, or with `kwargs: {pretrained: true}` for those that timm downloads.
        image_weight: Weight of the loss on the pooled vectors; 0 leaves it out.
        patch_weight: Weight of the loss on the patch tokens; 0 leaves it out.
        loss: `smooth_l1`, or `cosine` (1 - cosine similarity), between prediction and whitened target.
        head_hidden_dim: Predict with a linear layer, LayerNorm, GELU and a second linear layer, of this width in between; None
            predicts with one linear layer.
        teacher_img_size: Resize the view to this side in px for the teacher (bicubic); None shows it what the student sees.
        teacher_mean: Per-channel mean that the teacher expects its input to be normalised with. None takes that of timm's
            pretrained weights, and for `teacher.weights` that of the data.
        teacher_std: Per-channel deviation, likewise.
        base_lr: Peak learning rate per 256 images of the global batch.
        lr_warmup: Linear warm-up of the learning rate (a duration).
        final_lr: Learning rate at the end of the cosine; absolute.
        betas: Of AdamW.
        weight_decay: Never on biases, norms and position embeddings.
        compile: Compile both networks: true, default, reduce-overhead or max-autotune, see `compiling`.

    Durations are `"10 epochs"`, `"500 steps"`, `"10%"` or a fraction of the run below 1.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        teacher: BackboneConfig,
        image_weight: float = 1.0,
        patch_weight: float = 1.0,
        loss: Literal["smooth_l1", "cosine"] = "smooth_l1",
        head_hidden_dim: int | None = None,
        teacher_img_size: int | None = None,
        teacher_mean: tuple[float, float, float] | None = None,
        teacher_std: tuple[float, float, float] | None = None,
        base_lr: float = 1.5e-4,
        lr_warmup: Duration = "10 epochs",
        final_lr: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.05,
        compile: CompileMode = False,
    ) -> None:
        super().__init__()
        weights = {"image": image_weight, "patch": patch_weight}
        if min(weights.values()) < 0 or max(weights.values()) == 0:
            raise ConfigError(
                f"model.image_weight={image_weight} and model.patch_weight={patch_weight} must not be negative, nor both 0."
            )
        check_sizes("model", head_hidden_dim=head_hidden_dim)
        check_image_sizes("model", teacher_img_size=teacher_img_size)
        if teacher_std is not None and min(teacher_std) <= 0:
            raise ConfigError(f"model.teacher_std={list(teacher_std)} must be positive.")
        self.backbone_config = resolve_backbone(backbone)
        self.optimisation = Optimisation(
            self.backbone_config, base_lr, lr_warmup, final_lr, betas, weight_decay, clip=3.0
        )
        self.loss_weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.loss_kind = loss
        self.head_hidden_dim = head_hidden_dim
        self.teacher_img_size = teacher_img_size
        self.wanted_mean, self.wanted_std = teacher_mean, teacher_std

        self.backbone = build_backbone(self.backbone_config)
        if image_weight == 0:
            freeze_readout(self.backbone)
        with _naming_the_teacher():
            self.teacher_config = resolve_teacher(teacher)
            # Not called teacher: of a checkpoint, other runs take the student.
            self.target = build_backbone(self.teacher_config)
        self.target.requires_grad_(False)
        self.target.eval()
        widths = {name: (_widths(self.backbone)[name], _widths(self.target)[name]) for name in self.loss_weights}
        self.heads = nn.ModuleDict({name: _head(*width, head_hidden_dim) for name, width in widths.items()})
        self.compile_mode = compile
        self.encode = compile_function(encode, compile)
        self.register_state_dict_post_hook(_leave_out_teacher)
        self.register_load_state_dict_post_hook(_do_not_miss_teacher)

    # --- the method ---------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Pooled vectors of the student: what the run is for."""
        return self.backbone(images)

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        self.target.eval()  # no drop path in the targets
        return self

    @torch.no_grad()
    def teacher_view(self, images: Tensor) -> Tensor:
        """The views (B, 3, H, W) of the student as the teacher expects them: (B, 3, H', W'), its own mean and deviation."""
        size = self.teacher_img_size or images.shape[-1]
        renormalize = self.teacher_norm != self.data_norm
        if size == images.shape[-1] and not renormalize:
            return images
        mean, std = per_channel(self.data_norm, images.device)
        pixels = images.float() * std + mean
        if size != images.shape[-1]:  # as with images of 8 bits, bicubic filters do not leave the range of a pixel
            pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = per_channel(self.teacher_norm, images.device)
        return ((pixels - mean) / std).to(images.dtype)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        begin_step(self.compile_mode)
        self.optimisation.start(self)
        images, _ = batch
        parts = tuple(self.loss_weights)
        with torch.no_grad():
            taught = self.encode(self.target, self.teacher_view(images), parts)
        learnt = self.encode(self.backbone, images, parts)
        predictions = {name: self.heads[name](learnt[name]) for name in parts}
        losses, targets = {}, {}
        with torch.autocast(self.device.type, enabled=False):
            for name in parts:
                prediction, target = predictions[name].float(), taught[name].float()
                if name == "patch":
                    target = align(target, prediction.shape[1:3])
                targets[name] = whiten(target)
                losses[name] = feature_loss(self.loss_kind, prediction, targets[name])
            loss = torch.stack([self.loss_weights[name] * losses[name] for name in parts]).sum()
        self.log_dict({f"train/loss_{name}": value for name, value in losses.items()})
        if logs_this_step(self.trainer):
            for name in parts:
                health = agreement(predictions[name].float(), targets[name])
                self.log_dict({f"health/{key}_{name}": value for key, value in health.items()})
        return self.optimisation.watch(self, loss)

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

    def setup(self, stage: str) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "mean"):
            raise ConfigError("Distillation needs one of this project's data modules (data.class_path).")
        own = getattr(self.target, "pretrained_cfg", {}) if self.teacher_config.kwargs.get("pretrained") else {}
        self.data_norm = tuple(data.mean), tuple(data.std)
        self.teacher_norm = (
            tuple(self.wanted_mean or own.get("mean") or data.mean),
            tuple(self.wanted_std or own.get("std") or data.std),
        )
        self.teacher_record = {
            **recorded_backbone(self.teacher_config),
            "sha256": weights_hash(self.target),  # here, where weights are as they were read: not moved, not rounded
            "img_size": self.teacher_img_size,
            "mean": list(self.teacher_norm[0]),
            "std": list(self.teacher_norm[1]),
        }

    def on_fit_start(self) -> None:
        check_compile(self, self.compile_mode)
        transform = getattr(getattr(self.trainer, "datamodule", None), "train_transform", None)
        size = getattr(transform, "img_size", None)
        if size is None:
            raise ConfigError(
                "model.class_path: Distillation trains on one view of an image: set data.train_transform to a TrainTransform "
                f"(it is {type(transform).__name__}), as configs/pretrain_distillation.yaml does."
            )
        self.grids = {"student": self._grid(self.backbone, size, "data.train_transform.img_size")}
        with _naming_the_teacher():
            key = "data.train_transform.img_size" if self.teacher_img_size is None else "model.teacher_img_size"
            self.grids["teacher"] = self._grid(self.target, self.teacher_img_size or size, key)

    def _grid(self, network: nn.Module, size: int, key: str) -> tuple[int, ...]:
        """Grid of patches of an empty image; none if patches are not compared. Refuses networks that do not fit."""
        check_input_size(network, size, key)
        parameter, was_training = next(network.parameters()), network.training
        image = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
        try:
            with torch.no_grad():
                features = encode(network.eval(), image, tuple(self.loss_weights))
        finally:
            network.train(was_training)
        return tuple(features["patch"].shape[1:3]) if "patch" in features else ()

    def run_info(self) -> dict[str, str]:
        """What the run's first lines say about the method."""
        config, (mean, std) = self.teacher_config, self.teacher_norm
        losses = ", ".join(f"{name} x {weight:g}" for name, weight in self.loss_weights.items())
        heads = "linear heads" if self.head_hidden_dim is None else f"heads of two layers ({self.head_hidden_dim})"
        size = "the student's size" if self.teacher_img_size is None else f"{self.teacher_img_size} px"
        lines = {
            "method": f"distillation, {self.loss_kind} loss ({losses}), {heads}",
            "teacher": (
                f"{config.name} {config.kwargs or ''}, weights {config.weights or 'of timm'}, "
                f"{sum(p.numel() for p in self.target.parameters()) / 1e6:.2f} M parameters"
            ),
            "teacher's view": f"{size}, mean {mean}, std {std}",
        }
        if "patch" in self.loss_weights:
            grids = {name: f"{grid[0]} x {grid[1]}" for name, grid in self.grids.items()}
            lines["patch tokens"] = f"student {grids['student']}, teacher {grids['teacher']}"
        return {**lines, **self.optimisation.run_info()}

    def next_command(self, checkpoint: str) -> str:
        """What to run when this run has ended."""
        return probe_command(self, checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.optimisation.save(self, checkpoint)
        checkpoint[TEACHER_KEY] = self.teacher_record

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.optimisation.load(self, checkpoint)
        recorded = checkpoint.get(TEACHER_KEY, {})
        for name, value in self.teacher_record.items():
            if recorded.get(name) != value:
                raise ConfigError(
                    f"ckpt_path: the run was started with another teacher: its {name} was {recorded.get(name)}, but is "
                    f"{value} here. Resume with the recipe of that run and the very file of its model.teacher.weights; to "
                    "start a new run from the student's weights, use --model.backbone.weights."
                )
        heads = {name: tuple(value.shape) for name, value in self.heads.state_dict(prefix="heads.").items()}
        saved = {n: tuple(v.shape) for n, v in checkpoint["state_dict"].items() if n.startswith("heads.")}
        if heads != saved:
            raise ConfigError(
                f"ckpt_path: the checkpoint's heads are {saved}, here they are {heads}. Resume with the model.image_weight, "
                "model.patch_weight and model.head_hidden_dim of that run."
            )


def per_channel(norm: tuple[tuple[float, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation (3, 1, 1) each. Copied without waiting for the device, which `torch.tensor(..., device=)` would."""
    mean, std = (torch.tensor(value).view(3, 1, 1).to(device, non_blocking=True) for value in norm)
    return mean, std


# --- what is compared -------------------------------------------------------------------------------------------------


def encode(network: nn.Module, images: Tensor, parts: Sequence[str]) -> dict[str, Tensor]:
    """Pooled vectors (B, P) as `image` and a map of patch tokens (B, h, w, D) as `patch`, whichever are asked for."""
    features = network.forward_features(images)  # type: ignore[operator]
    if not isinstance(features, Tensor):
        raise ConfigError(f"model.backbone: {type(network).__name__} returns several feature maps instead of one.")
    results = {}
    if "image" in parts:
        results["image"] = network.forward_head(features)  # type: ignore[operator]
    if "patch" in parts:
        tokens = patch_tokens(network, features)
        results["patch"] = tokens.unflatten(1, token_grid(network, features, tokens.shape[1], images.shape[2:]))
    return results


def token_grid(network: nn.Module, features: Tensor, num_tokens: int, image_size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a network's patch tokens: of its feature map, its patch embedding, or a square.

    Raises:
        ConfigError: If the tokens fill none of these.
    """
    if features.ndim == 4:
        nhwc = getattr(network, "output_fmt", "NCHW") == "NHWC"
        return tuple(features.shape[1:3] if nhwc else features.shape[2:])  # type: ignore[return-value]
    side = math.isqrt(num_tokens)
    grids = [(side, side)]
    embed: Any = getattr(network, "patch_embed", None)
    for name in ("feat_grid", "dynamic_feat_size"):  # ViL's; timm's
        if hasattr(embed, name):
            grids.insert(0, tuple(getattr(embed, name)((image_size[0], image_size[1]))))
    for h, w in grids:
        if h * w == num_tokens:
            return h, w
    raise ConfigError(
        f"model.backbone: the {num_tokens} patch tokens of this {type(network).__name__} for an image of {image_size[0]} x "
        f"{image_size[1]} px fill no grid. Choose another model.backbone.name, or set model.patch_weight to 0."
    )


def align(tokens: Tensor, grid_size: Sequence[int]) -> Tensor:
    """Resample a token map (B, h', w', D) to (B, h, w, D): bilinear, averaging where it shrinks.

    Both grids are taken to cover the view from edge to edge. Patches that overlap (`stride`) do not quite: the outermost ones
    are off by about (patch - stride) / 2 px.
    """
    if tuple(tokens.shape[1:3]) == tuple(grid_size):
        return tokens
    rows, columns = (bilinear(old, new, tokens) for old, new in zip(tokens.shape[1:3], grid_size, strict=True))
    return torch.einsum("ij, bjkd, lk -> bild", rows, tokens, columns)


def bilinear(old: int, new: int, like: Tensor) -> Tensor:
    """Weights (new, old) by which `new` cells of a line are made of `old` ones; each row sums to 1.

    What `F.interpolate` does with `antialias=True`, which on the CPU is wrong for a single column (torch 2.15).
    """
    scale = old / new
    centres = (torch.arange(new, device=like.device, dtype=like.dtype) + 0.5) * scale - 0.5
    distances = (torch.arange(old, device=like.device, dtype=like.dtype) - centres[:, None]).abs() / max(scale, 1.0)
    weights = (1 - distances).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def whiten(vectors: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the channels of every vector (..., D): a layer norm without gain and bias."""
    return F.layer_norm(vectors, vectors.shape[-1:])


def feature_loss(kind: str, prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over all vectors (..., D) of the smooth L1 loss, averaged over channels, or of 1 - cosine similarity."""
    if kind == "cosine":
        return (1 - F.cosine_similarity(prediction, target, dim=-1)).mean()
    return F.smooth_l1_loss(prediction, target, beta=_SMOOTH_L1_BETA)


@torch.no_grad()
def agreement(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Mean cosine similarity of predictions and targets (..., D), and the one that a constant would reach.

    Features have much in common, whatever is seen: what lies above `cosine_constant`, that of the targets' mean, was learnt.
    """
    constant = target.flatten(0, -2).mean(0).expand_as(target)
    return {
        "cosine": F.cosine_similarity(prediction, target, dim=-1).mean(),
        "cosine_constant": F.cosine_similarity(constant, target, dim=-1).mean(),
    }


# --- student and teacher ----------------------------------------------------------------------------------------------


def resolve_teacher(config: BackboneConfig) -> BackboneConfig:
    """As `resolve_backbone`, but a teacher has to be trained, which is to say: its weights have to come from somewhere.

    Raises:
        ConfigError: If they do not, or if their file is missing.
    """
    if config.weights is None and not config.kwargs.get("pretrained"):
        raise ConfigError(
            f"model.teacher.weights is not set, and an untrained {config.name or 'network'} has nothing to teach. Set it to a "
            "checkpoint of any run or a published file, or, for weights that timm knows, model.teacher.name together with "
            "model.teacher.kwargs.pretrained: true."
        )
    if config.weights is not None and not Path(config.weights).is_file():
        folder, hint = Path(config.weights).parent, ""
        if folder.parent.name == "checkpoints":
            hint = f" Train the teacher first: python main.py fit --config configs/{folder.name}.yaml"
        raise ConfigError(f"model.teacher.weights: no weights file at {config.weights}.{hint}")
    return resolve_backbone(config)


@contextmanager
def _naming_the_teacher() -> Iterator[None]:
    """What is said of a backbone here is said of the teacher."""
    try:
        yield
    except ConfigError as error:
        text = str(error).replace("model.backbone", "model.teacher").replace("the backbone", "the teacher")
        raise ConfigError(text) from error


def _widths(network: nn.Module) -> dict[str, int]:
    return {"image": feature_dim(network), "patch": int(network.num_features)}  # type: ignore[arg-type]


def _head(in_dim: int, out_dim: int, hidden_dim: int | None) -> nn.Module:
    if hidden_dim is None:
        return nn.Linear(in_dim, out_dim)
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.GELU(), nn.Linear(hidden_dim, out_dim)
    )


def _leave_out_teacher(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix + _TARGET)]:
        del state_dict[name]


def _do_not_miss_teacher(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.startswith(_TARGET)]
