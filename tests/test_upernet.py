"""Shapes, wiring and initialisation of UperNet."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vil_lightning.upernet import UperNet, decoder_width, pyramid_blocks


def test_pyramid_blocks__are_those_of_the_published_code() -> None:
    assert pyramid_blocks(24) == [7, 11, 15, 23]  # ViL
    assert pyramid_blocks(12) == [3, 5, 7, 11]  # ViT
    for depth in range(1, 40):
        blocks = pyramid_blocks(depth)
        assert blocks == sorted(blocks)
        assert blocks[0] >= 0
        assert blocks[-1] == depth - 1


def test_decoder_width__by_model_size() -> None:
    assert [decoder_width(dim) for dim in (192, 384, 768)] == [192, 384, 384]


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (1, 3)])
def test_upernet__shapes(grid: tuple[int, int]) -> None:
    network = UperNet([8, 6, 4, 10], num_classes=5, width=12).eval()
    maps = [torch.randn(2, dim, *grid) for dim in (8, 6, 4, 10)]
    logits, auxiliary = network(maps)
    assert logits.shape == (2, 5, 4 * grid[0], 4 * grid[1])
    assert auxiliary.shape == (2, 5, *grid)


def test_upernet__number_of_parameters() -> None:
    dim, width, classes = 192, 192, 150
    block = lambda i, o, k: i * o * k * k + 2 * o  # noqa: E731 - convolution without bias, and batch norm
    transposed = dim * dim * 4 + dim
    pyramid = 3 * transposed + 2 * dim
    pools = 4 * block(dim, width, 1) + block(dim + 4 * width, width, 3)
    fpn = 3 * (block(dim, width, 1) + block(width, width, 3))
    top = block(4 * width, width, 3) + width * classes + classes
    auxiliary = block(dim, width, 3) + width * classes + classes
    network = UperNet([dim] * 4, classes, width)
    assert sum(p.numel() for p in network.parameters()) == pyramid + pools + fpn + top + auxiliary


def test_upernet__initialisation() -> None:
    torch.manual_seed(0)
    network = UperNet([64] * 4, 10, 64)
    assert network.bottleneck[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert network.classifier.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert network.classifier.bias.eq(0).all()
    up = network.pyramid.levels[1]
    assert up.bias.eq(0).all()
    bound = (6 / (2 * 64 * 4)) ** 0.5  # Xavier, uniform
    assert up.weight.abs().max().item() == pytest.approx(bound, rel=0.02)
    assert up.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_upernet__information_flows_from_coarse_to_fine() -> None:
    torch.manual_seed(0)
    network = UperNet([4] * 4, 3, 4).eval()
    maps = [torch.randn(1, 4, 4, 4, requires_grad=True) for _ in range(4)]
    logits, auxiliary = network(maps)
    gradients = torch.autograd.grad(logits.sum(), maps, retain_graph=True)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    of_auxiliary = torch.autograd.grad(auxiliary.sum(), maps, allow_unused=True)
    assert [gradient is not None for gradient in of_auxiliary] == [False, False, True, False]


def test_upernet__decoder_equals_a_longhand_version() -> None:
    torch.manual_seed(0)
    network = UperNet([4] * 4, 3, 6)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    network = network.double().eval()
    maps = [torch.randn(2, 4, 5, 4, dtype=torch.float64) for _ in range(4)]
    with torch.no_grad():
        c1, c2, c3, c4 = network.pyramid(maps)
        assert [tuple(c.shape[2:]) for c in (c1, c2, c3, c4)] == [(20, 16), (10, 8), (5, 4), (3, 2)]
        assert torch.equal(c3, maps[2])
        up = lambda x, size: F.interpolate(x, size=size, mode="bilinear", align_corners=False)  # noqa: E731
        pooled = [c4]
        for conv, side in zip(network.pools, (1, 2, 3, 6), strict=True):
            pooled.append(up(conv(F.adaptive_avg_pool2d(c4, (side, side))), (3, 2)))
        p4 = network.pool_bottleneck(torch.cat(pooled, 1))
        l3 = network.laterals[2](c3) + up(p4, (5, 4))
        l2 = network.laterals[1](c2) + up(l3, (10, 8))
        l1 = network.laterals[0](c1) + up(l2, (20, 16))
        p1, p2, p3 = network.fpn[0](l1), network.fpn[1](l2), network.fpn[2](l3)
        joined = torch.cat([p1, up(p2, (20, 16)), up(p3, (20, 16)), up(p4, (20, 16))], 1)
        expected = network.classifier(network.bottleneck(joined))
        torch.testing.assert_close(network(maps)[0], expected)
