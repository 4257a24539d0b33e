"""Clusters: their order, convolution, attention and a whole encoder against loops over clusters."""

import itertools
from typing import Any

import pytest
import timm
import torch
from test_mae import SMALL, VIT, images
from tiny import VIL
from torch import Tensor, nn

from vil_lightning.backbones.layers import CausalConv1d, DepthwiseConv2d, Layout
from vil_lightning.methods.clusters import (
    cluster_layout,
    cluster_mask,
    conv_reach,
    encode_clusters,
    from_clusters,
    to_clusters,
)

Grid = tuple[int, int]
GRIDS: list[tuple[Grid, int]] = [((4, 4), 2), ((4, 6), 2), ((6, 3), 3), ((2, 3), 1), ((8, 4), 4), ((6, 6), 6)]


def places_of(grid: Grid, side: int) -> list[tuple[int, int, int]]:
    """(row, column, cluster) of every patch in the order of the sequence."""
    h, w = grid
    return [
        (i * side + y, j * side + x, i * (w // side) + j)
        for i, j in itertools.product(range(h // side), range(w // side))
        for y, x in itertools.product(range(side), range(side))
    ]


def convolved_by_loops(
    x: Tensor, conv: DepthwiseConv2d, grid: Grid, side: int, num_clusters: int, ahead: int = 0
) -> Tensor:
    """(B, M, C) -> (B, M, C): a patch adds up the neighbours whose cluster is at most `ahead` later than its own."""
    places = places_of(grid, side)[: num_clusters * side**2]
    known = {(row, column): (n, cluster) for n, (row, column, cluster) in enumerate(places)}
    reach = conv.weight.shape[-1] // 2
    result = []
    for row, column, own in places:
        total = conv.bias.expand(len(x), -1)
        for dy, dx in itertools.product(range(-reach, reach + 1), repeat=2):
            n, cluster = known.get((row + dy, column + dx), (0, own + ahead + 1))
            if cluster <= own + ahead:
                total = total + x[:, n] * conv.weight[:, 0, dy + reach, dx + reach]
        result.append(total)
    return torch.stack(result, dim=1)


class LoopConv(nn.Module):
    """In the place of a network's convolution."""

    def __init__(self, conv: DepthwiseConv2d, *args: Any, ahead: int = 0) -> None:
        super().__init__()
        self.conv, self.args, self.ahead = conv, args, ahead

    def forward(self, x: Tensor, layout: Any, reverse: bool) -> Tensor:
        assert not reverse
        return convolved_by_loops(x, self.conv, *self.args, ahead=self.ahead)


def replace_convolutions(network: nn.Module, *args: Any, ahead: int = 0) -> None:
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, DepthwiseConv2d) and not isinstance(module, LoopConv):
                setattr(module, name, LoopConv(child, *args, ahead=ahead))


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "side"), GRIDS)
def test_to_clusters__order_and_its_inverse(grid: Grid, side: int) -> None:
    x = torch.randn(2, grid[0] * grid[1], 3)
    ordered = to_clusters(x, grid, side)
    for n, (row, column, _) in enumerate(places_of(grid, side)):
        assert torch.equal(ordered[:, n], x[:, row * grid[1] + column])
    assert torch.equal(from_clusters(ordered, grid, side), x)


@pytest.mark.parametrize(("num_clusters", "side"), [(1, 2), (3, 1), (4, 2), (2, 3)])
def test_cluster_mask__own_cluster_and_earlier_ones(num_clusters: int, side: int) -> None:
    mask, patches = cluster_mask(num_clusters, side), num_clusters * side**2
    assert mask.tolist() == [[k // side**2 <= i // side**2 for k in range(patches)] for i in range(patches)]


# --- convolution ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize(("grid", "side"), GRIDS)
def test_convolution__counts_later_clusters_as_zeros(grid: Grid, side: int, kernel_size: int) -> None:
    total = grid[0] * grid[1] // side**2
    conv = DepthwiseConv2d(8, kernel_size).double()
    for num_clusters in {total, max(total - 1, 1), 1}:
        layout = cluster_layout(grid, side, num_clusters, kernel_size // 2)
        x = torch.randn(2, num_clusters * side**2, 8).double()
        assert layout.seq_len == x.shape[1]
        expected = convolved_by_loops(x, conv, grid, side, num_clusters)
        torch.testing.assert_close(conv(x, layout, False), expected, rtol=1e-12, atol=1e-12)


def test_convolution__of_one_cluster_is_the_ordinary_one() -> None:
    conv, x = DepthwiseConv2d(8).double(), torch.randn(2, 36, 8).double()
    one = conv(x, cluster_layout((6, 6), 6, 1, 1), False)
    torch.testing.assert_close(one, conv(x, Layout(6, 6), False), rtol=1e-12, atol=1e-12)


def test_convolution__refuses_another_number_of_tokens() -> None:
    with pytest.raises(ValueError, match="17 tokens"):
        DepthwiseConv2d(8)(torch.zeros(1, 17, 8), cluster_layout((4, 4), 2, 4, 1), False)


# --- encoders ---------------------------------------------------------------------------------------------------------


def vil(**kwargs: Any) -> Any:
    settings = {
        **SMALL,
        "depth": 3,
        "block_design": "unidirectional",
        "drop_path_rate": 0.0,
        "num_classes": 0,
        **kwargs,
    }
    return timm.create_model(VIL, **settings).double().eval()


@pytest.mark.parametrize(("grid", "side"), [((4, 4), 2), ((4, 6), 2), ((6, 3), 3), ((2, 3), 1)])
@pytest.mark.parametrize("kwargs", [{}, {"share_conv": False, "use_v_conv": True, "conv_kernel_size": 5}], ids=str)
def test_encode_clusters__conv2d(kwargs: dict[str, Any], grid: Grid, side: int) -> None:
    network, x = vil(img_size=(4 * grid[0], 4 * grid[1]), **kwargs), images(4 * grid[0], 4 * grid[1]).double()
    num_clusters = grid[0] * grid[1] // side**2 - 1
    middle, last = encode_clusters(network, x, side, [2, 3])
    replace_convolutions(network, grid, side, num_clusters)
    tokens = network._embed(x)[0]
    tokens = torch.stack([tokens[:, row * grid[1] + column] for row, column, _ in places_of(grid, side)], dim=1)
    tokens = tokens[:, : num_clusters * side**2]
    for depth, block in enumerate(network.blocks, start=1):
        tokens = block(tokens, Layout(1, tokens.shape[1]))
        if depth == 2:
            torch.testing.assert_close(middle, tokens, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last, network.norm(tokens), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("grid", "side"), [((4, 4), 2), ((6, 3), 3)])
def test_encode_clusters__causal1d_is_the_network_on_reordered_patches(grid: Grid, side: int) -> None:
    network = vil(img_size=(4 * grid[0], 4 * grid[1]), conv_kind="causal1d", conv_kernel_size=4)
    x = images(4 * grid[0], 4 * grid[1]).double()
    assert isinstance(network.blocks[0].mixer.branches[0].conv, CausalConv1d)
    assert conv_reach(network) == 0
    tokens = network._embed(x)[0]
    tokens = torch.stack([tokens[:, row * grid[1] + column] for row, column, _ in places_of(grid, side)], dim=1)
    for block in network.blocks:
        tokens = block(tokens, Layout(1, tokens.shape[1]))
    (actual,) = encode_clusters(network, x, side, [3])
    torch.testing.assert_close(actual, network.norm(tokens)[:, : -(side**2)], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "kwargs", "prefix"),
    [
        ("vit_tiny_patch16_224", {}, 1),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, 0),
        ("deit_tiny_distilled_patch16_224", {}, 2),
        ("vit_tiny_patch16_224", {"reg_tokens": 2, "pre_norm": True, "no_embed_class": True}, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("fused", [True, False])
def test_encode_clusters__vit(name: str, kwargs: dict[str, Any], prefix: int, fused: bool) -> None:
    network = timm.create_model(name, num_classes=0, **{**VIT, "img_size": (16, 24), **kwargs}).double().eval()
    for block in network.blocks:
        block.attn.fused_attn = fused
    x, grid, side = images(16, 24).double(), (4, 6), 2
    (actual,) = encode_clusters(network, x, side, [2])
    tokens = network.norm_pre(network._pos_embed(network.patch_embed(x)))
    front, patches = tokens[:, :prefix], tokens[:, prefix:]
    clusters = [
        torch.stack([patches[:, row * 6 + column] for row, column, own in places_of(grid, side) if own == k], dim=1)
        for k in range(5)
    ]
    for block in network.blocks:  # a cluster is the end of a sequence that goes no further
        clusters = [block(torch.cat([front, *clusters[: k + 1]], dim=1))[:, -4:] for k in range(5)]
        front = block(front) if prefix else front
    torch.testing.assert_close(actual, network.norm(torch.cat(clusters, dim=1)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [(VIL, {"block_design": "unidirectional"}), ("vit_tiny_patch16_224", VIT)],
    ids=["vil", "vit"],
)
def test_encode_clusters__gradient_checkpointing_changes_nothing(name: str, kwargs: dict[str, Any]) -> None:
    network = timm.create_model(name, num_classes=0, **{**SMALL, **kwargs}).double()
    runs = [0]
    network.blocks[0].register_forward_pre_hook(lambda *args: runs.__setitem__(0, runs[0] + 1))
    results = []
    for enable in (False, True):
        network.set_grad_checkpointing(enable)
        x, runs[0] = images().double().requires_grad_(), 0
        (tokens,) = encode_clusters(network, x, 2, [2])
        results.append(
            (tokens.detach(), *torch.autograd.grad(tokens.square().sum(), [x, network.patch_embed.proj.weight]))
        )
        assert runs[0] == 1 + enable  # once more in the backward pass
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_encode_clusters__with_stochastic_depth_that_skips_images() -> None:
    network = vil(drop_path_rate=0.2).train()
    x = images().double()[:1].expand(10, -1, -1, -1)  # ten times the same image
    (out,) = encode_clusters(network, x, 2, [3])
    assert out.isfinite().all()
    different = {tuple(tokens.flatten()[:4].tolist()) for tokens in out}
    assert 1 < len(different) <= 10  # two of ten are left out of each block
