"""What a step of supervised training computes, against a loop written out by hand; and what it refuses."""

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import timm
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from timm.data.mixup import rand_bbox
from tiny import VIL, Steps, backbone, built, pictures, state, supervised, trainer
from torch import Tensor, nn
from torch.nn import functional as F

from vil_lightning.data import Digits, TrainTransform
from vil_lightning.errors import ConfigError
from vil_lightning.methods import Supervised
from vil_lightning.methods.randomness import seed_step
from vil_lightning.optim import layer_lr_scales


def mixed_by_hand(images: Tensor, labels: Tensor, smoothing: float, num_classes: int = 10) -> tuple[Tensor, Tensor]:
    """MixUp 0.8 or CutMix 1.0, each half the time, image i with image B - 1 - i."""
    assert np.random.rand() < 1.0  # mix_prob
    cut = np.random.rand() < 0.5
    ratio = np.random.beta(1.0, 1.0) if cut else np.random.beta(0.8, 0.8)
    other = torch.arange(len(images) - 1, -1, -1)
    if cut:
        top, bottom, left, right = rand_bbox(images.shape, ratio)
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images[other][:, :, top:bottom, left:right]
        ratio = 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
    else:
        mixed = ratio * images + (1 - ratio) * images[other]
    targets = F.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes
    return mixed, ratio * targets + (1 - ratio) * targets[other]


def rate_by_hand(step: int, total: int, warmup: int, peak: float, end: float) -> float:
    """`step` counts from 1."""
    if step <= warmup:
        return peak * step / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def layer_scale_by_hand(name: str, decay: float, pairs: int) -> float:
    layer = pairs + 1  # norm and head
    if name.startswith(("patch_embed", "pos_embed")):
        layer = 0
    elif name.startswith("blocks."):
        layer = int(name.split(".")[1]) // 2 + 1
    return float(decay ** (pairs + 1 - layer))


@pytest.mark.parametrize(
    ("accumulate", "layer_decay", "clip"), [(1, None, 0.5), (2, None, 0.5), (1, 0.5, None)], ids=str
)
def test_fit__equals_a_loop_by_hand(
    tmp_path: Path, accumulate: int, layer_decay: float | None, clip: float | None
) -> None:
    epochs, per_epoch, warmup, decay, smoothing = 2, 4, 2, 0.1, 0.1
    steps = Steps()
    settings = {"label_smoothing": smoothing, "weight_decay": decay, "ema_decay": 0.9, "layer_decay": layer_decay}
    model = supervised(drop_path_rate=0.2, **settings)
    fit = trainer(
        tmp_path,
        max_epochs=epochs,
        callbacks=[steps],
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
    )
    fit.fit(model, datamodule=pictures())
    total = epochs * per_epoch // accumulate
    assert fit.global_step == total
    peak = 0.5 * 8 * accumulate / 1024
    assert model.lr == pytest.approx(peak, rel=1e-12)

    network, average = copy.deepcopy(steps.start), copy.deepcopy(steps.start).eval()
    network.train()
    groups = []
    for name, parameter in network.named_parameters():
        free = parameter.ndim <= 1 or name.endswith(".bias") or name == "pos_embed.embed"
        scale = 1.0 if layer_decay is None else layer_scale_by_hand(name, layer_decay, pairs=1)
        groups.append({"params": [parameter], "weight_decay": 0.0 if free else decay, "scale": scale})
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.999))
    names = [name for name, _ in network.named_parameters()]
    own = dict(model.backbone.named_parameters())

    done = 0
    for number, (images, labels) in enumerate(steps.batches):
        seed_step(SimpleNamespace(current_epoch=number // per_epoch, global_rank=0), number % per_epoch)
        images, targets = mixed_by_hand(images, labels, smoothing)
        loss = -(targets * network(images).log_softmax(1)).sum(1).mean()
        assert steps.losses[number] == pytest.approx(loss.item() / accumulate, rel=1e-5)
        (loss / accumulate).backward()
        if (number + 1) % accumulate == 0:
            done += 1
            if clip is not None:
                nn.utils.clip_grad_norm_(network.parameters(), clip)
            lr = rate_by_hand(done, total, warmup, peak, 1e-4)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for kept, new in zip(average.parameters(), network.parameters(), strict=True):
                    kept.copy_(0.9 * kept + 0.1 * new)
            for name, group in zip(names, optimizer.param_groups, strict=True):
                assert steps.rates[number][id(own[name])] == pytest.approx(group["lr"], rel=1e-9), name
        # After every batch, so that the moving average is seen not to move in between.
        for prefix, expected in (("backbone", network), ("ema.module", average)):
            for name, value in expected.named_parameters():
                actual = steps.states[number][f"{prefix}.{name}"]
                torch.testing.assert_close(
                    actual, value.detach(), rtol=1e-4, atol=2e-6, msg=f"{number} {prefix}.{name}"
                )
    assert done == total
    moved = max(float((value - steps.start.state_dict()[name]).detach().abs().max()) for name, value in own.items())
    assert moved > 1e-3  # far more than what is tolerated above
    assert not model.ema.module.training
    assert network.training


class Logged(Supervised):
    """Keeps every learning rate and gradient norm it reports."""

    def log_dict(self, values: Any, *args: Any, **kwargs: Any) -> None:
        self.__dict__.setdefault("reported", []).append({name: float(value) for name, value in values.items()})
        super().log_dict(values, *args, **kwargs)


def test_schedule__first_peak_and_last_step(tmp_path: Path) -> None:
    model = supervised(kind=Logged, lr_warmup="25%", final_lr=1e-5)
    trainer(tmp_path, max_epochs=2).fit(model, datamodule=pictures())
    rates = [values["schedule/lr"] for values in model.reported]
    peak = 0.5 * 8 / 1024
    assert rates[:2] == pytest.approx([peak / 2, peak], rel=1e-9)
    assert rates[-1] == pytest.approx(1e-5, rel=1e-9)
    assert max(rates) == rates[1]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert all(values["train/grad_norm"] > 0 for values in model.reported)


def test_schedule__constant_if_it_ends_at_the_peak(tmp_path: Path) -> None:
    peak = 0.5 * 8 / 1024
    model = supervised(kind=Logged, lr_warmup="1 step", final_lr=peak)
    trainer(tmp_path, max_epochs=1).fit(model, datamodule=pictures())
    assert [values["schedule/lr"] for values in model.reported] == pytest.approx([peak] * 4, rel=1e-9)


def test_learning_rate__of_a_group_is_what_a_monitor_shows(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    model = supervised(layer_decay=0.5, lr_warmup=0)
    fit = trainer(tmp_path, max_epochs=1, logger=logger, callbacks=[LearningRateMonitor("step")])
    fit.fit(model, datamodule=pictures())
    groups = fit.optimizers[0].param_groups
    assert sorted({group["lr_scale"] for group in groups}) == [0.25, 0.5, 1.0]
    assert len({group["name"] for group in groups}) == len(groups) == 6
    for group in groups:
        assert group["lr"] == pytest.approx(1e-4 * group["lr_scale"], rel=1e-9)  # final_lr at the last step


@pytest.mark.parametrize("optimizer", ["lamb", "sgd"])
def test_optimizer__of_timm_gets_groups_and_rates(tmp_path: Path, optimizer: str) -> None:
    betas = {"betas": (0.8, 0.9)} if optimizer == "lamb" else {}
    model = supervised(optimizer=optimizer, weight_decay=0.05, layer_decay=0.5, **betas)
    fit = trainer(tmp_path, max_steps=2)
    fit.fit(model, datamodule=pictures())
    assert type(fit.optimizers[0]).__name__.lower() == optimizer
    groups = fit.optimizers[0].param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    assert {group["lr"] for group in groups} == {model.lr * scale for scale in (0.25, 0.5, 1.0)}
    assert all(tuple(group.get("betas", (0.8, 0.9))) == (0.8, 0.9) for group in groups)


def test_optimizer__without_betas_refuses_them() -> None:
    with pytest.raises(ConfigError, match=r"model\.betas"):
        supervised(optimizer="sgd", betas=(0.8, 0.9))


def test_run_info__counts_the_decayed_tensors_of_vil2_tiny(tmp_path: Path) -> None:
    model = Supervised(backbone(), ema_decay=0.99, layer_decay=0.65)
    model.backbone_config.kwargs = {"img_size": 16, "patch_size": 8}
    lines: dict[str, str] = {}

    class Read(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            lines.update(pl_module.run_info())
            trainer.should_stop = True

    model.lr_warmup = 0
    trainer(tmp_path, max_steps=1, callbacks=[Read()]).fit(model, datamodule=pictures(2))
    assert lines["weight decay"] == "0.05 on 194 tensors, none on 319"
    assert lines["method"] == "supervised, 10 classes, MixUp 0.8, CutMix 1, p 1, EMA 0.99"
    assert "0.001 x 2 / 1024" in lines["learning rate"]
    assert "x 0.65 per layer" in lines["learning rate"]


# --- mixing -----------------------------------------------------------------------------------------------------------

DRAWS = 10_000


def draws(model: Supervised, count: int = DRAWS) -> list[tuple[Tensor, Tensor]]:
    """Mixes of four images, the i-th filled with i, the label i."""
    np.random.seed(0)
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8)
    return [model.mix(images.clone(), torch.arange(4)) for _ in range(count)]


def test_mix__shares_ratios_pairs_and_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = pytest.importorskip("scipy.stats")
    asked: list[tuple[float, tuple[int, ...]]] = []

    def box(shape: Any, ratio: float, *args: Any, **kwargs: Any) -> Any:
        drawn = rand_bbox(shape, ratio, *args, **kwargs)
        asked.append((ratio, tuple(int(edge) for edge in drawn)))
        return drawn

    monkeypatch.setattr("timm.data.mixup.rand_bbox", box)
    model = built(supervised(num_classes=5))
    mixup_ratios = []
    for images, targets in draws(model):
        assert (targets.sum(1) - 1).abs().max() <= 1e-6
        cut = bool(((images[0] == 0) | (images[0] == 3)).all())
        if cut:
            ratio = 1 - float((images[0, 0] == 3).sum()) / 64
            pasted = images[0] == 3
            for i in range(4):  # the same box in every image and channel, filled from image 3 - i
                assert torch.equal(images[i], torch.where(pasted, 3.0 - i, float(i)))
        else:
            ratio = 1 - float(images[0, 0, 0, 0]) / 3
            mixup_ratios.append(ratio)
            for i in range(4):
                expected = torch.full((3, 8, 8), i * ratio + (3 - i) * (1 - ratio))
                assert (images[i] - expected).abs().max() <= 1e-5
        expected = ratio * torch.eye(4, 5) + (1 - ratio) * torch.eye(4, 5).flip(0)
        assert (targets - expected).abs().max() <= (1e-6 if cut else 1e-5)
    # CutMix half the time, and no batch left as it was but by an empty box.
    assert len(asked) + len(mixup_ratios) == DRAWS
    assert abs(len(asked) - DRAWS / 2) <= 4 * (DRAWS / 4) ** 0.5
    assert stats.kstest(mixup_ratios, stats.beta(0.8, 0.8).cdf).pvalue > 1e-3
    assert np.mean(mixup_ratios) == pytest.approx(0.5, abs=0.02)
    assert np.var(mixup_ratios) == pytest.approx(1 / (4 * 2.6), abs=0.004)  # a uniform one has 0.083
    assert stats.kstest([ratio for ratio, _ in asked], stats.uniform.cdf).pvalue > 1e-3
    for ratio, (top, bottom, left, right) in asked:
        side = 8 * (1 - ratio) ** 0.5  # of the box, before it is clipped to the image
        for start, end in ((top, bottom), (left, right)):
            assert end - start <= side
            assert start == 0 or end == 8 or end - start >= 2 * math.floor(side / 2)  # half-sizes are rounded down


def changed(model: Supervised, count: int = DRAWS) -> int:
    return sum(bool(images[0].any()) for images, _ in draws(model, count))


def test_mix__as_often_as_wanted() -> None:
    rare = changed(built(supervised(num_classes=5, cutmix_alpha=0.0, mix_prob=0.3)))
    assert abs(rare - 0.3 * DRAWS) <= 4 * (DRAWS * 0.3 * 0.7) ** 0.5
    assert changed(built(supervised(num_classes=5, cutmix_alpha=0.0)), 2000) == 2000


def test_mix__switch_probability() -> None:
    mixes = draws(built(supervised(num_classes=5, mix_switch_prob=0.2)))
    cut = sum(bool((images == images.round()).all()) for images, _ in mixes)
    assert abs(cut - 0.2 * DRAWS) <= 4 * (DRAWS * 0.2 * 0.8) ** 0.5


@pytest.mark.parametrize("off", [{"mixup_alpha": 0.0, "cutmix_alpha": 0.0}, {"mix_prob": 0.0}], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mix__off(off: dict[str, float], smoothing: float) -> None:
    model = built(supervised(num_classes=5, label_smoothing=smoothing, **off))
    for images, targets in draws(model, 50):
        assert torch.equal(images[:, 0, 0, 0], torch.arange(4.0))
        expected = torch.full((4, 5), smoothing / 5)
        expected[torch.arange(4), torch.arange(4)] = 1 - smoothing + smoothing / 5
        torch.testing.assert_close(targets, expected, rtol=0, atol=1e-7)


def test_mix__smooths_mixed_labels() -> None:
    for images, targets in draws(built(supervised(num_classes=5, label_smoothing=0.1, cutmix_alpha=0.0)), 50):
        ratio = 1 - float(images[0, 0, 0, 0]) / 3
        torch.testing.assert_close(targets[0, 0].item(), 0.9 * ratio + 0.02, rtol=0, atol=1e-5)
        torch.testing.assert_close(targets[0, 3].item(), 0.9 * (1 - ratio) + 0.02, rtol=0, atol=1e-5)
        torch.testing.assert_close(targets[0, 4].item(), 0.02, rtol=0, atol=1e-6)


@pytest.mark.parametrize("threshold", [None, 0.0, 0.3])
def test_binary_cross_entropy__with_a_threshold(threshold: float | None) -> None:
    model = built(supervised(num_classes=5, loss="binary_cross_entropy", target_threshold=threshold))
    logits, targets = torch.randn(4, 5), draws(model, 3)[2][1]
    assert 0 < targets[0].max() < 1  # really mixed
    wanted = targets if threshold is None else (targets > threshold).float()
    expected = -(wanted * logits.sigmoid().log() + (1 - wanted) * (1 - logits.sigmoid()).log()).mean()
    assert float(model.loss(logits, targets)) == pytest.approx(float(expected), rel=1e-5)


def test_binary_cross_entropy__predicts_sigmoids(tmp_path: Path) -> None:
    model, images = supervised(num_classes=10, loss="binary_cross_entropy", predict_top_k=10), []

    class Keep(L.Callback):
        def on_predict_start(self, trainer: Any, module: Any) -> None:
            nn.init.normal_(module.backbone.head.weight)  # clearly different logits

        def on_predict_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            images.append((outputs, module(batch[0])))

    trainer(tmp_path, callbacks=[Keep()]).predict(model, datamodule=pictures())
    for outputs, logits in images:
        assert torch.equal(outputs["probabilities"], logits.sigmoid().sort(descending=True).values)
        assert torch.equal(outputs["classes"], logits.argsort(descending=True))


def test_mix__refuses_an_odd_batch(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_size=7 must be even.*model\.mix_prob=0"):
        trainer(tmp_path, max_epochs=1).fit(supervised(), datamodule=pictures(7))
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(supervised(mix_prob=0.0), datamodule=pictures(7))
    assert fit.global_step == 4


class Erased(Supervised):
    """Counts the images in which something was erased; without mixing."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.before = batch[0].clone()
        return super().training_step(batch, batch_idx)

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        shares = (images != self.before).any(1).flatten(1).float().mean(1)  # of the pixels
        self.__dict__.setdefault("shares", []).extend(shares.tolist())
        return super().mix(images, labels)


def test_erase__as_often_and_as_large_as_wanted(tmp_path: Path) -> None:
    model = supervised(kind=Erased, erase_prob=0.25, mix_prob=0.0)
    data = Digits(16, 64, train_transform=TrainTransform(16), seed=0)
    trainer(tmp_path, max_epochs=1).fit(model, datamodule=data)
    count = len(model.shares)
    assert count == 22 * 64
    erased = [share for share in model.shares if share]
    assert abs(len(erased) - 0.25 * count) <= 4 * (count * 0.25 * 0.75) ** 0.5
    assert 0.01 < min(erased) < max(erased) < 0.45  # 1/50 to 1/3 of the area, in whole pixels
    assert max(erased) > 0.25


# --- the network ------------------------------------------------------------------------------------------------------


def test_compile__equals_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(compile: bool) -> tuple[Supervised, list[float]]:
        steps = Steps()
        model = supervised(ema_decay=0.9, compile=compile)
        trainer(tmp_path, max_steps=2, callbacks=[steps]).fit(model, datamodule=pictures())
        return model, steps.losses

    calls = []
    compile_with = functools.partial(torch.compile, backend="eager")  # the default needs a C++ compiler, and a minute

    def compiler(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        function = compile_with(*args, **kwargs)

        def counted(*a: Any, **k: Any) -> Any:
            calls.append(1)
            return function(*a, **k)

        return counted

    plain, losses = run(False)
    monkeypatch.setattr(torch, "compile", compiler)
    model, compiled_losses = run(True)
    assert len(calls) >= 2
    assert compiled_losses == pytest.approx(losses, rel=1e-5)
    saved = state(model)
    assert saved.keys() == state(plain).keys()  # a checkpoint of either serves both
    for name, value in state(plain).items():
        torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_layer_decay__is_the_published_formula() -> None:
    scales = layer_lr_scales(timm.create_model(VIL, img_size=16, patch_size=8), 0.65)
    assert scales == pytest.approx({name: layer_scale_by_hand(name, 0.65, 12) for name in scales}, rel=1e-12)
    assert (scales["pos_embed.embed"], scales["norm.weight"], scales["head.bias"]) == (0.65**13, 1.0, 1.0)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        *(({name: value}, name) for name in ("mix_prob", "mix_switch_prob", "erase_prob") for value in (-0.1, 1.1)),
        *(({name: 0}, name) for name in ("base_lr", "lr_batch_size", "predict_top_k", "num_classes")),
        *(({name: -1.0}, name) for name in ("mixup_alpha", "cutmix_alpha", "weight_decay", "warmup_lr", "final_lr")),
        *(({name: value}, name) for name in ("label_smoothing", "ema_decay") for value in (-0.1, 1.0)),
        *(({"layer_decay": value}, "layer_decay") for value in (0.0, 1.1)),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (-0.1, 0.9)}, "betas"),
        ({"target_threshold": 0.5}, "target_threshold"),  # with cross-entropy
        ({"target_threshold": 1.0, "loss": "binary_cross_entropy"}, "target_threshold"),
        ({"optimizer": "adamm"}, "optimizer"),
    ],
    ids=str,
)
def test_settings__out_of_range_are_named(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{key}(\[\d\])?="):
        supervised(**settings)


@pytest.mark.parametrize(("key", "value"), [("lr_warmup", "9 steps"), ("head_only", "3 epochs"), ("lr_warmup", 5)])
def test_settings__durations_are_named(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{key}={value!r}"):
        trainer(tmp_path, max_epochs=2).fit(supervised(**{key: value}), datamodule=pictures())


def test_settings__a_threshold_below_the_smoothing() -> None:
    settings = {"num_classes": 5, "loss": "binary_cross_entropy", "label_smoothing": 0.1}
    with pytest.raises(ConfigError, match=r"model\.label_smoothing=0\.1.*model\.target_threshold=0\.0"):
        built(supervised(**settings, target_threshold=0.0))
    built(supervised(**settings, target_threshold=0.02))


def test_settings__no_number_of_classes() -> None:
    with pytest.raises(ConfigError, match=r"model\.num_classes is not set"):
        built(supervised())


def test_fit__stops_when_it_diverges(tmp_path: Path) -> None:
    class Broken(Supervised):
        def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            images, targets = super().mix(images, labels)
            return images, targets * (math.nan if self.trainer.global_step == 1 else 1)

    fit = trainer(tmp_path, max_epochs=1)
    with pytest.raises(RuntimeError, match=r"train/loss or the gradient is nan at step 2.*model\.base_lr"):
        fit.fit(supervised(kind=Broken), datamodule=pictures())
    fit = trainer(tmp_path, max_steps=2)
    fit.fit(supervised(kind=Broken), datamodule=pictures())
    with pytest.raises(RuntimeError, match="diverged"):  # nor is a good checkpoint replaced
        fit.save_checkpoint(tmp_path / "broken.ckpt")
    assert not (tmp_path / "broken.ckpt").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_fit__learns_random_pictures_by_heart(tmp_path: Path) -> None:
    """256 images of noise with random labels: nothing but memory can tell them apart."""

    class Noise(Digits):
        def build_sources(self) -> Any:
            train, _, classes = super().build_sources()
            generator = torch.Generator().manual_seed(0)
            train.images = torch.randint(0, 256, (256, 3, 16, 16), dtype=torch.uint8, generator=generator)
            train.labels = torch.randint(0, 10, (256,), generator=generator).tolist()
            return train, train, classes

    config = backbone()
    config.kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 4}
    model = Supervised(config, mix_prob=0.0, base_lr=3e-3, lr_batch_size=64, lr_warmup="5%", weight_decay=0.0)
    torch.manual_seed(1)
    fit = trainer(tmp_path, max_epochs=60, limit_val_batches=1.0, check_val_every_n_epoch=60, gradient_clip_val=1.0)
    fit.fit(model, datamodule=Noise(16, 64, seed=0))
    assert float(fit.callback_metrics["val/acc1"]) >= 99
