"""A run that is told to stop (SIGTERM, SIGUSR1) writes its state after the step it is in, and can be continued there."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from types import FrameType
from typing import Any

import lightning as L
import torch
from torch import Tensor

from vil_lightning.callbacks import LastCheckpoint

log = logging.getLogger(__name__)


class Preempted(SystemExit):
    """Ends the process with 128 + the number of the signal, as a shell reports it: a scheduler sees that it was no success."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class Preemption(L.Callback):
    """Turns SIGTERM (preemption, a node that shuts down, torchrun) and SIGUSR1 (SLURM's `--signal`) into an orderly stop.

    In place of Lightning's handlers, which save, or talk to other processes, in the middle of whatever the program is doing.
    All processes stop after the same optimiser step, also if only some got the signal. After SIGUSR1 a SLURM job is put into
    the queue again; a job started with `--resume auto` then goes on. A signal that arrives during validation acts after the
    next step.

    It acts from `listen` on, the command line calls it before it starts the trainer. A signal during the preparations lets the
    first step pass.

    Args:
        last: Writes the state; None if the run keeps none (`checkpoint.save_last=false`).
    """

    signals = ("SIGTERM", "SIGUSR1")  # the latter is unknown to Windows

    def __init__(self, last: LastCheckpoint | None) -> None:
        self.last = last
        self.received = 0
        self._listening = False
        self._previous: dict[int, Any] = {}
        self._agreed: Tensor | None = None
        self._step = -1

    # --- signals ------------------------------------------------------------------------------------------------------

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._listening:
            self.received = number
        else:  # after the run; Lightning puts back the handlers that it found
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def listen(self) -> None:
        """Take the signals from now on. (Python allows handlers on its main thread only; elsewhere nothing changes.)"""
        if threading.current_thread() is not threading.main_thread():
            return
        for name in self.signals:
            if hasattr(signal, name):
                number = getattr(signal, name)
                previous = signal.signal(number, self._receive)
                self._previous.setdefault(number, previous)
        self._listening = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.listen()  # again: by now Lightning has put its own handlers in front
        if trainer.received_sigterm:
            self.received = self.received or signal.SIGTERM
            trainer._signal_connector.received_sigterm = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}
        self._listening = False

    # --- the stop -----------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # between accumulated batches: gradients are not part of a checkpoint
        number = self._agree(trainer)
        if number:
            self._stop(trainer, number)

    def _agree(self, trainer: L.Trainer) -> int:
        """The signal that any process had received a step ago (when alone: by now)."""
        if trainer.world_size == 1:
            return self.received
        # Read a step late, like the check of the loss: by then it has arrived, and the device is not waited for.
        before = self._agreed
        mine = torch.tensor(float(self.received), device=trainer.strategy.root_device)
        self._agreed = torch.as_tensor(trainer.strategy.reduce(mine, reduce_op="max"))
        return 0 if before is None else int(before)

    def _stop(self, trainer: L.Trainer, number: int) -> None:
        name, step = signal.Signals(number).name, trainer.global_step
        if self.last is None:
            said = "Its state is not kept (checkpoint.save_last=false)."
        else:
            self.last.save_now(trainer)
            said = f"Its state is in {self.last.dirpath}/last.ckpt; start it again with --resume auto to go on."
        if trainer.is_global_zero:
            print(f"\nStopped by {name} after step {step}. {said}", file=sys.stderr, flush=True)
            if hasattr(signal, "SIGUSR1") and number == signal.SIGUSR1:
                requeue()
        raise Preempted(number)


def requeue() -> None:
    """Put the SLURM job that this process belongs to into the queue again; nothing if there is none."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID") and (
        f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    )
    job = job or os.environ.get("SLURM_JOB_ID")
    if not job:
        return
    program = shutil.which("scontrol")
    if program is None:
        log.error("SLURM job %s is not queued again: there is no scontrol in PATH.", job)
        return
    done = subprocess.run([program, "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        log.error("SLURM job %s is not queued again: scontrol says %s", job, (done.stderr or done.stdout).strip())
    else:
        log.warning("SLURM job %s is queued again.", job)
