"""The state in which a run can be continued."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO


class LastCheckpoint(ModelCheckpoint):
    """Writes `last.ckpt` after every epoch (or as often as told) and at the end, replacing the one before.

    Lightning's own `save_last` (2.6) writes it only when another checkpoint is written, too: with a monitored value, only when
    that has improved. A run that no longer improved would be continued from long before, and end without its last weights.

    Args:
        dirpath: Folder.
        every_n_epochs: How often, at the end of an epoch; 1 if none of the three is given.
        every_n_train_steps: How often, in steps.
        train_time_interval: How often, in time.
        save_on_exception: Also write it when the run is stopped by an error.

    It always holds the whole state; `checkpoint.save_weights_only` is for `best.ckpt`.
    """

    def __init__(
        self,
        dirpath: str | Path,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        save_on_exception: bool = False,
    ) -> None:
        self.by_epoch = every_n_train_steps is None and train_time_interval is None
        super().__init__(
            dirpath,
            filename="last",
            every_n_epochs=every_n_epochs,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            save_on_train_epoch_end=True if self.by_epoch else None,  # also in epochs without validation
            save_on_exception=save_on_exception,
            enable_version_counter=False,
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Saved in this step already, before the validation: what that has found (the best value so far) belongs in.
        if not self.by_epoch and self._last_global_step_saved == trainer.global_step and trainer.state.fn == "fit":
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self.on_validation_end(trainer, pl_module)  # the others may look at a validation's result only now

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        saved = self.by_epoch and self._last_global_step_saved == trainer.global_step
        if not saved and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save(trainer)
        self._finish_writing(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, SystemExit):  # an orderly stop has saved what it wanted to keep
            super().on_exception(trainer, pl_module, exception)

    def save_now(self, trainer: L.Trainer) -> None:
        """Write the state after a step, at once, and see that it is there.

        Raises:
            ConfigError: If it cannot be written.
        """
        if self._last_global_step_saved != trainer.global_step:
            self._save(trainer)
        self._finish_writing(trainer)

    @staticmethod
    def _finish_writing(trainer: L.Trainer) -> None:
        """Wait for a state that is written in the background, and refuse to call a run finished whose state is lost."""
        writer: Any = trainer.strategy.checkpoint_io
        if isinstance(writer, AsyncCheckpointIO):
            writer.teardown()  # waits; it starts again with the next checkpoint
            writer = writer.checkpoint_io
        if hasattr(writer, "check_written"):
            writer.check_written()

    def _save(self, trainer: L.Trainer) -> None:
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
