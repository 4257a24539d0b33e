"""The parts a Vision-LSTM block is made of.

Letters: `B` batch, `S` tokens, `D` embed_dim, `E` inner width (2 D), `NH` heads, `DH` head width (E / NH), `h, w` token
grid.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vil_lightning.ops import describe_backend, mlstm

ConvKind = Literal["causal1d", "conv2d"]
Grid = tuple[int, int]


class ClassTokens(NamedTuple):
    """How many class tokens stand before the patches, amid them (after the first ceil(N / 2)) and after them."""

    before: int = 0
    amid: int = 0
    after: int = 0


class Layout(NamedTuple):
    """What the tokens of a sequence are: patches of an `h x w` grid in row-major order, and class tokens.

    With `visible` (B, K), sorted, only those patches of each image are in the sequence (masked pretraining).
    """

    h: int
    w: int
    cls: ClassTokens = ClassTokens()
    visible: Tensor | None = None

    @property
    def seq_len(self) -> int:
        num_patches = self.h * self.w if self.visible is None else self.visible.shape[1]
        return num_patches + sum(self.cls)

    def of_images(self, images: Tensor) -> "Layout":
        """The layout of `x[images]`, for some images (K,) of a batch."""
        return self if self.visible is None else self._replace(visible=self.visible[images])

    @property
    def transposed(self) -> "Layout":
        """The layout of `to_columns(x)`."""
        visible = None if self.visible is None else self._column_places().sort(dim=1).values
        return Layout(self.w, self.h, self.cls, visible)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, C) -> patches (B, N, C) and class tokens (B, n, C)."""
        return split_class_tokens(x, self.cls)

    def join(self, patches: Tensor, cls_tokens: Tensor) -> Tensor:
        """Undoes `split`."""
        if not any(self.cls):
            return patches
        half = (patches.shape[1] + 1) // 2
        before, amid, after = cls_tokens.split(self.cls, dim=1)
        return torch.cat([before, patches[:, :half], amid, patches[:, half:], after], dim=1)

    def to_columns(self, x: Tensor) -> Tensor:
        """(B, S, C) with the patches in column-major order; class tokens keep their places."""
        patches, cls_tokens = self.split(x)
        if self.visible is None:
            patches = patches.unflatten(1, (self.h, self.w)).transpose(1, 2).flatten(1, 2)
        else:
            patches = take_tokens(patches, self._column_places().argsort(dim=1))
        return self.join(patches, cls_tokens)

    def to_grid(self, patches: Tensor) -> Tensor:
        """Patches (B, K, C) -> (B, h, w, C), with zeros where a patch is hidden."""
        if self.visible is not None:
            empty = patches.new_zeros(patches.shape[0], self.h * self.w, patches.shape[2])
            patches = empty.scatter(1, self.visible[..., None].expand_as(patches), patches)
        return patches.unflatten(1, (self.h, self.w))

    def from_grid(self, image: Tensor) -> Tensor:
        """Undoes `to_grid`."""
        patches = image.flatten(1, 2)
        return patches if self.visible is None else take_tokens(patches, self.visible)

    def _column_places(self) -> Tensor:
        """Column-major numbers (B, K) of the visible patches."""
        assert self.visible is not None
        return self.visible % self.w * self.h + self.visible // self.w


def take_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """Tokens (B, K, C) of (B, N, C), by their positions (B, K) in each image."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[2]))


def split_class_tokens(x: Tensor, cls: ClassTokens) -> tuple[Tensor, Tensor]:
    """(B, S, C) -> patches (B, N, C) and class tokens (B, n, C)."""
    if not any(cls):
        return x, x[:, :0]
    num_patches = x.shape[1] - sum(cls)
    half = (num_patches + 1) // 2
    before, first, amid, second, after = x.split([cls.before, half, cls.amid, num_patches - half, cls.after], dim=1)
    return torch.cat([first, second], dim=1), torch.cat([before, amid, after], dim=1)


class BlockDiagonalLinear(nn.Module):
    """Linear map that mixes channels only inside consecutive groups of `block_size` channels.

    The published models use it for q, k and v, with groups of 4.

    Args:
        dim: Width of input and output; a multiple of `block_size`.
    """

    # Small blocks are laid out in dense tiles of this width before the product. At the sizes of ViL-T, one batched
    # product of 16 x 16 tiles took a quarter of the time of the 4 x 4 einsum on a CPU.
    tile_size = 16

    def __init__(self, dim: int, block_size: int = 4, bias: bool = True) -> None:
        super().__init__()
        if dim % block_size:
            raise ValueError(f"BlockDiagonalLinear: dim={dim} is not a multiple of block_size={block_size}.")
        self.dim = dim
        self.weight = nn.Parameter(torch.empty(dim // block_size, block_size, block_size))  # (G, out, in)
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        nn.init.normal_(self.weight, std=math.sqrt(2 / (5 * dim)))

    def forward(self, x: Tensor, num_heads: int | None = None) -> Tensor:
        """(..., dim) -> (..., dim), or with `num_heads` (B, S, dim) -> (B, num_heads, S, dim / num_heads)."""
        num_blocks, block_size, _ = self.weight.shape
        # On a CPU heads lie one after the other in memory: products within heads then copy nothing. GPU kernels read by tokens.
        heads = num_heads if num_heads and x.device.type == "cpu" and num_blocks % num_heads == 0 else 1
        num_tiles = num_blocks // math.gcd(num_blocks // heads, max(self.tile_size // block_size, 1))
        y = x.reshape(-1, num_tiles, self.dim // num_tiles).transpose(0, 1)  # (tiles, ..., tile)
        tiles = self._tiles(num_tiles).transpose(1, 2)
        y = torch.bmm(y, tiles) if self.bias is None else torch.baddbmm(self.bias.view(num_tiles, 1, -1), y, tiles)
        if heads > 1:
            return (
                y.unflatten(0, (heads, -1))
                .transpose(1, 2)
                .reshape(heads, *x.shape[:2], self.dim // heads)
                .transpose(0, 1)
            )
        y = y.transpose(0, 1).reshape(x.shape)
        return y if num_heads is None else y.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    def _tiles(self, num_tiles: int) -> Tensor:
        """The weight as `num_tiles` dense matrices (tiles, out, in)."""
        num_blocks, block_size, _ = self.weight.shape
        in_tile = num_blocks // num_tiles
        # (tiles, r, out, 1, in) * (1, r, 1, r, 1): copies each block to the diagonal of its tile, zeros elsewhere.
        diagonal = torch.eye(in_tile, dtype=self.weight.dtype, device=self.weight.device)
        tiles = self.weight.view(num_tiles, in_tile, block_size, 1, block_size) * diagonal[:, None, :, None]
        return tiles.reshape(num_tiles, in_tile * block_size, in_tile * block_size)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} blocks of {self.weight.shape[1]}, bias={self.bias is not None}"


class CausalConv1d(nn.Module):
    """Depthwise convolution along the scan: a token sees itself and the `kernel_size - 1` tokens scanned before it."""

    def __init__(self, dim: int, kernel_size: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, kernel_size))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _init_depthwise(self.weight, self.bias)

    def forward(self, x: Tensor, layout: Layout, reverse: bool) -> Tensor:
        """(B, S, E) -> (B, S, E). `layout` is not used; it is there to match `DepthwiseConv2d`."""
        past = self.weight.shape[-1] - 1
        # A reversed scan is the mirrored kernel with its padding at the other end: nothing is flipped but the weights.
        weight = self.weight.flip(-1) if reverse else self.weight
        x = F.pad(x.transpose(1, 2), (0, past) if reverse else (past, 0))
        return F.conv1d(x, weight, self.bias, groups=x.shape[1]).transpose(1, 2)


class DepthwiseConv2d(nn.Module):
    """Depthwise convolution on the token grid (version 2 of ViL); zero padding keeps the grid's size."""

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"DepthwiseConv2d: conv_kernel_size={kernel_size} must be odd to keep the grid's size.")
        self.weight = nn.Parameter(torch.empty(dim, 1, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _init_depthwise(self.weight, self.bias)

    def forward(self, x: Tensor, layout: Layout, reverse: bool) -> Tensor:
        """(B, S, E) -> (B, S, E).

        A reversed row-major sequence is the image turned by 180 degrees; turning the kernel instead gives the same
        numbers. Class tokens have no place on the grid: to the kernel they are images of one pixel. Hidden patches are
        zeros, like what lies around the image.
        """
        if x.shape[1] != layout.seq_len:
            raise ValueError(f"DepthwiseConv2d: {x.shape[1]} tokens do not fill a grid of {layout.h} x {layout.w}.")
        patches, cls_tokens = layout.split(x)
        weight = self.weight.flip(-1, -2) if reverse else self.weight
        padding = weight.shape[-1] // 2
        image = layout.to_grid(patches).permute(0, 3, 1, 2)  # (B, E, h, w), channels last in memory
        image = F.conv2d(image, weight, self.bias, padding=padding, groups=weight.shape[0])
        patches = layout.from_grid(image.permute(0, 2, 3, 1))
        if any(layout.cls):
            cls_tokens = cls_tokens * weight[:, 0, padding, padding] + self.bias
        return layout.join(patches, cls_tokens)


def _init_depthwise(weight: Tensor, bias: Tensor) -> None:
    bound = 1 / math.sqrt(weight[0].numel())  # what torch gives its own convolutions
    nn.init.uniform_(weight, -bound, bound)
    nn.init.uniform_(bias, -bound, bound)


class MultiHeadNorm(nn.Module):
    """LayerNorm over the channels of each head on its own, with a gain (and bias) per channel; adds the branch's skip."""

    def __init__(self, dim: int, num_heads: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor, skip: Tensor, residual: Tensor) -> Tensor:
        """(B, NH, S, DH) -> (B, S, NH * DH), with `skip` (NH * DH) times `residual` (B, S, NH * DH) added."""
        heads_first = x.stride(1) > x.stride(0)  # as `mlstm` may return it; a norm would copy it into the other order
        x = x.transpose(0, 1) if heads_first else x
        x = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        x = x.permute(1, 2, 0, 3) if heads_first else x.transpose(1, 2)  # (B, S, NH, DH)
        weight = self.weight.unflatten(0, x.shape[2:])
        residual = residual.contiguous()  # that of a convolution along the scan is not
        added = residual * skip if self.bias is None else torch.addcmul(self.bias, residual, skip)
        # Laid out as its first argument, token by token, so that `flatten` copies nothing.
        return torch.addcmul(added.unflatten(2, x.shape[2:]), x, weight).flatten(2)


class MLSTMBranch(nn.Module):
    """One directed pass over the tokens: convolution, q/k/v, gates, mLSTM, head norm and skip.

    Args:
        dim: Inner width E.
        use_v_conv: Let v read the convolved input, as q and k do, instead of the raw one.
        share_conv: One convolution for q, k (and v); otherwise each has its own. The skip takes q's.
        init_std: Standard deviation of the q, k and v weights.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        conv_kind: ConvKind,
        conv_kernel_size: int,
        use_v_conv: bool,
        share_conv: bool,
        qkv_block_size: int,
        proj_bias: bool,
        norm_bias: bool,
        norm_eps: float,
        init_std: float,
        mlstm_backend: str,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.mlstm_backend = mlstm_backend
        self.init_std = init_std
        self.use_v_conv = use_v_conv
        make_conv = CausalConv1d if conv_kind == "causal1d" else DepthwiseConv2d
        self.conv: CausalConv1d | DepthwiseConv2d = make_conv(dim, conv_kernel_size)
        self.conv_k = None if share_conv else make_conv(dim, conv_kernel_size)
        self.conv_v = make_conv(dim, conv_kernel_size) if use_v_conv and not share_conv else None
        self.q_proj = BlockDiagonalLinear(dim, qkv_block_size, bias=proj_bias)
        self.k_proj = BlockDiagonalLinear(dim, qkv_block_size, bias=proj_bias)
        self.v_proj = BlockDiagonalLinear(dim, qkv_block_size, bias=proj_bias)
        self.igate = nn.Linear(3 * dim, num_heads)  # reads [q; k; v]
        self.fgate = nn.Linear(3 * dim, num_heads)
        self.norm = MultiHeadNorm(dim, num_heads, eps=norm_eps, bias=norm_bias)
        self.skip = nn.Parameter(torch.ones(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for conv in (self.conv, self.conv_k, self.conv_v):
            if conv is not None:
                conv.reset_parameters()
        for proj in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(proj.weight, std=self.init_std)
            if proj.bias is not None:
                nn.init.zeros_(proj.bias)
        nn.init.zeros_(self.igate.weight)
        nn.init.normal_(self.igate.bias, std=0.1)
        nn.init.zeros_(self.fgate.weight)
        with torch.no_grad():
            self.fgate.bias.copy_(torch.linspace(3.0, 6.0, self.num_heads))
        nn.init.ones_(self.norm.weight)
        if self.norm.bias is not None:
            nn.init.zeros_(self.norm.bias)
        nn.init.ones_(self.skip)

    def mlstm_info(self) -> str:
        """For a run's log: which backend computes the mLSTM."""
        return describe_backend(self.mlstm_backend)

    def forward(self, x: Tensor, layout: Layout, reverse: bool) -> Tensor:
        """(B, S, E) -> (B, S, E)."""
        q, k, v, igate, fgate, c = self.project(x, layout, reverse)
        h = mlstm(q, k, v, igate, fgate, reverse=reverse, backend=self.mlstm_backend)
        return self.norm(h, self.skip, c)

    def project(
        self, x: Tensor, layout: Layout, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the mLSTM is given for x (B, S, E), and what the skip adds to its result.

        Returns:
            q, k, v (B, NH, S, DH), input and forget gate pre-activations (B, NH, S), convolved input (B, S, E).
        """
        c = F.silu(self.conv(x, layout, reverse))
        c_k = c if self.conv_k is None else F.silu(self.conv_k(x, layout, reverse))
        c_v = c if self.conv_v is None else F.silu(self.conv_v(x, layout, reverse))
        inputs = c, c_k, c_v if self.use_v_conv else x
        igate, fgate = self._gates(inputs)  # (B, NH, S)
        projections = zip((self.q_proj, self.k_proj, self.v_proj), inputs, strict=True)
        q, k, v = (proj(y, self.num_heads) for proj, y in projections)  # (B, NH, S, DH)
        return q, k, v, igate, fgate, c

    def _gates(self, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Pre-activations (B, NH, S) of both gates, from what q, k and v are computed from (B, S, E).

        The gates are linear in [q; k; v], and these in their inputs: the maps are multiplied first, which costs next to
        nothing. Neither the (B, S, 3 E) concatenation nor a product with it is needed; q and k share theirs. (So what is hooked
        to, or put in the place of, `q_proj`, `k_proj` and `v_proj` does not reach the gates.)
        """
        weight = torch.cat([self.igate.weight, self.fgate.weight])  # (2 NH, 3 E)
        bias = torch.cat([self.igate.bias, self.fgate.bias])
        blocks = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])  # (3 G, out, in)
        # Never in half precision: with fgate around 5, bfloat16 resolves the logarithm of the decay to 2 % only.
        dtype = torch.promote_types(inputs[0].dtype, torch.float32)
        with torch.autocast(inputs[0].device.type, enabled=False):
            weight, bias, blocks = weight.to(dtype), bias.to(dtype), blocks.to(dtype)
            if self.q_proj.bias is not None:
                biases = [proj.bias for proj in (self.q_proj, self.k_proj, self.v_proj)]
                bias = torch.addmv(bias, weight, torch.cat(biases).to(dtype))  # type: ignore[arg-type]
            # Not as products of matrices: hundreds of 4 x 4 ones take longer than this.
            folded = (weight.unflatten(1, blocks.shape[:2])[..., None] * blocks).sum(2)  # (2 NH, 3 G, in)
            q_map, k_map, v_map = folded.flatten(1).chunk(3, dim=1)  # (2 NH, E)
            of_q, of_k, of_v = inputs
            if of_q is of_k:
                gates = F.linear(of_q.to(dtype), q_map + k_map, bias)
            else:
                gates = F.linear(of_q.to(dtype), q_map, bias) + F.linear(of_k.to(dtype), k_map)
            gates = gates + F.linear(of_v.to(dtype), v_map)
        igate, fgate = gates.transpose(1, 2).chunk(2, dim=1)
        return igate, fgate


def images_to_keep(batch: int, drop_rate: float, device: torch.device) -> Tensor | None:
    """Stochastic depth for part of a batch: which images a block is computed for, (K,), sorted; the rest of them skips it.

    K is the number that is nearest to a share `1 - drop_rate` of the batch, always the same, so that nothing waits for the
    device and shapes stay static. Every image is equally likely to be dropped, as with independent draws. What the block
    adds is to be scaled by batch / K.

    Returns:
        None if none or all would be dropped, or a number off the rate by more than 1 % of the batch: then each image has to be
        drawn for. The published training code does the same, but drops the next larger number, 7 of 128 at a rate of 5 %, where
        this drops 6.
    """
    dropped = round(batch * drop_rate)
    if dropped in (0, batch) or abs(dropped / batch - drop_rate) > 0.01:
        return None
    return torch.randperm(batch, device=device)[dropped:].sort().values


def resize_position_embedding(embed: Tensor, grid_size: Grid) -> Tensor:
    """(1, h0, w0, D) -> (1, h, w, D); bicubic, corners not aligned, no antialiasing, as in the published models."""
    if tuple(embed.shape[1:3]) == tuple(grid_size):
        return embed
    dtype = embed.dtype
    image = embed.permute(0, 3, 1, 2).to(torch.promote_types(dtype, torch.float32))
    if (
        torch.are_deterministic_algorithms_enabled()
    ):  # of the gradient of interpolation, GPUs have no deterministic form
        rows, columns = (_bicubic(old, new, image) for old, new in zip(image.shape[2:], grid_size, strict=True))
        with torch.autocast(image.device.type, enabled=False):
            image = rows @ image @ columns.T
    else:
        image = F.interpolate(image, size=tuple(grid_size), mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).to(dtype)


def _bicubic(old: int, new: int, like: Tensor) -> Tensor:
    """Bicubic interpolation of `old` numbers at `new` places as a matrix (new, old)."""
    impulses = torch.eye(old, dtype=like.dtype, device=like.device)[None, None]  # one in each column
    return F.interpolate(impulses, size=(new, old), mode="bicubic", align_corners=False)[0, 0]
