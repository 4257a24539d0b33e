"""Autoregressive pretraining: predict the pixels of the next cluster of patches from all clusters before it.

ARM: Ren et al. 2024, arXiv:2406.07537, for Mamba; MAL, arXiv:2412.10730, has clusters like these for xLSTM. A scan that runs
forward is a sequence model already: one pass over an image gives a prediction after every cluster, and no patch is hidden.

What ViL changes. In an alternating ViL every token sees both sides after two scans, so here all scans run forward over clusters
in order, and the convolution of version 2 is cut off at later clusters: see `vil_lightning.methods.clusters`. Names and shapes
of the parameters are those of the ordinary network, so fine-tuning takes them up with alternating scans (`next_command`), as
ARM fine-tunes with four directions what it pretrained with one.

Other differences from ARM: positions in the encoder are learned, not sines; ViL has no MLP blocks.

Letters: `B` images, `N` patches, `c` side of a cluster in patches, `M = N - c²` patches of all clusters but one, `D` encoder
width, `P` pixels of a patch (3 p²).
"""

from typing import Any

import lightning as L
import torch
from timm.layers import Mlp, build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from vil_lightning.backbones import VisionLSTM
from vil_lightning.checks import check_sizes
from vil_lightning.errors import ConfigError
from vil_lightning.methods.backbone import BackboneConfig, build_backbone, check_input_size, resolve_backbone
from vil_lightning.methods.clusters import check_causal, cluster_mask, encode_clusters, from_clusters, to_clusters
from vil_lightning.methods.commands import finetune_command
from vil_lightning.methods.compiling import CompileMode, check_compile, compile_blocks
from vil_lightning.methods.masked import freeze_readout, normalize_patches, patchify, unpatchify
from vil_lightning.methods.optimisation import Optimisation
from vil_lightning.methods.randomness import seed_step
from vil_lightning.schedules import Duration


class Autoregressive(L.LightningModule):
    """Next-cluster prediction with a ViL or a plain ViT of timm. Needs a data module whose `train_transform` gives one view.

    The defaults are those of ARM-B on ImageNet-1k.

    Args:
        backbone: The encoder; a ViL needs `block_design: unidirectional`.
        cluster_size: Side c of a cluster, in patches. The grid is cut into squares of c x c patches, at least two.
        decoder_dim: Width of the decoder.
        decoder_depth: Its number of blocks, and at how many depths it reads the encoder.
        decoder_num_heads: Its heads.
        normalize_targets: Subtract each patch's mean from its pixels and divide by its deviation.
        base_lr: Peak learning rate per 256 images of the global batch.
        lr_warmup: Linear warm-up of the learning rate (a duration).
        final_lr: Learning rate at the end of the cosine; absolute.
        betas: Of AdamW.
        weight_decay: Never on biases, norms, position embeddings and the query token.
        compile: Compile the blocks of encoder and decoder: true, default or max-autotune, see `compiling`.

    Durations are `"10 epochs"`, `"500 steps"`, `"10%"` or a fraction of the run below 1.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        cluster_size: int = 4,
        decoder_dim: int = 512,
        decoder_depth: int = 4,
        decoder_num_heads: int = 8,
        normalize_targets: bool = True,
        base_lr: float = 1.5e-4,
        lr_warmup: Duration = "40 epochs",
        final_lr: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.05,
        compile: CompileMode = False,
    ) -> None:
        super().__init__()
        sizes = {"decoder_dim": decoder_dim, "decoder_depth": decoder_depth, "decoder_num_heads": decoder_num_heads}
        check_sizes("model", 2**16, **sizes)
        self.backbone_config = resolve_backbone(backbone)
        self.optimisation = Optimisation(
            self.backbone_config, base_lr, lr_warmup, final_lr, betas, weight_decay, clip=3.0
        )
        self.cluster_size = cluster_size
        self.normalize_targets = normalize_targets

        self.backbone = build_backbone(self.backbone_config)
        check_causal(self.backbone, self.backbone_config, "Autoregressive")
        freeze_readout(self.backbone)
        embed: Any = self.backbone.patch_embed
        self.patch_size: tuple[int, int] = tuple(embed.patch_size)
        self._check_clusters(tuple(embed.grid_size))
        dim, num_blocks = int(self.backbone.embed_dim), len(self.backbone.blocks)  # type: ignore[arg-type]
        self.depths = _depths(num_blocks, decoder_depth)
        pixels = 3 * self.patch_size[0] * self.patch_size[1]
        self.decoder = CrossAttentionDecoder(dim, decoder_dim, decoder_depth, decoder_num_heads, pixels)
        self.compile_mode = compile
        compile_blocks(self.backbone, compile)
        compile_blocks(self.decoder, compile)

    def _check_clusters(self, grid_size: tuple[int, int]) -> None:
        (h, w), side = grid_size, self.cluster_size
        if side < 1 or h % side or w % side or h * w == side**2:
            raise ConfigError(
                f"model.cluster_size={side} does not cut the grid of {h} x {w} patches into two or more squares. Choose a "
                "common divisor of height and width, or change the grid with img_size and patch_size in model.backbone.kwargs."
            )

    # --- the method ---------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Pooled vectors of the network as it is configured, which scans whole rows of patches: what the run is for."""
        return self.backbone(images)

    def predict_patches(self, images: Tensor) -> Tensor:
        """Predicted pixels (B, M, P) of all clusters but the first, cluster by cluster, each from the true ones before it."""
        features = encode_clusters(self.backbone, images, self.cluster_size, self.depths)
        return self.decoder(features, self.grid_size(images), self.cluster_size)

    def targets(self, images: Tensor) -> Tensor:
        """Pixels (B, M, P) in the order of `predict_patches`."""
        pixels = to_clusters(patchify(images.float(), self.patch_size), self.grid_size(images), self.cluster_size)
        return pixels[:, self.cluster_size**2 :]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.optimisation.start(self)
        images, _ = batch
        prediction = self.predict_patches(images)
        with torch.autocast(self.device.type, enabled=False):
            target = self.targets(images)
            if self.normalize_targets:
                target, _, _ = normalize_patches(target)
            loss = F.mse_loss(prediction.float(), target)
        return self.optimisation.watch(self, loss)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> dict[str, Tensor]:
        """For pictures: the mask (B, 1, H, W) of all but the first cluster, and the images (B, 3, H, W) as predicted there.

        Every cluster is predicted from the true ones before it, not from predictions.
        """
        grid_size, first = self.grid_size(images), self.cluster_size**2
        pixels = to_clusters(patchify(images.float(), self.patch_size), grid_size, self.cluster_size)
        prediction = self.predict_patches(images).float()
        if self.normalize_targets:  # the network does not know mean and deviation: take the true ones
            _, mean, deviation = normalize_patches(pixels[:, first:])
            prediction = prediction * deviation + mean
        merged = from_clusters(torch.cat([pixels[:, :first], prediction], dim=1), grid_size, self.cluster_size)
        mask = torch.ones(len(images), pixels.shape[1], self.patch_size[0] * self.patch_size[1], device=images.device)
        mask[:, :first] = 0
        mask = from_clusters(mask, grid_size, self.cluster_size)
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
                "model.class_path: Autoregressive trains on one view of an image: set data.train_transform to a TrainTransform "
                f"(it is {type(transform).__name__}), as configs/pretrain_autoregressive.yaml does."
            )
        key = "data.train_transform.img_size"
        check_input_size(self.backbone, size, key)
        if size % self.patch_size[0] or size % self.patch_size[1]:  # dynamic_img_pad would fill it up
            raise ConfigError(f"{key}={size} is not a multiple of the patch size {self.patch_size}.")
        self._check_clusters((size // self.patch_size[0], size // self.patch_size[1]))

    def run_info(self) -> dict[str, str]:
        """What the run's first lines say about the method."""
        side = self.cluster_size
        return {
            "method": f"Autoregressive, clusters of {side} x {side} patches; decoder reads blocks {self.depths}",
            **self.optimisation.run_info(),
        }

    def next_command(self, checkpoint: str) -> str:
        """What to run when this run has ended: fine-tune with scans in both directions, or score the features as they are."""
        command = finetune_command(self, checkpoint)
        if isinstance(self.backbone, VisionLSTM) and "finetune" in command:
            command += " --model.backbone.kwargs '{block_design: alternating}'"
        return command

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.optimisation.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.optimisation.load(self, checkpoint)


def _depths(num_blocks: int, count: int) -> list[int]:
    """After which blocks the decoder reads: evenly from the middle to the end, as in ARM (6, 8, 10, 12 of 12)."""
    step = num_blocks / 2 / max(count - 1, 1)
    return [num_blocks - round(step * i) for i in reversed(range(count))]


# --- decoder ----------------------------------------------------------------------------------------------------------


class CrossAttentionDecoder(nn.Module):
    """Queries, one for each patch to predict, look at the tokens of the clusters before. They do not see one another.

    Every query is the same learned token plus the patch's position in sines and cosines. All depths of the encoder are normed,
    put side by side and mapped to one set of keys and values for each block.

    Args:
        in_dim: Encoder width.
        dim: Width.
        depth: Number of blocks, and of the features it is given.
        out_dim: Pixels of a patch.
    """

    def __init__(self, in_dim: int, dim: int, depth: int, num_heads: int, out_dim: int) -> None:
        super().__init__()
        if depth < 1:
            raise ConfigError(f"model.decoder_depth={depth} must be at least 1.")
        if dim < 1 or num_heads < 1 or dim % num_heads or dim % 4:
            raise ConfigError(
                f"model.decoder_dim={dim} must be a multiple of model.decoder_num_heads={num_heads}, and of 4 for the "
                "positions."
            )
        self.in_norms = nn.ModuleList(nn.LayerNorm(in_dim) for _ in range(depth))
        self.in_proj = nn.Linear(depth * in_dim, depth * dim)
        self.query = nn.Parameter(torch.zeros(dim))
        self.blocks = nn.ModuleList(CrossAttentionBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, out_dim)
        nn.init.normal_(self.query, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: list[Tensor], grid_size: tuple[int, int], cluster_size: int) -> Tensor:
        """Tokens (B, M, D) of all clusters but the last, at each depth -> (B, M, P) for all clusters but the first."""
        x = torch.cat([norm(tokens) for norm, tokens in zip(self.in_norms, features, strict=True)], dim=-1)
        sources = self.in_proj(x).chunk(len(self.blocks), dim=-1)  # (B, M, dim) each
        positions = build_sincos2d_pos_embed(list(grid_size), len(self.query), device=x.device)
        positions = to_clusters(positions[None], grid_size, cluster_size)[:, cluster_size**2 :]
        # Row i is the query of cluster i + 1, column j a token of cluster j: seen if j <= i.
        seen = cluster_mask(x.shape[1] // cluster_size**2, cluster_size, x.device)
        x = (self.query + positions.to(self.query)).expand(len(x), -1, -1)
        for block, source in zip(self.blocks, sources, strict=True):
            x = block(x, source, seen)
        return self.head(self.norm(x))


class CrossAttentionBlock(nn.Module):
    """x + Attention(LayerNorm(x), source), then x + MLP(LayerNorm(x))."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)  # softmax cancels a bias of k; one of v is one of proj
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, source: Tensor, seen: Tensor) -> Tensor:
        """Queries (B, M, dim), tokens (B, M, dim), who sees whom (M, M) -> (B, M, dim)."""
        k, v = self.kv(source).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (self.q(self.norm1(x)), k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))
