"""What methods that hide patches share: encoding the rest, and pixels as targets."""

import torch
from timm.layers import PatchEmbed
from timm.models._manipulate import checkpoint
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vil_lightning.backbones import VisionLSTM
from vil_lightning.backbones.layers import take_tokens
from vil_lightning.errors import ConfigError


def check_maskable(backbone: nn.Module, method: str) -> None:
    """Refuse backbones of which patches cannot be hidden.

    Raises:
        ConfigError: Naming what can be used.
    """
    plain = isinstance(backbone, VisionTransformer) and isinstance(backbone.patch_embed, PatchEmbed)  # no hybrid
    if not plain and not isinstance(backbone, VisionLSTM):
        raise ConfigError(
            f"{method} hides patches from the network, which it can do with ViL and timm's plain ViT (vit_*, deit_*, deit3_*), "
            f"but not with a {type(backbone).__name__}. Set model.backbone.name to one of these."
        )
    if isinstance(backbone, VisionLSTM) and backbone.patch_embed.stride != backbone.patch_embed.patch_size:
        raise ConfigError(
            f"{method}: model.backbone.kwargs.stride={backbone.patch_embed.stride} makes patches overlap, so that visible ones "
            "show pixels of hidden ones. Leave stride unset."
        )


def freeze_readout(backbone: nn.Module) -> None:
    """Exclude from training what only a read-out of the network uses: with DDP, processes would wait for its gradients."""
    for name in ("fc_norm", "attn_pool", "head"):
        if isinstance(part := getattr(backbone, name, None), nn.Module):
            part.requires_grad_(False)


def encode_visible(backbone: nn.Module, images: Tensor, visible: Tensor) -> Tensor:
    """Patch tokens of the network, shown only some of the patches; the others are left out.

    Args:
        images: (B, 3, H, W).
        visible: Positions (B, K) of the patches to show, in increasing order.

    Returns:
        (B, K, D), after the final norm.
    """
    if isinstance(backbone, VisionLSTM):
        return backbone.split_tokens(backbone.forward_features(images, visible))[0]
    assert isinstance(backbone, VisionTransformer)
    x = backbone._pos_embed(backbone.patch_embed(images))
    prefix = backbone.num_prefix_tokens
    x = torch.cat([x[:, :prefix], take_tokens(x[:, prefix:], visible)], dim=1)
    return _transformer(backbone, x)[:, prefix:]


def encode_masked(backbone: nn.Module, images: Tensor, hidden: Tensor, mask_token: Tensor) -> Tensor:
    """All tokens of the network, with a learned token in the place of hidden patches.

    Args:
        images: (B, 3, H, W).
        hidden: (B, N), True = hidden; images may have unequal numbers of them.
        mask_token: (D,).

    Returns:
        (B, S, D), after the final norm, class tokens included: what the network's `forward_head` takes.
    """
    if isinstance(backbone, VisionLSTM):
        return backbone.forward_features(images, hidden=hidden, mask_token=mask_token)
    assert isinstance(backbone, VisionTransformer)
    x = backbone.patch_embed(images)  # (B, N, D); (B, h, w, D) with dynamic_img_size
    x = torch.where(hidden.view(*x.shape[:-1], 1), mask_token.to(x.dtype), x)
    return _transformer(backbone, backbone._pos_embed(x))


def _transformer(backbone: VisionTransformer, x: Tensor) -> Tensor:
    x = backbone.norm_pre(x)
    for block in backbone.blocks:
        x = checkpoint(block, x) if backbone.grad_checkpointing else block(x)
    return backbone.norm(x)


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> pixels of each patch (B, N, p_h * p_w * C), patches in row-major order."""
    p_h, p_w = patch_size
    patches = images.unfold(2, p_h, p_h).unfold(3, p_w, p_w)  # (B, C, h, w, p_h, p_w)
    return patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(pixels: Tensor, patch_size: tuple[int, int], grid_size: tuple[int, int]) -> Tensor:
    """Undoes `patchify`."""
    (p_h, p_w), (h, w) = patch_size, grid_size
    images = pixels.view(len(pixels), h, w, p_h, p_w, -1).permute(0, 5, 1, 3, 2, 4)  # (B, C, h, p_h, w, p_w)
    return images.reshape(len(pixels), -1, h * p_h, w * p_w)


def normalize_patches(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (B, N, P) with mean 0 and deviation 1 in each patch, and that mean and deviation (B, N, 1)."""
    mean, variance = pixels.mean(-1, keepdim=True), pixels.var(-1, keepdim=True)
    deviation = (variance + 1e-6).sqrt()
    return (pixels - mean) / deviation, mean, deviation
