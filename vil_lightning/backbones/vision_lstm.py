"""Vision-LSTM (ViL), versions 1 and 2, as timm models.

Papers:
    Vision-LSTM: xLSTM as Generic Vision Backbone. Alkin et al. 2024, arXiv:2406.04303
    xLSTM: Extended Long Short-Term Memory. Beck et al. 2024, arXiv:2405.04517
Official code (architecture facts and published weights): NX-AI/vision-lstm

A ViL is a patch embedding followed by `depth` gated mLSTM blocks that scan the patches in turn from the top left and
from the bottom right. There is no attention and no MLP; the read-out uses the first and the last patch. The other block
designs and read-outs of the paper's ablations are data: `BLOCK_DESIGNS` and `_POOLINGS`.

Letters: `B` batch, `S` tokens, `D` embed_dim, `E` inner width (2 D), `h, w` token grid.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
from timm.layers import DropPath, LayerScale, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_module
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from vil_lightning.backbones.layers import (
    ClassTokens,
    ConvKind,
    Grid,
    Layout,
    MLSTMBranch,
    images_to_keep,
    resize_position_embedding,
    split_class_tokens,
)
from vil_lightning.backbones.weights import checkpoint_filter_fn
from vil_lightning.ops import MLSTM_BACKENDS

__all__ = ["VisionLSTM"]

WeightInit = Literal["published", "fixed"]


class Scan(NamedTuple):
    """The order in which a branch visits the tokens: along rows or columns, from the top left or the bottom right."""

    columns: bool = False
    reverse: bool = False


class BlockDesign(NamedTuple):
    """Which scans each block makes. Blocks take the entries of `cycle` in turn; a block sums its scans.

    With `shared`, all scans of a block use one set of parameters (one `MLSTMBranch`), otherwise each has its own.
    """

    cycle: tuple[tuple[Scan, ...], ...]
    shared: bool = False


_ROWS, _ROWS_REVERSED = Scan(), Scan(reverse=True)
_COLUMNS, _COLUMNS_REVERSED = Scan(columns=True), Scan(columns=True, reverse=True)
_QUAD = (_ROWS, _ROWS_REVERSED, _COLUMNS, _COLUMNS_REVERSED)

# The published training code takes the columns of an image for those of a grid floor(sqrt(S)) wide, whatever its real
# width, and cannot combine columns with conv2d, odd numbers of tokens or class tokens. Here columns are the image's.
BLOCK_DESIGNS = {
    "alternating": BlockDesign(((_ROWS,), (_ROWS_REVERSED,))),
    "unidirectional": BlockDesign(((_ROWS,),)),
    "bidirectional": BlockDesign(((_ROWS, _ROWS_REVERSED),)),
    "bidirectional_shared": BlockDesign(((_ROWS, _ROWS_REVERSED),), shared=True),
    "quaddirectional": BlockDesign((_QUAD,)),
    "quaddirectional_shared": BlockDesign((_QUAD,), shared=True),
    "alternating_quad": BlockDesign(tuple((scan,) for scan in _QUAD)),
}


class Pooling(NamedTuple):
    """A read-out of normalised tokens (B, S, D), and how many times D its result is wide.

    One that reads class tokens says in `cls` where they are inserted; they are learned, and get no position embedding.
    """

    read: Callable[[Tensor], Tensor]
    width: int = 1
    cls: ClassTokens = ClassTokens()


def _ends_concat(x: Tensor) -> Tensor:
    return torch.cat([x[:, 0], x[:, -1]], dim=-1)


def _ends_average(x: Tensor) -> Tensor:
    return (x[:, 0] + x[:, -1]) / 2


def _middle(x: Tensor) -> Tensor:
    # Index S // 2, as published: on an even grid a patch at the left edge, not the centre. A class token amid N patches is
    # there, too: ceil(N / 2) == (N + 1) // 2.
    return x[:, x.shape[1] // 2]


_POOLINGS = {
    "bilateral_concat": Pooling(_ends_concat, width=2),
    "bilateral_avg": Pooling(_ends_average),
    "avg": Pooling(lambda x: x.mean(dim=1)),
    "middle_patch": Pooling(_middle),
    "first": Pooling(lambda x: x[:, 0]),
    "last": Pooling(lambda x: x[:, -1]),
    "middle_cls": Pooling(_middle, cls=ClassTokens(amid=1)),
    "first_cls": Pooling(lambda x: x[:, 0], cls=ClassTokens(before=1)),
    "last_cls": Pooling(lambda x: x[:, -1], cls=ClassTokens(after=1)),
    "bilateral_cls_concat": Pooling(_ends_concat, width=2, cls=ClassTokens(before=1, after=1)),
    "bilateral_cls_avg": Pooling(_ends_average, cls=ClassTokens(before=1, after=1)),
    "": Pooling(lambda x: x),
}


def _pair(value: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    if isinstance(value, bool):  # which is an int to Python
        raise ValueError(f"A size of {value} is not known: img_size, patch_size and stride are numbers of px.")
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _choice(name: str, value: str, allowed: Any) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known. Available: {', '.join(repr(a) for a in allowed)}.")


@register_notrace_module
class PatchEmbed(nn.Module):
    """Image to patch vectors (B, C, H, W) -> (B, h, w, D). With `stride < patch_size` the patches overlap.

    Args:
        img_size: (H, W) the model is built for; only checked against the input if `dynamic_img_size` is off.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: tuple[int, int],
        stride: tuple[int, int],
        in_chans: int,
        embed_dim: int,
        dynamic_img_size: bool,
    ) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = patch_size
        self.stride = stride
        self.dynamic_img_size = dynamic_img_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=stride)
        self.check_img_size(img_size)

    def check_img_size(self, img_size: tuple[int, int]) -> None:
        for name, size, patch in zip(("height", "width"), img_size, self.patch_size, strict=True):
            if size % patch or size < patch:
                nearest = max(patch, round(size / patch) * patch)
                raise ValueError(
                    f"Image {name} {size} of img_size={tuple(img_size)} is not divisible by patch_size={patch} "
                    f"({size} % {patch} = {size % patch}). Use a multiple of {patch}, e.g. {nearest}."
                )

    def feat_grid(self, img_size: tuple[int, int]) -> Grid:
        """Token grid (h, w) of an image of the given (H, W)."""
        h, w = ((s - p) // t + 1 for s, p, t in zip(img_size, self.patch_size, self.stride, strict=True))
        return h, w

    @property
    def grid_size(self) -> Grid:
        return self.feat_grid(self.img_size)

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        return max(self.stride) if as_scalar else self.stride

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[-2], x.shape[-1])
        if size != self.img_size:
            if not self.dynamic_img_size:
                raise ValueError(
                    f"Input of {size[0]} x {size[1]} px does not match img_size={self.img_size}. Pass "
                    "dynamic_img_size=True to interpolate the position embedding, or call set_input_size()."
                )
            self.check_img_size(size)
        # Contiguous, because the blocks' sums keep the strides of this, and their norms would copy each time.
        return self.proj(x).permute(0, 2, 3, 1).contiguous()


@register_notrace_module
class PositionEmbedding(nn.Module):
    """Learned position embedding on a fixed grid, interpolated (bicubic) to whatever grid comes in."""

    def __init__(self, grid_size: Grid, embed_dim: int) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(1, *grid_size, embed_dim))
        trunc_normal_(self.embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h, w, D)."""
        return x + resize_position_embedding(self.embed, (x.shape[1], x.shape[2]))


class ViLMixer(nn.Module):
    """Up-projection, mLSTM scans, SiLU gate, down-projection.

    Every scan returns its result in image order, so their sum can be gated once.

    Args:
        branches: One per scan, or a single one that all scans share.
    """

    def __init__(
        self, dim: int, inner_dim: int, scans: tuple[Scan, ...], branches: list[MLSTMBranch], bias: bool
    ) -> None:
        super().__init__()
        self.scans = scans
        self.proj_up = nn.Linear(dim, 2 * inner_dim, bias=bias)
        self.branches = nn.ModuleList(branches)
        self.proj_down = nn.Linear(inner_dim, dim, bias=bias)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x, gate = self.proj_up(x).chunk(2, dim=-1)  # (B, S, E) each
        y = []
        if any(not scan.columns for scan in self.scans):
            y.append(self._sum_scans(x, layout, columns=False))
        if any(scan.columns for scan in self.scans):
            by_column = self._sum_scans(layout.to_columns(x), layout.transposed, columns=True)
            y.append(layout.transposed.to_columns(by_column))  # the transposed grid's columns are the rows
        return self.proj_down(functools.reduce(torch.add, y) * F.silu(gate))

    def _sum_scans(self, x: Tensor, layout: Layout, columns: bool) -> Tensor:
        results = [
            self.branches[i % len(self.branches)](x, layout, scan.reverse)
            for i, scan in enumerate(self.scans)
            if scan.columns == columns
        ]
        return functools.reduce(torch.add, results)


@register_notrace_module
class ViLBlock(nn.Module):
    """x + DropPath(LayerScale(Mixer(LayerNorm(x)))).

    Where the batch allows it, dropped images are not computed instead of multiplied by 0, see `images_to_keep`.
    """

    def __init__(
        self, dim: int, mixer: ViLMixer, norm_eps: float, norm_bias: bool, init_values: float | None, drop_path: float
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_eps, bias=norm_bias)
        self.mixer = mixer
        self.ls = LayerScale(dim, init_values=init_values) if init_values is not None else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        if self.training and isinstance(self.drop_path, DropPath):
            kept = images_to_keep(x.shape[0], self.drop_path.drop_prob, x.device)
            if kept is not None:
                y = self._branch(x.index_select(0, kept), layout.of_images(kept))
                return x.index_add(0, kept, y.to(x.dtype), alpha=x.shape[0] / kept.shape[0])
        return x + self.drop_path(self._branch(x, layout))

    def _branch(self, x: Tensor, layout: Layout) -> Tensor:
        return self.ls(self.mixer(self.norm(x), layout))


class VisionLSTM(nn.Module):
    """Vision-LSTM.

    The defaults are version 2 (ViL2); the registered `vil_*` models set what version 1 does differently.

    Args:
        img_size: Input size in px, an int or (H, W); multiples of `patch_size`.
        patch_size: Patch size in px.
        stride: Distance of neighbouring patches in px; `patch_size` if None. Smaller means overlapping patches.
        num_classes: Width of the classifier; 0 for none, then the model returns the pooled vector.
        global_pool: Read-out of the tokens, one of `_POOLINGS`. The `…_concat` ones are 2 D wide, the others D; the `…_cls…`
            ones insert learned class tokens; "" returns all tokens.
        embed_dim: Width D.
        depth: Number of scans: 24 in tiny, small and base, counted as 12 pairs by the published version-2 code.
        num_heads: Heads of the mLSTM; 4 in all published models.
        block_design: Which directions the blocks scan in; one of `BLOCK_DESIGNS`. With any of them there are `depth` blocks.
        conv_kind: Convolution before q and k: `conv2d` on the grid (version 2), `causal1d` along the scan (version 1).
        conv_kernel_size: 3 in version 2, 4 in version 1.
        use_v_conv: Let v read the convolved input, too (an ablation of the paper).
        share_conv: One convolution for q, k (and v), or one for each (an ablation).
        qkv_block_size: Width of the blocks of the block-diagonal q, k and v maps.
        proj_bias: Biases in the up, down, q, k and v projections (version 2).
        norm_bias: Biases in the norms of and after the blocks (version 2).
        init_values: Initial LayerScale, or None for none (all published models).
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth.
        drop_path_decay: Let the rate grow linearly from 0 with depth, instead of using it in every block.
        norm_eps: eps of the norms inside the blocks.
        final_norm_eps: eps of the norm after the last block.
        head_norm_eps: eps of the norm between pooling and classifier.
        weight_init: `published` draws the down-projections with the standard deviation of the published runs,
            2 / sqrt(D); `fixed` with the one that was meant, 2 / (depth sqrt(D)).
        mlstm_backend: See `vil_lightning.ops.mlstm`.
        dynamic_img_size: Accept inputs of other sizes than `img_size` by interpolating the position embedding.

    Raises:
        ValueError: For any value that does not fit, naming what would.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "bilateral_concat",
        embed_dim: int = 192,
        depth: int = 24,
        num_heads: int = 4,
        block_design: str = "alternating",
        conv_kind: ConvKind = "conv2d",
        conv_kernel_size: int = 3,
        use_v_conv: bool = False,
        share_conv: bool = True,
        qkv_block_size: int = 4,
        proj_bias: bool = True,
        norm_bias: bool = True,
        init_values: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_path_decay: bool = False,
        norm_eps: float = 1e-5,
        final_norm_eps: float = 1e-6,
        head_norm_eps: float = 1e-5,
        weight_init: WeightInit = "published",
        mlstm_backend: str = "auto",
        dynamic_img_size: bool = True,
    ) -> None:
        super().__init__()
        _choice("block_design", block_design, BLOCK_DESIGNS)
        _choice("conv_kind", conv_kind, ("conv2d", "causal1d"))
        _choice("mlstm_backend", mlstm_backend, MLSTM_BACKENDS)
        _choice("weight_init", weight_init, ("published", "fixed"))
        _choice("global_pool", global_pool, _POOLINGS)
        inner_dim = math.ceil(2 * embed_dim / 64) * 64
        if inner_dim % num_heads or inner_dim % qkv_block_size:
            raise ValueError(
                f"num_heads={num_heads} and qkv_block_size={qkv_block_size} must divide the inner width {inner_dim} "
                f"(2 * embed_dim={embed_dim}, rounded up to a multiple of 64)."
            )
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={drop_path_rate} must be in [0, 1).")
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1.")

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.embed_dim = self.num_features = embed_dim
        self.depth = depth
        self.num_prefix_tokens = 0  # class tokens, if any, need not come first: see `split_tokens`
        self.weight_init = weight_init
        self.grad_checkpointing = False

        patch_size = _pair(patch_size)
        self.patch_embed = PatchEmbed(
            _pair(img_size),
            patch_size,
            _pair(stride) if stride is not None else patch_size,
            in_chans,
            embed_dim,
            dynamic_img_size,
        )
        # As published, the embedding has one entry per non-overlapping patch, whatever the stride.
        self.pos_embed = PositionEmbedding(self._pos_embed_grid(), embed_dim)

        self.cls_layout = _POOLINGS[global_pool].cls
        num_cls = sum(self.cls_layout)
        self.cls_tokens = nn.Parameter(torch.zeros(1, num_cls, embed_dim)) if num_cls else None

        cycle, shared = BLOCK_DESIGNS[block_design]
        init_std = math.sqrt(2 / (5 * embed_dim))  # "small init" of the model width, for q, k and v as well
        blocks = []
        for i in range(depth):
            scans = cycle[i % len(cycle)]
            branches = [
                MLSTMBranch(
                    inner_dim,
                    num_heads,
                    conv_kind=conv_kind,
                    conv_kernel_size=conv_kernel_size,
                    use_v_conv=use_v_conv,
                    share_conv=share_conv,
                    qkv_block_size=qkv_block_size,
                    proj_bias=proj_bias,
                    norm_bias=norm_bias,
                    norm_eps=norm_eps,
                    init_std=init_std,
                    mlstm_backend=mlstm_backend,
                )
                for _ in (scans[:1] if shared else scans)
            ]
            mixer = ViLMixer(embed_dim, inner_dim, scans, branches, bias=proj_bias)
            drop_path = drop_path_rate * i / max(depth - 1, 1) if drop_path_decay else drop_path_rate
            blocks.append(ViLBlock(embed_dim, mixer, norm_eps, norm_bias, init_values, drop_path))
        self.blocks = nn.ModuleList(blocks)
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]

        self.norm = nn.LayerNorm(embed_dim, eps=final_norm_eps, bias=norm_bias)
        self._head_norm_eps = head_norm_eps
        self.fc_norm: nn.Module = nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self._build_head()
        self.init_weights()

    # --- initialisation ---------------------------------------------------------------------------------------------

    def init_weights(self) -> None:
        """Draw all parameters anew, as `weight_init` says."""
        proj = self.patch_embed.proj
        nn.init.xavier_uniform_(proj.weight.view(proj.weight.shape[0], -1))
        nn.init.zeros_(proj.bias)  # type: ignore[arg-type]
        trunc_normal_(self.pos_embed.embed, std=0.02)
        if self.cls_tokens is not None:
            nn.init.normal_(self.cls_tokens, std=0.02)
        down_std = 2 / math.sqrt(self.embed_dim) / (self.depth if self.weight_init == "fixed" else 1)
        for block in cast("list[ViLBlock]", self.blocks):
            mixer = block.mixer
            nn.init.normal_(mixer.proj_up.weight, std=math.sqrt(2 / (5 * self.embed_dim)))
            nn.init.normal_(mixer.proj_down.weight, std=down_std)
            for linear in (mixer.proj_up, mixer.proj_down):
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
            for branch in cast("list[MLSTMBranch]", mixer.branches):
                branch.reset_parameters()
            block.norm.reset_parameters()
        self.norm.reset_parameters()
        self._init_head()

    def _build_head(self) -> None:
        width = self.head_hidden_size
        if self.global_pool == "" and self.num_classes == 0:
            self.fc_norm = nn.Identity()  # bare features: nothing untrained after the final norm
        else:
            self.fc_norm = nn.LayerNorm(width, eps=self._head_norm_eps)
        self.head = nn.Linear(width, self.num_classes) if self.num_classes > 0 else nn.Identity()

    def _init_head(self) -> None:
        if isinstance(self.fc_norm, nn.LayerNorm):
            self.fc_norm.reset_parameters()
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=2e-5)
            nn.init.zeros_(self.head.bias)

    def _pos_embed_grid(self) -> Grid:
        embed = self.patch_embed
        return embed.img_size[0] // embed.patch_size[0], embed.img_size[1] // embed.patch_size[1]

    # --- what timm asks of a model ----------------------------------------------------------------------------------

    @property
    def head_hidden_size(self) -> int:
        """Width of the pooled vector."""
        return self.embed_dim * _POOLINGS[self.global_pool].width

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed.embed"} if self.cls_tokens is None else {"pos_embed.embed", "cls_tokens"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """Layers for layer-wise learning-rate decay: stem, then pairs of scans (a transformer's block), then head.

        The norm after the blocks and the head share the last group. With `coarse`, all blocks are one group.
        """

        def layer_of(name: str) -> tuple[float, ...]:
            if name.startswith(("patch_embed", "pos_embed", "cls_tokens")):
                return (0.0,)
            block = re.match(r"blocks\.(\d+)\.", name + ".")
            if block:
                return (1.0,) if coarse else (1.0, float(int(block[1]) // 2))
            return (math.inf,)

        return layer_of

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; the norm before it is kept unless the pooled width changes."""
        if global_pool is not None:
            _choice("global_pool", global_pool, _POOLINGS)
            if global_pool != "" and _POOLINGS[global_pool].cls != self.cls_layout:
                raise ValueError(
                    f"global_pool={global_pool!r} needs other class tokens than this model has (it was built with "
                    f"{self.global_pool!r}). Build the model with it instead."
                )
            self.global_pool = global_pool
        self.num_classes = num_classes
        old_norm, reference = self.fc_norm, self.patch_embed.proj.weight
        self._build_head()
        self._init_head()
        norms = isinstance(old_norm, nn.LayerNorm) and isinstance(self.fc_norm, nn.LayerNorm)
        if norms and old_norm.normalized_shape == self.fc_norm.normalized_shape:
            self.fc_norm = old_norm
        for module in (self.fc_norm, self.head):
            module.to(device=reference.device, dtype=reference.dtype).train(self.training)

    @torch.jit.ignore
    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change the resolution the model is built for, resampling position embedding (and patch projection)."""
        embed = self.patch_embed
        if patch_size is not None and _pair(patch_size) != embed.patch_size:
            from timm.layers import resample_patch_embed

            new, old = _pair(patch_size), embed.patch_size
            if embed.stride != old:
                raise ValueError(
                    f"set_input_size: cannot change patch_size={old} of a model with stride={embed.stride}; "
                    "build it with the new patch_size and stride instead."
                )
            proj = nn.Conv2d(embed.proj.in_channels, self.embed_dim, kernel_size=new, stride=new)
            proj = proj.to(embed.proj.weight)
            with torch.no_grad():
                proj.weight.copy_(resample_patch_embed(embed.proj.weight, list(new), verbose=False))
                proj.bias.copy_(embed.proj.bias)  # type: ignore[union-attr,arg-type]
            embed.proj, embed.patch_size, embed.stride = proj, new, new
            for info in self.feature_info:
                info["reduction"] = embed.feat_ratio()
        if img_size is not None:
            embed.img_size = _pair(img_size)
        embed.check_img_size(embed.img_size)
        with torch.no_grad():
            resized = resize_position_embedding(self.pos_embed.embed, self._pos_embed_grid())
        self.pos_embed.embed = nn.Parameter(resized.clone(), requires_grad=self.pos_embed.embed.requires_grad)

    # --- forward ----------------------------------------------------------------------------------------------------

    def _embed(
        self,
        x: Tensor,
        visible: Tensor | None = None,
        hidden: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> tuple[Tensor, Layout]:
        """(B, C, H, W) -> tokens (B, S, D), patches in row-major order, and what they are."""
        x = self.patch_embed(x)
        grid_size = (x.shape[1], x.shape[2])
        masked = visible is not None or hidden is not None
        if masked and self.patch_embed.stride != self.patch_embed.patch_size:
            raise ValueError(
                f"Patches of {self.patch_embed.patch_size} px every {self.patch_embed.stride} px overlap: visible ones would "
                "show the pixels of hidden ones. Build the model without stride to mask patches."
            )
        if (hidden is None) != (mask_token is None) or (visible is not None and hidden is not None):
            raise ValueError("Pass either visible, or hidden together with mask_token.")
        if hidden is not None and mask_token is not None:
            x = torch.where(hidden.view(-1, *grid_size, 1), mask_token.to(x.dtype), x)
        layout = Layout(*grid_size, self.cls_layout, visible)
        x = layout.from_grid(self.pos_embed(x))
        if self.cls_tokens is not None:
            x = layout.join(x, self.cls_tokens.expand(x.shape[0], -1, -1))
        return x, layout

    def split_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, S, D) -> patches (B, N, D) in row-major order, and class tokens (B, n, D), mostly n = 0."""
        return split_class_tokens(x, self.cls_layout)

    def _block(self, block: nn.Module, x: Tensor, layout: Layout) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(block, x, layout)
        return block(x, layout)

    def forward_features(
        self,
        x: Tensor,
        visible: Tensor | None = None,
        *,
        hidden: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """(B, C, H, W) -> all tokens (B, S, D) after the norm that follows the blocks.

        Args:
            x: Images.
            visible: Positions (B, K) of the patches to look at, sorted; None for all. Only these pass through the blocks.
            hidden: Mask (B, N), True = hidden, of which images may have unequal numbers. All patches pass through the blocks,
                with `mask_token` in the place of hidden ones.
            mask_token: (D,), for `hidden`.
        """
        x, layout = self._embed(x, visible, hidden, mask_token)
        for block in self.blocks:
            x = self._block(block, x, layout)
        return self.norm(x)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens (B, S, D) -> (B, head_hidden_size); all tokens for `global_pool=""`."""
        return _POOLINGS[self.global_pool if pool_type is None else pool_type].read(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Tokens after chosen scans; the interface of timm's transformers.

        Args:
            x: Images (B, C, H, W).
            indices: The last n scans if an int, all if None, otherwise the scans (0-based) to return.
            return_prefix_tokens: Return pairs (patches, class tokens (B, n, D)), if the model has class tokens.
            norm: Apply the final norm to every intermediate.
            stop_early: Do not run scans after the last one asked for.
            output_fmt: `NCHW` for (B, D, h, w) or `NLC` for (B, N, D), patches only.
            intermediates_only: Return only the list of intermediates.
            output_dict: Return a dictionary with `image_features` and `image_intermediates`.

        Returns:
            (final tokens (B, S, D), list of intermediates), unless changed by the last two arguments.
        """
        _choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        x, layout = self._embed(x)
        intermediates = []
        for i, block in enumerate(self.blocks[: max_index + 1] if stop_early else self.blocks):
            x = self._block(block, x, layout)
            if i in take_indices:
                y, cls_tokens = layout.split(self.norm(x) if norm else x)
                if output_fmt == "NCHW":
                    y = y.transpose(1, 2).unflatten(-1, (layout.h, layout.w)).contiguous()
                intermediates.append((y, cls_tokens) if return_prefix_tokens and any(layout.cls) else y)
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": intermediates}
            if not intermediates_only:
                result["image_features"] = self.norm(x)
            return result
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] | tuple[int, ...] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what is not needed for the given intermediates; returns their indices."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        self.feature_info = self.feature_info[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices


# --- registered models ------------------------------------------------------------------------------------------------

_VERSION_1: dict[str, Any] = {
    "conv_kind": "causal1d",
    "conv_kernel_size": 4,
    "proj_bias": False,
    "norm_bias": False,
    "global_pool": "bilateral_avg",
    "final_norm_eps": 1e-5,
    "head_norm_eps": 1e-6,
}
# eps as in the published hub models; the training code has the two last ones the other way round.
_VERSION_2: dict[str, Any] = {
    "conv_kind": "conv2d",
    "conv_kernel_size": 3,
    "proj_bias": True,
    "norm_bias": True,
    "global_pool": "bilateral_concat",
    "final_norm_eps": 1e-6,
    "head_norm_eps": 1e-5,
}


def _cfg(file: str = "", **kwargs: Any) -> dict[str, Any]:
    # Documented location of the published weights (README of NX-AI/vision-lstm).
    url = f"https://ml.jku.at/research/vision_lstm/download/{file}" if file else ""
    return dict(
        url=url,
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=None,
        crop_pct=1.0,
        interpolation="bicubic",
        fixed_input_size=False,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        first_conv="patch_embed.proj",
        classifier="head",
        license="mit",
        **kwargs,
    )


# The hub's `vil-tinyplus-stride8` points to the file of the model without stride, so no tag is made for it.
default_cfgs = generate_default_cfgs(
    {
        "vil_tiny_patch16_224.in1k": _cfg("vil_tiny16_e800_in1k.th"),
        "vil_tiny_patch16_224.in1k_e400": _cfg("vil_tiny16_e400_in1k.th"),
        "vil_tinyplus_patch16_224.in1k": _cfg("vil_tinyplus16_e800_in1k.th"),
        "vil_tinyplus_patch16_224.in1k_e400": _cfg("vil_tinyplus16_e400_in1k.th"),
        "vil_small_patch16_224.in1k": _cfg("vil_small16_e400_in1k.th"),
        "vil_smallplus_patch16_224.in1k": _cfg("vil_smallplus16_e400_in1k.th"),
        "vil_smallplus_patch16_224.in1k_stride8": _cfg("vil_smallplus16_e400_in1k_stride8.th"),
        "vil_base_patch16_224.in1k": _cfg("vil_base16_e400_in1k.th"),
        "vil_base_patch16_224.in1k_stride8": _cfg("vil_base16_e400_in1k_stride8.th"),
        "vil2_tiny_patch16_224.in1k": _cfg("vil2_tiny16_e800_in1k.th"),
        "vil2_tiny_patch16_224.in1k_e400": _cfg("vil2_tiny16_e400_in1k.th"),
        "vil2_small_patch16_224.in1k": _cfg("vil2_small16_e400_in1k.th"),
        "vil2_base_patch16_224.in1k": _cfg("vil2_base16_e400_in1k.th"),
    }
)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> VisionLSTM:
    args = {**defaults, **kwargs}
    tag = args.get("pretrained_cfg")
    if isinstance(tag, str) and tag.endswith("stride8"):
        args.setdefault("stride", 8)  # what these weights were trained with
    return build_model_with_cfg(
        VisionLSTM,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (-3, -2, -1), "feature_cls": "getter"},
        **args,
    )


@register_model
def vil_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-T, version 1."""
    return _create("vil_tiny_patch16_224", pretrained, dict(_VERSION_1, embed_dim=192, depth=24), kwargs)


@register_model
def vil_tinyplus_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-T+, version 1: as many parameters as Vim-T."""
    return _create("vil_tinyplus_patch16_224", pretrained, dict(_VERSION_1, embed_dim=192, depth=29), kwargs)


@register_model
def vil_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-S, version 1."""
    return _create("vil_small_patch16_224", pretrained, dict(_VERSION_1, embed_dim=384, depth=24), kwargs)


@register_model
def vil_smallplus_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-S+, version 1: 24.6 M parameters, though the paper's table rounds it to Vim-S's 26 M."""
    return _create("vil_smallplus_patch16_224", pretrained, dict(_VERSION_1, embed_dim=384, depth=26), kwargs)


@register_model
def vil_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-B, version 1."""
    return _create("vil_base_patch16_224", pretrained, dict(_VERSION_1, embed_dim=768, depth=24), kwargs)


@register_model
def vil2_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-T, version 2."""
    return _create("vil2_tiny_patch16_224", pretrained, dict(_VERSION_2, embed_dim=192, depth=24), kwargs)


@register_model
def vil2_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-S, version 2."""
    return _create("vil2_small_patch16_224", pretrained, dict(_VERSION_2, embed_dim=384, depth=24), kwargs)


@register_model
def vil2_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-B, version 2."""
    return _create("vil2_base_patch16_224", pretrained, dict(_VERSION_2, embed_dim=768, depth=24), kwargs)
