"""The state in which a run can be continued."""

from datetime import timedelta
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Writes `last.ckpt` after every epoch (or as often as told) and at the end, replacing the one before.

    Lightning's own `save_last` (2.6) writes it only when another checkpoint is written, too: with a monitored value, only when
    that has improved. A run that no longer improved would be continued from long before, and end without its last weights.

    Args:
        dirpath: Folder.
        every_n_epochs: How often, at the end of an epoch; 1 if none of the three is given.
        every_n_train_steps: How often, in steps.
        train_time_interval: How often, in time.
    """

    def __init__(
        self,
        dirpath: str | Path,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
    ) -> None:
        by_epoch = every_n_train_steps is None and train_time_interval is None
        super().__init__(
            dirpath,
            filename="last",
            every_n_epochs=every_n_epochs,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            save_on_train_epoch_end=True if by_epoch else None,  # also in epochs without validation
            enable_version_counter=False,
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
