"""MAE: its loss and its steps against formulas and a loop written out by hand, and what a run of it needs."""

import functools
import inspect
import itertools
import math
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
from test_resume import same
from test_supervised import rate_by_hand
from tiny import VIL, FewDigits, Steps, digits, pictures, run_in_two_processes, state, trainer
from torch import Tensor, nn
from torch.nn import functional as F

from vil_lightning.data import TrainTransform
from vil_lightning.errors import ConfigError
from vil_lightning.methods import MAE, Autoregressive, BackboneConfig, LinearProbe, SimMIM, Supervised
from vil_lightning.methods.mae import hidden_loss
from vil_lightning.methods.masked import normalize_patches, patchify, unpatchify
from vil_lightning.methods.randomness import seed_step

SMALL: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2}
VIT: dict[str, Any] = {**SMALL, "num_heads": 2, "dynamic_img_size": True}


def mae(kind: type[MAE] = MAE, name: str = VIL, backbone: dict[str, Any] | None = None, **kwargs: Any) -> MAE:
    torch.manual_seed(1)
    settings: dict[str, Any] = {"decoder_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2}
    settings |= {"base_lr": 0.1, "lr_warmup": "2 steps"}
    return kind(BackboneConfig(name, None, {**SMALL, **(backbone or {})}), **{**settings, **kwargs})


def images(height: int = 16, width: int = 16, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(5))


def patch_pixels(image: Tensor, i: int, j: int, p_h: int, p_w: int) -> Tensor:
    """Pixels (p_h * p_w * 3) of one patch of an image (3, H, W): line by line, the colours of a pixel together."""
    rows, columns = range(i * p_h, (i + 1) * p_h), range(j * p_w, (j + 1) * p_w)
    return torch.stack([image[c, y, x] for y in rows for x in columns for c in range(3)])


def loss_by_hand(prediction: Tensor, images: Tensor, hidden: Tensor, patch: int, normalize: bool) -> Tensor:
    """In float64. Mean over hidden patches of the mean squared error in a patch."""
    width, errors = images.shape[3] // patch, []
    for b, k in hidden.nonzero().tolist():
        target = patch_pixels(images[b].double(), k // width, k % width, patch, patch)
        if normalize:
            mean = target.sum() / len(target)
            variance = (target - mean).pow(2).sum() / (len(target) - 1)
            target = (target - mean) / (variance + 1e-6).sqrt()
        errors.append((prediction[b, k].double() - target).pow(2).sum() / len(target))
    return torch.stack(errors).mean()


# --- pixels and loss --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [(4, 4), (2, 3), (8, 12)])
def test_patchify__order_of_pixels_and_its_inverse(patch: tuple[int, int]) -> None:
    x, (p_h, p_w) = images(8, 12), patch
    pixels, grid = patchify(x, patch), (8 // p_h, 12 // p_w)
    assert pixels.shape == (3, grid[0] * grid[1], 3 * p_h * p_w)
    for b, i, j in itertools.product(range(3), range(grid[0]), range(grid[1])):
        assert torch.equal(pixels[b, i * grid[1] + j], patch_pixels(x[b], i, j, p_h, p_w))
    assert torch.equal(unpatchify(pixels, patch, grid), x)


def test_normalize_patches__unbiased_and_safe_where_nothing_varies() -> None:
    pixels = torch.cat([torch.randn(2, 3, 48), torch.full((2, 1, 48), 0.3)], dim=1).double()
    normal, mean, deviation = normalize_patches(pixels)
    variance = pixels[0, 0].sub(pixels[0, 0].mean()).square().sum() / 47
    torch.testing.assert_close(deviation[0, 0, 0], (variance + 1e-6).sqrt())
    torch.testing.assert_close(normal[:, :3].var(-1), torch.ones(2, 3).double(), rtol=1e-5, atol=0)
    assert normal[:, 3].abs().max() < 1e-9
    torch.testing.assert_close(normal * deviation + mean, pixels)


def test_hidden_loss__visible_patches_do_not_count() -> None:
    prediction, target = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    hidden = torch.tensor([[True, False, True, False], [False, True, True, False]])
    expected = (prediction - target)[hidden].square().mean()
    torch.testing.assert_close(hidden_loss(prediction, target, hidden), expected)
    prediction[~hidden] += 100
    torch.testing.assert_close(hidden_loss(prediction, target, hidden), expected)


class Quiet(MAE):
    """For a step without a run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trainer = trainer()
        self.optimisation.lr_at = lambda module: 0.0

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_training_step__loss_against_loops(size: tuple[int, int], normalize: bool) -> None:
    model, x = mae(Quiet, normalize_targets=normalize), images(*size)
    torch.manual_seed(3)
    loss = model.training_step((x, torch.zeros(3)), 0)
    torch.manual_seed(3)
    hidden, visible = model.draw_mask(x)
    total = size[0] * size[1] // 16
    assert hidden.sum(1).tolist() == [total - total // 4] * 3
    expected = loss_by_hand(model.predict_patches(x, visible), x, hidden, 4, normalize)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("decoder", ["vil", "vit"])
@pytest.mark.parametrize("where", ["drop", "mask_token"])
@pytest.mark.parametrize(("name", "kwargs"), [(VIL, {}), ("vit_tiny_patch16_224", VIT)], ids=["vil", "vit"])
def test_predict_patches__every_token_to_its_place(name: str, kwargs: dict[str, Any], where: str, decoder: str) -> None:
    model = mae(name=name, backbone={**kwargs, "img_size": (12, 20)}, hidden=where, decoder=decoder).double().eval()
    x = images(12, 20).double()
    hidden, visible = model.draw_mask(x)
    if where == "drop":
        tokens = model.mask_token.expand(3, 15, 32).clone()
        if name == VIL:
            encoded = model.backbone.forward_features(x, visible)
        else:
            encoder = model.backbone
            embedded = encoder.patch_embed(x).view(3, 15, 32) + encoder.pos_embed[:, 1:]
            kept = torch.stack([embedded[b, visible[b]] for b in range(3)])
            kept = torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1]).expand(3, -1, -1), kept], dim=1)
            encoded = encoder.norm(encoder.blocks(kept))[:, 1:]
        for b, k in itertools.product(range(3), range(visible.shape[1])):
            tokens[b, visible[b, k]] = encoded[b, k]
    else:

        def replace(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
            return torch.where(hidden.view(*embedded.shape[:-1], 1), model.mask_token, embedded)

        handle = model.backbone.patch_embed.register_forward_hook(replace)
        tokens = model.backbone.forward_features(x)[:, -15:]
        handle.remove()
    small = model.decoder
    y = F.linear(tokens, small.patch_embed.proj.weight[:, :, 0, 0], small.patch_embed.proj.bias)
    if decoder == "vil":
        y, layout = (
            small.pos_embed(y.view(3, 3, 5, 32)).flatten(1, 2),
            small._embed(torch.zeros(1, 32, 3, 5).double())[1],
        )
        for block in small.blocks:
            y = block(y, layout)
    else:
        y = small.blocks(y + small.pos_embed)
    expected = F.linear(small.norm(y), model.head.weight, model.head.bias)
    torch.testing.assert_close(model.predict_patches(x, visible), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("where", ["drop", "mask_token"])
def test_predict_patches__knows_nothing_of_hidden_pixels(where: str) -> None:
    model, x = mae(hidden=where).eval(), images()
    hidden, visible = model.draw_mask(x)
    spoilt = torch.where(unpatchify(hidden[..., None].expand(-1, -1, 16), (4, 4), (4, 4)), torch.nan, x)
    expected = model.predict_patches(x, visible)
    assert torch.equal(model.predict_patches(spoilt, visible), expected)
    assert expected.isfinite().all()


@pytest.mark.parametrize("normalize", [True, False])
def test_reconstruct__visible_pixels_stay_and_hidden_ones_are_predicted(normalize: bool) -> None:
    model, x = mae(normalize_targets=normalize, backbone={"img_size": (12, 20)}).eval(), images(12, 20)
    torch.manual_seed(3)
    result = model.reconstruct(x)
    torch.manual_seed(3)
    hidden, visible = model.draw_mask(x)
    mask, rebuilt = result["mask"], result["reconstruction"]
    assert (mask.shape, rebuilt.shape) == ((3, 1, 12, 20), (3, 3, 12, 20))
    assert not rebuilt.requires_grad
    predicted = model.predict_patches(x, visible)
    for b, k in itertools.product(range(3), range(15)):
        place = (slice(k // 5 * 4, k // 5 * 4 + 4), slice(k % 5 * 4, k % 5 * 4 + 4))
        assert (mask[b, 0][place] == float(hidden[b, k])).all()
        if not hidden[b, k]:
            assert torch.equal(rebuilt[b][(slice(None), *place)], x[b][(slice(None), *place)])
            continue
        truth = patch_pixels(x[b], k // 5, k % 5, 4, 4)
        wanted = predicted[b, k] * (truth.var() + 1e-6).sqrt() + truth.mean() if normalize else predicted[b, k]
        torch.testing.assert_close(patch_pixels(rebuilt[b], k // 5, k % 5, 4, 4), wanted, rtol=1e-5, atol=1e-5)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_defaults__are_the_official_ones() -> None:
    defaults = {name: p.default for name, p in inspect.signature(MAE).parameters.items()}
    official = {
        "mask_ratio": 0.75,
        "mask_kind": "random",
        "normalize_targets": True,
        "base_lr": 1.5e-4,
        "final_lr": 0.0,
    }
    official |= {"betas": (0.9, 0.95), "weight_decay": 0.05, "lr_warmup": "40 epochs"}
    official |= {"decoder_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16}
    assert {name: defaults[name] for name in official} == official


def test_fit__equals_a_loop_by_hand(tmp_path: Path) -> None:
    steps, decay = Steps(), 0.1
    settings = {"weight_decay": decay, "final_lr": 1e-4, "backbone": {"drop_path_rate": 0.2}}
    model = mae(**settings)
    fit = trainer(tmp_path, max_epochs=1, limit_train_batches=3, callbacks=[steps], gradient_clip_val=0.5)
    fit.fit(model, datamodule=pictures())
    assert fit.global_step == 3
    peak = 0.1 * 8 / 256
    assert model.optimisation.peak_lr == pytest.approx(peak, rel=1e-12)

    network = mae(**settings).train()
    groups = []
    for name, parameter in network.named_parameters():
        if "fc_norm" in name:  # of no read-out: not trained
            assert not parameter.requires_grad
            continue
        free = parameter.ndim <= 1 or name.endswith((".bias", "pos_embed.embed", "mask_token"))
        groups.append({"params": [parameter], "weight_decay": 0.0 if free else decay})
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))
    for number, (x, _) in enumerate(steps.batches):
        seed_step(SimpleNamespace(current_epoch=0, global_rank=0), number)
        hidden = torch.zeros(8, 16, dtype=torch.bool).scatter(1, torch.rand(8, 16).topk(12).indices, True)
        visible = torch.stack([(~mask).nonzero().flatten() for mask in hidden])
        loss = loss_by_hand(network.predict_patches(x, visible), x, hidden, 4, normalize=True)
        assert steps.losses[number] == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate_by_hand(number + 1, 3, 2, peak, 1e-4)
            assert group["lr"] == pytest.approx(next(iter(steps.rates[number].values())), rel=1e-9)
        optimizer.step()
        optimizer.zero_grad()
        for name, value in network.named_parameters():
            # AdamW makes steps of what rounding leaves of a gradient next to nothing: a few numbers may be off.
            off = (steps.states[number][name] - value.detach()).abs()
            wrong = int((off > 2e-6 + 1e-4 * value.abs()).sum())
            assert wrong <= max(1, value.numel() // 1000), f"{name} after step {number}: {wrong} of {value.numel()}"
            assert off.max() < 0.1 * peak, name
    start = mae(**settings).state_dict()
    assert max(float((value - start[name]).abs().max()) for name, value in state(model).items()) > 1e-3
    assert {"train/loss", "train/grad_norm", "schedule/lr"} <= fit.callback_metrics.keys()


@pytest.mark.parametrize(
    ("kwargs", "name", "backbone"),
    [
        *(({"mask_kind": kind}, VIL, {}) for kind in ("block", "row")),
        ({"hidden": "mask_token", "decoder": "vit"}, VIL, {"global_pool": "middle_cls"}),
        ({}, VIL, {"conv_kind": "causal1d", "block_design": "quaddirectional_shared", "img_size": (16, 24)}),
        ({"decoder": "vit"}, "vit_tiny_patch16_224", {**VIT, "global_pool": "avg"}),
        ({"hidden": "mask_token"}, "deit3_small_patch16_224", VIT),
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

    model = mae(name=name, backbone=backbone, **kwargs)
    model.optimisation.lr_warmup = 0
    fit = trainer(tmp_path, max_epochs=1, limit_train_batches=1, callbacks=[Watch()])
    fit.fit(model, datamodule=pictures())
    assert math.isfinite(float(fit.callback_metrics["train/loss"]))
    assert missing == []


def test_fit__bf16(tmp_path: Path) -> None:
    def run(precision: str) -> tuple[MAE, list[float]]:
        steps, model = Steps(), mae()
        trainer(tmp_path, max_steps=2, precision=precision, callbacks=[steps]).fit(model, datamodule=pictures())
        return model, steps.losses

    _, losses = run("32-true")
    model, rounded = run("bf16-mixed")
    assert rounded == pytest.approx(losses, rel=0.02)
    assert rounded != losses
    for name, value in state(model).items():
        assert value.dtype == torch.float32
        assert value.isfinite().all(), name


def test_fit__stops_when_it_diverges(tmp_path: Path) -> None:
    class Spoil(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                batch[0].fill_(torch.nan)

    fit = trainer(tmp_path, max_epochs=1, callbacks=[Spoil()])
    with pytest.raises(RuntimeError, match=r"train/loss or the gradient is nan at step 2.*model\.base_lr"):
        fit.fit(mae(), datamodule=pictures())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Steps, dict[str, Tensor]]:
    """An uninterrupted run with a checkpoint after each of its 8 steps."""
    path = tmp_path_factory.mktemp("straight")
    return path, *resumable(path, None)


def resumable(path: Path, ckpt_path: Path | None) -> tuple[Steps, dict[str, Tensor]]:
    steps, model = Steps(), mae(backbone={"drop_path_rate": 0.3})
    every = ModelCheckpoint(path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit = trainer(path, max_epochs=2, callbacks=[steps, every], enable_checkpointing=True)
    fit.fit(model, datamodule=pictures(), ckpt_path=ckpt_path, weights_only=True)
    assert fit.global_step == 8
    return steps, {**state(model), **flat(fit.optimizers[0].state_dict()["state"])}


def flat(values: dict[Any, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{key}.{name}": tensor for key, of_key in values.items() for name, tensor in of_key.items()}


@pytest.mark.parametrize("done", [3, 4, 6], ids=["mid-epoch 3", "boundary", "mid-epoch 6"])
def test_resume__ends_in_the_same_state(
    straight: tuple[Path, Steps, dict[str, Tensor]], tmp_path: Path, done: int
) -> None:
    path, recorded, whole = straight
    torch.manual_seed(12345)
    resumed, end = resumable(tmp_path, path / f"step={done}.ckpt")
    assert same(resumed.batches, recorded.batches[done:])
    assert resumed.losses == recorded.losses[done:]
    assert same(end, whole)


def test_masks__differ_between_steps_and_epochs(straight: tuple[Path, Steps, dict[str, Tensor]]) -> None:
    masks, model, x = [], mae(), images(batch=8)
    for epoch, batch in itertools.product(range(3), range(4)):
        seed_step(SimpleNamespace(current_epoch=epoch, global_rank=0), batch)
        masks.append(model.draw_mask(x)[1])
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 12


def test_checkpoint__serves_fine_tuning_and_probe(
    straight: tuple[Path, Steps, dict[str, Tensor]], tmp_path: Path
) -> None:
    path = str(straight[0] / "step=8.ckpt")
    encoder = {n.removeprefix("backbone."): v for n, v in straight[2].items() if n.startswith("backbone.")}
    content = torch.load(path, weights_only=True)
    assert content["backbone"] == {"name": VIL, "kwargs": {**SMALL, "drop_path_rate": 0.3}}
    tuned, steps = Supervised(BackboneConfig(None, path, {"global_pool": "avg"}), new_head=True, lr_warmup=0), Steps()
    trainer(tmp_path, max_steps=1, max_epochs=1, callbacks=[steps]).fit(tuned, datamodule=pictures())
    probe = LinearProbe(BackboneConfig(None, path, {}))
    for network in (steps.start, probe.backbone):
        loaded = {n: v for n, v in state(network).items() if not n.startswith(("head.", "fc_norm."))}
        assert same(loaded, {n: v for n, v in encoder.items() if not n.startswith("fc_norm.")})
    assert all(parameter.requires_grad for parameter in tuned.backbone.parameters())  # fc_norm, too, is trained now
    assert tuned.backbone.head.out_features == 10


def test_compile__equals_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(compile: bool) -> tuple[MAE, list[float]]:
        steps, model = Steps(), mae(compile=compile, backbone={"depth": 1}, decoder_depth=1)
        trainer(tmp_path, max_steps=2, callbacks=[steps]).fit(model, datamodule=pictures())
        return model, steps.losses

    calls = []
    compile_with = functools.partial(torch.compile, backend="eager")  # the default needs a C++ compiler, and a minute

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
    assert len(calls) >= 4
    assert compiled_losses == pytest.approx(losses, rel=1e-5)
    assert state(model).keys() == state(plain).keys()
    for name, value in state(plain).items():
        torch.testing.assert_close(state(model)[name], value, rtol=1e-4, atol=1e-6, msg=name)


# --- two processes ----------------------------------------------------------------------------------------------------


def masked_by_content(model: MAE | SimMIM, x: Tensor) -> tuple[Tensor, Tensor]:
    """Which patches are hidden depends on their pixels alone, so that it does not matter which process has an image."""
    scores = (1000 * patchify(x.double(), model.patch_size).sum(-1)).sin() + torch.linspace(0, 1e-6, 16)
    places = scores.argsort(1)
    return torch.ones(len(x), 16, dtype=torch.bool).scatter(1, places[:, :4], False), places[:, :4].sort(1).values


class ContentMAE(MAE):
    def draw_mask(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return masked_by_content(self, images)


class ContentSimMIM(SimMIM):
    """With SGD: gradients of absolute differences can cancel, and AdamW makes steps of full length of what rounding leaves."""

    def draw_mask(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return masked_by_content(self, images)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(super().configure_optimizers().param_groups)


class SGDAutoregressive(Autoregressive):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(super().configure_optimizers().param_groups)


def contestants() -> dict[str, L.LightningModule]:
    torch.manual_seed(1)
    config = BackboneConfig(VIL, None, {**SMALL, "global_pool": "avg"})
    forward = BackboneConfig(VIL, None, {**SMALL, "block_design": "unidirectional"})
    decoder = {"decoder_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2}
    return {
        "drop": mae(ContentMAE, lr_warmup=0),
        "mask_token": mae(ContentMAE, lr_warmup=0, hidden="mask_token", decoder="vit"),
        "simmim": ContentSimMIM(config, mask_ratio=0.75, mask_unit=1, base_lr=6.0, lr_warmup=0),
        "autoregressive": SGDAutoregressive(forward, cluster_size=2, base_lr=6.0, lr_warmup=0, **decoder),
    }


def train(world_size: int, out: Path) -> None:
    torch.set_num_threads(1)
    for name, model in contestants().items():
        parallel = {"devices": world_size, "strategy": "ddp"} if world_size > 1 else {}
        fit = trainer(out, max_steps=3, max_epochs=1, **parallel)
        fit.fit(model, datamodule=pictures(8 // world_size))
        assert fit.global_step == 3
        assert model.optimisation.global_batch_size == 8
        torch.save(model.state_dict(), out / f"{name}_world{world_size}_rank{fit.global_rank}.pt")


@pytest.mark.timeout(120)
def test_ddp__two_processes_equal_one(tmp_path: Path) -> None:
    train(1, tmp_path)
    results = run_in_two_processes(__file__, "train", tmp_path)
    assert [code for code, _ in results] == [0, 0], "\n".join(error for _, error in results)
    for name, model in contestants().items():
        one = torch.load(tmp_path / f"{name}_world1_rank0.pt", weights_only=True)
        two, other = (torch.load(tmp_path / f"{name}_world2_rank{rank}.pt", weights_only=True) for rank in range(2))
        assert same(two, other), f"{name} differs between the processes"
        for key, expected in one.items():
            torch.testing.assert_close(two[key], expected, rtol=1e-4, atol=1e-5, msg=f"{name} {key}")
        assert max(float((one[key] - value).abs().max()) for key, value in model.state_dict().items()) > 1e-3


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 0.0}, r"model\.mask_ratio=0\.0 hides 0 of 16 patches"),
        ({"mask_ratio": 1.0}, r"model\.mask_ratio=1\.0 hides 16 of 16"),
        ({"mask_ratio": 0.97}, r"model\.mask_ratio=0\.97 hides 16 of 16"),
        ({"mask_ratio": 0.1, "mask_kind": "row"}, r"model\.mask_ratio=0\.1 hides 0 of 16.*4 x 4.*mask_kind=row"),
        ({"mask_ratio": -0.5}, r"model\.mask_ratio=-0\.5"),
        ({"mask_ratio": 1.5}, r"model\.mask_ratio=1\.5"),
        ({"mask_kind": "rows"}, r"model\.mask_kind='rows' is not known.*random, block, row"),
        ({"base_lr": 0.0}, r"model\.base_lr=0\.0 must be positive"),
        ({"decoder_depth": 0}, r"model\.decoder_depth=0 must be at least 1"),
        (
            {"decoder_dim": 30, "decoder": "vit", "decoder_num_heads": 4},
            r"model\.decoder_dim, .*model\.decoder_num_heads",
        ),
        ({"backbone": {"stride": 2}}, r"model\.backbone\.kwargs\.stride=\(2, 2\)"),
    ],
    ids=str,
)
def test_settings__are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mae(**settings)


@pytest.mark.parametrize("name", ["convnext_atto", "resnet10t"])
def test_settings__backbone_without_patches(name: str) -> None:
    with pytest.raises(ConfigError, match=r"MAE hides patches.*model\.backbone\.name"):
        MAE(BackboneConfig(name, None, {}))


def test_settings__data(tmp_path: Path) -> None:
    for data in (digits(), FewDigits(16, 8)):  # several views, and none at random
        with pytest.raises(ConfigError, match=r"data\.train_transform to a TrainTransform.*configs/pretrain_mae\.yaml"):
            trainer(tmp_path, max_epochs=1).fit(mae(), datamodule=data)
    fixed = {"dynamic_img_size": False, "img_size": 32}
    with pytest.raises(ConfigError, match=r"data\.train_transform\.img_size=16 does not fit the backbone"):
        trainer(tmp_path, max_epochs=1).fit(mae(backbone=fixed), datamodule=pictures())
    model = mae(backbone={"patch_size": 16, "img_size": 64}, mask_ratio=0.06)  # enough patches at 64 px, not at 16
    with pytest.raises(ConfigError, match=r"model\.mask_ratio=0\.06 hides 1 of 1"):
        trainer(tmp_path, max_epochs=1).fit(model, datamodule=pictures())


def test_settings__another_backbone_than_the_checkpoints(
    straight: tuple[Path, Steps, dict[str, Tensor]], tmp_path: Path
) -> None:
    model = mae(backbone={"depth": 3})
    with pytest.raises(ConfigError, match=r"model\.backbone"):
        trainer(tmp_path, max_epochs=2).fit(model, datamodule=pictures(), ckpt_path=straight[0] / "step=3.ckpt")


def test_reports__say_what_runs(tmp_path: Path) -> None:
    model = mae(lr_warmup="1 step")
    trainer(tmp_path, max_epochs=1, limit_train_batches=2).fit(model, datamodule=pictures())
    lines = model.run_info()
    assert lines["method"] == "MAE, 0.75 of the patches hidden (random, drop), vil decoder"
    assert lines["learning rate"] == "0.00313 = 0.1 x 8 / 256, to 0"
    assert lines["schedules"] == "2 steps; warm-up 1"
    assert model.next_command("a.ckpt").endswith("configs/finetune.yaml --model.backbone.weights a.ckpt")


# --- recipes ----------------------------------------------------------------------------------------------------------

CONFIGS = Path(__file__).parents[2] / "configs"


def recipe_of(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]:
    """Trainer, model and data of a recipe, and its global batch, of which the comments are right."""
    text = path.read_text()
    recipe = yaml.safe_load(text)
    fit, model, data = recipe["trainer"], recipe["model"]["init_args"], recipe["data"]["init_args"]
    per_micro_batch = data["batch_size"] * fit.get("devices", 1)
    batch = recipe.get("global_batch_size", per_micro_batch)
    accumulate = batch // per_micro_batch
    found = re.search(r"base_lr: \S+ +# x (\d+) / (\d+) = (\S+)", text)
    assert found is not None
    assert int(found[1]) == batch
    assert int(found[2]) == (256 if "mae" in path.stem else 512)
    assert float(found[3]) == pytest.approx(model["base_lr"] * batch / int(found[2]))
    if path.parent.name == "imagenet":
        micro = f" x {accumulate} accumulated" if accumulate > 1 else ""
        assert f"# Batch:  {fit['devices']} GPUs x {data['batch_size']}{micro} = {batch}." in text
    view = TrainTransform(**data["train_transform"]["init_args"])
    assert view.img_size == data["img_size"]
    assert not view.three_augment
    assert not any(view.color_jitter)
    return fit, model, data, batch


def build_recipe(kind: Any, model: dict[str, Any]) -> Any:
    """On the meta device, where nothing is computed."""
    settings = dict(model)
    with torch.device("meta"):
        return kind(BackboneConfig(**settings.pop("backbone")), **settings)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_recipe__has_the_official_numbers(size: str) -> None:
    fit, model, data, batch = recipe_of(CONFIGS / f"imagenet/pretrain_mae_vil2_{size}.yaml")
    assert (fit["max_epochs"], batch, model["base_lr"], model["lr_warmup"]) == (800, 4096, 1.5e-4, "40 epochs")
    assert (model["weight_decay"], model["betas"], model["final_lr"]) == (0.05, [0.9, 0.95], 0.0)
    assert (model["mask_ratio"], model["decoder_dim"], model["decoder_depth"]) == (0.75, 512, 8)
    assert (data["train_transform"]["init_args"]["scale"], data["train_transform"]["init_args"]["hflip_prob"]) == (
        [0.2, 1],
        0.5,
    )
    assert model["backbone"]["name"] == f"vil2_{size}_patch16_224"
    built = build_recipe(MAE, model)
    assert built.normalize_targets
    assert (built.decoder.embed_dim, len(built.decoder.blocks), built.head.out_features) == (512, 8, 768)
    assert built.draw_mask(torch.zeros(1, 3, 224, 224))[1].shape == (1, 49)


def test_recipe__of_the_digits() -> None:
    _, model, _, _ = recipe_of(CONFIGS / "pretrain_mae.yaml")
    build_recipe(MAE, model)
