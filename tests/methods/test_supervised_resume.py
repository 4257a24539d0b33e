"""Supervised runs that are interrupted, or spread over two processes, end where an undisturbed one does."""

import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_resume import same
from tiny import FewDigits, Steps, pictures, run_in_two_processes, state, supervised, trainer
from torch import Tensor, nn

from vil_lightning.callbacks import PredictionWriter
from vil_lightning.data.loading import ImageSource
from vil_lightning.errors import ConfigError
from vil_lightning.methods import Supervised
from vil_lightning.methods.randomness import seed_step

EPOCHS, STEPS_PER_EPOCH = 2, 4
ALL_ON: dict[str, Any] = {"drop_path_rate": 0.2, "erase_prob": 0.5, "ema_decay": 0.9, "layer_decay": 0.7}


def run(path: Path, ckpt_path: Path | None = None, every: int = 0, **settings: Any) -> tuple[L.Trainer, Any, Steps]:
    steps, model = Steps(), supervised(**{**ALL_ON, "head_only": "2 steps", **settings})
    callbacks: list[L.Callback] = [steps]
    if every:
        callbacks.append(ModelCheckpoint(path, filename="{step}", every_n_train_steps=every, save_top_k=-1))
    fit = trainer(path, max_epochs=EPOCHS, callbacks=callbacks, enable_checkpointing=bool(every))
    fit.fit(model, datamodule=pictures(), ckpt_path=ckpt_path, weights_only=True)
    return fit, model, steps


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[L.Trainer, Any, Steps, Path]:
    """An uninterrupted run, with a checkpoint after each step."""
    path = tmp_path_factory.mktemp("straight")
    enabled = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    result = run(path, every=1)
    torch.use_deterministic_algorithms(enabled)
    return *result, path


@pytest.mark.parametrize("done", [1, 4, 6], ids=["mid-epoch 1", "boundary", "mid-epoch 6"])
def test_resume__ends_in_the_same_state(straight: tuple[Any, Any, Steps, Path], tmp_path: Path, done: int) -> None:
    whole_fit, whole, recorded, path = straight
    assert len(recorded.batches) == EPOCHS * STEPS_PER_EPOCH
    torch.manual_seed(12345)  # the resumed process is at no particular point of the generator
    fit, model, resumed = run(tmp_path, path / f"step={done}.ckpt")
    assert fit.global_step == whole_fit.global_step == EPOCHS * STEPS_PER_EPOCH
    assert same(resumed.batches, recorded.batches[done:])
    assert resumed.losses == recorded.losses[done:]
    assert same(state(model.backbone), state(whole.backbone))
    assert same(state(model.ema), state(whole.ema))
    assert not same(state(whole.ema.module), state(whole.backbone))
    assert same(fit.optimizers[0].state_dict(), whole_fit.optimizers[0].state_dict())
    assert model.classes == [str(digit) for digit in range(10)]


@pytest.mark.parametrize(
    "off", [{"drop_path_rate": 0.0}, {"erase_prob": 0.0}, {"mix_prob": 0.0}, {"head_only": 0}], ids=str
)
def test_resume__every_part_takes_part(
    straight: tuple[Any, Any, Steps, Path], tmp_path: Path, off: dict[str, Any]
) -> None:
    """Without it the weights differ, so the comparison above covers it."""
    _, model, _ = run(tmp_path, **off)
    assert not same(state(model.backbone), state(straight[1].backbone))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ema_decay": None}, r"has a moving average, but model\.ema_decay is None"),
        ({"num_classes": 7}, r"ckpt_path: backbone\.head\.weight is \(10, 64\).*\(7, 64\)"),
        ({"drop_path_rate": 0.1}, "ckpt_path: the checkpoint's backbone is"),
    ],
    ids=str,
)
def test_resume__refuses_another_network(
    straight: tuple[Any, Any, Steps, Path], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, straight[3] / "step=4.ckpt", **settings)


def test_checkpoint__holds_nothing_but_tensors_and_plain_values(straight: tuple[Any, Any, Steps, Path]) -> None:
    content = torch.load(straight[3] / "step=3.ckpt", weights_only=True)
    assert content["backbone"]["kwargs"]["embed_dim"] == 32
    assert content["classes"] == [str(digit) for digit in range(10)]
    assert same(dict(content["state_dict"]), straight[2].states[2])  # the moving average is that of its own step


# --- two processes ----------------------------------------------------------------------------------------------------

STEPS, GLOBAL_BATCH, VAL_IMAGES = 4, 8, 19
IN_PARALLEL: dict[str, Any] = {"drop_path_rate": 0.2, "erase_prob": 0.5, "ema_decay": 0.9, "lr_warmup": 0}


class OddDigits(FewDigits):
    """An odd number of images to score: two processes must share them unevenly."""

    def build_sources(self) -> tuple[ImageSource, ImageSource, list[str]]:
        train, val, classes = super().build_sources()
        val.images, val.labels = val.images[:VAL_IMAGES], val.labels[:VAL_IMAGES]  # type: ignore[attr-defined]
        return train, val, classes


def test_seed__differs_between_processes_batches_and_epochs() -> None:
    """For every generator in use: torch (drop path), Python (erasing), numpy (mixing)."""
    drawn: list[tuple[float, float, float]] = []
    for place in itertools.product(range(3), repeat=3):
        for _ in range(2):
            seed_step(SimpleNamespace(current_epoch=place[0], global_rank=place[1]), place[2])  # type: ignore[arg-type]
            drawn.append((float(torch.rand(())), random.random(), float(np.random.rand())))
    assert drawn[::2] == drawn[1::2]
    for column in zip(*drawn[::2], strict=True):
        assert len(set(column)) == 27


class TwoInOne(Supervised):
    """Computes what two processes would: each half of the batch with the random numbers of its process."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        losses = []
        for rank in range(2):
            seed_step(SimpleNamespace(current_epoch=self.trainer.current_epoch, global_rank=rank), batch_idx)  # type: ignore[arg-type]
            half = batch[0][rank::2].clone(), batch[1][rank::2]
            losses.append(super().training_step(half, batch_idx))
        return (losses[0] + losses[1]) / 2


class RandomHead(L.Callback):
    """A classifier whose answers differ, before validation and prediction."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        for network in (pl_module.backbone, pl_module.ema.module):
            nn.init.normal_(network.head.weight, generator=generator)

    on_predict_start = on_validation_start


def train(world_size: int, out: Path) -> None:
    """Train for a few steps, score and predict; every process saves what it ends with."""
    torch.set_num_threads(1)
    parallel = {"devices": world_size, "strategy": "ddp"} if world_size > 1 else {}

    def data() -> FewDigits:
        return pictures(GLOBAL_BATCH // world_size, OddDigits, eval_batch_size=10 // world_size)

    model = supervised(kind=TwoInOne if world_size == 1 else Supervised, **IN_PARALLEL)
    steps = Steps()
    fit = trainer(out, max_epochs=1, callbacks=[steps], **parallel)
    fit.fit(model, datamodule=data())
    assert (fit.global_step, model.global_batch_size) == (STEPS, GLOBAL_BATCH)

    writer = PredictionWriter(str(out / f"world{world_size}.csv"))
    score = trainer(out, limit_val_batches=1.0, callbacks=[RandomHead(), writer], **parallel)
    fresh = supervised(**IN_PARALLEL)  # its weights are the same everywhere, bit for bit
    metrics = score.validate(fresh, datamodule=data(), verbose=False)[0]
    score.predict(fresh, datamodule=data(), return_predictions=False)
    content = {"start": steps.start.state_dict(), "state": model.state_dict(), "metrics": metrics}
    torch.save(content, out / f"world{world_size}_rank{fit.global_rank}.pt")


@pytest.mark.timeout(150)
def test_ddp__two_processes_equal_one(tmp_path: Path) -> None:
    train(1, tmp_path)
    results = run_in_two_processes(__file__, "train", tmp_path)
    assert [code for code, _ in results] == [0, 0], "\n".join(error for _, error in results)

    one = torch.load(tmp_path / "world1_rank0.pt", weights_only=True)
    two, other = (torch.load(tmp_path / f"world2_rank{rank}.pt", weights_only=True) for rank in range(2))
    assert one["state"].keys() == two["state"].keys()
    for name, expected in one["state"].items():
        assert torch.equal(two["state"][name], other["state"][name]), f"{name} differs between the processes"
        torch.testing.assert_close(
            two["state"][name], expected, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    for prefix in ("backbone.", "ema.module."):
        moved = [float((one["state"][prefix + n] - v).abs().max()) for n, v in one["start"].items()]
        assert max(moved) > 1e-3  # far more than what is tolerated above

    # Every image is scored once, although the last one is dealt with the first one again.
    assert one["metrics"].keys() == {"val/loss", "val/acc1", "val/acc5", "val/ema_acc1", "val/ema_acc5"}
    for scores in (two["metrics"], other["metrics"]):
        for name, expected in one["metrics"].items():
            assert scores[name] == pytest.approx(expected, rel=1e-5 if name == "val/loss" else 1e-12), name
    shares = [one["metrics"][name] * VAL_IMAGES / 100 for name in one["metrics"] if "acc" in name]
    assert shares == pytest.approx([round(share) for share in shares], abs=1e-4)
    assert len({round(share) for share in shares}) > 2
    rows = (tmp_path / "world1.csv").read_text()
    assert (tmp_path / "world2.csv").read_text() == rows
    assert rows.count("\n") == 1 + VAL_IMAGES


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"weight_decay": 0.5}, "weight_decay"),
        ({"layer_decay": 0.5}, "layer_decay"),
        ({"betas": (0.8, 0.9)}, "betas"),
        ({"optimizer": "lamb"}, "optimizer"),
        ({"freeze": ["patch_embed."]}, "freeze"),
        ({"loss": "binary_cross_entropy"}, "loss"),
    ],
)
def test_resume__refuses_settings_that_the_optimizer_would_not_take_over(
    straight: tuple[Any, Any, Steps, Path], tmp_path: Path, settings: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{key}"):
        run(tmp_path, straight[3] / "step=3.ckpt", **settings)
