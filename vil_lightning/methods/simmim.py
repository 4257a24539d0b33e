"""SimMIM: masked image modelling with mask tokens in the encoder.

Xie et al. 2022, arXiv:2111.09886. All patches pass through the encoder, hidden ones as one learned token; a single linear layer
predicts their pixels, compared by the absolute difference. Simpler and dearer than MAE; for ViL it keeps the full grid, so that
the 3 x 3 convolution and the scans see in pretraining what they see later.

Letters: `B` images, `N` patches, `D` encoder width, `P` pixels of a patch (3 p²).
"""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from vil_lightning.errors import ConfigError
from vil_lightning.masking import hidden_except, hidden_mask, num_hidden, visible_positions
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
    freeze_readout,
    patchify,
    unpatchify,
)
from vil_lightning.methods.optimisation import Optimisation
from vil_lightning.methods.randomness import seed_step
from vil_lightning.schedules import Duration


class SimMIM(L.LightningModule):
    """SimMIM with a ViL or a plain ViT of timm. Needs a data module whose `train_transform` gives one view (`TrainTransform`).

    The defaults are those of the official ViT-B configuration (microsoft/SimMIM), with a cosine schedule instead of a step.

    Args:
        backbone: The encoder.
        mask_ratio: Share of hidden mask units.
        mask_unit: Side of the squares that are hidden as a whole, in patches; 2 hides 32 px at a patch size of 16.
        base_lr: Peak learning rate per 512 images of the global batch.
        lr_warmup: Linear warm-up of the learning rate (a duration).
        final_lr: Learning rate at the end of the cosine; absolute.
        betas: Of AdamW.
        weight_decay: Never on biases, norms, position embeddings and the mask token.
        compile: Compile the blocks of the encoder: true, default or max-autotune, see `compiling`.

    Durations are `"10 epochs"`, `"500 steps"`, `"10%"` or a fraction of the run below 1.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        mask_ratio: float = 0.6,
        mask_unit: int = 2,
        base_lr: float = 1e-4,
        lr_warmup: Duration = "10 epochs",
        final_lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.05,
        compile: CompileMode = False,
    ) -> None:
        super().__init__()
        if mask_unit < 1:
            raise ConfigError(f"model.mask_unit={mask_unit} must be at least 1 patch.")
        self.backbone_config = resolve_backbone(backbone)
        self.optimisation = Optimisation(
            self.backbone_config, base_lr, lr_warmup, final_lr, betas, weight_decay, lr_batch_size=512, clip=5.0
        )
        self.mask_ratio = mask_ratio
        self.mask_unit = mask_unit
        self.backbone = build_backbone(self.backbone_config)
        check_maskable(self.backbone, "SimMIM")
        freeze_readout(self.backbone)
        embed: Any = self.backbone.patch_embed
        self.patch_size: tuple[int, int] = tuple(embed.patch_size)
        self._check_mask(tuple(embed.grid_size))
        dim = int(self.backbone.embed_dim)  # type: ignore[arg-type]
        self.mask_token = nn.Parameter(torch.zeros(dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.head = nn.Linear(dim, 3 * self.patch_size[0] * self.patch_size[1])
        self.compile_mode = compile
        compile_blocks(self.backbone, compile)

    def _check_mask(self, grid_size: tuple[int, int]) -> None:
        if grid_size[0] % self.mask_unit or grid_size[1] % self.mask_unit:
            raise ConfigError(
                f"model.mask_unit={self.mask_unit} does not divide the grid of {grid_size[0]} x {grid_size[1]} patches. Choose "
                "a common divisor, or change the grid with img_size and patch_size in model.backbone.kwargs."
            )
        units = (grid_size[0] // self.mask_unit, grid_size[1] // self.mask_unit)
        hidden, total = num_hidden("random", units, self.mask_ratio), units[0] * units[1]
        if not 0 < self.mask_ratio < 1 or not 0 < hidden < total:
            raise ConfigError(
                f"model.mask_ratio={self.mask_ratio} hides {hidden} of {total} mask units. Choose a ratio that hides some and "
                "shows some, a smaller model.mask_unit, or more patches (img_size, patch_size in model.backbone.kwargs)."
            )

    # --- the method ---------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Pooled vectors of the encoder, shown all patches: what the run is for."""
        return self.backbone(images)

    def draw_mask(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """A mask (B, N), True where hidden, and the positions (B, K) of the visible patches."""
        h, w = self.grid_size(images)
        units = (h // self.mask_unit, w // self.mask_unit)
        hidden = hidden_mask("random", len(images), units, self.mask_ratio, images.device).view(-1, *units)
        hidden = hidden.repeat_interleave(self.mask_unit, 1).repeat_interleave(self.mask_unit, 2).flatten(1)
        num_visible = h * w - num_hidden("random", units, self.mask_ratio) * self.mask_unit**2
        return hidden, visible_positions(hidden, num_visible)

    def predict_patches(self, images: Tensor, visible: Tensor) -> Tensor:
        """Predicted pixels (B, N, P) of every patch."""
        h, w = self.grid_size(images)
        tokens = encode_masked(self.backbone, images, hidden_except(visible, h * w), self.mask_token)
        return self.head(patch_tokens(self.backbone, tokens))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.optimisation.start(self)
        images, _ = batch
        hidden, visible = self.draw_mask(images)
        prediction = self.predict_patches(images, visible)
        with torch.autocast(self.device.type, enabled=False):
            per_patch = (prediction.float() - patchify(images.float(), self.patch_size)).abs().mean(-1)
            loss = (per_patch * hidden).sum() / hidden.sum()
        return self.optimisation.watch(self, loss)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> dict[str, Tensor]:
        """For pictures: the mask (B, 1, H, W) and the images (B, 3, H, W) with hidden patches as predicted."""
        hidden, visible = self.draw_mask(images)
        prediction, grid_size = self.predict_patches(images, visible).float(), self.grid_size(images)
        merged = torch.where(hidden[..., None], prediction, patchify(images.float(), self.patch_size))
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
                "model.class_path: SimMIM trains on one view of an image: set data.train_transform to a TrainTransform "
                f"(it is {type(transform).__name__}), as configs/pretrain_simmim.yaml does."
            )
        check_input_size(self.backbone, size, "data.train_transform.img_size")
        self._check_mask((size // self.patch_size[0], size // self.patch_size[1]))

    def run_info(self) -> dict[str, str]:
        """What the run's first lines say about the method."""
        return {
            "method": f"SimMIM, {self.mask_ratio:g} hidden in squares of {self.mask_unit} x {self.mask_unit} patches",
            **self.optimisation.run_info(),
        }

    def next_command(self, checkpoint: str) -> str:
        """What to run when this run has ended."""
        return finetune_command(self, checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.optimisation.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.optimisation.load(self, checkpoint)
