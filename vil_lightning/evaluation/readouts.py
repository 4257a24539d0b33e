"""Read-outs: how the patch tokens of an image become one vector."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vil_lightning.errors import ConfigError
from vil_lightning.methods.backbone import patch_tokens
from vil_lightning.methods.masked import encode_visible

# Of normalised patch tokens (B, S, D), without class tokens: (B, D), or (B, 2D) for `bilateral_concat`.
READOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "bilateral_concat": lambda x: torch.cat([x[:, 0], x[:, -1]], dim=-1),
    "bilateral_avg": lambda x: (x[:, 0] + x[:, -1]) / 2,
    "avg": lambda x: x.mean(dim=1),
    "first": lambda x: x[:, 0],
    "last": lambda x: x[:, -1],
    "max": lambda x: x.amax(dim=1),
}
LAST4 = "/last4"
READOUT_NAMES = (*READOUTS, *(f"{name}{LAST4}" for name in READOUTS))
_OF_MAPS = ("avg", "max")  # the others read the ends of a sequence, and a feature map is none


def read_out(backbone: nn.Module, images: Tensor, names: Sequence[str], shown: float = 1.0) -> dict[str, Tensor]:
    """Read-outs (B, D) of normalised images (B, 3, H, W), by name, in float32.

    They are of the patch tokens that `forward_features` returns; class tokens are left out, also that of a ViT. With `/last4`
    they are of the patch tokens after each of the last four blocks (scans of ViL, stages of a convolutional network; all, if
    there are fewer), passed through the norm that follows the last block, if there is one of their width, and concatenated.

    With `shown` below 1 the network is given the first rows of patches only, and never sees the others.

    Raises:
        ConfigError: If the network has no such read-out.
    """
    if shown < 1:
        if any(name.endswith(LAST4) for name in names):
            raise ConfigError(
                f"readouts: {LAST4} is not computed of images that are shown in part. Use another read-out."
            )
        tokens = encode_visible(backbone, images, first_rows(backbone, images, shown)).float()
        return {name: READOUTS[name](tokens) for name in names}
    if any(name.endswith(LAST4) for name in names):
        if not hasattr(backbone, "forward_intermediates"):
            raise ConfigError(f"readouts: {type(backbone).__name__} shows no intermediate layers, which {LAST4} reads.")
        depth = len(backbone.feature_info)  # type: ignore[arg-type]
        output, layers = backbone.forward_intermediates(images, indices=min(4, depth), norm=False)  # type: ignore[operator]
    else:
        output, layers = backbone.forward_features(images), []  # type: ignore[operator]
    refused = [name for name in names if name.removesuffix(LAST4) not in _OF_MAPS]
    if output.ndim == 4 and refused:
        raise ConfigError(
            f"readouts: {', '.join(refused)} read the first and last of a sequence of tokens, but {type(backbone).__name__} "
            f"computes a feature map. Use {', '.join(_OF_MAPS)}, with or without {LAST4}."
        )
    tokens = patch_tokens(backbone, output).float()
    norm = getattr(backbone, "norm", None)
    last4 = [_normalised(norm, layer.flatten(2).transpose(1, 2)).float() for layer in layers]
    return {
        name: torch.cat([READOUTS[name.removesuffix(LAST4)](x) for x in last4], dim=-1)
        if name.endswith(LAST4)
        else READOUTS[name](tokens)
        for name in names
    }


def first_rows(backbone: nn.Module, images: Tensor, shown: float) -> Tensor:
    """Numbers (B, K) of the patches in the upper part of images: `shown` of the rows, rounded up."""
    height, width = backbone.patch_embed.patch_size  # type: ignore[union-attr, misc]
    rows, columns = images.shape[-2] // int(height), images.shape[-1] // int(width)
    count = max(1, math.ceil(shown * rows - 1e-9)) * columns
    return torch.arange(count, device=images.device).expand(len(images), -1)


def _normalised(norm: Any, tokens: Tensor) -> Tensor:
    """Stages of a hierarchical network are of other widths than its last norm."""
    fits = isinstance(norm, nn.LayerNorm) and tuple(norm.normalized_shape) == tuple(tokens.shape[-1:])
    return norm(tokens) if fits else tokens
