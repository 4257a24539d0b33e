"""How long a run is and how large its batches are: what schedules and learning rates are made of."""

import math

import lightning as L

from vil_lightning.errors import ConfigError
from vil_lightning.methods.fully_sharded import check_strategy
from vil_lightning.schedules import Duration, resolve_steps


def run_length(trainer: L.Trainer) -> tuple[int, int]:
    """Optimiser steps of the run, and per epoch.

    Raises:
        ConfigError: If the run has no end.
    """
    total = trainer.estimated_stepping_batches
    if not math.isfinite(total):
        raise ConfigError("The schedules need the length of the run: set trainer.max_epochs or trainer.max_steps.")
    if trainer.train_dataloader is None:  # with max_steps alone, nothing has asked for it yet
        trainer.fit_loop.setup_data()
    # As Lightning counts: what is left at the end of an epoch makes a step of its own.
    return int(total), math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)


def resolve_durations(trainer: L.Trainer, durations: dict[str, Duration]) -> dict[str, int]:
    """Optimiser steps of each duration, and of the run as `total`. Keys are those of the module's arguments.

    Under `trainer.fast_dev_run`, whose run is shorter than any warm-up, durations end with the run.
    """
    total, steps_per_epoch = run_length(trainer)
    steps = {}
    for key, value in durations.items():
        known = {"steps_per_epoch": steps_per_epoch, "total_steps": total, "key": f"model.{key}"}
        steps[key] = resolve_steps(value, **known, cut=bool(trainer.fast_dev_run))  # type: ignore[arg-type,attr-defined]
    return {**steps, "total": total}


def global_batch_size(trainer: L.Trainer) -> int:
    """Images per optimiser step, over all devices and accumulated batches.

    Raises:
        ConfigError: If nothing says how many, or under a strategy that splits more than batches.
    """
    check_strategy(trainer)
    per_device = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    if per_device is None:
        raise ConfigError("The learning rate is scaled with the batch: use a data module that has a batch_size.")
    return per_device * trainer.world_size * trainer.accumulate_grad_batches
