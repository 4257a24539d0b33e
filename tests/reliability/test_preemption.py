"""A run that is told to stop writes its state after the step, and continues from there to the same end."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "methods"))
from tiny import digits, dino, pictures, run_in_two_processes, state, supervised, trainer

from vil_lightning.callbacks import LastCheckpoint
from vil_lightning.checkpoint_io import AtomicCheckpointIO, newest_good
from vil_lightning.errors import ConfigError
from vil_lightning.reliability import Preempted, Preemption
from vil_lightning.reliability.preemption import requeue


class Signal(L.Callback):
    """Sends this process a signal in the middle of a batch."""

    def __init__(self, batch: int, number: int = signal.SIGTERM, rank: int = 0, epoch: int = 0) -> None:
        self.batch, self.number, self.rank, self.epoch = batch, number, rank, epoch

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Any) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress
        at = (trainer.current_epoch, progress.current.ready - 1, trainer.global_rank)
        if at == (self.epoch, self.batch, self.rank):
            os.kill(os.getpid(), self.number)


def run(
    folder: Path, model: Any, data: Any, *callbacks: L.Callback, ckpt_path: Path | None = None, **kwargs: Any
) -> Any:
    last = LastCheckpoint(folder)
    stop = Preemption(last)
    fit = trainer(folder, max_epochs=2, enable_checkpointing=True, callbacks=[*callbacks], **kwargs)
    fit.strategy.checkpoint_io = AtomicCheckpointIO()
    fit.callbacks += [last, stop]  # type: ignore[attr-defined]
    fit.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return fit


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_preemption__stops_after_the_step_and_goes_on_from_there(
    tmp_path: Path, number: int, code: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    whole = dino(drop_path_rate=0.2)
    run(tmp_path / "whole", whole, digits())
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with pytest.raises(Preempted) as stopped:
        run(tmp_path / "cut", dino(drop_path_rate=0.2), digits(), Signal(1, number))
    assert stopped.value.code == code
    assert "after step 2" in capfd.readouterr().err
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == handlers
    last = newest_good(tmp_path / "cut")
    assert last is not None
    assert torch.load(last, weights_only=True)["global_step"] == 2
    resumed = dino(drop_path_rate=0.2)
    run(tmp_path / "cut", resumed, digits(), ckpt_path=last)
    for name, value in state(whole).items():
        assert torch.equal(value, state(resumed)[name]), name


def test_preemption__waits_for_the_accumulated_step(tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        run(tmp_path, supervised(), pictures(), Signal(0), accumulate_grad_batches=2)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["global_step"] == 1
    assert content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] == 2


def test_preemption__at_the_end_of_an_epoch(tmp_path: Path) -> None:
    whole, resumed = supervised(), supervised()
    run(tmp_path / "whole", whole, pictures())
    with pytest.raises(Preempted):
        run(tmp_path / "cut", supervised(), pictures(), Signal(3))
    run(tmp_path / "cut", resumed, pictures(), ckpt_path=tmp_path / "cut/last.ckpt")
    for name, value in state(whole).items():
        assert torch.equal(value, state(resumed)[name]), name


def test_preemption__a_state_that_cannot_be_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ConfigError, match="No space left"):
        run(tmp_path, supervised(), pictures(), Signal(1))


def preempted_rank(world_size: int, folder: Path) -> None:
    """Only process 1 gets the signal."""
    torch.set_num_threads(1)
    run(folder, dino(), digits(4), Signal(1, rank=1), devices=world_size, strategy="ddp")


@pytest.mark.timeout(150)
def test_preemption__one_process_stops_all_after_the_same_step(tmp_path: Path) -> None:
    results = run_in_two_processes(__file__, "preempted_rank", tmp_path, timeout=100)
    assert [code for code, _ in results] == [143, 143], "\n".join(error for _, error in results)
    # Agreed upon a step later.
    assert "after step 3" in results[0][1]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({"SLURM_JOB_ID": "17"}, "17"),
        ({"SLURM_JOB_ID": "99", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}, "17_3"),
        ({}, None),
    ],
)
def test_requeue__calls_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], job: str | None
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    requeue()
    called = tmp_path / "called"
    assert (called.read_text() if called.exists() else None) == (f"requeue {job}\n" if job else None)


class EarlySignal(L.Callback):
    """Sends the signal before there is a step, when Lightning's own handlers are in place."""

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_preemption__a_signal_during_the_preparations_lets_one_step_pass(tmp_path: Path) -> None:
    last = LastCheckpoint(tmp_path)
    stop = Preemption(last)
    stop.listen()
    fit = trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[EarlySignal()])
    fit.callbacks += [last, stop]  # type: ignore[attr-defined]
    try:
        with pytest.raises(Preempted):
            fit.fit(supervised(), datamodule=pictures())
    finally:
        left = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1
    # Lightning has put the handler back that it found; it must not swallow what is meant to end the process now.
    assert callable(left)
    code = f"from vil_lightning.reliability import Preemption; Preemption(None)._receive({signal.SIGTERM:d}, None)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], check=False, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        ).returncode
        == -signal.SIGTERM
    )
