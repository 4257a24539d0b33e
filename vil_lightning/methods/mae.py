"""MAE: masked autoencoder.

He et al. 2022, arXiv:2111.06377. The encoder sees the visible patches only; a small decoder rebuilds the pixels of the hidden
ones from them.

What ViL changes. The scan depends on the order of its tokens, so visible patches stay in the order of the image (MAE
shuffles them). The 3 x 3 convolution of version 2 needs the grid: before it the visible patches are put back on the grid with
zeros between them, after it they are taken out again. Two alternatives are arguments: `kwargs.conv_kind: causal1d` convolves
along the kept sequence, and `hidden: mask_token` runs the encoder over the full grid with a learned token at hidden places.
There is no class token.

The decoder is a small ViL or ViT that runs on the map of encoder tokens as on an image with patches of one pixel.

Letters: `B` images, `N` patches, `K` visible patches, `D` encoder width, `P` pixels of a patch (3 p²).
"""

from typing import Any, Literal

import lightning as L
import timm
import torch
from torch import Tensor, nn

from vil_lightning.checks import check_sizes
from vil_lightning.errors import ConfigError
from vil_lightning.masking import MASK_KINDS, hidden_except, hidden_mask, num_hidden, visible_positions
from vil_lightning.methods.backbone import (
    BackboneConfig,
    build_backbone,
    check_input_size,
    patch_tokens,
    resolve_backbone,
)
from vil_lightning.methods.commands import finetune_command
from vil_lightning.methods.compiling import CompileMode, check_compile, compile_blocks
from vil_lightning.methods.masked import (
    check_maskable,
    encode_masked,
    encode_visible,
    freeze_readout,
    normalize_patches,
    patchify,
    unpatchify,
)
from vil_lightning.methods.optimisation import Optimisation
from vil_lightning.methods.randomness import seed_step
from vil_lightning.schedules import Duration


class MAE(L.LightningModule):
    """MAE with a ViL or a plain ViT of timm. Needs a data module whose `train_transform` gives one view (`TrainTransform`).

    The defaults are the official ones for ImageNet-1k.

    Args:
        backbone: The encoder.
        mask_ratio: Share of hidden patches.
        mask_kind: `random`, `block` or `row`, see `vil_lightning.masking.hidden_mask`.
        hidden: `drop` leaves hidden patches out of the encoder; `mask_token` puts a learned token in their places.
        decoder: Blocks of the decoder: `vil` (version 2, alternating) or `vit`.
        decoder_dim: Its width.
        decoder_depth: Its number of blocks; for `vil` of scans.
        decoder_num_heads: Heads of a `vit` decoder.
        normalize_targets: Subtract each patch's mean from its pixels and divide by its deviation.
        base_lr: Peak learning rate per 256 images of the global batch.
        lr_warmup: Linear warm-up of the learning rate (a duration).
        final_lr: Learning rate at the end of the cosine; absolute.
        betas: Of AdamW.
        weight_decay: Never on biases, norms, position embeddings and mask tokens.
        compile: Compile the blocks of encoder and decoder: true, default or max-autotune, see `compiling`.

    Durations are `"10 epochs"`, `"500 steps"`, `"10%"` or a fraction of the run below 1.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        mask_ratio: float = 0.75,
        mask_kind: str = "random",
        hidden: Literal["drop", "mask_token"] = "drop",
        decoder: Literal["vil", "vit"] = "vil",
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        normalize_targets: bool = True,
        base_lr: float = 1.5e-4,
        lr_warmup: Duration = "40 epochs",
        final_lr: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.05,
        compile: CompileMode = False,
    ) -> None:
        super().__init__()
        if mask_kind not in MASK_KINDS:
            raise ConfigError(f"model.mask_kind={mask_kind!r} is not known. Available: {', '.join(MASK_KINDS)}.")
        sizes = {"decoder_dim": decoder_dim, "decoder_depth": decoder_depth, "decoder_num_heads": decoder_num_heads}
        check_sizes("model", 2**16, **sizes)
        self.backbone_config = resolve_backbone(backbone)
        self.optimisation = Optimisation(self.backbone_config, base_lr, lr_warmup, final_lr, betas, weight_decay)
        self.mask_ratio = mask_ratio
        self.mask_kind = mask_kind
        self.hidden = hidden
        self.decoder_kind = decoder
        self.normalize_targets = normalize_targets

        self.backbone = build_backbone(self.backbone_config)
        check_maskable(self.backbone, "MAE")
        freeze_readout(self.backbone)
        embed: Any = self.backbone.patch_embed
        self.patch_size: tuple[int, int] = tuple(embed.patch_size)
        grid_size = tuple(embed.grid_size)
        self._check_mask(grid_size)
        dim = int(self.backbone.embed_dim)  # type: ignore[arg-type]
        self.decoder = _decoder(decoder, grid_size, dim, decoder_dim, decoder_depth, decoder_num_heads)
        self.head = nn.Linear(decoder_dim, 3 * self.patch_size[0] * self.patch_size[1])
        # Before the encoder or after it; in its width either way: the decoder's first layer is a linear map, of this token,
        # too.
        self.mask_token = nn.Parameter(torch.zeros(dim))
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.compile_mode = compile
        compile_blocks(self.backbone, compile)
        compile_blocks(self.decoder, compile)

    def _check_mask(self, grid_size: tuple[int, int]) -> None:
        hidden, total = num_hidden(self.mask_kind, grid_size, self.mask_ratio), grid_size[0] * grid_size[1]
        if not 0 < self.mask_ratio < 1 or not 0 < hidden < total:
            raise ConfigError(
                f"model.mask_ratio={self.mask_ratio} hides {hidden} of {total} patches ({grid_size[0]} x {grid_size[1]}, "
                f"model.mask_kind={self.mask_kind}). Choose a ratio that hides some and shows some, or more patches (img_size, "
                "patch_size in model.backbone.kwargs)."
            )

    # --- the method ---------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Pooled vectors of the encoder, shown all patches: what the run is for."""
        return self.backbone(images)

    def draw_mask(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """A mask (B, N), True where hidden, and the positions (B, K) of the visible patches."""
        grid_size = self.grid_size(images)
        hidden = hidden_mask(self.mask_kind, len(images), grid_size, self.mask_ratio, images.device)
        num_visible = hidden.shape[1] - num_hidden(self.mask_kind, grid_size, self.mask_ratio)
        return hidden, visible_positions(hidden, num_visible)

    def predict_patches(self, images: Tensor, visible: Tensor) -> Tensor:
        """Predicted pixels (B, N, P) of every patch."""
        h, w = self.grid_size(images)
        if self.hidden == "drop":
            tokens = encode_visible(self.backbone, images, visible)
            full = self.mask_token.to(tokens.dtype).expand(len(images), h * w, -1)
            tokens = full.scatter(1, visible[..., None].expand_as(tokens), tokens)
        else:
            hidden = hidden_except(visible, h * w)
            tokens = patch_tokens(self.backbone, encode_masked(self.backbone, images, hidden, self.mask_token))
        image = tokens.transpose(1, 2).unflatten(2, (h, w))
        return self.head(self.decoder.forward_features(image))  # type: ignore[operator]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.optimisation.start(self)
        images, _ = batch
        hidden, visible = self.draw_mask(images)
        prediction = self.predict_patches(images, visible)
        with torch.autocast(self.device.type, enabled=False):
            target = patchify(images.float(), self.patch_size)
            if self.normalize_targets:
                target, _, _ = normalize_patches(target)
            loss = hidden_loss(prediction.float(), target, hidden)
        return self.optimisation.watch(self, loss)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> dict[str, Tensor]:
        """For pictures: the mask (B, 1, H, W) and the images (B, 3, H, W) with hidden patches as predicted."""
        hidden, visible = self.draw_mask(images)
        pixels = patchify(images.float(), self.patch_size)
        prediction = self.predict_patches(images, visible).float()
        if self.normalize_targets:  # the network does not know mean and deviation: take the true ones
            _, mean, deviation = normalize_patches(pixels)
            prediction = prediction * deviation + mean
        grid_size = self.grid_size(images)
        merged = torch.where(hidden[..., None], prediction, pixels)
        mask = hidden[..., None].float().expand(-1, -1, self.patch_size[0] * self.patch_size[1])
        return {
            "mask": unpatchify(mask, self.patch_size, grid_size),
            "reconstruction": unpatchify(merged, self.patch_size, grid_size),
        }

    def grid_size(self, images: Tensor) -> tuple[int, int]:
        """Patches (h, w) of these images."""
        return images.shape[2] // self.patch_size[0], images.shape[3] // self.patch_size[1]

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
        check_compile(self, self.compile_mode, by_blocks=True)
        transform = getattr(getattr(self.trainer, "datamodule", None), "train_transform", None)
        size = getattr(transform, "img_size", None)
        if size is None:
            raise ConfigError(
                "model.class_path: MAE trains on one view of an image: set data.train_transform to a TrainTransform "
                f"(it is {type(transform).__name__}), as configs/pretrain_mae.yaml does."
            )
        check_input_size(self.backbone, size, "data.train_transform.img_size")
        self._check_mask((size // self.patch_size[0], size // self.patch_size[1]))

    def run_info(self) -> dict[str, str]:
        """What the run's first lines say about the method."""
        return {
            "method": (
                f"MAE, {self.mask_ratio:g} of the patches hidden ({self.mask_kind}, {self.hidden}), {self.decoder_kind} decoder"
            ),
            **self.optimisation.run_info(),
        }

    def next_command(self, checkpoint: str) -> str:
        """What to run when this run has ended."""
        return finetune_command(self, checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.optimisation.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.optimisation.load(self, checkpoint)


def hidden_loss(prediction: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error of hidden patches: (B, N, P), (B, N, P), (B, N) -> ()."""
    per_patch = (prediction - target).square().mean(-1)
    return (per_patch * hidden).sum() / hidden.sum()


def _decoder(kind: str, grid_size: Any, in_dim: int, dim: int, depth: int, num_heads: int) -> nn.Module:
    shared = {"img_size": grid_size, "patch_size": 1, "in_chans": in_dim, "embed_dim": dim, "depth": depth}
    common: dict[str, Any] = {**shared, "num_classes": 0, "global_pool": "", "dynamic_img_size": True}
    try:
        if kind == "vil":
            return timm.create_model("vil2_tiny_patch16_224", **common)
        return timm.create_model("vit_tiny_patch16_224", num_heads=num_heads, class_token=False, **common)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"model.decoder_dim, model.decoder_depth, model.decoder_num_heads: {error}") from error
