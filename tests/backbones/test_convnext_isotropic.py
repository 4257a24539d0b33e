"""Isotropic ConvNeXt: size, arithmetic against a few plain lines, and what timm asks of a model."""

from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn import functional as F

from vil_lightning.backbones import ConvNeXtIsotropic
from vil_lightning.backbones.convnext_isotropic import checkpoint_filter_fn

SMALL, BASE = "convnext_isotropic_small_patch16_224", "convnext_isotropic_base_patch16_224"


def build(**kwargs: Any) -> ConvNeXtIsotropic:
    return timm.create_model(SMALL, **{"img_size": 64, "embed_dim": 32, "depth": 3, "num_classes": 10, **kwargs}).eval()


def images(batch: int = 2, height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(batch, 3, height, width)


@pytest.mark.parametrize(("name", "dim", "millions"), [(SMALL, 384, 22), (BASE, 768, 87)])
def test_parameters__as_published(name: str, dim: int, millions: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    stem = 3 * 16 * 16 * dim + dim
    block = (7 * 7 * dim + dim) + 2 * dim + (dim * 4 * dim + 4 * dim) + (4 * dim * dim + dim)
    count = sum(p.numel() for p in model.parameters())
    assert count == stem + 18 * block + 2 * dim + (dim * 1000 + 1000)
    assert round(count / 1e6) == millions  # arXiv:2201.03545, table 2: 22 M and 87 M
    assert not [name for name, _ in model.named_parameters() if "gamma" in name]


def test_forward__equals_the_formula() -> None:
    model = build(init_values=0.5).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = images().double()
    y = F.conv2d(x, model.stem.weight, model.stem.bias, stride=16)
    for block in model.blocks:
        z = F.conv2d(y, block.conv_dw.weight, block.conv_dw.bias, padding=3, groups=32).permute(0, 2, 3, 1)
        z = F.layer_norm(z, (32,), block.norm.weight, block.norm.bias, 1e-6)
        z = F.gelu(z @ block.mlp.fc1.weight.T + block.mlp.fc1.bias) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
        y = y + (block.gamma * z).permute(0, 3, 1, 2)
    pooled = F.layer_norm(y.mean((2, 3)), (32,), model.norm.weight, model.norm.bias, 1e-6)
    torch.testing.assert_close(model(x), pooled @ model.head.weight.T + model.head.bias, rtol=1e-10, atol=1e-10)


def test_forward__shapes() -> None:
    model = build()
    x = images(2, 64, 96)
    features = model.forward_features(x)
    assert features.shape == (2, 32, 4, 6)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model(x).shape == (2, 10)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), model.forward_head(features, pre_logits=True), rtol=0, atol=0)
    model.reset_classifier(7, "")
    assert model(x).shape == (2, 4, 6, 7)
    assert model.get_classifier() is model.head


def test_grad_checkpointing__changes_neither_output_nor_gradients() -> None:
    model = build().train()
    x = images()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        y = model(x)
        y.square().mean().backward()
        gradients.append([y, *(p.grad for p in model.parameters())])
    assert all(g is not None and g.isfinite().all() for g in gradients[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("kwargs", "name", "shape"),
    [
        ({"patch_size": 8}, "stem.weight", (32, 3, 8, 8)),
        ({"in_chans": 1}, "stem.weight", (32, 1, 16, 16)),
        ({"embed_dim": 48}, "norm.weight", (48,)),
        ({"kernel_size": 5}, "blocks.2.conv_dw.weight", (32, 1, 5, 5)),
        ({"init_values": 1e-6}, "blocks.2.gamma", (32,)),
        ({"num_classes": 4}, "head.weight", (4, 32)),
    ],
)
def test_arguments__change_shapes(kwargs: dict[str, Any], name: str, shape: tuple[int, ...]) -> None:
    assert build(**kwargs).state_dict()[name].shape == shape


def test_arguments__regularisation() -> None:
    x = images()
    for kwargs in ({"drop_rate": 0.5}, {"drop_path_rate": 0.5}):
        model = build(**kwargs).train()
        assert not torch.equal(model(x), model(x)), kwargs
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in build(drop_path_rate=0.2).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"img_size": 100}, "100 x 100 px is not divisible by patch_size=16"),
        ({"kernel_size": 4}, "kernel_size=4 must be odd"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate=1.0 must be in \[0, 1\)"),
        ({"global_pool": "max"}, "global_pool='max' is not known"),
    ],
)
def test_arguments__are_checked(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


def test_input_size__must_be_divisible() -> None:
    with pytest.raises(ValueError, match="64 x 50 px is not divisible"):
        build()(images(1, 64, 50))


def test_features_only__returns_three_maps() -> None:
    model = build(features_only=True)
    maps = model(images(2, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, 32, 4, 6)] * 3
    assert model.feature_info.reduction() == [16] * 3


def test_forward_intermediates__choices() -> None:
    model = build()
    nn.init.normal_(model.norm.weight)
    x = images()
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x), rtol=0, atol=0)
    torch.testing.assert_close(maps[-1], final, rtol=0, atol=0)
    assert len(maps) == 3
    first = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(first, maps[:1], rtol=0, atol=0)
    (normed,) = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(normed[:, :, 1, 2], model.norm(final[:, :, 1, 2]))
    as_dict = model.forward_intermediates(x, output_dict=True)
    torch.testing.assert_close(as_dict, {"image_intermediates": maps, "image_features": final}, rtol=0, atol=0)
    with pytest.raises(ValueError, match="output_fmt='NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_layers__for_learning_rate_decay() -> None:
    model = build()
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert layers["stem.weight"] == 0
    assert [layers[f"blocks.{i}.conv_dw.weight"] for i in range(3)] == [1, 2, 3]
    assert layers["norm.weight"] == layers["head.bias"] == 4
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse["blocks.0.norm.weight"] == coarse["blocks.2.norm.weight"] == 1
    assert model.no_weight_decay() == set()


def test_published_names__are_translated() -> None:
    model = build()
    own = model.state_dict()
    back = {".conv_dw.": ".dwconv.", ".mlp.fc1.": ".pwconv1.", ".mlp.fc2.": ".pwconv2."}
    published = {}
    for name, value in own.items():
        for here, there in back.items():
            name = name.replace(here, there)
        published[name] = value
    assert published.keys() != own.keys()
    translated = checkpoint_filter_fn({"model": published}, model)
    assert translated.keys() == own.keys()
    assert checkpoint_filter_fn(own, model).keys() == own.keys()
