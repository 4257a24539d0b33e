"""Supervised training and fine-tuning of a classifier, with the recipes of ViL and of DeiT I to III.

Alkin et al. 2024, arXiv:2406.04303 (ViL: 3-Augment, MixUp / CutMix, cross-entropy with soft targets); Touvron et al.,
arXiv:2012.12877, 2203.09795, 2204.07118 (DeiT I, "three things", DeiT III). The crops and colours of a recipe belong to its
data module; what needs a whole batch (mixing, erasing) is done here, on the device.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from vil_lightning.checks import check_sizes
from vil_lightning.errors import ConfigError
from vil_lightning.methods.backbone import (
    CHECKPOINT_KEY,
    CLASSES_KEY,
    BackboneConfig,
    build_backbone,
    check_input_size,
    check_resumed_backbone,
    classifier_names,
    recorded_backbone,
    recorded_classes,
    recorded_loss,
    recorded_num_classes,
    resolve_backbone,
)
from vil_lightning.methods.compiling import CompileMode, begin_step, check_compile, compile_network, resolve_mode
from vil_lightning.methods.divergence import FiniteCheck
from vil_lightning.methods.fully_sharded import refuse_sharding
from vil_lightning.methods.optimisers import adamw, on_cpu, set_lr
from vil_lightning.methods.randomness import float32_weights, seed_step
from vil_lightning.methods.resuming import SETTINGS_KEY, check_batch, check_settings, record_batch, record_settings
from vil_lightning.methods.run_length import global_batch_size, resolve_durations
from vil_lightning.optim import clip_grad_per_tensor, layer_lr_scales, scale_lr, weight_decay_groups
from vil_lightning.schedules import Duration, linear_cosine
from vil_lightning.sharding import local

_BINARY = "binary_cross_entropy"
# Others look at more of a matrix than a slice, keep states of other shapes, or have not been compared.
_SHARDED_OPTIMIZERS = ("adamw", "lamb", "sgd")


class Supervised(L.LightningModule):
    """A timm model with its classifier. `fit` trains it, `validate` and `test` score it, `predict` lists classes per image.

    The defaults are the recipe of ViL on ImageNet-1k.

    Args:
        backbone: The network; `weights` may come from any method here, from a published file, or from an earlier run.
        num_classes: Outputs of the classifier. None takes those of the weights' classifier, or of the data if there is none.
        new_head: Start with a new classifier, whatever the weights hold. Needed if they hold none, or one of another size.
        freeze: Prefixes of parameter names that are not trained, e.g. `["patch_embed.", "blocks.0."]`.
        head_only: How long only the classifier (and the norm before it) is trained, at the start (a duration).
        loss: `cross_entropy` with soft targets, or `binary_cross_entropy` per class (DeiT III).
        target_threshold: With `binary_cross_entropy`, make targets above it 1 and others 0 (DeiT III: 0).
        label_smoothing: Share of the target that is spread over all classes.
        mixup_alpha: Of the Beta distribution of MixUp's ratio; 0 for no MixUp.
        cutmix_alpha: The same for CutMix.
        mix_prob: Probability that a batch is mixed at all.
        mix_switch_prob: Probability of CutMix if both are on. One ratio and one box per device's batch; image i is mixed with
            image B - 1 - i. With one of them alone this does nothing.
        erase_prob: Probability that a random rectangle of an image is replaced by noise (DeiT I, Vim: 0.25).
        base_lr: Peak learning rate per `lr_batch_size` images of the global batch.
        lr_batch_size: See `base_lr`.
        lr_warmup: Linear warm-up of the learning rate (a duration).
        warmup_lr: Learning rate before the first step; absolute.
        final_lr: Learning rate at the end of the cosine; absolute, not scaled by the batch.
        optimizer: `adamw`, or another optimiser of timm, e.g. `lamb` (DeiT III).
        betas: Of the optimiser.
        weight_decay: Never on biases, norms, position embeddings and class tokens.
        layer_decay: Factor of the learning rate per layer below the head (pairs of scans for ViL); None for none.
        ema_decay: Keep a moving average of the weights with this decay per step, and score it, too. It is what other recipes
            then take from the checkpoint. None for none. (It moves also in a step that a gradient scaler skips.)
        predict_top_k: Classes per image that `predict` returns.
        compile: Compile the network: true, default, reduce-overhead or max-autotune, see `compiling`.

    Durations are `"10 epochs"`, `"500 steps"`, `"10%"` or a fraction of the run below 1. Clip gradients with
    `trainer.gradient_clip_val` (global norm; 1.0 in the ViL recipes).
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        num_classes: int | None = None,
        new_head: bool = False,
        freeze: Sequence[str] = (),
        head_only: Duration = 0,
        loss: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy",
        target_threshold: float | None = None,
        label_smoothing: float = 0.0,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        mix_prob: float = 1.0,
        mix_switch_prob: float = 0.5,
        erase_prob: float = 0.0,
        base_lr: float = 1e-3,
        lr_batch_size: int = 1024,
        lr_warmup: Duration = "5 epochs",
        warmup_lr: float = 0.0,
        final_lr: float = 1e-6,
        optimizer: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        ema_decay: float | None = None,
        predict_top_k: int = 5,
        compile: CompileMode = False,
    ) -> None:
        super().__init__()
        _check_ranges(
            probabilities={"mix_prob": mix_prob, "mix_switch_prob": mix_switch_prob, "erase_prob": erase_prob},
            positive={"base_lr": base_lr, "lr_batch_size": lr_batch_size, "predict_top_k": predict_top_k},
            not_negative={
                "mixup_alpha": mixup_alpha,
                "cutmix_alpha": cutmix_alpha,
                "weight_decay": weight_decay,
                "warmup_lr": warmup_lr,
                "final_lr": final_lr,
            },
            below_one={
                "label_smoothing": label_smoothing,
                "ema_decay": ema_decay,
                "target_threshold": target_threshold,
                "betas[0]": betas[0],
                "betas[1]": betas[1],
            },
        )
        check_sizes("model", 2**24, num_classes=num_classes)
        if layer_decay is not None and not 0 < layer_decay <= 1:
            raise ConfigError(f"model.layer_decay={layer_decay} must be in (0, 1], or null for none.")
        if target_threshold is not None and loss != "binary_cross_entropy":
            raise ConfigError(
                f"model.target_threshold={target_threshold} needs model.loss=binary_cross_entropy (it is {loss})."
            )
        if optimizer not in list_optimizers():
            raise ConfigError(f"model.optimizer={optimizer!r} is not known. Available: {', '.join(list_optimizers())}.")
        if tuple(betas) != (0.9, 0.999) and not get_optimizer_info(optimizer).has_betas:
            raise ConfigError(f"model.betas={list(betas)}: {optimizer} has none. Leave model.betas at its default.")
        self.backbone_config = resolve_backbone(backbone)
        self.num_classes = num_classes
        self.new_head = new_head
        self.freeze_prefixes = tuple(freeze)
        self.head_only = head_only
        self.target_threshold = target_threshold
        self.label_smoothing = label_smoothing
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.mix_prob = mix_prob
        self.mix_switch_prob = mix_switch_prob
        self.erase_prob = erase_prob
        self.base_lr = base_lr
        self.lr_batch_size = lr_batch_size
        self.lr_warmup = lr_warmup
        self.warmup_lr = warmup_lr
        self.final_lr = final_lr
        self.optimizer = optimizer
        self.betas = tuple(betas)
        self.weight_decay = weight_decay
        self.layer_decay = layer_decay
        self.ema_decay = ema_decay
        self.predict_top_k = predict_top_k
        self.predict_per_class = loss == _BINARY
        self.compile_mode = compile
        resolve_mode(compile)
        self.classes: list[str] = []
        self.loss_name = loss
        self.loss: nn.Module
        if loss == "cross_entropy":
            self.loss = SoftTargetCrossEntropy()
        else:
            self.loss = BinaryCrossEntropy(smoothing=0.0, target_threshold=target_threshold)
        self.mixup: Mixup | None = None
        self.ema: ModelEmaV3 | None = None
        self._grad_norm = torch.zeros(())
        self._finite = FiniteCheck(
            "a lower model.base_lr, a longer model.lr_warmup, trainer.gradient_clip_val=1.0, or trainer.precision=bf16-mixed "
            "instead of 16-mixed."
        )

    # --- the network, once the data is known --------------------------------------------------------------------------

    @float32_weights()
    def configure_model(self) -> None:
        if hasattr(self, "backbone"):
            return
        trainer = self._trainer
        data = getattr(trainer, "datamodule", None)
        resumed = None if trainer is None else trainer.ckpt_path
        if self.num_classes is None and not self.new_head:
            self.num_classes = recorded_num_classes(self.backbone_config)
        if self.num_classes is None and resumed is not None:
            self.num_classes = recorded_num_classes(dataclasses.replace(self.backbone_config, weights=str(resumed)))
        if self.num_classes is None:
            self.num_classes = getattr(data, "num_classes", None) or None
        if self.num_classes is None:
            raise ConfigError(
                "model.num_classes is not set, and neither weights nor data say how many classes there are."
            )
        smoothed = self.label_smoothing / self.num_classes  # the target of a class that is not in the image
        if self.target_threshold is not None and smoothed > self.target_threshold:
            raise ConfigError(
                f"model.label_smoothing={self.label_smoothing} gives every one of {self.num_classes} classes a target above "
                f"model.target_threshold={self.target_threshold}. Set model.label_smoothing=0, or a higher threshold."
            )
        self.backbone = build_backbone(self.backbone_config, self.num_classes, self.new_head)
        if not self.new_head:
            self.classes = recorded_classes(self.backbone_config, self.num_classes)
            self.predict_per_class = self.predict_per_class or recorded_loss(self.backbone_config) == _BINARY
        self._freeze()
        if self.ema_decay is not None:
            self.ema = MovingAverage(self.backbone, decay=self.ema_decay).requires_grad_(False)
        compile_network(self.backbone, self.compile_mode)
        if self.ema is not None:
            compile_network(self.ema.module, self.compile_mode)
        if (self.mixup_alpha or self.cutmix_alpha) and self.mix_prob:
            self.mixup = Mixup(
                self.mixup_alpha,
                self.cutmix_alpha,
                prob=self.mix_prob,
                switch_prob=self.mix_switch_prob,
                mode="batch",
                label_smoothing=self.label_smoothing,
                num_classes=self.num_classes,
            )
        networks = ("", "ema_") if self.ema is not None else ("",)
        metrics: dict[str, nn.Module] = {"loss": MeanMetric()}
        for network in networks:
            for k in (1, 5) if self.num_classes > 5 else (1,):
                metrics[f"{network}acc{k}"] = MulticlassAccuracy(self.num_classes, top_k=k, average="micro")
        self.metrics = nn.ModuleDict(metrics)

    def check_trained(self, ckpt_path: str | None) -> None:
        """Refuse to score, or to predict with, a classifier that nobody has trained. The command line asks this.

        Raises:
            ConfigError: If nothing says where its weights come from.
        """
        if ckpt_path is not None:
            return
        config = self.backbone_config
        if self.new_head:
            raise ConfigError(
                "model.new_head=true would replace the classifier that is to be scored by an untrained one. Set "
                "--model.new_head false."
            )
        if config.weights is None and not config.kwargs.get("pretrained"):
            raise ConfigError(
                "There are no trained weights to score or to predict with: set --model.backbone.weights FILE, or --ckpt_path "
                "to a checkpoint of this recipe."
            )

    def _freeze(self) -> None:
        for prefix in self.freeze_prefixes:
            frozen = [p for name, p in self.backbone.named_parameters() if name.startswith(prefix)]
            if not frozen:
                names = sorted({name.split(".")[0] for name, _ in self.backbone.named_parameters()})
                raise ConfigError(
                    f"model.freeze: no parameter of {self.backbone_config.name} starts with {prefix!r}. "
                    f"First parts of names: {', '.join(names)}."
                )
            for parameter in frozen:
                parameter.requires_grad_(False)
        if not any(p.requires_grad for p in self.backbone.parameters()):
            raise ConfigError(f"model.freeze={list(self.freeze_prefixes)} leaves nothing to train.")

    def setup(self, stage: str) -> None:
        check_compile(self, self.compile_mode)
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage != "predict" and not getattr(data, "labelled", True):
            raise ConfigError(
                "Supervised trains and scores classifiers, but the images have no classes (data.labelled=false, or a split "
                "without labels). Use data with labels, or a self-supervised method, such as DINO."
            )
        if stage == "fit" and not getattr(data, "num_classes", 0):
            raise ConfigError("Supervised needs a data module with labelled images (data.class_path).")
        if stage == "fit" and hasattr(data.train_transform, "num_local_views"):
            raise ConfigError(
                "model.class_path: Supervised trains on one view of an image: set data.train_transform to a TrainTransform "
                "instead of MultiCrop."
            )
        if stage == "fit" and self.needs_even_batches and data.batch_size % 2:
            raise ConfigError(
                f"data.batch_size={data.batch_size} must be even: MixUp and CutMix pair the images of a batch. "
                "(model.mix_prob=0 turns them off.)"
            )

    @property
    def needs_even_batches(self) -> bool:
        """Whether MixUp or CutMix pair the images of a batch."""
        return bool((self.mixup_alpha or self.cutmix_alpha) and self.mix_prob)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C); of the moving average, if there is one."""
        return self.backbone(images) if self.ema is None else self.ema.module(images)

    # --- training -----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self._check_classes()
        self.classes = list(data.classes)
        train_size = getattr(data.train_transform, "img_size", None)
        if train_size is not None:
            check_input_size(self.backbone, train_size, "data.train_transform.img_size")
        check_input_size(self.backbone, data.img_size, "data.img_size")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_step(self.trainer, batch_idx)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        begin_step(self.compile_mode)
        self._finite.raise_if_not_finite(self, self.scheduled_lr())
        images, labels = batch
        if self.erase_prob:
            images = RandomErasing(self.erase_prob, mode="pixel", device=images.device)(images)
        images, targets = self.mix(images, labels)
        logits = self.backbone(images)
        with torch.autocast(self.device.type, enabled=False):
            loss = self.loss(logits.float(), targets)
        self.log("train/loss", self._finite.watch_loss(self, loss), prog_bar=True)
        with torch.no_grad():  # a mixed image counts as the class that most of it is
            accuracy = 100 * (logits.argmax(1) == targets.argmax(1)).float().mean()
        self.log("train/acc1", accuracy)
        return loss

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """MixUp or CutMix of a batch, which may be changed in place, and its soft targets (B, C)."""
        assert self.num_classes is not None
        if self.mixup is not None:
            return self.mixup(images, labels)
        return images, mixup_target(labels, self.num_classes, 1.0, self.label_smoothing)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Gradients are unscaled and accumulated here, and not clipped yet. (Without gradient the optimiser skips a parameter.
        # Not `requires_grad`: DDP has to see the same parameters throughout.)
        if self.trainer.global_step < self.schedule_steps["head_only"]:
            for name, parameter in self.backbone.named_parameters():
                if not name.startswith(self._head_names()):
                    parameter.grad = None

    def _head_names(self) -> tuple[str, ...]:
        """Prefixes of the parameters that are trained during `head_only`."""
        return (*classifier_names(self.backbone), "fc_norm.")

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self._grad_norm = clip_grad_per_tensor(self.backbone.parameters(), None)  # only measures
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Called once per optimiser step, however many batches it accumulates."""
        lr = self.scheduled_lr()
        set_lr(optimizer, lr)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._finite.watch_grad_norm(self, self._grad_norm)
        if self.ema is not None:  # here, so that a checkpoint written after this batch holds it
            self.ema.update(self.backbone)
        self.log_dict({"schedule/lr": on_cpu(lr), "train/grad_norm": self._grad_norm})

    def scheduled_lr(self) -> float:
        """Learning rate at the current optimiser step, before layer-wise decay."""
        steps = self.schedule_steps
        return linear_cosine(
            self.trainer.global_step, steps["total"], steps["lr_warmup"], self.warmup_lr, self.lr, self.final_lr
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer not in _SHARDED_OPTIMIZERS:
            reason = f"of timm's optimisers only {', '.join(_SHARDED_OPTIMIZERS)} are known to train the same on slices"
            refuse_sharding(self.trainer, f"model.optimizer={self.optimizer}", reason, "ddp")
        durations = {"lr_warmup": self.lr_warmup, "head_only": self.head_only}
        self.schedule_steps = resolve_durations(self.trainer, durations)
        head = [p for name, p in self.backbone.named_parameters() if name.startswith(self._head_names())]
        if self.schedule_steps["head_only"] and not any(p.requires_grad for p in head):
            raise ConfigError(
                f"model.head_only={self.head_only!r} trains the classifier alone, but "
                f"model.freeze={list(self.freeze_prefixes)} freezes it."
            )
        self.global_batch_size = global_batch_size(self.trainer)
        self.lr = scale_lr(self.base_lr, self.global_batch_size, self.lr_batch_size)
        lr_scales = None if self.layer_decay is None else layer_lr_scales(self.backbone, self.layer_decay)
        if self.optimizer == "adamw":
            return adamw(self, self.backbone, self.lr, self.weight_decay, self.betas, lr_scales)  # type: ignore[arg-type]
        groups = weight_decay_groups(self.backbone, self.weight_decay, lr_scales)
        return create_optimizer_v2(groups, opt=self.optimizer, lr=self.lr, weight_decay=0.0, betas=self.betas)

    # --- scoring ------------------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        self._check_classes()

    def on_test_start(self) -> None:
        self._check_classes()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._score(batch, batch_idx)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._score(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _score(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        images, labels = batch
        # Under DDP the sampler repeats images to give all ranks equally many; each counts once.
        real = self.trainer.datamodule.real_images(batch_idx, len(labels)).to(labels.device)  # type: ignore[attr-defined]
        logits = {"": self.backbone(images).float()}
        if self.ema is not None:
            logits["ema_"] = self.ema.module(images).float()
        if real.any():
            losses = F.cross_entropy(logits[""][real], labels[real], reduction="none")
            self.metrics["loss"].update(losses)  # type: ignore[operator]
        for name, metric in self.metrics.items():
            if name != "loss" and real.any():
                metric.update(logits["ema_" if name.startswith("ema_") else ""][real], labels[real])  # type: ignore[operator]
        return {"logits": logits.get("ema_", logits[""]), "labels": labels, "real": real}

    def _log_scores(self, stage: str) -> None:
        for name, metric in self.metrics.items():
            value = metric.compute() * (1 if name == "loss" else 100)  # type: ignore[operator]
            metric.reset()  # type: ignore[operator]
            # The metric has gathered all processes already.
            self.log(f"{stage}/{name}", value, prog_bar=name == "acc1", rank_zero_only=False, sync_dist=False)

    def _check_classes(self) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.num_classes != self.num_classes:
            raise ConfigError(
                f"The classifier has {self.num_classes} classes, the data {data.num_classes}. To train a new classifier on "
                "this data set model.new_head=true (and leave model.num_classes unset); to score the given one use data with "
                "its classes."
            )
        for position, (own, others) in enumerate(zip(self.classes, data.classes, strict=False)):
            if own != others:
                rank_zero_warn(
                    f"Class {position} is {own!r} in the weights and {others!r} in the data. Unless only its name has changed, "
                    "the accuracy means nothing; for other classes set model.new_head=true."
                )
                break

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Most likely classes (B, k) of each image, their probabilities (B, k), and the images' positions (B,)."""
        images, positions = batch
        real = self.trainer.datamodule.real_images(batch_idx, len(positions)).to(images.device)  # type: ignore[attr-defined]
        logits = self(images).float()
        probabilities = logits.sigmoid() if self.predict_per_class else logits.softmax(-1)
        top = probabilities.topk(min(self.predict_top_k, probabilities.shape[1]))
        return {
            "positions": positions[real],
            "probabilities": top.values[real],
            "classes": top.indices[real],
        }

    # --- reports and checkpoints --------------------------------------------------------------------------------------

    @property
    def micro_batch_statistics(self) -> str:
        """What is computed over the images of a micro batch, and so changes when batches are accumulated."""
        return "MixUp and CutMix draw" if self.needs_even_batches else ""

    def run_info(self) -> dict[str, str]:
        """What the run's first lines say about the method."""
        steps = self.schedule_steps
        groups = self.trainer.optimizers[0].param_groups
        decayed = sum(len(g["params"]) for g in groups if g["weight_decay"])
        free = sum(len(g["params"]) for g in groups) - decayed
        mixing = "no mixing"
        if self.mixup is not None:
            mixing = f"MixUp {self.mixup_alpha:g}, CutMix {self.cutmix_alpha:g}, p {self.mix_prob:g}"
        warmup = f"warm-up {steps['lr_warmup']}" + (f", head only {steps['head_only']}" if steps["head_only"] else "")
        return {
            "method": f"supervised, {self.num_classes} classes, {mixing}"
            + (f", EMA {self.ema_decay}" if self.ema_decay is not None else ""),
            "backbone": f"{self.backbone_config.name} {self.backbone_config.kwargs or ''}",
            "learning rate": (
                f"{self.lr:.3g} = {self.base_lr:g} x {self.global_batch_size} / {self.lr_batch_size}, to {self.final_lr:g}"
                + (f", x {self.layer_decay:g} per layer" if self.layer_decay is not None else "")
            ),
            "schedules": f"{steps['total']} steps; {warmup}",
            "weight decay": f"{self.weight_decay:g} on {decayed} tensors, none on {free}",
        }

    def next_command(self, checkpoint: str) -> str:
        """What to run when this run has ended."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        command = (
            f"python main.py predict --config configs/imagenet/evaluate.yaml --model.backbone.weights {checkpoint}"
        )
        command += f" --data.img_size {data.img_size} --data.crop_pct {data.eval_transform.crop_pct:g}"
        command += (
            f" --data.mean '{list(data.mean)}' --data.std '{list(data.std)}' --data.predict_dir <folder of images>"
        )
        return command

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Never overwrite a good checkpoint with a broken one.
        self._finite.raise_if_not_finite(self, self.scheduled_lr())
        checkpoint[CHECKPOINT_KEY] = recorded_backbone(self.backbone_config)
        checkpoint[CLASSES_KEY] = self.classes
        record_settings(checkpoint, **self._settings())
        record_batch(self._trainer, checkpoint)

    def _settings(self) -> dict[str, Any]:
        """What must not change when a run is resumed."""
        return {
            "loss": self.loss_name,
            "optimizer": self.optimizer,
            "betas": self.betas,
            "weight_decay": self.weight_decay,
            "layer_decay": self.layer_decay,
            "freeze": self.freeze_prefixes,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_resumed_backbone(checkpoint, self.backbone_config)
        check_settings(self._trainer, checkpoint, **self._settings())
        check_batch(self._trainer, checkpoint)
        self.predict_per_class = checkpoint.get(SETTINGS_KEY, {}).get("loss", self.loss_name) == _BINARY
        self.classes = list(checkpoint.get(CLASSES_KEY, []))
        has_ema = any(name.startswith("ema.") for name in checkpoint["state_dict"])
        if has_ema != (self.ema is not None):
            raise ConfigError(
                f"ckpt_path: the checkpoint has {'a' if has_ema else 'no'} moving average, but model.ema_decay is "
                f"{self.ema_decay}. Resume with the setting of that run."
            )
        heads = {
            name: tuple(checkpoint["state_dict"][name].shape)
            for name, value in self.state_dict().items()
            if name in checkpoint["state_dict"] and checkpoint["state_dict"][name].shape != value.shape
        }
        if heads:
            name, shape = next(iter(heads.items()))
            raise ConfigError(
                f"ckpt_path: {name} is {shape} in the checkpoint, but {tuple(self.state_dict()[name].shape)} here. --ckpt_path "
                "continues a run; to start a new one from its weights use --model.backbone.weights (and model.new_head)."
            )


class MovingAverage(ModelEmaV3):
    """timm's, which also works slice by slice if network and average are sharded."""

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        averages, values = [], []
        for average, value in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            if average.is_floating_point():
                averages.append(local(average))
                values.append(local(value))
            else:
                average.copy_(value)
        get_ema_multi_avg_fn(decay)(averages, values, 0)  # the number of averages so far is not asked for


def _check_ranges(
    probabilities: dict[str, float],
    positive: dict[str, float],
    not_negative: dict[str, float],
    below_one: dict[str, float | None],
) -> None:
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"model.{name}={value} must be in [0, 1].")
    for name, value in positive.items():
        if value <= 0:
            raise ConfigError(f"model.{name}={value} must be positive.")
    for name, value in not_negative.items():
        if value < 0:
            raise ConfigError(f"model.{name}={value} must not be negative.")
    for name, optional in below_one.items():
        if optional is not None and not 0 <= optional < 1:
            raise ConfigError(f"model.{name}={optional} must be in [0, 1).")
