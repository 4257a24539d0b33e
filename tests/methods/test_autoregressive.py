"""Autoregressive pretraining: no pixel reaches its own prediction; the method against loops, and what a run of it needs."""

import copy
import functools
import inspect
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from test_clusters import places_of, replace_convolutions
from test_mae import CONFIGS, SMALL, VIT, build_recipe, flat, images, patch_pixels
from test_resume import same
from test_supervised import rate_by_hand
from tiny import VIL, FewDigits, Steps, digits, pictures, state, trainer
from torch import Tensor, nn
from torch.nn import functional as F

from vil_lightning.backbones import VisionLSTM, vision_lstm
from vil_lightning.backbones.vision_lstm import Scan
from vil_lightning.data import TrainTransform
from vil_lightning.errors import ConfigError
from vil_lightning.methods import BackboneConfig, LinearProbe, Supervised, autoregressive, clusters
from vil_lightning.methods.autoregressive import Autoregressive, CrossAttentionDecoder
from vil_lightning.methods.masked import patchify
from vil_lightning.methods.randomness import seed_step
from vil_lightning.ops import MLSTM_BACKENDS

FORWARD: dict[str, Any] = {**SMALL, "block_design": "unidirectional"}
CAUSAL1D: dict[str, Any] = {"conv_kind": "causal1d", "conv_kernel_size": 4}


def method(
    kind: type[Autoregressive] = Autoregressive, name: str = VIL, backbone: dict[str, Any] | None = None, **kwargs: Any
) -> Autoregressive:
    torch.manual_seed(1)
    settings: dict[str, Any] = {"cluster_size": 2, "decoder_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2}
    settings |= {"base_lr": 0.1, "lr_warmup": "2 steps"}
    defaults = FORWARD if name.startswith("vil") else VIT
    return kind(BackboneConfig(name, None, {**defaults, **(backbone or {})}), **{**settings, **kwargs})


# --- nothing leaks ----------------------------------------------------------------------------------------------------


def influence(model: Autoregressive, x: Tensor) -> list[list[bool]]:
    """For every predicted cluster, whether each cluster's pixels have any gradient, however small."""
    x, side = x.clone().requires_grad_(), model.cluster_size
    prediction, grid = model.predict_patches(x), model.grid_size(x)
    owner = torch.empty(grid, dtype=torch.long)
    for row, column, cluster in places_of(grid, side):
        owner[row, column] = cluster
    owner = owner.repeat_interleave(4, 0).repeat_interleave(4, 1)  # of every pixel
    result = []
    for part in prediction.split(side**2, dim=1):
        (gradient,) = torch.autograd.grad(part.square().sum(), x, retain_graph=True)
        reached = (gradient != 0).any(0).any(0)
        result.append([bool(reached[owner == k].any()) for k in range(int(owner.max()) + 1)])
    return result


def earlier_only(num_clusters: int) -> list[list[bool]]:
    return [[k < target for k in range(num_clusters)] for target in range(1, num_clusters)]


LEAK_FREE: list[tuple[str, dict[str, Any]]] = [
    (VIL, {"depth": 3}),
    (VIL, {"depth": 4, "share_conv": False, "use_v_conv": True, "conv_kernel_size": 5}),
    (VIL, {"depth": 3, **CAUSAL1D}),
    ("vil_tiny_patch16_224", {"depth": 2}),
    ("vit_tiny_patch16_224", {"depth": 3}),
    ("deit3_small_patch16_224", {"reg_tokens": 2}),
]


@pytest.mark.parametrize(("name", "kwargs"), LEAK_FREE, ids=str)
@pytest.mark.parametrize(("size", "side"), [((16, 16), 2), ((16, 24), 2), ((24, 12), 3), ((8, 12), 1), ((32, 16), 4)])
def test_predict_patches__no_pixel_reaches_its_own_prediction(
    size: tuple[int, int], side: int, name: str, kwargs: dict[str, Any]
) -> None:
    model = method(name=name, backbone={**kwargs, "img_size": size}, cluster_size=side).double().eval()
    num_clusters = size[0] * size[1] // 16 // side**2
    assert influence(model, images(*size).double()) == earlier_only(num_clusters)


@pytest.mark.parametrize("mode", ["train", "another size", *(b for b in MLSTM_BACKENDS if b not in ("auto", "triton"))])
def test_predict_patches__no_leak_however_it_is_computed(mode: str) -> None:
    backend = {"mlstm_backend": mode} if mode in MLSTM_BACKENDS else {"drop_path_rate": 0.2}
    model = method(backbone={**backend, "depth": 3}).double().train(mode == "train")
    size = (24, 16) if mode == "another size" else (16, 16)
    assert influence(model, images(*size).double()) == earlier_only(size[0] * size[1] // 64)


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(("name", "kwargs"), LEAK_FREE[:5:2], ids=str)
def test_predict_patches__later_clusters_may_be_anything(name: str, kwargs: dict[str, Any], precision: str) -> None:
    dtype = torch.float64 if precision == "float64" else torch.float32
    model, x = method(name=name, backbone={**kwargs, "img_size": (16, 24)}).to(dtype).eval(), images(16, 24).to(dtype)

    def predict(x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=precision == "bfloat16"):
            return model.predict_patches(x)

    expected = predict(x)
    for cluster in range(1, 6):
        other = x.clone()
        for row, column, own in places_of((4, 6), 2):
            if own >= cluster:
                other[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 30 * torch.randn(3, 3, 4, 4)
        actual, known = predict(other), 4 * cluster  # predictions of the clusters 1 to `cluster`
        assert torch.equal(actual[:, :known], expected[:, :known])
        assert known == expected.shape[1] or not torch.equal(actual[:, known:], expected[:, known:])


def scan_backwards(model: Autoregressive, monkeypatch: pytest.MonkeyPatch) -> None:
    model.backbone.blocks[1].mixer.scans = (Scan(reverse=True),)


def scan_columns(model: Autoregressive, monkeypatch: pytest.MonkeyPatch) -> None:
    model.backbone.blocks[1].mixer.scans = (Scan(columns=True),)
    layout = clusters.ClusterLayout
    monkeypatch.setattr(layout, "to_columns", lambda self, x: to_columns_of_image(x), raising=False)
    monkeypatch.setattr(layout, "transposed", property(lambda self: self), raising=False)


def to_columns_of_image(x: Tensor) -> Tensor:
    """Clusters in two rows and two columns; the fourth is not there."""
    return x[:, [*range(4), *range(8, 12), *range(4, 8)]]


def convolve_all(model: Autoregressive, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_convolutions(model.backbone, (4, 4), 2, 3, ahead=4)


def attend_to_all(model: Autoregressive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "cluster_mask", lambda n, side, device: torch.ones(n * side**2, n * side**2).bool())


def decode_from_itself(model: Autoregressive, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = clusters.cluster_mask
    monkeypatch.setattr(autoregressive, "cluster_mask", lambda *args: plain(*args).roll(-4, dims=0) | plain(*args))


def overlap_patches(model: Autoregressive, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = model.backbone.patch_embed.proj
    monkeypatch.setattr(conv, "forward", lambda x: conv._conv_forward(x.roll(-1, dims=-1), conv.weight, conv.bias))


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (scan_backwards, VIL),
        (scan_columns, VIL),
        (convolve_all, VIL),
        (overlap_patches, VIL),
        (decode_from_itself, VIL),
        (attend_to_all, "vit_tiny_patch16_224"),
    ],
)
def test_influence__sees_a_leak(spoil: Callable[..., None], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above rest on: they fail for methods that leak."""
    model = method(name=name).double().eval()
    assert influence(model, images().double()) == earlier_only(4)
    spoil(model, monkeypatch)
    found = influence(model, images().double())
    assert any(
        later and not allowed
        for row, rows in zip(found, earlier_only(4), strict=True)
        for later, allowed in zip(row, rows, strict=True)
    )


# --- predictions and loss ---------------------------------------------------------------------------------------------


def decoded_by_loops(
    decoder: CrossAttentionDecoder, features: list[Tensor], grid: tuple[int, int], side: int
) -> Tensor:
    """One query after another, over the tokens it may see."""
    dim, heads = len(decoder.query), decoder.blocks[0].num_heads
    mixed = torch.cat([norm(x) for norm, x in zip(decoder.in_norms, features, strict=True)], dim=-1)
    sources = F.linear(mixed, decoder.in_proj.weight, decoder.in_proj.bias)
    result = []
    for row, column, cluster in places_of(grid, side)[side**2 :]:
        angles = [place / 10000 ** (4 * k / dim) for place in (row, column) for k in range(dim // 4)]
        angles = torch.tensor(angles, dtype=torch.float64).view(2, -1)
        sines = torch.cat([angles.sin().flatten(), angles.cos().flatten()])
        x = (decoder.query + sines).expand(len(mixed), -1)
        for n, block in enumerate(decoder.blocks):
            seen = sources[:, : cluster * side**2, n * dim : (n + 1) * dim]
            q, (k, v) = block.q(block.norm1(x)), block.kv(seen).split(dim, dim=-1)
            y = []
            for part in torch.arange(dim).chunk(heads):
                scores = (k[..., part] @ q[:, part, None])[..., 0] / len(part) ** 0.5
                y.append((scores.softmax(-1)[..., None] * v[..., part]).sum(1))
            x = x + block.proj(torch.cat(y, dim=-1))
            x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
        result.append(decoder.head(decoder.norm(x)))
    return torch.stack(result, dim=1)


@pytest.mark.parametrize(("grid", "side"), [((4, 6), 2), ((6, 3), 3), ((2, 3), 1)])
def test_predict_patches__every_query_looks_at_the_clusters_before(grid: tuple[int, int], side: int) -> None:
    size = (4 * grid[0], 4 * grid[1])
    model, x = (
        method(backbone={"img_size": size, "depth": 4}, cluster_size=side).double().eval(),
        images(*size).double(),
    )
    features = clusters.encode_clusters(model.backbone, x, side, [2, 4])
    expected = decoded_by_loops(model.decoder, features, grid, side)
    torch.testing.assert_close(model.predict_patches(x), expected, rtol=1e-6, atol=1e-6)  # sines are float32


@pytest.mark.parametrize(
    ("num_blocks", "count", "depths"),
    [
        (12, 4, [6, 8, 10, 12]),
        (24, 4, [12, 16, 20, 24]),
        (4, 2, [2, 4]),
        (24, 1, [24]),
        (1, 2, [1, 1]),
        (2, 4, [1, 1, 2, 2]),
    ],
)
def test_depths__from_the_middle_to_the_end(num_blocks: int, count: int, depths: list[int]) -> None:
    assert method(backbone={"depth": num_blocks}, decoder_depth=count).depths == depths


def targets_by_hand(image: Tensor, grid: tuple[int, int], side: int, normalize: bool) -> list[Tensor]:
    """Pixels (P) in float64 of every patch but those of the first cluster."""
    targets = []
    for row, column, _ in places_of(grid, side)[side**2 :]:
        target = patch_pixels(image.double(), row, column, 4, 4)
        if normalize:
            mean = target.sum() / len(target)
            variance = (target - mean).pow(2).sum() / (len(target) - 1)
            target = (target - mean) / (variance + 1e-6).sqrt()
        targets.append(target)
    return targets


def loss_by_hand(prediction: Tensor, images: Tensor, side: int = 2, normalize: bool = True) -> Tensor:
    """In float64. Mean over predicted patches of the mean squared error in a patch."""
    grid, errors = (images.shape[2] // 4, images.shape[3] // 4), []
    for guesses, image in zip(prediction.double(), images, strict=True):
        for guess, target in zip(guesses, targets_by_hand(image, grid, side, normalize), strict=True):
            errors.append((guess - target).pow(2).sum() / len(target))
    return torch.stack(errors).mean()


class Quiet(Autoregressive):
    """For a step without a run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trainer = trainer()
        self.optimisation.lr_at = lambda module: 0.0

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("size", "side"), [((16, 16), 2), ((24, 12), 3), ((8, 12), 1)])
def test_training_step__loss_against_loops(size: tuple[int, int], side: int, normalize: bool) -> None:
    model = method(Quiet, normalize_targets=normalize, cluster_size=side, backbone={"img_size": size})
    x = images(*size)
    loss = model.training_step((x, torch.zeros(3)), 0)
    expected = loss_by_hand(model.predict_patches(x), x, side, normalize)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("normalize", [True, False])
def test_reconstruct__first_cluster_stays_and_others_are_predicted(normalize: bool) -> None:
    model, x = method(normalize_targets=normalize, backbone={"img_size": (16, 24)}).eval(), images(16, 24)
    result, predicted = model.reconstruct(x), model.predict_patches(x)
    mask, rebuilt = result["mask"], result["reconstruction"]
    assert (mask.shape, rebuilt.shape, rebuilt.requires_grad) == ((3, 1, 16, 24), (3, 3, 16, 24), False)
    for b, (n, (row, column, cluster)) in itertools.product(range(3), enumerate(places_of((4, 6), 2))):
        place = (slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
        assert (mask[b, 0][place] == float(cluster > 0)).all()
        truth, shown = (patch_pixels(image, row, column, 4, 4) for image in (x[b], rebuilt[b]))
        if cluster:
            wanted = predicted[b, n - 4]
            truth = wanted * (truth.var() + 1e-6).sqrt() + truth.mean() if normalize else wanted
        torch.testing.assert_close(shown, truth, rtol=1e-5, atol=1e-5 if cluster else 0)


def test_forward__is_the_network_as_configured() -> None:
    model, x = method(backbone={"global_pool": "avg"}).eval(), images()
    assert torch.equal(model(x), model.backbone(x))


# --- runs -------------------------------------------------------------------------------------------------------------


def test_defaults__are_those_of_arm() -> None:
    defaults = {name: p.default for name, p in inspect.signature(Autoregressive).parameters.items()}
    official = {"cluster_size": 4, "decoder_dim": 512, "decoder_depth": 4, "decoder_num_heads": 8}
    official |= {"normalize_targets": True, "base_lr": 1.5e-4, "final_lr": 0.0, "lr_warmup": "40 epochs"}
    official |= {"betas": (0.9, 0.95), "weight_decay": 0.05}
    assert {name: defaults[name] for name in official} == official


def test_fit__equals_a_loop_by_hand(tmp_path: Path) -> None:
    steps, decay = Steps(), 0.1
    model = method(weight_decay=decay, final_lr=1e-4, backbone={"drop_path_rate": 0.2})
    network, start = copy.deepcopy(model).train(), state(model)
    fit = trainer(tmp_path, max_epochs=1, limit_train_batches=3, callbacks=[steps], gradient_clip_val=0.5)
    fit.fit(model, datamodule=pictures())
    peak = 0.1 * 8 / 256
    assert (fit.global_step, model.optimisation.peak_lr) == (3, pytest.approx(peak, rel=1e-12))
    groups = []
    for name, parameter in network.named_parameters():
        if "fc_norm" in name:  # of no read-out: not trained
            assert not parameter.requires_grad
            continue
        free = parameter.ndim <= 1 or name.endswith((".bias", "pos_embed.embed"))
        groups.append({"params": [parameter], "weight_decay": 0.0 if free else decay})
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))
    for number, (x, _) in enumerate(steps.batches):
        seed_step(SimpleNamespace(current_epoch=0, global_rank=0), number)
        loss = loss_by_hand(network.predict_patches(x), x)
        assert steps.losses[number] == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate_by_hand(number + 1, 3, 2, peak, 1e-4)
            assert group["lr"] == pytest.approx(next(iter(steps.rates[number].values())), rel=1e-9)
        optimizer.step()
        for name, value in network.named_parameters():
            # AdamW makes whole steps of what rounding leaves of a gradient next to nothing.
            clear = torch.ones_like(value, dtype=torch.bool) if value.grad is None else value.grad.abs() > 1e-6
            off = (steps.states[number][name] - value.detach()).abs()
            assert (off <= 2e-6 + 1e-4 * value.abs())[clear].all(), f"{name} after step {number}"
            assert clear.any() or "gate" in name, name
        optimizer.zero_grad()
        with torch.no_grad():  # so that the next step starts from the same numbers
            for name, value in network.named_parameters():
                value.copy_(steps.states[number][name])
    assert max(float((value - start[name]).abs().max()) for name, value in state(model).items()) > 1e-3
    logged = {name: float(value) for name, value in fit.callback_metrics.items()}
    assert logged["train/grad_norm"] == pytest.approx(float(grad_norm), rel=1e-4)  # before clipping
    assert logged["schedule/lr"] == pytest.approx(rate_by_hand(3, 3, 2, peak, 1e-4), rel=1e-6)
    assert logged["train/loss"] == steps.losses[-1]


@pytest.mark.parametrize(
    ("kwargs", "name", "backbone"),
    [
        ({}, VIL, {"share_conv": False, "use_v_conv": True, "init_values": 0.1, "global_pool": ""}),
        ({"cluster_size": 1, "decoder_depth": 3}, VIL, {**CAUSAL1D, "img_size": (16, 24)}),
        ({"decoder_depth": 1}, "vit_tiny_patch16_224", {"global_pool": "avg"}),
        ({}, "deit_tiny_distilled_patch16_224", {}),
        ({}, "deit3_small_patch16_224", {"reg_tokens": 2}),
    ],
    ids=str,
)
def test_fit__every_trained_parameter_has_a_gradient(
    tmp_path: Path, kwargs: dict[str, Any], name: str, backbone: dict[str, Any]
) -> None:
    """DDP would wait for one that has none."""
    missing: list[str] = []

    class Watch(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
            missing.extend(n for n, p in pl_module.named_parameters() if p.requires_grad and p.grad is None)

    model = method(name=name, backbone=backbone, **kwargs)
    model.optimisation.lr_warmup = 0
    fit = trainer(tmp_path, max_epochs=1, limit_train_batches=1, callbacks=[Watch()])
    fit.fit(model, datamodule=pictures())
    assert fit.global_step == 1
    assert missing == []


@pytest.mark.parametrize("name", [VIL, "vit_tiny_patch16_224"])
def test_fit__bf16(tmp_path: Path, name: str) -> None:
    def run(precision: str) -> tuple[Autoregressive, list[float]]:
        steps, model = Steps(), method(name=name)
        trainer(tmp_path, max_steps=2, precision=precision, callbacks=[steps]).fit(model, datamodule=pictures())
        return model, steps.losses

    _, losses = run("32-true")
    model, rounded = run("bf16-mixed")
    assert rounded == pytest.approx(losses, rel=0.02)
    assert rounded != losses
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in state(model).values())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Steps, dict[str, Tensor]]:
    """An uninterrupted run with a checkpoint after each of its 8 steps."""
    path = tmp_path_factory.mktemp("straight")
    return path, *resumable(path, None)


def resumable(path: Path, ckpt_path: Path | None) -> tuple[Steps, dict[str, Tensor]]:
    steps, model = Steps(), method(backbone={"drop_path_rate": 0.3, "depth": 4})
    every = ModelCheckpoint(path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit = trainer(path, max_epochs=2, callbacks=[steps, every], enable_checkpointing=True)
    fit.fit(model, datamodule=pictures(), ckpt_path=ckpt_path, weights_only=True)
    assert fit.global_step == 8
    return steps, {**state(model), **flat(fit.optimizers[0].state_dict()["state"])}


@pytest.mark.parametrize("done", [4, 6], ids=["boundary", "mid-epoch"])
def test_resume__ends_in_the_same_state(
    straight: tuple[Path, Steps, dict[str, Tensor]], tmp_path: Path, done: int
) -> None:
    path, recorded, whole = straight
    torch.manual_seed(12345)
    resumed, end = resumable(tmp_path, path / f"step={done}.ckpt")
    assert same(resumed.batches, recorded.batches[done:])
    assert resumed.losses == recorded.losses[done:]
    assert same(end, whole)


@pytest.mark.parametrize("design", ["alternating", "alternating_quad", "bidirectional_shared", None])
def test_checkpoint__is_fine_tuned_in_other_directions(
    straight: tuple[Path, Steps, dict[str, Tensor]], tmp_path: Path, design: str | None
) -> None:
    path = str(straight[0] / "step=8.ckpt")
    encoder = {n.removeprefix("backbone."): v for n, v in straight[2].items() if n.startswith("backbone.")}
    assert torch.load(path, weights_only=True)["backbone"]["kwargs"]["block_design"] == "unidirectional"
    kwargs = {"block_design": design} if design else {}
    tuned, steps = Supervised(BackboneConfig(None, path, kwargs), new_head=True, lr_warmup=0), Steps()
    trainer(tmp_path, max_steps=1, max_epochs=1, callbacks=[steps]).fit(tuned, datamodule=pictures())
    cycle = vision_lstm.BLOCK_DESIGNS[design or "unidirectional"].cycle
    assert [block.mixer.scans for block in steps.start.blocks] == [cycle[i % len(cycle)] for i in range(4)]
    loaded = {n: v for n, v in state(steps.start).items() if not n.startswith(("head.", "fc_norm."))}
    assert same(loaded, {n: v for n, v in encoder.items() if not n.startswith("fc_norm.")})
    assert all(parameter.requires_grad for parameter in tuned.backbone.parameters())
    assert tuned.backbone.head.out_features == 10


def test_checkpoint__serves_a_probe(straight: tuple[Path, Steps, dict[str, Tensor]]) -> None:
    network = LinearProbe(BackboneConfig(None, str(straight[0] / "step=8.ckpt"), {})).backbone
    assert isinstance(network, VisionLSTM)
    assert [block.mixer.scans for block in network.blocks] == [(Scan(),)] * 4
    for name, value in state(network).items():
        assert name.startswith("fc_norm.") or torch.equal(value, straight[2][f"backbone.{name}"]), name


def test_compile__equals_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(compile: bool) -> tuple[Autoregressive, list[float]]:
        steps, model = Steps(), method(compile=compile, backbone={"depth": 1}, decoder_depth=1, lr_warmup=0)
        trainer(tmp_path, max_steps=1, callbacks=[steps]).fit(model, datamodule=pictures())
        return model, steps.losses

    calls = []
    compile_with = functools.partial(torch.compile, backend="eager", fullgraph=True)  # the default needs a C++ compiler

    def compiler(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        compiled = compile_with(function, *args, **kwargs)

        def counted(*a: Any, **k: Any) -> Any:
            calls.append(function.__self__)
            return compiled(*a, **k)

        return counted

    plain, losses = run(False)
    monkeypatch.setattr(torch, "compile", compiler)
    model, compiled_losses = run(True)
    assert {id(block) for block in calls} == {id(model.backbone.blocks[0]), id(model.decoder.blocks[0])}
    assert compiled_losses == pytest.approx(losses, rel=1e-5)
    assert state(model).keys() == state(plain).keys()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cluster_size": 3}, r"model\.cluster_size=3 does not cut the grid of 4 x 4 patches into two or more squares"),
        ({"cluster_size": 4}, r"model\.cluster_size=4 does not cut"),
        ({"cluster_size": 0}, r"model\.cluster_size=0 does not cut"),
        ({"cluster_size": -2}, r"model\.cluster_size=-2 does not cut"),
        ({"backbone": {"img_size": (16, 24)}, "cluster_size": 4}, r"model\.cluster_size=4.*4 x 6"),
        ({"base_lr": 0.0}, r"model\.base_lr=0\.0 must be positive"),
        ({"decoder_depth": 0}, r"model\.decoder_depth=0 must be at least 1"),
        ({"decoder_dim": 30}, r"model\.decoder_dim=30 must be a multiple of model\.decoder_num_heads=2, and of 4"),
        ({"decoder_num_heads": 3}, r"model\.decoder_dim=32 .* model\.decoder_num_heads=3"),
        ({"decoder_num_heads": 0}, r"model\.decoder_num_heads=0"),
        ({"backbone": {"stride": 2}}, r"Autoregressive: model\.backbone\.kwargs\.stride=\(2, 2\)"),
        ({"backbone": {"global_pool": "middle_cls"}}, r"model\.backbone\.kwargs\.global_pool=middle_cls.*e\.g\. avg"),
        *(
            (
                {"backbone": {"block_design": design}},
                rf"model\.backbone\.kwargs\.block_design={design}.*block_design=unidirectional",
            )
            for design in vision_lstm.BLOCK_DESIGNS
            if design != "unidirectional"
        ),
        (
            {"name": "vit_tiny_patch16_224", "backbone": {"patch_drop_rate": 0.5}},
            r"model\.backbone\.kwargs\.patch_drop_rate",
        ),
    ],
    ids=str,
)
def test_settings__are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method(**settings)


def test_settings__backbone_and_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"block_design=alternating"):  # what a ViL has unless told otherwise
        Autoregressive(BackboneConfig(VIL, None, SMALL))
    with pytest.raises(ConfigError, match=r"Autoregressive hides patches.*model\.backbone\.name"):
        Autoregressive(BackboneConfig("convnext_atto", None, {}))
    for data in (digits(), FewDigits(16, 8)):  # several views, and none at random
        with pytest.raises(ConfigError, match=r"train_transform to a TrainTransform.*pretrain_autoregressive\.yaml"):
            trainer(tmp_path, max_epochs=1).fit(method(), datamodule=data)
    model = method(backbone={"img_size": 64}, cluster_size=4)  # more than one at 64 px, not at 16
    with pytest.raises(ConfigError, match=r"model\.cluster_size=4 does not cut the grid of 4 x 4"):
        trainer(tmp_path, max_epochs=1).fit(model, datamodule=pictures())
    padded = {"img_size": 24, "patch_size": 6, "dynamic_img_pad": True}  # 16 px would be filled up to 18
    with pytest.raises(
        ConfigError, match=r"data\.train_transform\.img_size=16 is not a multiple of the patch size \(6, 6\)"
    ):
        trainer(tmp_path, max_epochs=1).fit(method(name="vit_tiny_patch16_224", backbone=padded), datamodule=pictures())


def test_settings__another_backbone_than_the_checkpoints(
    straight: tuple[Path, Steps, dict[str, Tensor]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"ckpt_path: the checkpoint's backbone"):
        trainer(tmp_path, max_epochs=2).fit(method(), datamodule=pictures(), ckpt_path=straight[0] / "step=6.ckpt")


def test_reports__say_what_runs(tmp_path: Path) -> None:
    model = method(lr_warmup="1 step")
    trainer(tmp_path, max_epochs=1, limit_train_batches=2).fit(model, datamodule=pictures())
    lines = model.run_info()
    assert lines["method"] == "Autoregressive, clusters of 2 x 2 patches; decoder reads blocks [1, 2]"
    assert lines["learning rate"] == "0.00313 = 0.1 x 8 / 256, to 0"
    alternate = " --model.backbone.kwargs '{block_design: alternating}'"
    assert model.next_command("a.ckpt").endswith(f"configs/finetune.yaml --model.backbone.weights a.ckpt{alternate}")
    model.trainer.datamodule.source_arguments = {"root": "images"}
    assert "linear_probe.yaml" in model.next_command("a.ckpt")
    assert "alternating" not in model.next_command("a.ckpt")  # frozen features are best as they were trained
    vit = method(name="vit_tiny_patch16_224")
    vit.trainer = trainer()
    vit.trainer.datamodule = pictures()
    vit.trainer.datamodule.setup()
    assert vit.next_command("a.ckpt").endswith("a.ckpt")


# --- recipes ----------------------------------------------------------------------------------------------------------


def recipe_of(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]:
    """Trainer, model and data of a recipe, and its global batch, of which the comments are right."""
    text = path.read_text()
    recipe = yaml.safe_load(text)
    fit, model, data = recipe["trainer"], recipe["model"]["init_args"], recipe["data"]["init_args"]
    devices = fit.get("devices", 1)
    batch = recipe.get("global_batch_size", data["batch_size"] * devices)
    accumulate = batch // (data["batch_size"] * devices)
    found = re.search(r"base_lr: \S+ +# x (\d+) / 256 = (\S+)", text)
    assert found is not None
    assert int(found[1]) == batch
    assert float(found[2]) == pytest.approx(model["base_lr"] * batch / 256)
    if path.parent.name == "imagenet":
        micro = f" x {accumulate} accumulated" if accumulate > 1 else ""
        assert f"# Batch:  {devices} GPUs x {data['batch_size']}{micro} = {batch}." in text
    view = TrainTransform(**data["train_transform"]["init_args"])
    assert view.img_size == data["img_size"] == model["backbone"]["kwargs"]["img_size"]
    assert not view.three_augment
    assert not any(view.color_jitter)
    return fit, model, data, batch


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_recipe__has_the_numbers_of_arm_b(size: str) -> None:
    fit, model, data, batch = recipe_of(CONFIGS / f"imagenet/pretrain_autoregressive_vil2_{size}.yaml")
    assert (fit["max_epochs"], batch, model["base_lr"], model["lr_warmup"]) == (1600, 2048, 1.5e-4, "40 epochs")
    assert (model["weight_decay"], model["betas"], model["final_lr"]) == (0.05, [0.9, 0.95], 0.0)
    assert (fit["gradient_clip_val"], fit["precision"], data["img_size"]) == (3.0, "bf16-mixed", 192)
    view = data["train_transform"]["init_args"]
    assert (view["scale"], view["hflip_prob"]) == ([0.2, 1], 0.5)
    assert model["backbone"]["name"] == f"vil2_{size}_patch16_224"
    built = build_recipe(Autoregressive, model)
    assert (built.cluster_size, built.depths, built.normalize_targets) == (4, [12, 16, 20, 24], True)
    assert (built.decoder.head.in_features, built.decoder.head.out_features, len(built.decoder.blocks)) == (512, 768, 4)
    assert 512 / built.decoder.blocks[0].num_heads == 64
    assert built.targets(torch.zeros(1, 3, 192, 192)).shape == (1, 8 * 16, 768)


def test_recipe__of_the_digits() -> None:
    _, model, _, _ = recipe_of(CONFIGS / "pretrain_autoregressive.yaml")
    build_recipe(Autoregressive, model)


def test_recipe__of_fine_tuning_has_the_numbers_of_arm_b() -> None:
    recipe = yaml.safe_load((CONFIGS / "imagenet/finetune_autoregressive_vil2_base.yaml").read_text())
    model, data = recipe["model"]["init_args"], recipe["data"]["init_args"]
    assert recipe["trainer"]["max_epochs"] == 100
    assert (recipe["trainer"]["devices"] * data["batch_size"], model["lr_batch_size"]) == (1024, 256)
    assert (model["base_lr"], model["layer_decay"], model["ema_decay"]) == (5e-4, 0.65, 0.99992)
    assert (model["mixup_alpha"], model["cutmix_alpha"], model["erase_prob"]) == (0.8, 1.0, 0.25)
    kwargs = model["backbone"]["kwargs"]
    assert (kwargs["block_design"], kwargs["drop_path_rate"]) == ("alternating", 0.1)
    assert model["new_head"]


def test_targets__are_pixels_in_the_order_of_the_predictions() -> None:
    model, x = method(backbone={"img_size": (16, 24)}), images(16, 24)
    expected = torch.stack([torch.stack(targets_by_hand(image, (4, 6), 2, normalize=False)) for image in x])
    assert torch.equal(model.targets(x).double(), expected)
    assert model.targets(x).shape[1] == patchify(x, (4, 4)).shape[1] - 4
