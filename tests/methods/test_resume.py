"""A run that is interrupted and resumed ends where an uninterrupted one does, bit for bit."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Recorder, digits, dino, state, trainer

EPOCHS, STEPS_PER_EPOCH = 2, 4


def run(path: Path, ckpt_path: Path | None = None, callbacks: tuple[L.Callback, ...] = ()) -> tuple[Any, Any, Recorder]:
    recorder = Recorder()
    model = dino(
        drop_path_rate=0.2, teacher_temp_warmup="1 epoch", warmup_teacher_temp=0.02, freeze_last_layer="2 steps"
    )
    fit = trainer(path, max_epochs=EPOCHS, callbacks=[recorder, *callbacks], enable_checkpointing=bool(callbacks))
    fit.fit(model, datamodule=digits(), ckpt_path=ckpt_path, weights_only=True)
    return fit, model, recorder


def same(a: Any, b: Any) -> bool:
    """Equality of nested containers, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Recorder, Path]:
    """An uninterrupted run, with a checkpoint after each step."""
    path = tmp_path_factory.mktemp("straight")
    checkpoints = ModelCheckpoint(path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    enabled = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    result = run(path, callbacks=(checkpoints,))
    torch.use_deterministic_algorithms(enabled)
    return *result, path


@pytest.mark.parametrize("done", [1, 3, 4, 6], ids=["mid-epoch 1", "mid-epoch 3", "boundary", "mid-epoch 6"])
def test_resume__ends_in_the_same_state(straight: tuple[Any, Any, Recorder, Path], tmp_path: Path, done: int) -> None:
    whole_trainer, whole, recorded, path = straight
    assert len(recorded.batches) == EPOCHS * STEPS_PER_EPOCH
    torch.manual_seed(12345)  # the resumed process is at no particular point of the generator
    fit, model, resumed = run(tmp_path, path / f"step={done}.ckpt")
    assert fit.global_step == whole_trainer.global_step == EPOCHS * STEPS_PER_EPOCH
    assert same(resumed.batches, recorded.batches[done:])
    assert same(resumed.schedules, recorded.schedules[done:])
    assert same(resumed.losses, recorded.losses[done:])
    assert same(state(model.student), state(whole.student))
    assert same(state(model.teacher), state(whole.teacher))
    assert torch.equal(model.loss.center, whole.loss.center)
    assert same(fit.optimizers[0].state_dict(), whole_trainer.optimizers[0].state_dict())


def test_resume__from_the_checkpoint_written_at_the_end_of_an_epoch(
    straight: tuple[Any, Any, Recorder, Path], tmp_path: Path
) -> None:
    _, whole, recorded, _ = straight
    run(tmp_path, callbacks=(ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1),))
    _, model, resumed = run(tmp_path, tmp_path / "epoch=0.ckpt")
    assert same(resumed.batches, recorded.batches[STEPS_PER_EPOCH:])
    assert same(state(model), state(whole))


def test_resume__drop_path_takes_part(straight: tuple[Any, Any, Recorder, Path], tmp_path: Path) -> None:
    """Without drop path the losses differ, so the comparison above covers the network's randomness."""
    recorder = Recorder()
    model = dino(
        drop_path_rate=0.0, teacher_temp_warmup="1 epoch", warmup_teacher_temp=0.02, freeze_last_layer="2 steps"
    )
    trainer(tmp_path, max_epochs=EPOCHS, callbacks=[recorder]).fit(model, datamodule=digits())
    assert recorder.losses[0] != straight[2].losses[0]


def test_checkpoint__holds_nothing_but_tensors_and_plain_values(straight: tuple[Any, Any, Recorder, Path]) -> None:
    content = torch.load(straight[3] / "step=3.ckpt", weights_only=True)
    assert content["backbone"]["name"] == "vil2_tiny_patch16_224"
    assert content["backbone"]["kwargs"]["embed_dim"] == 32
    assert content["global_step"] == 3


def test_checkpoint__holds_the_teacher_of_its_own_step(straight: tuple[Any, Any, Recorder, Path]) -> None:
    _, _, recorded, path = straight
    for step in (1, 4):
        saved = torch.load(path / f"step={step}.ckpt", weights_only=True)["state_dict"]
        assert same(dict(saved), recorded.states[step - 1])


def test_resume__after_an_epoch_cut_short(tmp_path: Path) -> None:
    """With trainer.limit_train_batches an epoch ends before its loader does; the next one still starts at its first batch."""

    def shortened(path: Path, ckpt_path: Path | None = None) -> Recorder:
        recorder = Recorder()
        every = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        fit = trainer(path, max_epochs=3, limit_train_batches=2, callbacks=[recorder, every], enable_checkpointing=True)
        fit.fit(dino(), datamodule=digits(), ckpt_path=ckpt_path, weights_only=True)
        return recorder

    whole = shortened(tmp_path / "whole")
    resumed = shortened(tmp_path / "resumed", tmp_path / "whole/epoch=0.ckpt")
    assert len(whole.batches) == 6
    assert same(resumed.batches, whole.batches[2:])
    assert same(resumed.states[-1], whole.states[-1])
