"""UperNet: a decoder that turns the features of a plain backbone into a segmentation.

Xiao et al. 2018, Unified Perceptual Parsing for Scene Understanding, arXiv:1807.10221. Widths, pyramid and initialisation are
those of the segmentation code of NX-AI/vision-lstm (the paper of ViL). Not there: backbones of other depths than 24 (ViL) and
12 (ViT).

Letters: `B` images, `C` classes, `D` width of the backbone, `h, w` patch grid.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_POOL_SIDES = (1, 2, 3, 6)
_CONV_STD = 0.02


def pyramid_blocks(depth: int) -> list[int]:
    """The four blocks (0-based) whose outputs are decoded: after 1/3, 1/2, 2/3 and all of them.

    7, 11, 15 and 23 of ViL's 24 scans (after pairs 4, 6, 8 and 12), 3, 5, 7 and 11 of a ViT's 12 blocks.
    """
    return [max(round(depth * share) - 1, 0) for share in (1 / 3, 1 / 2, 2 / 3, 1)]


def decoder_width(dim: int) -> int:
    """192 for tiny backbones (D = 192), 384 for small and base ones."""
    return 192 if dim <= 192 else 384


class Pyramid(nn.Module):
    """Four maps of one size to four sizes: enlarged 4 and 2 times, as it is, and halved."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        four, two = dims[:2]
        self.levels = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(four, four, kernel_size=2, stride=2),
                    nn.BatchNorm2d(four),
                    nn.GELU(),
                    nn.ConvTranspose2d(four, four, kernel_size=2, stride=2),
                ),
                nn.ConvTranspose2d(two, two, kernel_size=2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True),  # a grid of one patch stays one
            ]
        )
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps (B, D, h, w) -> (B, D, 4 h, 4 w), (B, D, 2 h, 2 w), (B, D, h, w), (B, D, h / 2, w / 2)."""
        return [level(one) for level, one in zip(self.levels, maps, strict=True)]


class UperNet(nn.Module):
    """Pyramid, decoder and auxiliary head.

    A pyramid pooling module reads the smallest map at four scales; from there, information flows to the larger ones, and all
    of them together make the logits. The auxiliary head reads the third map alone; it only helps training.

    Args:
        dims: Widths of the four maps of the backbone.
        num_classes: C.
        width: Channels of the decoder and of the auxiliary head.
    """

    def __init__(self, dims: Sequence[int], num_classes: int, width: int) -> None:
        super().__init__()
        self.pyramid = Pyramid(dims)
        self.pools = nn.ModuleList(conv_block(dims[3], width, 1) for _ in _POOL_SIDES)
        self.pool_bottleneck = conv_block(dims[3] + len(_POOL_SIDES) * width, width, 3)
        self.laterals = nn.ModuleList(conv_block(dim, width, 1) for dim in dims[:3])
        self.fpn = nn.ModuleList(conv_block(width, width, 3) for _ in dims[:3])
        self.bottleneck = conv_block(4 * width, width, 3)
        self.classifier = nn.Conv2d(width, num_classes, kernel_size=1)
        self.auxiliary = nn.Sequential(conv_block(dims[2], width, 3), nn.Conv2d(width, num_classes, kernel_size=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # not the transposed ones of the pyramid
                nn.init.normal_(module.weight, std=_CONV_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Four maps (B, D, h, w) -> logits (B, C, 4 h, 4 w), and those of the auxiliary head (B, C, h, w)."""
        levels = self.pyramid(maps)
        paths = [lateral(level) for lateral, level in zip(self.laterals, levels[:3], strict=True)]
        paths.append(self.pool(levels[3]))
        for i in (2, 1, 0):  # from coarse to fine
            paths[i] = paths[i] + resized_like(paths[i + 1], paths[i])
        paths[:3] = [conv(path) for conv, path in zip(self.fpn, paths[:3], strict=True)]
        joined = torch.cat([resized_like(path, paths[0]) for path in paths], dim=1)
        return self.classifier(self.bottleneck(joined)), self.auxiliary(levels[2])

    def pool(self, level: Tensor) -> Tensor:
        """The smallest map (B, D, h, w), with what it is like at four scales: (B, width, h, w)."""
        parts = [
            resized_like(conv(F.adaptive_avg_pool2d(level, side)), level)
            for conv, side in zip(self.pools, _POOL_SIDES, strict=True)
        ]
        return self.pool_bottleneck(torch.cat([level, *parts], dim=1))


def conv_block(dim: int, width: int, kernel_size: int) -> nn.Sequential:
    """Convolution, batch norm and ReLU; the size of the map stays."""
    conv = nn.Conv2d(dim, width, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


def resized_like(x: Tensor, target: Tensor) -> Tensor:
    return F.interpolate(x, size=target.shape[-2:], mode="bilinear")
