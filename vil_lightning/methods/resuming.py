"""What a checkpoint records about its run, so that resuming with other settings is refused instead of half ignored."""

from typing import Any

import lightning as L

from vil_lightning.errors import ConfigError

SETTINGS_KEY = "settings"


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


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
