"""How long a run is and how large its batches are: what schedules and learning rates are made of."""

import math
from typing import Any

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


def logs_this_step(trainer: L.Trainer) -> bool:
    """Whether the step that is being computed is one whose numbers Lightning writes; `trainer.log_every_n_steps=0` is never."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (trainer.global_step + 1) % every == 0


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


def split_batch(global_batch: int, largest: int, world_size: int, even: bool = False) -> tuple[int, int]:
    """How each device works through its share of an optimiser step's images: in as few micro batches as fit.

    Args:
        global_batch: Images per optimiser step, over all devices.
        largest: Images that a device can hold.
        world_size: Number of devices.
        even: Whether a micro batch has to be even.

    Returns:
        Images per device and micro batch, and micro batches per step; times `world_size` they are `global_batch`.

    Raises:
        ConfigError: If the images cannot be divided in this way.
    """
    if global_batch < 1:
        raise ConfigError(f"global_batch_size={global_batch} must be at least 1, or null.")
    share, rest = divmod(global_batch, world_size)
    if rest:
        near = [images for images in (share * world_size, (share + 1) * world_size) if images]
        raise ConfigError(
            f"global_batch_size={global_batch} cannot be divided among {world_size} devices (trainer.num_nodes x "
            f"trainer.devices). Use a number of devices that divides it, or global_batch_size={' or '.join(map(str, near))}."
        )
    for accumulated in range(math.ceil(share / largest), share + 1):
        per_device, rest = divmod(share, accumulated)
        if not rest and not (even and per_device % 2):
            return per_device, accumulated
    raise ConfigError(
        f"global_batch_size={global_batch} gives each of {world_size} devices {share} images, which do not make even batches "
        f"of at most data.batch_size={largest}. MixUp and CutMix pair the images of a batch: use another global_batch_size, "
        "a larger data.batch_size, or model.mix_prob=0."
    )


def divide_batch(trainer: L.Trainer, module: L.LightningModule, data: Any, global_batch: int) -> None:
    """Let every optimiser step see `global_batch` images, however many devices there are. Call before the run starts.

    `data.batch_size`, until now the largest batch that fits a device, and `trainer.accumulate_grad_batches` become what
    `split_batch` finds, and an epoch a whole number of such steps.

    Raises:
        ConfigError: If that is impossible, or contradicts `trainer.accumulate_grad_batches`.
    """
    largest = getattr(data, "batch_size", None)
    if largest is None or not hasattr(data, "global_batch_size"):
        raise ConfigError(f"global_batch_size needs one of this project's data modules, not a {type(data).__name__}.")
    even = bool(getattr(module, "needs_even_batches", False))
    per_device, accumulated = split_batch(global_batch, largest, trainer.world_size, even)
    wanted = trainer.accumulate_grad_batches
    if wanted not in (1, accumulated):
        raise ConfigError(
            f"trainer.accumulate_grad_batches={wanted}, but global_batch_size={global_batch} on {trainer.world_size} device(s) "
            f"with data.batch_size={largest} takes {accumulated}. Leave trainer.accumulate_grad_batches unset, or set "
            "global_batch_size=null to choose it yourself."
        )
    data.batch_size, data.global_batch_size = per_device, global_batch
    trainer.accumulate_grad_batches = accumulated
