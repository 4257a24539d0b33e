"""Speed, and how long the run will still take."""

import time
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar


class Throughput(L.Callback):
    """Logs `speed/images_per_second` over all devices, as often as other metrics; pauses (validation) are not counted.

    On a CUDA device also `speed/peak_memory_gib`: the most that tensors have taken on it so far.
    """

    def __init__(self) -> None:
        self._images = 0
        self._seconds = 0.0
        self._last: float | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._last is None:
            self._last = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        self._seconds += now - (self._last if self._last is not None else now)
        self._last = now  # the next batch's loading time counts
        self._images += len(batch[-1]) * trainer.world_size
        # Just when Lightning writes logs: this hook runs after the step was counted.
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # 0 is never
        if every and trainer.global_step % every == 0 and self._seconds > 0:
            pl_module.log("speed/images_per_second", self._images / self._seconds)
            self._images, self._seconds = 0, 0.0
            if pl_module.device.type == "cuda":
                pl_module.log("speed/peak_memory_gib", torch.cuda.max_memory_allocated(pl_module.device) / 2**30)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last = None


class RunProgressBar(RichProgressBar):
    """Lightning's Rich progress bar, with the time left until the end of the run (not only of the epoch)."""

    def __init__(self, refresh_rate: int = 1, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)
        self._started: tuple[float, int] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._started = time.monotonic(), trainer.global_step

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        total = trainer.estimated_stepping_batches
        if self._started is not None and total != float("inf"):
            started, first_step = self._started
            done = trainer.global_step - first_step
            if done:
                left = (time.monotonic() - started) / done * (total - trainer.global_step)
                metrics["run_eta"] = str(timedelta(seconds=round(left)))
        return metrics
