"""Vision Mamba (Vim) as timm models, in plain torch; the published weights load by their own names.

Papers:
    Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model.
        Zhu et al. 2024, arXiv:2401.09417
    Mamba: Linear-Time Sequence Modeling with Selective State Spaces. Gu and Dao 2023, arXiv:2312.00752
Official code (architecture facts and published weights): hustvl/Vim

A Vim is a patch embedding, a class token in the middle of the row-major patches, and `depth` gated Mamba blocks, each of
which scans the tokens from both ends. There is no attention and no MLP; the classifier reads the class token.

Letters: `B` batch, `M` patches, `S = M + 1` tokens, `D` embed_dim, `E` inner width (expand · D), `N` d_state,
`R` rank of the step size (D / 16), `h, w` patch grid.
"""

import math
import re
from collections.abc import Callable
from typing import Any, cast

import torch
from timm.layers import DropPath, lecun_normal_, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from vil_lightning.backbones.layers import Grid, resize_position_embedding
from vil_lightning.backbones.vision_lstm import PatchEmbed, _choice, _pair
from vil_lightning.backbones.weights import checkpoint_filter_fn
from vil_lightning.ops import SELECTIVE_SCAN_BACKENDS, selective_scan

__all__ = ["VisionMamba"]


# --- the class token in the middle ------------------------------------------------------------------------------------


def split_middle(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B, M + 1, D) -> patches (B, M, D) and the class token (B, 1, D), which follows the first M // 2 patches."""
    middle = (x.shape[1] - 1) // 2
    return torch.cat([x[:, :middle], x[:, middle + 1 :]], dim=1), x[:, middle : middle + 1]


def join_middle(patches: Tensor, cls_token: Tensor) -> Tensor:
    """Undoes `split_middle`."""
    middle = patches.shape[1] // 2
    return torch.cat([patches[:, :middle], cls_token, patches[:, middle:]], dim=1)


def resize_middle_position_embedding(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Position table (1, h0 w0 + 1, D) -> (1, h w + 1, D): the patches' rows are resampled, the class token's kept.

    The published fine-tuning to stride 8 took row 0 for the class token's and so shifted half of the table by one patch;
    its weights come with a table of their own size and need no resizing.
    """
    if tuple(old) == tuple(new):
        return table
    patches, cls_row = split_middle(table)
    patches = resize_position_embedding(patches.unflatten(1, tuple(old)), new).flatten(1, 2)
    return join_middle(patches, cls_row)


@register_notrace_function
def add_class_token_and_positions(patches: Tensor, cls_token: Tensor, table: Tensor, built_for: Grid) -> Tensor:
    """Patches (B, h, w, D) -> tokens (B, S, D)."""
    batch, h, w, _ = patches.shape
    x = join_middle(patches.flatten(1, 2), cls_token.expand(batch, -1, -1))
    return x + resize_middle_position_embedding(table, built_for, (h, w))


# What each pooling makes of normalised tokens (B, S, D).
_POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "middle_cls": lambda x: split_middle(x)[1].squeeze(1),
    "avg": lambda x: split_middle(x)[0].mean(dim=1),
    "": lambda x: x,
}


# --- blocks -----------------------------------------------------------------------------------------------------------


class VimMixer(nn.Module):
    """Up-projection, a selective scan from either end, SiLU gate, down-projection.

    The scans share the projections and have everything else to themselves; the parameters of the one that starts at the
    last token end in `_b`. Both return their results in image order, so their mean can be gated once.

    Args:
        dim: D.
        inner_dim: E.
        d_state: N.
        d_conv: Kernel size of the causal convolution before each scan.
        dt_rank: R.
        scan_backend: See `vil_lightning.ops.selective_scan`.
    """

    def __init__(self, dim: int, inner_dim: int, d_state: int, d_conv: int, dt_rank: int, scan_backend: str) -> None:
        super().__init__()
        self.inner_dim, self.d_state, self.d_conv, self.dt_rank = inner_dim, d_state, d_conv, dt_rank
        self.scan_backend = scan_backend
        self.A_log = nn.Parameter(torch.empty(inner_dim, d_state))
        self.D = nn.Parameter(torch.empty(inner_dim))
        self.A_b_log = nn.Parameter(torch.empty(inner_dim, d_state))
        self.D_b = nn.Parameter(torch.empty(inner_dim))
        self.in_proj = nn.Linear(dim, 2 * inner_dim, bias=False)
        self.conv1d = nn.Conv1d(inner_dim, inner_dim, d_conv, groups=inner_dim)
        self.x_proj = nn.Linear(inner_dim, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, inner_dim)
        self.conv1d_b = nn.Conv1d(inner_dim, inner_dim, d_conv, groups=inner_dim)
        self.x_proj_b = nn.Linear(inner_dim, dt_rank + 2 * d_state, bias=False)
        self.dt_proj_b = nn.Linear(dt_rank, inner_dim)
        self.out_proj = nn.Linear(inner_dim, dim, bias=False)

    def reset_parameters(self, depth: int) -> None:
        """Draw all parameters as the published code does; `depth` is the number of blocks on the residual stream."""
        for module in self.children():  # uniform within 1 / sqrt(fan_in), as torch does
            cast("nn.Linear | nn.Conv1d", module).reset_parameters()
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(depth)
            for A_log in (self.A_log, self.A_b_log):
                A_log.copy_(torch.arange(1, self.d_state + 1).log().expand_as(A_log))
            # Steps drawn log-uniformly from [0.001, 0.1], through the inverse of the softplus.
            low, high = math.log(1e-3), math.log(1e-1)
            step = torch.empty_like(self.dt_proj.bias).uniform_(low, high).exp().clamp(min=1e-4)
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))
        # As published, by oversight or not: the scan from the end starts with steps of softplus(0) = 0.69.
        nn.init.zeros_(self.dt_proj_b.bias)
        nn.init.ones_(self.D)
        nn.init.ones_(self.D_b)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x, gate = self.in_proj(x).chunk(2, dim=-1)  # (B, S, E) each
        forwards = self._scan(x, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D, reverse=False)
        backwards = self._scan(x, self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b, reverse=True)
        return self.out_proj((forwards + backwards) / 2 * F.silu(gate))

    def _scan(
        self, x: Tensor, conv: nn.Conv1d, x_proj: nn.Linear, dt_proj: nn.Linear, A_log: Tensor, D: Tensor, reverse: bool
    ) -> Tensor:
        """(B, S, E) -> (B, S, E)."""
        x = F.silu(_causal_conv(x, conv, reverse))
        dt, B, C = x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        # Never in half precision: at the initial biases, around -5, bfloat16 resolves the step size to 2 % only.
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            delta = F.softplus(F.linear(dt.to(dtype), dt_proj.weight.to(dtype), dt_proj.bias.to(dtype)))
            A = -torch.exp(A_log.to(dtype))
        y = selective_scan(x, delta, A, B, C, reverse=reverse, backend=self.scan_backend)
        return y + D * x


def _causal_conv(x: Tensor, conv: nn.Conv1d, reverse: bool) -> Tensor:
    """(B, S, E) -> (B, S, E): a token sees itself and those scanned just before it."""
    past = conv.kernel_size[0] - 1
    # A reversed scan is the mirrored kernel with its padding at the other end: nothing is flipped but the weights.
    weight = conv.weight.flip(-1) if reverse else conv.weight
    x = F.pad(x.transpose(1, 2), (0, past) if reverse else (past, 0))
    return F.conv1d(x, weight, conv.bias, groups=conv.groups).transpose(1, 2)


@register_notrace_module
class VimBlock(nn.Module):
    """x + DropPath(Mixer(RMSNorm(x))).

    The published code carries (output, sum) pairs from block to block to fuse the addition with the next norm, which is
    the same computation.
    """

    def __init__(self, dim: int, mixer: VimMixer, norm_eps: float, drop_path: float) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = nn.RMSNorm(dim, eps=norm_eps)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mixer(self.norm(x)))


class VisionMamba(nn.Module):
    """Vision Mamba with two scans per block and the class token in the middle, as in all published models.

    Args:
        img_size: Input size in px, an int or (H, W); multiples of `patch_size`.
        patch_size: Patch size in px.
        stride: Distance of neighbouring patches in px; `patch_size` if None. Smaller means overlapping patches.
        num_classes: Width of the classifier; 0 for none, then the model returns the pooled vector.
        global_pool: Read-out of the tokens: `middle_cls` the class token (published), `avg` the mean of the patches, ""
            all tokens, the class token among them.
        embed_dim: Width D.
        depth: Number of blocks.
        d_state: States per channel, N.
        d_conv: Kernel size of the causal convolutions.
        expand: Inner width E as a multiple of D.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth; the rate grows linearly from 0 in the first block to this in the last.
        norm_eps: eps of all norms.
        scan_backend: See `vil_lightning.ops.selective_scan`.
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
        global_pool: str = "middle_cls",
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-5,
        scan_backend: str = "auto",
        dynamic_img_size: bool = True,
    ) -> None:
        super().__init__()
        _choice("scan_backend", scan_backend, SELECTIVE_SCAN_BACKENDS)
        _choice("global_pool", global_pool, _POOLINGS)
        for name, value in (("depth", depth), ("d_state", d_state), ("d_conv", d_conv), ("expand", expand)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={drop_path_rate} must be in [0, 1).")

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.depth = depth
        self.num_prefix_tokens = 0  # the class token does not come first: see `split_tokens`
        self.grad_checkpointing = False

        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        patch_size = _pair(patch_size)
        patch_embed = PatchEmbed(
            _pair(img_size),
            patch_size,
            _pair(stride) if stride is not None else patch_size,
            in_chans,
            embed_dim,
            dynamic_img_size,
        )
        # One row per token, the class token's in the middle.
        self.pos_embed = nn.Parameter(torch.empty(1, patch_embed.num_patches + 1, embed_dim))
        self.patch_embed = patch_embed
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        blocks = []
        for i in range(depth):
            mixer = VimMixer(
                embed_dim,
                expand * embed_dim,
                d_state=d_state,
                d_conv=d_conv,
                dt_rank=math.ceil(embed_dim / 16),
                scan_backend=scan_backend,
            )
            blocks.append(VimBlock(embed_dim, mixer, norm_eps, drop_path_rate * i / max(depth - 1, 1)))
        self.layers = nn.ModuleList(blocks)
        self.norm_f = nn.RMSNorm(embed_dim, eps=norm_eps)
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]
        self.init_weights()

    # --- initialisation ---------------------------------------------------------------------------------------------

    def init_weights(self) -> None:
        """Draw all parameters anew, as the published code does."""
        proj = self.patch_embed.proj
        lecun_normal_(proj.weight)
        nn.init.zeros_(proj.bias)  # type: ignore[arg-type]
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        for block in cast("list[VimBlock]", self.layers):
            block.mixer.reset_parameters(self.depth)
            block.norm.reset_parameters()
        self.norm_f.reset_parameters()
        self._init_head()

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    # --- what timm asks of a model ----------------------------------------------------------------------------------

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """As in the published runs, which do decay `A_log`, a matrix (`D` and biases are vectors)."""
        return {"pos_embed", "cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """Layers for layer-wise learning-rate decay: stem, then each block, then head.

        The norm after the blocks and the head share the last group. With `coarse`, all blocks are one group.
        """

        def layer_of(name: str) -> tuple[float, ...]:
            if name.startswith(("patch_embed", "pos_embed", "cls_token")):
                return (0.0,)
            block = re.match(r"layers\.(\d+)\.", name + ".")
            if block:
                return (1.0,) if coarse else (1.0, float(block[1]))
            return (math.inf,)

        return layer_of

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier."""
        if global_pool is not None:
            _choice("global_pool", global_pool, _POOLINGS)
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self._init_head()
        reference = self.patch_embed.proj.weight
        self.head.to(device=reference.device, dtype=reference.dtype).train(self.training)

    @torch.jit.ignore
    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change the resolution the model is built for, resampling position embedding (and patch projection)."""
        embed = self.patch_embed
        old_grid = embed.grid_size
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
        size = _pair(img_size) if img_size is not None else embed.img_size
        embed.check_img_size(size)
        embed.img_size = size
        with torch.no_grad():
            resized = resize_middle_position_embedding(self.pos_embed, old_grid, embed.grid_size)
        self.pos_embed = nn.Parameter(resized.clone(), requires_grad=self.pos_embed.requires_grad)

    @torch.jit.ignore
    def resize_pos_embed(self, table: Tensor) -> Tensor:
        """A position table (1, M0 + 1, D) of a square grid resampled to this model's; any other is returned as it is."""
        side = math.isqrt(max(table.shape[1] - 1, 0)) if table.ndim == 3 else 0
        if side == 0 or table.shape[1] != side**2 + 1 or table.shape == self.pos_embed.shape:
            return table
        return resize_middle_position_embedding(table, (side, side), self.patch_embed.grid_size)

    # --- forward ----------------------------------------------------------------------------------------------------

    def split_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, S, D) -> patches (B, M, D) in row-major order, and the class token (B, 1, D)."""
        return split_middle(x)

    def _embed(self, x: Tensor) -> tuple[Tensor, Grid]:
        """(B, C, H, W) -> tokens (B, S, D), and the patch grid (h, w)."""
        patches = self.patch_embed(x)
        tokens = add_class_token_and_positions(patches, self.cls_token, self.pos_embed, self.patch_embed.grid_size)
        return tokens, (patches.shape[1], patches.shape[2])

    def _block(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(block, x)
        return block(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> all tokens (B, S, D), the class token amid the patches, after the norm that follows the blocks."""
        x, _ = self._embed(x)
        for block in self.layers:
            x = self._block(block, x)
        return self.norm_f(x)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens (B, S, D) -> (B, D); all tokens for `global_pool=""`."""
        return _POOLINGS[self.global_pool if pool_type is None else pool_type](x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.pool(x))
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
        """Patch tokens after chosen blocks; the interface of timm's transformers.

        Args:
            x: Images (B, C, H, W).
            indices: The last n blocks if an int, all if None, otherwise the blocks (0-based) to return.
            return_prefix_tokens: Return pairs (patches, class token (B, 1, D)).
            norm: Apply the final norm to every intermediate.
            stop_early: Do not run blocks after the last one asked for.
            output_fmt: `NCHW` for (B, D, h, w) or `NLC` for (B, M, D), patches only.
            intermediates_only: Return only the list of intermediates.
            output_dict: Return a dictionary with `image_features` and `image_intermediates`.

        Returns:
            (final tokens (B, S, D), list of intermediates), unless changed by the last two arguments.
        """
        _choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        x, grid_size = self._embed(x)
        intermediates: list[Any] = []
        for i, block in enumerate(self.layers[: max_index + 1] if stop_early else self.layers):
            x = self._block(block, x)
            if i in take_indices:
                y, cls_token = self.split_tokens(self.norm_f(x) if norm else x)
                if output_fmt == "NCHW":
                    y = y.transpose(1, 2).unflatten(-1, grid_size).contiguous()
                intermediates.append((y, cls_token) if return_prefix_tokens else y)
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": intermediates}
            if not intermediates_only:
                result["image_features"] = self.norm_f(x)
            return result
        return intermediates if intermediates_only else (self.norm_f(x), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] | tuple[int, ...] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what is not needed for the given intermediates; returns their indices."""
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: max_index + 1]
        self.feature_info = self.feature_info[: max_index + 1]
        if prune_norm:
            self.norm_f = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices


# --- registered models ------------------------------------------------------------------------------------------------


def _cfg(repository: str, file: str, **kwargs: Any) -> dict[str, Any]:
    return dict(
        hf_hub_id=f"hustvl/{repository}",
        hf_hub_filename=file,
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=None,
        crop_pct=0.875,
        interpolation="bicubic",
        fixed_input_size=False,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        first_conv="patch_embed.proj",
        classifier="head",
        license="apache-2.0",
        **kwargs,
    )


# The files hold two sets of weights, of which `model` is loaded, not the average `model_ema`; which of them has the published
# accuracy is not documented. timm's reader of local files (`pretrained_cfg_overlay={"file": ...}`) prefers the average.
default_cfgs = generate_default_cfgs(
    {
        "vim_tiny_patch16_224.in1k": _cfg("Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth"),
        "vim_tiny_patch16_224.in1k_stride8": _cfg("Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth"),
        "vim_small_patch16_224.in1k": _cfg("Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth"),
        "vim_small_patch16_224.in1k_stride8": _cfg("Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth"),
        "vim_base_patch16_224.in1k": _cfg("Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth"),
    }
)


def _create(variant: str, pretrained: bool, embed_dim: int, kwargs: dict[str, Any]) -> VisionMamba:
    args = {"embed_dim": embed_dim, "depth": 24, **kwargs}
    tag = args.get("pretrained_cfg")
    if isinstance(tag, str) and tag.endswith("stride8"):
        args.setdefault("stride", 8)  # what these weights were trained with
    return build_model_with_cfg(
        VisionMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (-3, -2, -1), "feature_cls": "getter"},
        **args,
    )


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti."""
    return _create("vim_tiny_patch16_224", pretrained, 192, kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S."""
    return _create("vim_small_patch16_224", pretrained, 384, kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-B."""
    return _create("vim_base_patch16_224", pretrained, 768, kwargs)
