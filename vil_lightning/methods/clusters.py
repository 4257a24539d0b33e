"""Clusters of patches in a fixed order, and encoders in which no token sees a later cluster.

A grid of h x w patches is cut into squares of c x c patches. Clusters follow one another row by row, and so do the patches
inside each: this is the order of the sequence.

What keeps a ViL from looking ahead. The scans: all of them run forward along the sequence (`block_design: unidirectional`). The
convolution: `causal1d` looks back along the sequence; `conv2d`, whose 3 x 3 patches reach into later clusters, counts those as
zeros (`ClusterLayout`), so that its weights stay those of the ordinary network. All else acts on each token alone.
In a ViT a mask keeps attention from later clusters; its class and register tokens see one another only, or they would pass on
what they see.

Letters: `B` images, `N` patches, `K` clusters in the sequence, `M = K c²` their patches, `C` channels, `D` encoder width.
"""

from typing import Any, NamedTuple

import torch
from timm.models._manipulate import checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from vil_lightning.backbones import VisionLSTM
from vil_lightning.backbones.layers import ClassTokens, DepthwiseConv2d
from vil_lightning.backbones.vision_lstm import Scan
from vil_lightning.errors import ConfigError
from vil_lightning.methods.backbone import BackboneConfig
from vil_lightning.methods.masked import check_maskable


def to_clusters(x: Tensor, grid_size: tuple[int, int], cluster_size: int) -> Tensor:
    """Patches (B, N, C), row by row -> (B, N, C), cluster by cluster."""
    h, w = grid_size
    x = x.unflatten(1, (h // cluster_size, cluster_size, w // cluster_size, cluster_size))
    return x.transpose(2, 3).flatten(1, 4)


def from_clusters(x: Tensor, grid_size: tuple[int, int], cluster_size: int) -> Tensor:
    """Undoes `to_clusters`."""
    h, w = grid_size
    x = x.unflatten(1, (h // cluster_size, w // cluster_size, cluster_size, cluster_size))
    return x.transpose(2, 3).flatten(1, 4)


def cluster_mask(num_clusters: int, cluster_size: int, device: torch.device | str = "cpu") -> Tensor:
    """(M, M), True where the patch of the column is of the same cluster as that of the row, or of an earlier one."""
    cluster = torch.arange(num_clusters, device=device).repeat_interleave(cluster_size**2)
    return cluster[None, :] <= cluster[:, None]


class ClusterLayout(NamedTuple):
    """The layout of a sequence of clusters, for the blocks of a ViL; stands in for `backbones.layers.Layout`.

    To the convolution each cluster is an image of its own, with a rim of neighbouring patches as wide as the kernel reaches.
    Those of later clusters, and what lies outside the image, are zeros.

    Args:
        h: Height of such an image: c and twice the rim.
        w: Its width.
        rim: Width of the rim.
        sources: (K h w,): which patch of the sequence each patch of these images is; M for none.
        cls: There are no class tokens.
    """

    h: int
    w: int
    rim: int
    sources: Tensor
    cls: ClassTokens = ClassTokens()

    @property
    def seq_len(self) -> int:
        return len(self.sources) // (self.h * self.w) * (self.h - 2 * self.rim) * (self.w - 2 * self.rim)

    def of_images(self, images: Tensor) -> "ClusterLayout":
        """The layout of some images of a batch: all have the same."""
        return self

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, C) -> patches (B, M, C) and class tokens (B, 0, C)."""
        return x, x[:, :0]

    def join(self, patches: Tensor, cls_tokens: Tensor) -> Tensor:
        """Undoes `split`."""
        return patches

    def to_grid(self, patches: Tensor) -> Tensor:
        """(B, M, C) -> (B K, h, w, C)."""
        nothing_too = F.pad(patches, (0, 0, 0, 1))
        return nothing_too.index_select(1, self.sources).reshape(-1, self.h, self.w, patches.shape[2])

    def from_grid(self, image: Tensor) -> Tensor:
        """(B K, h, w, C) -> (B, M, C), without the rims."""
        num_clusters = len(self.sources) // (self.h * self.w)
        inside = image[:, self.rim : self.h - self.rim, self.rim : self.w - self.rim]
        return inside.flatten(1, 2).unflatten(0, (-1, num_clusters)).flatten(1, 2)


def cluster_layout(
    grid_size: tuple[int, int], cluster_size: int, num_clusters: int, rim: int, device: torch.device | str = "cpu"
) -> ClusterLayout:
    """The layout of the first `num_clusters` clusters of a grid."""
    (h, w), side = grid_size, cluster_size + 2 * rim
    place = from_clusters(torch.arange(h * w)[None, :, None], grid_size, cluster_size).view(h, w)  # in the sequence
    place = F.pad(place, (rim, rim, rim, rim), value=h * w)
    sources = place.unfold(0, side, cluster_size).unfold(1, side, cluster_size).flatten(0, 1)[:num_clusters]
    later = sources // cluster_size**2 > torch.arange(num_clusters)[:, None, None]  # what lies outside is later, too
    sources = sources.masked_fill(later, num_clusters * cluster_size**2)
    return ClusterLayout(side, side, rim, sources.flatten().to(device, non_blocking=True))


def encode_clusters(backbone: nn.Module, images: Tensor, cluster_size: int, depths: list[int]) -> list[Tensor]:
    """Tokens of all clusters but the last, each from what is in its own cluster and earlier ones.

    Args:
        backbone: After `check_causal`.
        images: (B, 3, H, W).
        cluster_size: Its square divides the grid.
        depths: After how many blocks to take them.

    Returns:
        (B, M, D) for each depth; after the final norm where that is the last block.
    """
    network: Any = backbone
    p_h, p_w = network.patch_embed.patch_size
    grid_size = images.shape[2] // p_h, images.shape[3] // p_w
    num_clusters = grid_size[0] * grid_size[1] // cluster_size**2 - 1
    context: Any  # what every block gets beside the tokens
    if isinstance(network, VisionLSTM):
        x, prefix = network._embed(images)[0], 0
        context = cluster_layout(grid_size, cluster_size, num_clusters, conv_reach(network), x.device)
    else:
        x, prefix = network.norm_pre(network._pos_embed(network.patch_embed(images))), network.num_prefix_tokens
        later = ~F.pad(cluster_mask(num_clusters, cluster_size, x.device), (prefix, 0, prefix, 0))
        later[:, :prefix] = False
        # Added to the scores. (A boolean mask would be added as 0 and 1 by some versions of timm without fused attention.)
        context = torch.zeros(later.shape, dtype=x.dtype, device=x.device).masked_fill(later, -torch.inf)
    patches = to_clusters(x[:, prefix:], grid_size, cluster_size)[:, : num_clusters * cluster_size**2]
    x = torch.cat([x[:, :prefix], patches], dim=1)
    after = {}
    for depth, block in enumerate(network.blocks, start=1):
        x = checkpoint(block, x, context) if network.grad_checkpointing else block(x, context)
        after[depth] = x
    after[len(network.blocks)] = network.norm(x)
    return [after[depth][:, prefix:] for depth in depths]


def conv_reach(backbone: VisionLSTM) -> int:
    """How many patches the convolutions on the grid reach to each side; 0 if there are none."""
    sizes = [module.weight.shape[-1] for module in backbone.modules() if isinstance(module, DepthwiseConv2d)]
    return max(sizes, default=1) // 2


def check_causal(backbone: nn.Module, config: BackboneConfig, method: str) -> None:
    """Refuse backbones in which an earlier cluster could see a later one.

    Raises:
        ConfigError: Naming the key, and what can be used.
    """
    check_maskable(backbone, method)
    key = "model.backbone.kwargs"
    if not isinstance(backbone, VisionLSTM):
        if config.kwargs.get("patch_drop_rate"):
            raise ConfigError(
                f"{method}: {key}.patch_drop_rate leaves patches out at random, but every cluster is needed."
            )
        return
    if any(scan != Scan() for block in backbone.blocks for scan in block.mixer.scans):  # type: ignore[union-attr]
        raise ConfigError(
            f"{method}: {key}.block_design={config.kwargs.get('block_design', 'alternating')} has scans that meet later "
            f"clusters before earlier ones. Set {key}.block_design=unidirectional; fine-tuning can alternate, with these "
            "weights."
        )
    if any(backbone.cls_layout):
        raise ConfigError(
            f"{method}: {key}.global_pool={backbone.global_pool} has class tokens, which have no place in the order of the "
            "clusters. Choose one without, e.g. avg."
        )
