"""What timm expects of every registered model, and what its tools use besides.

Full-size models are built on the meta device where shapes are all that is asked; numbers come from models of depth 4.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import Tensor, nn

import vil_lightning  # noqa: F401  registers the models
from vil_lightning.backbones import VisionLSTM

MODELS = (
    "vil2_base_patch16_224",
    "vil2_small_patch16_224",
    "vil2_tiny_patch16_224",
    "vil_base_patch16_224",
    "vil_small_patch16_224",
    "vil_smallplus_patch16_224",
    "vil_tiny_patch16_224",
    "vil_tinyplus_patch16_224",
)
TINY = ("vil_tiny_patch16_224", "vil2_tiny_patch16_224")
ALL_MODELS = pytest.mark.parametrize("name", MODELS)
BOTH_VERSIONS = pytest.mark.parametrize("name", TINY)


def build(name: str, **kwargs: Any) -> VisionLSTM:
    """A registered model cut to four scans at 64 px."""
    model = timm.create_model(name, **{"img_size": 64, "depth": 4, **kwargs}).eval()
    if isinstance(model, VisionLSTM) and isinstance(model.head, nn.Linear):
        nn.init.normal_(model.head.weight, std=0.1)  # the initial classifier is all but zero and would hide differences
    return model


def images(batch: int = 2, height: int = 64, width: int = 64, in_chans: int = 3) -> Tensor:
    return torch.randn(batch, in_chans, height, width)


def concatenates(name: str) -> bool:
    return timm.create_model(name, depth=1).global_pool == "bilateral_concat"


def test_registered_models__are_the_eight() -> None:
    assert tuple(timm.list_models("vil*")) == MODELS


def test_pretrained_tags__name_documented_files_only() -> None:
    for name in timm.list_pretrained("vil*"):
        file = timm.get_pretrained_cfg(name).url.rpartition("/")[2]
        base, _, tag = name.partition(".")
        size = base.removesuffix("_patch16_224")
        assert file.startswith(size + "16_e"), name
        assert ("stride8" in tag) == file.endswith("_stride8.th")


# --- forward and backward ---------------------------------------------------------------------------------------------


@ALL_MODELS
def test_forward__is_finite_and_equal_with_grad_checkpointing(name: str) -> None:
    model = build(name, depth=2).train()
    x = images(1)
    y = model(x)
    assert y.shape == (1, 1000)
    assert y.isfinite().all()
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-6)


@ALL_MODELS
def test_backward__reaches_every_parameter(name: str) -> None:
    model = build(name, depth=2, num_classes=42).train()
    y = model(images())
    assert y.shape == (2, 42)
    y.square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


# --- default configuration, classifier and pooling --------------------------------------------------------------------


@ALL_MODELS
def test_default_cfg__matches_the_full_size_model(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    cfg, state_dict = model.default_cfg, model.state_dict()
    assert model.num_classes == cfg["num_classes"] == 1000
    assert (
        model.num_features
        == model.embed_dim
        == {"tiny": 192, "small": 384, "base": 768}[re.sub(r"vil2?_([a-z]+?)(plus)?_.*", r"\1", name)]
    )
    assert cfg["input_size"] == (3, 224, 224)
    assert not cfg["fixed_input_size"]
    assert (cfg["mean"], cfg["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (cfg["interpolation"], cfg["crop_pct"]) == ("bicubic", 1.0)
    assert cfg["classifier"] + ".weight" in state_dict
    assert cfg["first_conv"] + ".weight" in state_dict
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])


@ALL_MODELS
def test_classifier__can_be_taken_off(name: str) -> None:
    model = build(name, depth=2)
    x = images()
    features = model.forward_features(x)
    assert features.shape == (2, 16, model.num_features)

    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pre_logits, rtol=0, atol=0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model.num_classes == 0

    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features, rtol=0, atol=0)
    model.reset_classifier(7)
    assert model(x).shape == (2, 16, 7)


@ALL_MODELS
def test_no_classifier__gives_the_pooled_vector(name: str) -> None:
    model = build(name, depth=2, num_classes=0)
    # timm asks for num_features here. Version 2 is published with the first and the last token side by side, so its
    # pooled vector is twice as wide as its tokens and no single num_features can fit both: head_hidden_size says so.
    factor = 2 if name.startswith("vil2") else 1
    assert concatenates(name) == (factor == 2)
    assert model(images()).shape == (2, factor * model.num_features)
    assert model.head_hidden_size == factor * model.num_features


@ALL_MODELS
def test_no_classifier_no_pool__gives_the_tokens(name: str) -> None:
    model = build(name, depth=2, num_classes=0, global_pool="")
    x = images()
    assert model(x).shape == (2, 16, model.num_features)
    torch.testing.assert_close(model(x), model.forward_features(x), rtol=0, atol=0)
    assert not [n for n, _ in model.named_parameters() if n.startswith(("head", "fc_norm"))]


@BOTH_VERSIONS
def test_reset_classifier__keeps_the_norm_unless_its_width_changes(name: str) -> None:
    model = build(name).double().train()
    norm = model.fc_norm
    model.reset_classifier(5)
    assert model.fc_norm is norm
    assert model(images().double()).shape == (2, 5)
    model.reset_classifier(5, "avg" if concatenates(name) else "bilateral_concat")
    assert model.fc_norm is not norm
    assert model.fc_norm.weight.dtype == model.head.weight.dtype == torch.float64
    assert model(images().double()).shape == (2, 5)


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    files = {}
    for name in TINY:
        torch.manual_seed(1)
        files[name] = folder / f"{name}.pth"
        torch.save(build(name, img_size=224).state_dict(), files[name])
    return files


@BOTH_VERSIONS
@pytest.mark.parametrize("kwargs", [{"num_classes": 5}, {"num_classes": 0}, {"in_chans": 1}, {"global_pool": "avg"}])
def test_pretrained__adapts_to_the_model(name: str, kwargs: dict[str, Any], weights_files: dict[str, Path]) -> None:
    overlay = {"file": str(weights_files[name])}
    model = timm.create_model(name, True, pretrained_cfg_overlay=overlay, img_size=64, depth=4, **kwargs)
    saved = torch.load(weights_files[name], weights_only=True)
    key = "blocks.3.mixer.proj_down.weight"
    torch.testing.assert_close(model.state_dict()[key], saved[key])
    in_chans = kwargs.get("in_chans", 3)
    if in_chans == 1:
        expected = saved["patch_embed.proj.weight"].sum(1, keepdim=True)
        torch.testing.assert_close(model.patch_embed.proj.weight, expected)
    width = kwargs.get("num_classes", 1000) or model.head_hidden_size
    assert model(images(in_chans=in_chans)).shape == (2, width)


@BOTH_VERSIONS
def test_pretrained__loads_into_features_only(name: str, weights_files: dict[str, Path]) -> None:
    kwargs: dict[str, Any] = {"img_size": 224, "depth": 4, "pretrained_cfg_overlay": {"file": str(weights_files[name])}}
    extractor = timm.create_model(name, True, features_only=True, out_indices=(3,), **kwargs)
    whole = timm.create_model(name, True, **kwargs)
    x = images(1)
    torch.testing.assert_close(extractor(x)[-1], whole.forward_intermediates(x, intermediates_only=True)[-1])


def test_stride8_tag__builds_the_model_with_stride_8() -> None:
    model = timm.create_model("vil_base_patch16_224.in1k_stride8", depth=1)
    assert model.patch_embed.stride == (8, 8)
    assert model.patch_embed.num_patches == 27 * 27
    assert timm.create_model("vil_base_patch16_224", depth=1).patch_embed.stride == (16, 16)


# --- intermediate features --------------------------------------------------------------------------------------------


@ALL_MODELS
def test_features_only__returns_three_maps(name: str) -> None:
    model = build(name, features_only=True)
    maps = model(images(2, 64, 96))
    assert model.feature_info.channels() == [maps[0].shape[1]] * 3
    assert model.feature_info.reduction() == [16] * 3
    assert [tuple(m.shape[2:]) for m in maps] == [(4, 6)] * 3
    assert all(m.isfinite().all() for m in maps)


def test_features_only__chosen_indices_with_stride_8() -> None:
    model = build("vil_tiny_patch16_224", features_only=True, out_indices=(0, 2), stride=8)
    maps = model(images())
    assert model.feature_info.reduction() == [8, 8]
    assert [tuple(m.shape) for m in maps] == [(2, 192, 7, 7)] * 2


@ALL_MODELS
def test_forward_intermediates__final_equals_forward_features(name: str) -> None:
    model = build(name)
    x = images(2, 64, 96)
    assert len(model.feature_info) >= 3
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x), rtol=0, atol=0)
    assert [tuple(m.shape) for m in maps] == [(2, model.num_features, 4, 6)] * 4
    model.train().set_grad_checkpointing()
    checkpointed, checkpointed_maps = model.forward_intermediates(x)
    torch.testing.assert_close(checkpointed, final)
    torch.testing.assert_close(checkpointed_maps, maps)


@BOTH_VERSIONS
def test_forward_intermediates__formats_and_choices(name: str) -> None:
    model = build(name)
    nn.init.normal_(model.norm.weight)
    x = images(2, 64, 96)
    final, maps = model.forward_intermediates(x)

    tokens = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close([t.transpose(1, 2).unflatten(2, (4, 6)) for t in tokens], maps, rtol=0, atol=0)
    torch.testing.assert_close(model.norm(tokens[-1]), final, rtol=0, atol=0)
    normed = model.forward_intermediates(x, output_fmt="NLC", norm=True, intermediates_only=True)
    torch.testing.assert_close(normed, [model.norm(t) for t in tokens], rtol=0, atol=0)
    last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
    torch.testing.assert_close(last_two, maps[2:], rtol=0, atol=0)
    chosen = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    torch.testing.assert_close(chosen, [maps[0], maps[2]], rtol=0, atol=0)
    as_dict = model.forward_intermediates(x, output_dict=True)
    torch.testing.assert_close(as_dict, {"image_intermediates": maps, "image_features": final}, rtol=0, atol=0)


@BOTH_VERSIONS
def test_forward_intermediates__stop_early_skips_later_scans(name: str) -> None:
    model = build(name)
    x = images()
    expected = model.forward_intermediates(x, intermediates_only=True)[1]
    model.blocks[2].forward = None  # would fail if called
    (actual,) = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_forward_intermediates__unknown_format() -> None:
    with pytest.raises(ValueError, match=r"output_fmt='NHWC' is not known. Available: 'NCHW', 'NLC'"):
        build(TINY[0]).forward_intermediates(images(), output_fmt="NHWC")


@BOTH_VERSIONS
def test_prune_intermediate_layers__keeps_what_is_asked_for(name: str) -> None:
    model = build(name)
    x = images()
    expected = model.forward_intermediates(x, intermediates_only=True)[1]
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert len(model.blocks) == len(model.feature_info) == 2
    assert isinstance(model.norm, nn.Identity)
    assert isinstance(model.head, nn.Identity)
    assert not list(model.fc_norm.parameters())
    torch.testing.assert_close(model.forward_intermediates(x, intermediates_only=True)[-1], expected, rtol=0, atol=0)


# --- tracing ----------------------------------------------------------------------------------------------------------


@ALL_MODELS
def test_fx__traced_forward_equals_eager(name: str) -> None:
    model = build(name, depth=2)
    x = images(1)
    extractor = create_feature_extractor(model, ["head"])
    torch.testing.assert_close(extractor(x)["head"], model(x), rtol=0, atol=0)


@ALL_MODELS
def test_fx__traced_backward_reaches_every_parameter(name: str) -> None:
    model = build(name, depth=2, num_classes=42).train()
    traced = create_feature_extractor(model, ["head"])
    y = traced(images())["head"]
    assert y.shape == (2, 42)
    y.square().mean().backward()
    for parameter_name, parameter in traced.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@BOTH_VERSIONS
def test_torchscript__is_not_supported(name: str) -> None:
    # Deliberately: the poolings are a table of functions and the scans are planned in Python. torch.compile and
    # torch.export take the place of TorchScript, which torch itself has put aside.
    with pytest.raises((RuntimeError, torch.jit.frontend.NotSupportedError, TypeError)):
        torch.jit.script(build(name, scriptable=True))


# --- optimisers and input sizes ---------------------------------------------------------------------------------------


@BOTH_VERSIONS
def test_layer_decay__twelve_pairs_of_scans(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    groups = param_groups_layer_decay(model, layer_decay=0.65, weight_decay=0.05)
    names = {id(p): n for n, p in model.named_parameters()}
    scale = {names[id(p)]: g["lr_scale"] for g in groups for p in g["params"]}
    assert scale["patch_embed.proj.weight"] == scale["pos_embed.embed"] == pytest.approx(0.65**13)
    for block in range(24):
        (found,) = {value for n, value in scale.items() if n.startswith(f"blocks.{block}.")}
        assert found == pytest.approx(0.65 ** (12 - block // 2)), block
    assert scale["norm.weight"] == scale["fc_norm.bias"] == scale["head.weight"] == 1


def test_layer_decay__coarse_has_one_group_of_blocks() -> None:
    layer_of = build(TINY[0]).group_matcher(coarse=True)
    assert layer_of("blocks.0.norm.weight") == layer_of("blocks.3.mixer.proj_up.weight")
    assert layer_of("pos_embed.embed") < layer_of("blocks.0") < layer_of("norm.weight") == layer_of("head.bias")


@BOTH_VERSIONS
def test_weight_decay__spares_vectors_and_the_position_embedding(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert model.no_weight_decay() == {"pos_embed.embed"}
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05)
    decayed = sum(len(g["params"]) for g in optimizer.param_groups if g["weight_decay"] > 0)
    free = sum(len(g["params"]) for g in optimizer.param_groups if g["weight_decay"] == 0)
    # 8 matrices per scan, the patch projection and the classifier; version 2 as in the logs of the published runs.
    assert (decayed, free) == ((194, 150) if name.startswith("vil_") else (194, 319))


@BOTH_VERSIONS
@pytest.mark.parametrize("size", [(96, 96), (64, 128), (48, 32)], ids=str)
def test_dynamic_img_size__takes_other_sizes(name: str, size: tuple[int, int]) -> None:
    model = build(name, img_size=224, depth=2)
    x = images(2, *size)
    assert model.forward_features(x).shape == (2, size[0] * size[1] // 256, 192)
    # The embedding is interpolated, so building for that size gives the same.
    expected = model(x)
    model.set_input_size(size)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


@BOTH_VERSIONS
def test_dynamic_img_size__off_refuses_other_sizes(name: str) -> None:
    model = build(name, img_size=224, dynamic_img_size=False, depth=1)
    with pytest.raises(ValueError, match=r"96 x 96 px does not match img_size=\(224, 224\).*dynamic_img_size=True"):
        model(images(1, 96, 96))
    model.set_input_size(96)
    assert model(images(1, 96, 96)).shape == (1, 1000)


@BOTH_VERSIONS
def test_set_input_size__non_square_image(name: str) -> None:
    model = build(name)
    model.set_input_size((64, 128))
    assert model.patch_embed.grid_size == (4, 8)
    assert model.pos_embed.embed.shape == (1, 4, 8, 192)
    assert model.pos_embed.embed.requires_grad
    assert model(images(2, 64, 128)).shape == (2, 1000)


@BOTH_VERSIONS
def test_set_input_size__patch_size(name: str) -> None:
    model = build(name)
    x = images()
    before = model.forward_features(x)
    # 16 x 16 patches of an image blown up twice, seen through patches of 32 x 32: nearly the same tokens.
    model.set_input_size(128, 32)
    assert model.patch_embed.proj.weight.shape == (192, 3, 32, 32)
    assert model.pos_embed.embed.shape == (1, 4, 4, 192)
    assert {info["reduction"] for info in model.feature_info} == {32}
    blown_up = nn.functional.interpolate(x, scale_factor=2, mode="bicubic", antialias=True)
    after = model.forward_features(blown_up)
    assert (after - before).norm() < 0.2 * before.norm()


def test_set_input_size__refuses_what_does_not_fit() -> None:
    model = build(TINY[0])
    with pytest.raises(ValueError, match=r"height 100 of img_size=\(100, 64\) is not divisible by patch_size=16.*96"):
        model.set_input_size((100, 64))
    with pytest.raises(ValueError, match="cannot change patch_size"):
        build(TINY[0], stride=8).set_input_size(patch_size=8)
