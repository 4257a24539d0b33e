"""What a checkpoint records about its run, so that resuming with other settings is refused instead of half ignored."""

from typing import Any

import lightning as L

from vil_lightning.errors import ConfigError
from vil_lightning.methods.run_length import global_batch_size

SETTINGS_KEY = "settings"
BATCH_KEY = "batch"


def record_settings(checkpoint: dict[str, Any], **settings: Any) -> None:
    """Keep settings that live in the optimiser's state, which would win over the recipe's when a run is resumed."""
    checkpoint[SETTINGS_KEY] = {name: _plain(value) for name, value in settings.items()}


def check_settings(trainer: L.Trainer | None, checkpoint: dict[str, Any], **settings: Any) -> None:
    """Refuse to continue a run with other settings than it was started with. (Scoring it needs none of them.)

    Raises:
        ConfigError: Naming the first that differs.
    """
    recorded = checkpoint.get(SETTINGS_KEY, {})
    if trainer is None or trainer.state.fn != "fit":
        return
    for name, value in settings.items():
        if name in recorded and recorded[name] != _plain(value):
            raise ConfigError(
                f"ckpt_path: the run was started with model.{name}={recorded[name]}, but model.{name} is {_plain(value)}. "
                "Resume with the recipe of that run; to start a new one from its weights, use --model.backbone.weights."
            )


def record_batch(trainer: L.Trainer | None, checkpoint: dict[str, Any]) -> None:
    """Keep how many images an optimiser step and a micro batch of all devices have."""
    if trainer is not None:
        images = global_batch_size(trainer)
        checkpoint[BATCH_KEY] = {"step": images, "micro_batch": images // trainer.accumulate_grad_batches}


def check_batch(trainer: L.Trainer | None, checkpoint: dict[str, Any]) -> None:
    """Let a run go on with other devices: the same images per optimiser step, in other micro batches if need be.

    Lightning counts micro batches. `checkpoint` is changed, before its loops read their progress, to what it would hold if
    the run had had today's from its start. (The loader converts its own position.)

    Raises:
        ConfigError: If a step has another number of images than it had, or if the checkpoint is from the middle of what is now
            one micro batch.
    """
    recorded = checkpoint.get(BATCH_KEY)
    if recorded is None or trainer is None or trainer.state.fn != "fit":
        return
    images = global_batch_size(trainer)
    if recorded["step"] != images:
        raise ConfigError(
            f"ckpt_path: the run was started with {recorded['step']} images per optimiser step, but now there are {images} "
            "(trainer.num_nodes x trainer.devices x data.batch_size x trainer.accumulate_grad_batches). Resume with "
            f"--global_batch_size {recorded['step']}, which divides them among any number of devices; to start a new run from "
            "these weights, use --model.backbone.weights."
        )
    before, now = recorded["micro_batch"], images // trainer.accumulate_grad_batches
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
    if before == now or progress is None:
        return
    done = progress["current"]["processed"]
    if not progress["is_last_batch"] and done * before % now:
        raise ConfigError(
            f"ckpt_path: the checkpoint was written after {done} micro batches of {before} images, "
            f"which are no whole number of micro batches of {now} (data.batch_size x number of devices). Resume with a "
            "data.batch_size and devices that divide them, or from a checkpoint at the end of an epoch."
        )
    for span in ("current", "total"):
        # A checkpoint is written while its batch is processed but not completed: such a lag is of one batch, whatever its size.
        counts, processed = progress[span], progress[span]["processed"]
        for name, count in counts.items():
            counts[name] = processed * before // now + count - processed


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
