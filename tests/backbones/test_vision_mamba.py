"""VisionMamba: the published numbers, sizes and start, what every argument does, and what timm expects."""

import argparse
import copy
import inspect
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional as F

from vil_lightning import load_weights
from vil_lightning.backbones import VisionMamba
from vil_lightning.backbones.layers import resize_position_embedding
from vil_lightning.backbones.vision_mamba import VimMixer, join_middle, split_middle

MODELS = ("vim_base_patch16_224", "vim_small_patch16_224", "vim_tiny_patch16_224")
TINY = "vim_tiny_patch16_224"
ALL_MODELS = pytest.mark.parametrize("name", MODELS)


def build(**kwargs: Any) -> VisionMamba:
    """A small model with random parameters, the same in every model that has one of that name and shape."""
    model = VisionMamba(**{"img_size": 64, "embed_dim": 32, "depth": 4, "num_classes": 10, **kwargs}).eval()
    randomise(model)
    return model


def randomise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 10
        with torch.no_grad():
            parameter.copy_(noise / math.sqrt(fan_in) + (1 if "norm" in name or name.endswith((".D", ".D_b")) else 0))


def images(height: int = 64, width: int = 64, batch: int = 2, in_chans: int = 3) -> Tensor:
    return torch.randn(batch, in_chans, height, width, generator=torch.Generator().manual_seed(3))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- the published numbers --------------------------------------------------------------------------------------------


def normal(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    """The rule by which the weights of the golden model follow from their names."""
    x = normal(zlib.crc32(name.encode()), shape)
    if name.endswith(("A_log", "A_b_log")):
        return torch.arange(1, shape[1] + 1, dtype=x.dtype).log() + 0.1 * x
    if name.endswith(("dt_proj.bias", "dt_proj_b.bias")):
        return torch.linspace(-4.5, -0.5, shape[0], dtype=x.dtype) + 0.1 * x
    if name.endswith((".D", ".D_b", "norm.weight")) or name == "norm_f.weight":
        return 1 + 0.1 * x
    if len(shape) == 1:
        return 0.1 * x
    if name in ("pos_embed", "cls_token"):
        return 0.5 * x
    return x / math.prod(shape[1:]) ** 0.5


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """What the published code computed for Vim-Ti in float64: output and gradient norms, with raw names and shapes."""
    with np.load(Path(__file__).parent / "golden" / "vim_tiny.npz") as content:
        arrays: dict[str, Any] = dict(content)
    names, shapes = arrays["raw_keys"].tolist(), arrays["raw_shapes"].tolist()
    arrays["shapes"] = {n: tuple(int(i) for i in s.split(",")) for n, s in zip(names, shapes, strict=True)}
    arrays["grad_norms"] = dict(zip(names, arrays["grad_norm"].tolist(), strict=True))
    return arrays


@pytest.fixture(scope="module")
def published_file(golden: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file laid out as the published ones: weights, averaged weights, and the arguments of the run, a Namespace."""
    weights = {name: fill(name, shape) for name, shape in golden["shapes"].items()}
    averaged = {name: torch.zeros_like(value) for name, value in weights.items()}
    arguments = argparse.Namespace(model="vim_tiny", lr=5e-4, opt_betas=None)
    path = tmp_path_factory.mktemp("published") / "vim_t.pth"
    torch.save({"model": weights, "model_ema": averaged, "epoch": 299, "args": arguments}, path)
    return path


def test_published_numbers__chunked(golden: dict[str, Any], published_file: Path) -> None:
    model = timm.create_model(TINY, scan_backend="chunked").double()
    report = load_weights(model, published_file)
    assert (report.missing, report.unexpected, report.resized) == ([], [], [])
    expected = torch.from_numpy(golden["output"])
    x = normal(0, (expected.shape[0], 3, 224, 224)).requires_grad_()
    output = model(x)
    assert (output - expected).abs().max() <= 1e-10
    (output * normal(1, tuple(expected.shape))).sum().backward()
    assert x.grad is not None
    assert x.grad.norm().item() == pytest.approx(golden["grad_input_norm"].item(), rel=1e-8)
    for name, parameter in model.named_parameters():
        assert parameter.grad.norm().item() == pytest.approx(golden["grad_norms"][name], rel=1e-8), name


def test_published_numbers__recurrent_and_timm_pretrained(golden: dict[str, Any], published_file: Path) -> None:
    # A file's content as timm has it after a download.
    with torch.serialization.safe_globals([argparse.Namespace]):
        overlay = {"state_dict": torch.load(published_file, weights_only=True)}
    # timm builds and loads in one step, so the model has to be float64 from the start.
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = timm.create_model(TINY, True, pretrained_cfg_overlay=overlay, scan_backend="recurrent")
    finally:
        torch.set_default_dtype(dtype)
    with torch.no_grad():
        output = model(normal(0, (2, 3, 224, 224)))
    assert (output - torch.from_numpy(golden["output"])).abs().max() <= 1e-10


def test_published_names__in_the_order_of_the_file(golden: dict[str, Any]) -> None:
    with torch.device("meta"):
        state_dict = timm.create_model(TINY).state_dict()
    assert list(state_dict) == list(golden["shapes"])
    assert {name: tuple(value.shape) for name, value in state_dict.items()} == golden["shapes"]


@pytest.mark.parametrize(
    "name, stride, num_classes, count",
    [
        (MODELS[2], None, 1000, 7_148_008),
        (MODELS[1], None, 1000, 25_796_584),
        (MODELS[0], None, 1000, 97_598_440),
        (MODELS[2], None, 0, 6_955_008),
        (MODELS[1], None, 0, 25_411_584),
        (MODELS[0], None, 0, 96_829_440),
        (MODELS[2], 8, 1000, 7_250_344),
        (MODELS[1], 8, 1000, 26_001_256),
        (MODELS[0], 8, 1000, 98_007_784),
    ],
)
def test_parameter_count__is_the_published_one(name: str, stride: int | None, num_classes: int, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, stride=stride, num_classes=num_classes)
    assert sum(p.numel() for p in model.parameters()) == count


# --- the block, written out -------------------------------------------------------------------------------------------


def reference_mixer(params: dict[str, Tensor], u: Tensor, dt_rank: int, d_state: int, d_conv: int) -> Tensor:
    """The published mixer, slowly: its second direction flips x and z, runs forwards, and flips the result."""
    x, z = (u @ params["in_proj.weight"].T).chunk(2, dim=-1)

    def direction(x: Tensor, z: Tensor, end: str, A_log: str) -> Tensor:
        kernel = params[f"conv1d{end}.weight"][:, 0]
        conv = torch.zeros_like(x) + params[f"conv1d{end}.bias"]
        for t in range(x.shape[1]):
            for k in range(d_conv):
                if t - d_conv + 1 + k >= 0:
                    conv[:, t] = conv[:, t] + kernel[:, k] * x[:, t - d_conv + 1 + k]
        x = conv * torch.sigmoid(conv)
        q = x @ params[f"x_proj{end}.weight"].T
        dt, B, C = q[..., :dt_rank], q[..., dt_rank : dt_rank + d_state], q[..., dt_rank + d_state :]
        delta = torch.log1p(torch.exp(dt @ params[f"dt_proj{end}.weight"].T + params[f"dt_proj{end}.bias"]))
        A = -torch.exp(params[A_log])
        h = torch.zeros(x.shape[0], x.shape[2], d_state, dtype=x.dtype)
        outputs = []
        for t in range(x.shape[1]):
            h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * x[:, t])[..., None] * B[:, t, None]
            outputs.append((h * C[:, t, None]).sum(-1) + params[f"D{end}"] * x[:, t])
        return torch.stack(outputs, dim=1) * z * torch.sigmoid(z)

    forwards = direction(x, z, "", "A_log")
    backwards = direction(x.flip(1), z.flip(1), "_b", "A_b_log").flip(1)
    return (forwards + backwards) / 2 @ params["out_proj.weight"].T


@pytest.mark.parametrize("d_state, d_conv, expand", [(16, 4, 2), (3, 2, 1), (5, 1, 3)])
def test_mixer__equals_the_written_out_formulas(d_state: int, d_conv: int, expand: int) -> None:
    mixer = build(d_state=d_state, d_conv=d_conv, expand=expand).double().layers[1].mixer
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    expected = reference_mixer(dict(mixer.named_parameters()), x, 2, d_state, d_conv)
    torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [(64, 64), (48, 80)], ids=["even", "odd"])
def test_forward__is_the_chain_of_its_parts(size: tuple[int, int]) -> None:
    model = build(img_size=size, depth=2).double()
    x = images(*size).double()
    patches = x.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(3)  # (B, h, w, 3 * 16 * 16)
    tokens = (patches @ model.patch_embed.proj.weight.flatten(1).T + model.patch_embed.proj.bias).flatten(1, 2)
    middle = {(64, 64): 8, (48, 80): 7}[size]  # M // 2 of 16 and of 15 patches
    tokens = torch.cat([tokens[:, :middle], model.cls_token.expand(2, 1, 32), tokens[:, middle:]], dim=1)
    tokens = tokens + model.pos_embed

    def norm(u: Tensor, weight: Tensor) -> Tensor:
        return u / (u.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    for block in model.layers:
        params = dict(block.mixer.named_parameters())
        tokens = tokens + reference_mixer(params, norm(tokens, block.norm.weight), 2, 16, 4)
    tokens = norm(tokens, model.norm_f.weight)
    torch.testing.assert_close(model.forward_features(x), tokens, rtol=1e-9, atol=1e-10)
    expected = tokens[:, middle] @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-10)

    patches, cls_token = model.split_tokens(tokens)
    assert torch.equal(patches, torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], dim=1))
    assert torch.equal(cls_token, tokens[:, middle : middle + 1])
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(x), patches.mean(1), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("num_patches", [1, 2, 3, 196, 729])
def test_split_and_join__undo_each_other(num_patches: int) -> None:
    x = torch.randn(2, num_patches + 1, 3)
    patches, cls_token = split_middle(x)
    assert torch.equal(cls_token[:, 0], x[:, num_patches // 2])  # 98 of 197, 364 of 730
    assert torch.equal(join_middle(patches, cls_token), x)


# --- initialisation ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def initial() -> VisionMamba:
    torch.manual_seed(0)
    return timm.create_model(TINY)


def all_of(model: nn.Module, ending: str) -> Tensor:
    """All parameters whose names end so, flattened into one vector."""
    found = [p.detach().flatten() for n, p in model.named_parameters() if n.endswith(ending)]
    assert found, ending
    return torch.cat(found)


def assert_uniform(x: Tensor, bound: float) -> None:
    n = x.numel()
    assert 0.99 * bound < x.abs().max().item() <= bound
    assert x.std().item() == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(n))
    assert abs(x.mean().item()) < 5 * bound / math.sqrt(3 * n)


def assert_normal(x: Tensor, std: float) -> None:
    n = x.numel()
    assert abs(x.mean().item()) < 5 * std / math.sqrt(n)
    assert x.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n))


@pytest.mark.parametrize(
    "ending, bound",
    [
        ("in_proj.weight", 192**-0.5),
        ("x_proj.weight", 384**-0.5),
        ("x_proj_b.weight", 384**-0.5),
        ("dt_proj.weight", 12**-0.5),
        ("dt_proj_b.weight", 12**-0.5),
        ("out_proj.weight", (384 * 24) ** -0.5),
        ("conv1d.weight", 0.5),
        ("conv1d.bias", 0.5),
        ("conv1d_b.weight", 0.5),
        ("conv1d_b.bias", 0.5),
    ],
)
def test_initial_projections__are_uniform(initial: VisionMamba, ending: str, bound: float) -> None:
    assert_uniform(all_of(initial, ending), bound)


def test_initial_patch_projection__is_a_normal_cut_at_two_sigma(initial: VisionMamba) -> None:
    weight = all_of(initial, "patch_embed.proj.weight")
    assert_normal(weight, 768**-0.5)
    assert weight.abs().max().item() == pytest.approx(0.0820, abs=2e-4)


@pytest.mark.parametrize("ending", ["pos_embed", "cls_token", "head.weight"])
def test_initial_embeddings_and_head__are_normal(initial: VisionMamba, ending: str) -> None:
    assert_normal(all_of(initial, ending), 0.02)


def test_initial_step_sizes__differ_between_the_directions(initial: VisionMamba) -> None:
    steps = F.softplus(all_of(initial, "dt_proj.bias").double())
    assert 0.00099 < steps.min() < 0.0011
    assert 0.095 < steps.max() < 0.1001
    logs = (steps.log() - math.log(0.01)) / math.log(10)  # log-uniform: uniform in [-1, 1]
    assert_uniform(logs, logs.abs().max().item())
    assert (all_of(initial, "dt_proj_b.bias") == 0).all()


def test_initial_rates_skips_gains_and_biases(initial: VisionMamba) -> None:
    for ending in (".A_log", ".A_b_log"):
        rates = all_of(initial, ending).view(-1, 16).exp()
        torch.testing.assert_close(rates, torch.arange(1.0, 17).expand_as(rates))
    for ending in (".D", ".D_b", "norm.weight", "norm_f.weight"):
        assert (all_of(initial, ending) == 1).all()
    assert (initial.head.bias == 0).all()
    assert (initial.patch_embed.proj.bias == 0).all()


def test_init_weights__draws_every_parameter_again() -> None:
    model = timm.create_model(TINY, depth=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    assert_uniform(all_of(model, "out_proj.weight"), (384 * 2) ** -0.5)


# --- arguments --------------------------------------------------------------------------------------------------------

OTHER_VALUES: dict[str, Any] = {
    "img_size": 48,
    "patch_size": 32,
    "stride": 8,
    "in_chans": 1,
    "num_classes": 7,
    "global_pool": "avg",
    "embed_dim": 48,
    "depth": 3,
    "d_state": 8,
    "d_conv": 3,
    "expand": 3,
    "norm_eps": 0.1,
}


@pytest.mark.parametrize("argument", OTHER_VALUES)
def test_argument__changes_the_output(argument: str) -> None:
    value = OTHER_VALUES[argument]
    x = images(in_chans=value if argument == "in_chans" else 3)
    y, other = build()(images()), build(**{argument: value})(x)
    assert other.isfinite().all()
    assert other.shape != y.shape or (other - y).abs().max() > 1e-3


def test_arguments__all_have_a_test() -> None:
    elsewhere = {"drop_rate", "drop_path_rate", "scan_backend", "dynamic_img_size"}
    assert set(OTHER_VALUES) | elsewhere == set(inspect.signature(VisionMamba).parameters)


def test_drop_rate__is_that_of_the_dropout_before_the_classifier() -> None:
    model = build(drop_rate=0.4).train()
    features = torch.ones(1000, 17, 32)
    dropped = model.forward_head(features, pre_logits=True)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.4, abs=0.02)
    assert (model.eval().forward_head(features, pre_logits=True) == 1).all()


def test_drop_path_rate__grows_linearly_with_depth() -> None:
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in build(drop_path_rate=0.3).layers]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    assert isinstance(build(drop_path_rate=0.3).layers[0].drop_path, nn.Identity)
    assert [getattr(b.drop_path, "drop_prob", 0.0) for b in build(depth=1, drop_path_rate=0.3).layers] == [0.0]


def test_drop_path__drops_whole_branches_of_single_images() -> None:
    block = build(drop_path_rate=0.5).train().layers[3]
    x = torch.randn(1, 17, 32).expand(400, -1, -1)
    change = block(x) - x
    dropped = (change == 0).all(-1).all(-1)
    assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.1)
    expected = 2 * block.mixer(block.norm(x[:1]))
    torch.testing.assert_close(change[~dropped], expected.expand(int((~dropped).sum()), -1, -1), rtol=1e-3, atol=1e-4)


def test_scan_backend__is_used_by_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images()
    used: list[str] = []
    original = VimMixer.forward.__globals__["selective_scan"]

    def spy(*args: Any, backend: str, **kwargs: Any) -> Tensor:
        used.append(backend)
        return original(*args, backend=backend, **kwargs)

    monkeypatch.setitem(VimMixer.forward.__globals__, "selective_scan", spy)
    outputs = [build(scan_backend=backend).double()(x.double()) for backend in ("recurrent", "chunked")]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-10)
    assert used == ["recurrent"] * 8 + ["chunked"] * 8


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"scan_backend": "fast"}, "scan_backend='fast' is not known. Available: 'auto', "),
        ({"global_pool": "max"}, "global_pool='max' is not known. Available: 'middle_cls', 'avg', ''"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"d_state": 0}, "d_state=0 must be at least 1"),
        ({"d_conv": 0}, "d_conv=0 must be at least 1"),
        ({"expand": 0}, "expand=0 must be at least 1"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate=1.0 must be in \[0, 1\)"),
        ({"img_size": 100}, "height 100 .* is not divisible by patch_size=16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_argument__is_named(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build(**kwargs)


# --- input sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(96, 96), (64, 128), (48, 80)], ids=str)
def test_dynamic_img_size__equals_building_for_that_size(size: tuple[int, int]) -> None:
    model = build()
    x = images(*size)
    num_patches = size[0] * size[1] // 256
    assert model.forward_features(x).shape == (2, num_patches + 1, 32)
    expected, old = model(x), model.pos_embed.detach().clone()
    model.set_input_size(size)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert model.pos_embed.requires_grad

    # Row 8 of 17 belongs to the class token and stays as it is, in the new middle; the others are an image of 4 x 4.
    new = model.pos_embed.detach()
    assert torch.equal(new[:, num_patches // 2], old[:, 8])
    grid = torch.cat([old[:, :8], old[:, 9:]], dim=1).reshape(1, 4, 4, 32)
    resized = resize_position_embedding(grid, (size[0] // 16, size[1] // 16)).flatten(1, 2)
    assert torch.equal(torch.cat([new[:, : num_patches // 2], new[:, num_patches // 2 + 1 :]], dim=1), resized)


def test_dynamic_img_size__off_refuses_other_sizes() -> None:
    model = build(dynamic_img_size=False)
    with pytest.raises(ValueError, match=r"96 x 96 px does not match img_size=\(64, 64\).*dynamic_img_size=True"):
        model(images(96, 96))
    model.set_input_size(96)
    assert model(images(96, 96)).shape == (2, 10)


def test_set_input_size__patch_size() -> None:
    model = timm.create_model(TINY, img_size=64, depth=2).eval()
    x = images()
    before = model.forward_features(x)
    # 16 x 16 patches of an image blown up twice, seen through patches of 32 x 32: nearly the same tokens.
    model.set_input_size(128, 32)
    assert model.patch_embed.proj.weight.shape == (192, 3, 32, 32)
    assert model.pos_embed.shape == (1, 17, 192)
    assert {info["reduction"] for info in model.feature_info} == {32}
    after = model.forward_features(F.interpolate(x, scale_factor=2, mode="bicubic", antialias=True))
    assert (after - before).norm() < 0.2 * before.norm()
    model.set_input_size(patch_size=16)
    assert model.pos_embed.shape == (1, 65, 192)
    with pytest.raises(ValueError, match="cannot change patch_size"):
        build(stride=8).set_input_size(patch_size=8)


def test_set_input_size__refuses_what_does_not_fit_and_changes_nothing() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"height 100 of img_size=\(100, 64\) is not divisible by patch_size=16.*96"):
        model.set_input_size((100, 64))
    assert model(images()).shape == (2, 10)
    assert model.pos_embed.shape == (1, 17, 32)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda sd: sd,
        lambda sd: {"model": sd, "args": argparse.Namespace(lr=0.1, betas=(0.9, 0.999), model="vim"), "epoch": 3},
        lambda sd: {"model": {f"module.{n}": v for n, v in sd.items()}},
        lambda sd: {"state_dict": {f"backbone.{n}": v for n, v in sd.items()}},
        lambda sd: {"state_dict": {f"teacher.backbone.{n}": v for n, v in sd.items()}},
    ],
    ids=["plain", "published", "ddp", "supervised", "self_distillation"],
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_layout__is_understood(wrap: Any, legacy: bool, tmp_path: Path) -> None:
    saved = copy_of(build(depth=1))
    torch.save(wrap(saved), tmp_path / "file.pth", _use_new_zipfile_serialization=not legacy)
    model = VisionMamba(img_size=64, embed_dim=32, depth=1, num_classes=10)
    report = load_weights(model, tmp_path / "file.pth")
    assert (report.missing, report.unexpected, report.resized) == ([], [], [])
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


class Unsafe:
    """Leaves a trace when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_namespace__does_not_let_other_objects_in(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    arguments = argparse.Namespace(harmless=1, output=Unsafe(trace))
    torch.save({"model": copy_of(build(depth=1)), "args": arguments}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="holds pickled Python objects"):
        load_weights(build(depth=1), tmp_path / "file.pth")
    assert not trace.exists()


@pytest.mark.parametrize("kwargs", [{"img_size": 96}, {"img_size": (32, 128)}, {"stride": 8}], ids=str)
def test_position_table__is_resized_around_the_class_row(kwargs: dict[str, Any], tmp_path: Path) -> None:
    source = build(depth=1)
    torch.save(source.state_dict(), tmp_path / "file.pth")
    model = build(depth=1, **kwargs)
    report = load_weights(model, tmp_path / "file.pth")
    assert report.resized == (
        [] if kwargs.get("img_size") == (32, 128) else ["pos_embed"]
    )  # 2 x 8 patches, too: 17 rows
    middle = model.patch_embed.num_patches // 2
    assert torch.equal(model.pos_embed[:, middle], source.pos_embed[:, 8])
    if report.resized:
        source.set_input_size(kwargs.get("img_size"))
        if "img_size" in kwargs:
            assert torch.equal(model.pos_embed, source.pos_embed)
    assert torch.equal(model.head.weight, source.head.weight)


def test_position_table__of_no_square_grid_is_refused(tmp_path: Path) -> None:
    torch.save(build(depth=1, img_size=(48, 64)).state_dict(), tmp_path / "file.pth")
    model = build(depth=1)
    before = copy_of(model)
    with pytest.raises(ValueError, match=r"shapes \(1\): pos_embed: file \(1, 13, 32\), model \(1, 17, 32\)"):
        load_weights(model, tmp_path / "file.pth")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rotary_embeddings__of_the_first_release_are_refused(tmp_path: Path) -> None:
    # Those models rotated their tokens; without that their weights compute something else.
    rotary = {"rope.freqs_cos": torch.zeros(16, 64), "rope.freqs_sin": torch.zeros(16, 64)}
    torch.save({"model": {**copy_of(build(depth=1)), **rotary}}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"not in the model \(2\): rope.freqs_cos; rope.freqs_sin"):
        load_weights(build(depth=1), tmp_path / "file.pth")


@pytest.mark.parametrize(
    "kwargs",
    [{"num_classes": 5}, {"num_classes": 0}, {"in_chans": 1}, {"img_size": 96}, {"global_pool": "avg"}],
    ids=str,
)
def test_pretrained__adapts_to_the_model(kwargs: dict[str, Any], tmp_path: Path) -> None:
    source = timm.create_model(TINY, img_size=64, depth=2)
    torch.save({"model": source.state_dict(), "args": argparse.Namespace()}, tmp_path / "file.pth")
    overlay = {"file": str(tmp_path / "file.pth")}
    model = timm.create_model(TINY, True, pretrained_cfg_overlay=overlay, **{"img_size": 64, "depth": 2, **kwargs})
    assert torch.equal(model.layers[1].mixer.out_proj.weight, source.layers[1].mixer.out_proj.weight)
    in_chans, size = kwargs.get("in_chans", 3), kwargs.get("img_size", 64)
    if in_chans == 1:
        torch.testing.assert_close(model.patch_embed.proj.weight, source.patch_embed.proj.weight.sum(1, keepdim=True))
    assert model(images(size, size, in_chans=in_chans)).shape == (2, kwargs.get("num_classes", 1000) or 192)


# --- what timm expects ------------------------------------------------------------------------------------------------


def test_registered_models__are_the_three() -> None:
    assert tuple(timm.list_models("vim*")) == MODELS


def test_pretrained_tags__name_the_published_files() -> None:
    files = {name: timm.get_pretrained_cfg(name).hf_hub_filename for name in timm.list_pretrained("vim*")}
    assert files == {
        "vim_tiny_patch16_224.in1k": "vim_t_midclstok_76p1acc.pth",
        "vim_tiny_patch16_224.in1k_stride8": "vim_t_midclstok_ft_78p3acc.pth",
        "vim_small_patch16_224.in1k": "vim_s_midclstok_80p5acc.pth",
        "vim_small_patch16_224.in1k_stride8": "vim_s_midclstok_ft_81p6acc.pth",
        "vim_base_patch16_224.in1k": "vim_b_midclstok_81p9acc.pth",
    }
    for name in files:
        size = name.split("_")[1]
        assert timm.get_pretrained_cfg(name).hf_hub_id == f"hustvl/Vim-{size}-midclstok"


def test_stride8_tag__builds_the_model_with_stride_8() -> None:
    model = timm.create_model("vim_tiny_patch16_224.in1k_stride8", depth=1)
    assert model.patch_embed.stride == (8, 8)
    assert model.pos_embed.shape == (1, 730, 192)
    assert timm.create_model(TINY, depth=1).patch_embed.stride == (16, 16)


@ALL_MODELS
def test_default_cfg__matches_the_full_size_model(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    cfg, state_dict = model.default_cfg, model.state_dict()
    assert model.num_classes == cfg["num_classes"] == 1000
    width = {"tiny": 192, "small": 384, "base": 768}[name.split("_")[1]]
    assert model.num_features == model.embed_dim == model.head_hidden_size == width
    assert model.num_prefix_tokens == 0
    assert (cfg["input_size"], cfg["fixed_input_size"]) == ((3, 224, 224), False)
    assert (cfg["mean"], cfg["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (cfg["interpolation"], cfg["crop_pct"]) == ("bicubic", 0.875)
    assert cfg["classifier"] + ".weight" in state_dict
    assert cfg["first_conv"] + ".weight" in state_dict
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])


@ALL_MODELS
def test_backward__reaches_every_parameter(name: str) -> None:
    model = timm.create_model(name, img_size=32, depth=2, num_classes=42).train()
    y = model(images(32, 32))
    assert y.shape == (2, 42)
    y.square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


def test_grad_checkpointing__gives_the_same_gradients() -> None:
    model = build().train()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    calls: list[Tensor] = []
    other.layers[0].mixer.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    for m in (model, other):
        m(images()).square().sum().backward()
    assert len(calls) == 2  # once more in the backward pass
    expected = gradients(model)
    for name, grad in gradients(other).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_classifier__can_be_taken_off_and_replaced() -> None:
    model = build().double()
    x = images().double()
    features = model.forward_features(x)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, 32)
    torch.testing.assert_close(model.head(pre_logits), model(x), rtol=0, atol=0)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    torch.testing.assert_close(model(x), pre_logits, rtol=0, atol=0)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features, rtol=0, atol=0)
    model.reset_classifier(7, "middle_cls")
    assert model.num_classes == 7
    assert model.head.weight.dtype == torch.float64
    assert model(x).shape == (2, 7)
    with pytest.raises(ValueError, match="global_pool='max' is not known"):
        model.reset_classifier(7, "max")


@pytest.mark.parametrize("global_pool, shape", [("middle_cls", (2, 32)), ("avg", (2, 32)), ("", (2, 17, 32))])
def test_no_classifier__gives_the_pooled_vector(global_pool: str, shape: tuple[int, ...]) -> None:
    model = build(num_classes=0, global_pool=global_pool)
    assert model(images()).shape == shape
    assert not [n for n, _ in model.named_parameters() if n.startswith("head")]


def test_features_only__returns_three_maps() -> None:
    model = timm.create_model(TINY, img_size=64, depth=4, features_only=True).eval()
    maps = model(images(64, 96))
    assert model.feature_info.channels() == [192] * 3
    assert model.feature_info.reduction() == [16] * 3
    assert [tuple(m.shape) for m in maps] == [(2, 192, 4, 6)] * 3
    model = timm.create_model(TINY, img_size=64, depth=4, features_only=True, out_indices=(0, 2), stride=8)
    assert model.feature_info.reduction() == [8, 8]
    assert [tuple(m.shape) for m in model(images())] == [(2, 192, 7, 7)] * 2


def test_forward_intermediates__formats_and_choices() -> None:
    model = build()
    x = images(64, 96)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x), rtol=0, atol=0)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 4, 6)] * 4

    pairs = model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True)
    torch.testing.assert_close([t.transpose(1, 2).unflatten(2, (4, 6)) for t, _ in pairs], maps, rtol=0, atol=0)
    torch.testing.assert_close(model.norm_f(join_middle(*pairs[-1])), final, rtol=0, atol=0)
    normed = model.forward_intermediates(x, output_fmt="NLC", norm=True, intermediates_only=True)
    torch.testing.assert_close(normed, [model.norm_f(t) for t, _ in pairs], rtol=0, atol=0)
    last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
    torch.testing.assert_close(last_two, maps[2:], rtol=0, atol=0)
    chosen = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    torch.testing.assert_close(chosen, [maps[0], maps[2]], rtol=0, atol=0)
    as_dict = model.forward_intermediates(x, output_dict=True)
    torch.testing.assert_close(as_dict, {"image_intermediates": maps, "image_features": final}, rtol=0, atol=0)

    model.train().set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(x, intermediates_only=True), maps)
    model.layers[2].forward = None  # would fail if called
    (early,) = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early, maps[1])
    with pytest.raises(ValueError, match=r"output_fmt='NHWC' is not known. Available: 'NCHW', 'NLC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_prune_intermediate_layers__keeps_what_is_asked_for() -> None:
    model = build()
    x = images()
    expected = model.forward_intermediates(x, intermediates_only=True)[1]
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert len(model.layers) == len(model.feature_info) == 2
    assert isinstance(model.norm_f, nn.Identity)
    assert isinstance(model.head, nn.Identity)
    torch.testing.assert_close(model.forward_intermediates(x, intermediates_only=True)[-1], expected, rtol=0, atol=0)


def test_fx__traced_model_equals_eager_and_trains() -> None:
    model = build().train()
    traced = create_feature_extractor(model, ["head"])
    y = traced(images())["head"]
    torch.testing.assert_close(y, model(images()), rtol=0, atol=0)
    y.square().mean().backward()
    assert all(p.grad is not None for p in traced.parameters())


def test_compile__in_one_graph() -> None:
    model = build(img_size=(16, 32), depth=1, embed_dim=16).double()
    x = images(16, 32).double()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    compiled(x).square().sum().backward()
    actual = gradients(model)
    model.zero_grad()
    model(x).square().sum().backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(actual[name], grad, msg=name)


def test_autocast__keeps_step_sizes_in_float32() -> None:
    model = timm.create_model(TINY, img_size=64, depth=4).train()
    nn.init.normal_(model.head.weight, std=0.1)
    expected = model(images())
    with torch.autocast("cpu", torch.bfloat16):
        y = model(images())
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() < 0.05 * expected.norm()
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_autocast__step_sizes_are_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Tensor] = []
    scan = VimMixer.forward.__globals__["selective_scan"]

    def spy(x: Tensor, delta: Tensor, *args: Tensor, **kwargs: Any) -> Tensor:
        steps.append(delta.detach())
        return scan(x, delta, *args, **kwargs)

    monkeypatch.setitem(VimMixer.forward.__globals__, "selective_scan", spy)
    model = timm.create_model(TINY, img_size=64, depth=1)
    nn.init.zeros_(model.layers[0].mixer.dt_proj.weight)  # steps are then softplus(bias)
    with torch.autocast("cpu", torch.bfloat16):
        model(images())
    expected = F.softplus(model.layers[0].mixer.dt_proj.bias)
    assert steps[0].dtype == torch.float32
    torch.testing.assert_close(steps[0], expected.expand_as(steps[0]))


def test_layer_decay__stem_blocks_head() -> None:
    with torch.device("meta"):
        model = timm.create_model(TINY)
    groups = param_groups_layer_decay(model, layer_decay=0.9, weight_decay=0.05)
    names = {id(p): n for n, p in model.named_parameters()}
    scale = {names[id(p)]: g["lr_scale"] for g in groups for p in g["params"]}
    for name in ("patch_embed.proj.weight", "pos_embed", "cls_token"):
        assert scale[name] == pytest.approx(0.9**25)
    for block in range(24):
        (found,) = {value for n, value in scale.items() if n.startswith(f"layers.{block}.")}
        assert found == pytest.approx(0.9 ** (24 - block)), block
    assert scale["norm_f.weight"] == scale["head.weight"] == scale["head.bias"] == 1
    layer_of = model.group_matcher(coarse=True)
    assert layer_of("layers.0.norm.weight") == layer_of("layers.3.mixer.in_proj.weight")
    assert layer_of("pos_embed") < layer_of("layers.0") < layer_of("norm_f.weight") == layer_of("head.bias")


def test_weight_decay__spares_vectors_and_embeddings_but_not_the_rates() -> None:
    with torch.device("meta"):
        model = timm.create_model(TINY)
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    mixer = ("A_log", "A_b_log", "in_proj.weight", "out_proj.weight")
    mixer += tuple(f"{n}{end}.weight" for n in ("conv1d", "x_proj", "dt_proj") for end in ("", "_b"))
    blocks = {f"layers.{i}.mixer.{n}" for i in range(24) for n in mixer}
    assert decayed == blocks | {"patch_embed.proj.weight", "head.weight"}
