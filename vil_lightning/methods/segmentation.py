"""Semantic segmentation: a linear probe of frozen patch features, or fine-tuning under an UperNet.

The probe is batch norm and one 1 x 1 convolution on the patch grid, as in DINOv2 (Oquab et al. 2023, arXiv:2304.07193,
section 7.4). Fine-tuning is the recipe of ViL on ADE20K (Alkin et al. 2024, arXiv:2406.04303; NX-AI/vision-lstm).

Letters: `B` images, `C` classes, `D` width of the backbone, `H, W` pixels, `h, w` patch grid.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vil_lightning.checks import check_image_sizes, check_sizes
from vil_lightning.dense import (
    IGNORED,
    Confusion,
    padded_to_multiple,
    pca_foreground,
    scores_of,
    slide,
)
from vil_lightning.errors import ConfigError
from vil_lightning.methods.backbone import (
    BackboneConfig,
    build_backbone,
    check_input_size,
    resolve_backbone,
    weights_hash,
)
from vil_lightning.methods.fully_sharded import refuse_sharding
from vil_lightning.methods.optimisation import Optimisation
from vil_lightning.methods.optimisers import adamw
from vil_lightning.methods.randomness import float32_weights, seed_step
from vil_lightning.methods.resuming import check_settings, record_settings
from vil_lightning.methods.run_length import global_batch_size, resolve_durations
from vil_lightning.optim import layer_lr_scales, scale_lr
from vil_lightning.schedules import Duration
from vil_lightning.upernet import UperNet, decoder_width, pyramid_blocks

_AUX_WEIGHT = 0.4


class Segmentation(L.LightningModule):
    """Predict the class of every pixel. Needs a data module with masks (`SegmentationFolder`, `ShapesSegmentation`).

    The defaults of the optimiser are the recipe of ViL on ADE20K.

    Args:
        backbone: The network; any model of timm with `forward_intermediates` whose blocks all work on one patch grid.
        head: `linear` trains batch norm and one 1 x 1 convolution and leaves the backbone as it is; `upernet` trains an UperNet
            and the backbone.
        blocks: Blocks (0-based; scans of ViL) whose features are used. Linear: concatenated, after the final norm; the last
            one if None. UperNet: four, in ascending order, without norm; after 1/3, 1/2, 2/3 and all of the depth if None.
        width: UperNet: channels of decoder and auxiliary head; 192 for tiny backbones and 384 for larger ones if None.
        aux_weight: UperNet: weight of the auxiliary head's loss; 0.4 if None.
        layer_decay: UperNet: factor of the learning rate per layer below the decoder (pairs of scans of ViL); None for none.
        eval_size: Scale images to this many px on both sides before they are scored, and their logits back; None leaves them
            as they are.
        window: Images are scored in windows of this side in px, of which the logits are averaged; whole if None.
        stride: Distance of neighbouring windows in px; 2/3 of `window` if None.
        background: Also report how well the first principal component of the patch features, without any training, separates
            this class from all others; None does not. See `dense.pca_foreground`.
        base_lr: Peak learning rate per `lr_batch_size` images of the global batch.
        lr_batch_size: See `base_lr`.
        lr_warmup: Linear warm-up of the learning rate (a duration).
        final_lr: Learning rate at the end; absolute.
        poly_power: Let the learning rate fall as (1 - progress) to this power; None for half a cosine.
        betas: Of AdamW.
        weight_decay: Never on biases, norms, and position embeddings.

    Durations are `"10 epochs"`, `"500 steps"`, `"10%"` or a fraction of the run below 1. Batch norms see the images of one
    device, unless `trainer.sync_batchnorm` is set.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        head: Literal["linear", "upernet"] = "linear",
        blocks: Sequence[int] | None = None,
        width: int | None = None,
        aux_weight: float | None = None,
        layer_decay: float | None = None,
        eval_size: int | None = None,
        window: int | None = None,
        stride: int | None = None,
        background: int | None = None,
        base_lr: float = 5e-4,
        lr_batch_size: int = 16,
        lr_warmup: Duration = "1500 steps",
        final_lr: float = 1e-6,
        poly_power: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__()
        for name, value in {"width": width, "aux_weight": aux_weight, "layer_decay": layer_decay}.items():
            if head == "linear" and value is not None:
                raise ConfigError(f"model.{name}={value} is for model.head=upernet; with head=linear leave it unset.")
        for name, size in {"width": width, "eval_size": eval_size, "window": window, "poly_power": poly_power}.items():
            if size is not None and size <= 0:
                raise ConfigError(f"model.{name}={size} must be positive, or null.")
        check_sizes("model", 2**16, width=width)
        check_image_sizes("model", eval_size=eval_size)
        if aux_weight is not None and aux_weight < 0:
            raise ConfigError(f"model.aux_weight={aux_weight} must not be negative.")
        if layer_decay is not None and not 0 < layer_decay <= 1:
            raise ConfigError(f"model.layer_decay={layer_decay} must be in (0, 1], or null for none.")
        if stride is not None and (window is None or not 1 <= stride <= window):
            raise ConfigError(
                f"model.stride={stride} must be between 1 and model.window={window}, or pixels would be left out."
            )
        self.backbone_config = resolve_backbone(backbone)
        self.optimisation = _Optimisation(
            self.backbone_config,
            base_lr,
            lr_warmup,
            final_lr,
            betas,
            weight_decay,
            lr_batch_size=lr_batch_size,
            layer_decay=layer_decay,
            poly_power=poly_power,
        )
        self.head = head
        self.frozen = head == "linear"
        self.width = width
        self.aux_weight = _AUX_WEIGHT if aux_weight is None else aux_weight
        self.eval_size = eval_size
        self.window = window
        self.stride = (window and max(window * 2 // 3, 1)) if stride is None else stride
        self.background = background
        self.backbone = build_backbone(self.backbone_config)
        self.blocks, self.dims, self.patch = self._read_backbone(blocks)
        self.results: dict[str, Any] = {}
        if self.frozen:
            self.backbone.requires_grad_(False).eval()

    def _read_backbone(self, blocks: Sequence[int] | None) -> tuple[list[int], list[int], tuple[int, int]]:
        """Blocks to use, their widths, and the sides in px that must be divided by."""
        info: Any = getattr(self.backbone, "feature_info", None)
        name = self.backbone_config.name
        if not hasattr(self.backbone, "forward_intermediates") or not info:
            raise ConfigError(f"model.backbone.name={name} has no features of its blocks to give. Use a ViL or a ViT.")
        depth = len(info)
        chosen = list(blocks) if blocks is not None else [depth - 1] if self.frozen else pyramid_blocks(depth)
        needed = "at least one block" if self.frozen else "four blocks"
        wrong_number = not chosen if self.frozen else len(chosen) != 4
        if wrong_number or sorted(chosen) != chosen or not all(0 <= block < depth for block in chosen):
            raise ConfigError(
                f"model.blocks={chosen} must be {needed} in ascending order, from 0 to {depth - 1}, the last one of {name}."
            )
        reductions = {info[block]["reduction"] for block in chosen}
        if len(reductions) > 1:
            raise ConfigError(
                f"model.blocks={chosen} of {name} have patches of {sorted(reductions)} px. Choose blocks of one patch grid; "
                "UperNet here is made for networks that have no other, such as ViL and ViT."
            )
        embed = getattr(self.backbone, "patch_embed", None)
        reduction = reductions.pop()
        patch = tuple(getattr(embed, "patch_size", (reduction, reduction)))
        return chosen, [info[block]["num_chs"] for block in chosen], (int(patch[0]), int(patch[1]))

    # --- the network, once the data is known --------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if stage == "predict":
            raise ConfigError(
                "Segmentation writes no predictions. Use `validate` to score it; `forward` gives the logits."
            )
        reason = "images differ in size and number of windows, so that processes would wait for one another"
        refuse_sharding(self.trainer, "Segmentation", reason, "ddp")

    @float32_weights()
    def configure_model(self) -> None:
        if hasattr(self, "decoder"):
            return
        data: Any = getattr(self._trainer, "datamodule", None)
        if not getattr(data, "has_masks", False):
            raise ConfigError(
                f"Segmentation needs images with masks, but data is {type(data).__name__}. Use SegmentationFolder or "
                "ShapesSegmentation."
            )
        self.num_classes = int(data.num_classes)
        if self.background is not None and not 0 <= self.background < self.num_classes:
            raise ConfigError(
                f"model.background={self.background} must be one of the classes 0 to {self.num_classes - 1}."
            )
        if self.frozen:
            dim = sum(self.dims)
            convolution = nn.Conv2d(dim, self.num_classes, kernel_size=1)
            nn.init.normal_(convolution.weight, std=0.01)
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
            self.decoder: nn.Module = nn.Sequential(nn.BatchNorm2d(dim), convolution)
        else:
            self.decoder = UperNet(self.dims, self.num_classes, self.width or decoder_width(self.dims[-1]))
            freeze_unused(
                self.backbone, lambda image: self._features(padded_to_multiple(image, self.patch)), data.img_size
            )
        self.confusion = Confusion(self.num_classes)

    def train(self, mode: bool = True) -> "Segmentation":
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def check_trained(self, ckpt_path: str | None) -> None:
        """Refuse to score a head that nobody has trained. The command line asks this.

        Raises:
            ConfigError: If there is no checkpoint.
        """
        if ckpt_path is None:
            raise ConfigError("There is no trained head to score: set --ckpt_path to a checkpoint of this recipe.")

    def _features(self, images: Tensor) -> list[Tensor]:
        """Maps (B, D, h, w) of the chosen blocks; sides of the images are multiples of the patch."""
        wanted = sorted(set(self.blocks))  # a shallow network may have to give one several times
        maps = self.backbone.forward_intermediates(  # type: ignore[operator]
            images, indices=wanted, norm=self.frozen, stop_early=not self.frozen, intermediates_only=True
        )
        return [maps[wanted.index(block)] for block in self.blocks]

    def predict_pixels(self, images: Tensor) -> list[Tensor]:
        """Logits (B, C, H, W) of images (B, 3, H, W); UperNet adds those of its auxiliary head."""
        padded = padded_to_multiple(images, self.patch)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self._features(padded)
        outputs = [self.decoder(torch.cat(maps, dim=1))] if self.frozen else self.decoder(maps)
        height, width = images.shape[-2:]
        whole = [F.interpolate(output.float(), size=padded.shape[-2:], mode="bilinear") for output in outputs]
        return [logits[..., :height, :width] for logits in whole]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C, H, W) of normalised images of any size, as they are scored: scaled, and in windows."""
        size = images.shape[-2:]
        if self.eval_size is not None:
            images = F.interpolate(images, size=(self.eval_size, self.eval_size), mode="bicubic")
        if self.window is None:
            logits = self.predict_pixels(images)[0]
        else:
            assert self.stride is not None
            logits = slide(lambda part: self.predict_pixels(part)[0], images, self.window, self.stride)
        return logits if logits.shape[-2:] == size else F.interpolate(logits, size=size, mode="bilinear")

    # --- training -----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not self.frozen and data.batch_size < 2:
            raise ConfigError("data.batch_size=1: the batch norms of UperNet need at least two images per device.")
        fed = {"data.train_transform.img_size": [data.img_size]}  # sides in px of what the network is given
        if self.window is not None:
            fed["model.window"] = [self.window]
        elif self.eval_size is not None:
            fed["model.eval_size"] = [self.eval_size]
        else:
            fed["a side of the first val image"] = sorted(set(data.first_val_size() or ()))
        divisor = math.lcm(*self.patch)
        for key, sides in fed.items():
            for side in sides:
                check_input_size(self.backbone, side + -side % divisor, key)
        if self.frozen:
            self._hash = weights_hash(self.backbone)
        if self.background is not None:  # of the backbone that the run starts with
            self.final_metrics = self.score_foreground(self.background)
            for logger in self.trainer.loggers:
                logger.log_metrics(self.final_metrics, step=self.trainer.global_step)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_step(self.trainer, batch_idx)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.optimisation.start(self)
        images, masks = batch
        outputs = self.predict_pixels(images)  # float32
        # Of all processes, whose gradients are averaged: one with few labelled pixels must not give each of them more weight.
        labelled = self.trainer.strategy.reduce((masks != IGNORED).sum().float(), reduce_op="mean")
        with torch.autocast(self.device.type, enabled=False):
            loss, *auxiliary = (pixel_loss(logits, masks, labelled) for logits in outputs)
            for other in auxiliary:
                loss = loss + self.aux_weight * other
                self.log("train/aux_loss", other)
        return self.optimisation.watch(self, loss)

    # --- hooks, in the order in which they run in a step --------------------------------------------------------------

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

    def on_train_end(self) -> None:
        if self.frozen:
            assert weights_hash(self.backbone) == self._hash, "the probe changed the frozen backbone"

    # --- scoring ------------------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        if self.background is not None and not self.trainer.training and not self.trainer.sanity_checking:
            self.score_foreground(self.background)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._score(batch, batch_idx)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._score(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _score(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, masks = batch
        # Under DDP the sampler repeats images to give all ranks equally many; each counts once.
        real = self.trainer.datamodule.real_images(batch_idx, len(masks)).to(masks.device)  # type: ignore[attr-defined]
        if real.any():
            self.confusion.update(self(images).argmax(1)[real], masks[real])

    def _log_scores(self, stage: str) -> None:
        scores = scores_of(self.confusion.compute())  # gathers all processes
        self.confusion.reset()
        classes = self.trainer.datamodule.classes  # type: ignore[attr-defined]
        self.results["iou"] = dict(zip(classes, scores.pop("iou").tolist(), strict=True))
        self.results.update({name: float(value) for name, value in scores.items()})
        for name, value in scores.items():
            self.log(f"{stage}/{name}", value.float(), prog_bar=name == "miou", rank_zero_only=False, sync_dist=False)

    @torch.no_grad()
    def score_foreground(self, background: int) -> dict[str, float]:
        """`pca_foreground` of the backbone as it is, on the val set: `val/pca_foreground_…`; kept in `results`, too."""
        was_training = self.backbone.training
        self.backbone.eval()
        with self.trainer.precision_plugin.forward_context():
            scores = pca_foreground(
                self._last_map,
                self._val_batches,
                background,
                lambda total: self.trainer.strategy.reduce(total, reduce_op="sum"),
            )
        self.backbone.train(was_training)
        self.results["pca_foreground"] = scores
        return {f"val/pca_foreground_{name}": value for name, value in scores.items()}

    def _last_map(self, images: Tensor) -> Tensor:
        settings = {"indices": 1, "norm": True, "intermediates_only": True}
        return self.backbone.forward_intermediates(padded_to_multiple(images, self.patch), **settings)[0]  # type: ignore[operator]

    def _val_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images and masks of this process, each image once."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        for number, batch in enumerate(data.val_dataloader()):
            real = data.real_images(number, len(batch[1]))
            images, masks = (part[real].to(self.device) for part in batch)
            if len(images):
                yield data.normalize(images), masks

    # --- reports and checkpoints --------------------------------------------------------------------------------------

    def run_info(self) -> dict[str, str]:
        """What the run's first lines say about the method."""
        kind = "linear probe, backbone frozen" if self.frozen else f"UperNet, auxiliary loss x {self.aux_weight:g}"
        scored = "whole images" if self.window is None else f"windows of {self.window} px every {self.stride} px"
        lines = {
            "method": f"segmentation, {self.num_classes} classes, {kind}; blocks {self.blocks}",
            "scored on": scored + (f", scaled to {self.eval_size} px" if self.eval_size is not None else ""),
            **self.optimisation.run_info(),
        }
        if "pca_foreground" in self.results:
            shares = self.results["pca_foreground"]
            lines["foreground"] = f"first component {shares['best']:.1f} % IoU, everything {shares['everything']:.1f} %"
        return lines

    def _head_settings(self) -> dict[str, Any]:
        return {"head": self.head, "blocks": self.blocks, "num_classes": self.num_classes}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.optimisation.save(self, checkpoint)
        record_settings(checkpoint, **self.optimisation.settings(), **self._head_settings())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.optimisation.load(self, checkpoint)
        check_settings(self._trainer, checkpoint, **self.optimisation.settings())
        recorded = checkpoint.get("settings", {})
        for name, value in self._head_settings().items():
            if recorded.get(name) != value:
                key = "data" if name == "num_classes" else "model"
                raise ConfigError(
                    f"ckpt_path: the checkpoint has {key}.{name}={recorded.get(name)}, but {key}.{name} is {value}. Use the "
                    "recipe of that run; to start a new one from its backbone, use --model.backbone.weights."
                )


class _Optimisation(Optimisation):
    """With layer-wise decay of the learning rate, and a polynomial schedule."""

    def __init__(self, *args: Any, layer_decay: float | None, poly_power: float | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layer_decay = layer_decay
        self.poly_power = poly_power

    def settings(self) -> dict[str, Any]:
        """What must not change when a run is resumed."""
        return {"betas": self.betas, "weight_decay": self.weight_decay, "layer_decay": self.layer_decay}

    def configure(self, module: L.LightningModule) -> torch.optim.AdamW:
        self.steps = resolve_durations(module.trainer, {"lr_warmup": self.lr_warmup})
        self.global_batch_size = global_batch_size(module.trainer)
        self.peak_lr = scale_lr(self.base_lr, self.global_batch_size, self.lr_batch_size)
        scales: dict[str, float] | None = None
        if self.layer_decay is not None:
            of_backbone = layer_lr_scales(module.backbone, self.layer_decay)  # type: ignore[arg-type]
            scales = {
                name: of_backbone.get(name.removeprefix("backbone."), 1.0) for name, _ in module.named_parameters()
            }
        return adamw(module, module, self.peak_lr, self.weight_decay, self.betas, scales)  # type: ignore[arg-type]

    def lr_at(self, module: L.LightningModule) -> float:
        if self.poly_power is None:
            return super().lr_at(module)
        done, warmup, total = module.trainer.global_step + 1, self.steps["lr_warmup"], self.steps["total"]
        if done <= warmup:
            return self.peak_lr * done / warmup
        left = 1 - min((done - warmup) / max(total - warmup, 1), 1.0)
        return self.final_lr + (self.peak_lr - self.final_lr) * left**self.poly_power


def pixel_loss(logits: Tensor, masks: Tensor, num_pixels: Tensor | None = None) -> Tensor:
    """Cross entropy of logits (B, C, H, W), summed over the pixels that are not ignored and divided by their number, or by
    `num_pixels`; 0 if all are ignored.
    """
    masks = masks.long()
    total = F.cross_entropy(logits.float(), masks, ignore_index=IGNORED, reduction="sum")
    if num_pixels is None:
        num_pixels = (masks != IGNORED).sum().clamp(min=1)
    return total / torch.where(num_pixels > 0, num_pixels, 1)


def freeze_unused(backbone: nn.Module, features: Any, size: int) -> None:
    """Exclude from training what the features do not depend on: with DDP, processes would wait for its gradients.

    Args:
        features: Images to maps.
        size: Side in px of an image the network takes.
    """
    was_training = backbone.training
    parameter = next(backbone.parameters())
    image = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
    backbone.eval()
    trained = [p for p in backbone.parameters() if p.requires_grad]
    with torch.enable_grad():
        total = sum(one.sum() for one in features(image))
        gradients = torch.autograd.grad(total, trained, allow_unused=True)
    for p, gradient in zip(trained, gradients, strict=True):
        p.requires_grad_(gradient is not None)
    backbone.train(was_training)
