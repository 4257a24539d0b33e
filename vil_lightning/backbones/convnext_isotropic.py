"""Isotropic ConvNeXt as a timm model: ConvNeXt blocks at one resolution, as a transformer has.

Paper:
    A ConvNet for the 2020s. Liu et al. 2022, arXiv:2201.03545, section 3.3
Official code (architecture facts and published weights): facebookresearch/ConvNeXt

Letters: `B` batch, `D` embed_dim, `h, w` feature map.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.layers import LayerNorm, calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from vil_lightning.backbones.vision_lstm import _choice, _pair

__all__ = ["ConvNeXtIsotropic"]

_POOLINGS = ("avg", "")
# Part of a published name -> here.
_RENAMED = {".dwconv.": ".conv_dw.", ".pwconv1.": ".mlp.fc1.", ".pwconv2.": ".mlp.fc2."}


class ConvNeXtIsotropic(nn.Module):
    """Patchify stem, `depth` ConvNeXt blocks of one width, global average pooling, norm, classifier.

    Args:
        img_size: Nominal input size in px, an int or (H, W); a multiple of `patch_size`. Other multiples work, too: there is
            no position embedding.
        patch_size: Kernel and stride of the stem.
        num_classes: Width of the classifier; 0 for none, then the model returns the pooled vector.
        global_pool: `avg`, or "" for none.
        embed_dim: Width D.
        depth: Number of blocks.
        kernel_size: Of the depthwise convolutions; odd.
        init_values: Initial LayerScale, or None for none (small and base, as published).
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth; the rate grows linearly from 0 in the first block to this in the last.

    Raises:
        ValueError: For any value that does not fit, naming what would.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 18,
        kernel_size: int = 7,
        init_values: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _choice("global_pool", global_pool, _POOLINGS)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd, so that blocks keep the size of the map.")
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1.")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={drop_path_rate} must be in [0, 1).")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.depth = depth
        self.patch_size = patch_size
        self.grad_checkpointing = False
        self.set_input_size(img_size)
        self.stem = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.blocks = nn.ModuleList(
            ConvNeXtBlock(embed_dim, kernel_size=kernel_size, ls_init_value=init_values, drop_path=rate)
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        )
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size} for i in range(depth)
        ]
        self.norm: nn.Module = LayerNorm(embed_dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.apply(_init_weights)

    # --- what timm asks of a model ----------------------------------------------------------------------------------

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning-rate decay: stem, blocks (one group if `coarse`), norm and head."""
        return {"stem": r"^stem", "blocks": r"^blocks" if coarse else r"^blocks\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; the norm before it is kept."""
        if global_pool is not None:
            _choice("global_pool", global_pool, _POOLINGS)
            self.global_pool = global_pool
        self.num_classes = num_classes
        head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        head.apply(_init_weights)
        self.head = head.to(self.stem.weight.device, self.stem.weight.dtype).train(self.training)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Change the nominal input size; nothing depends on it."""
        self.img_size = self._checked(_pair(img_size))

    def _checked(self, size: tuple[int, int]) -> tuple[int, int]:
        if size[0] % self.patch_size or size[1] % self.patch_size:
            raise ValueError(f"Image of {size[0]} x {size[1]} px is not divisible by patch_size={self.patch_size}.")
        return size

    # --- forward ----------------------------------------------------------------------------------------------------

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, h, w), not normalised: the norm follows the pooling."""
        return self._run(x, self.blocks, ())[0]

    def _run(self, x: Tensor, blocks: Iterable[nn.Module], wanted: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """The map after these blocks, and those after the `wanted` ones."""
        self._checked((x.shape[-2], x.shape[-1]))
        x = self.stem(x)
        maps = []
        for i, block in enumerate(blocks):
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            if i in wanted:
                maps.append(x)
        return x, maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, D, h, w) -> (B, num_classes); (B, h, w, num_classes) without pooling."""
        x = self.head_drop(self.norm(x.mean((-2, -1)) if self.global_pool else x.permute(0, 2, 3, 1)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Maps (B, D, h, w) after chosen blocks; the interface of timm's convolutional networks.

        Args:
            x: Images (B, C, H, W).
            indices: The last n blocks if an int, all if None, otherwise the blocks (0-based) to return.
            norm: Apply the final norm to every intermediate.
            stop_early: Do not run blocks after the last one asked for.
            output_fmt: `NCHW` is the only one.
            intermediates_only: Return only the list of intermediates.
            output_dict: Return a dictionary with `image_features` and `image_intermediates`.
        """
        _choice("output_fmt", output_fmt, ("NCHW",))
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        x, maps = self._run(x, self.blocks[: max_index + 1] if stop_early else self.blocks, take_indices)
        if norm:
            maps = [self.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for y in maps]
        if output_dict:
            return {"image_intermediates": maps, **({} if intermediates_only else {"image_features": x})}
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] | tuple[int, ...] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what is not needed for the given intermediates; returns their indices."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks, self.feature_info = self.blocks[: max_index + 1], self.feature_info[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Hook for timm: the published names, or those here."""
    pattern = re.compile("|".join(map(re.escape, _RENAMED)))
    return {pattern.sub(lambda m: _RENAMED[m[0]], n): v for n, v in state_dict.get("model", state_dict).items()}


# --- registered models ------------------------------------------------------------------------------------------------


def _cfg(file: str) -> dict[str, Any]:
    return {
        "url": f"https://dl.fbaipublicfiles.com/convnext/{file}",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem",
        "classifier": "head",
        "license": "mit",
    }


default_cfgs = generate_default_cfgs(
    {
        "convnext_isotropic_small_patch16_224.in1k": _cfg("convnext_iso_small_1k_224_ema.pth"),
        "convnext_isotropic_base_patch16_224.in1k": _cfg("convnext_iso_base_1k_224_ema.pth"),
    }
)


def _create(variant: str, pretrained: bool, embed_dim: int, kwargs: dict[str, Any]) -> ConvNeXtIsotropic:
    return build_model_with_cfg(
        ConvNeXtIsotropic,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (-3, -2, -1), "feature_cls": "getter"},
        **{"embed_dim": embed_dim, "depth": 18, **kwargs},
    )


@register_model
def convnext_isotropic_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> ConvNeXtIsotropic:
    """Isotropic ConvNeXt-S."""
    return _create("convnext_isotropic_small_patch16_224", pretrained, 384, kwargs)


@register_model
def convnext_isotropic_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> ConvNeXtIsotropic:
    """Isotropic ConvNeXt-B."""
    return _create("convnext_isotropic_base_patch16_224", pretrained, 768, kwargs)
