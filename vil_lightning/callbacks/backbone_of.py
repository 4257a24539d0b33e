"""Where a method keeps the network it is for."""

import lightning as L
from torch import nn

from vil_lightning.errors import ConfigError

# In the order in which `weights.backbone_state_dict` looks for them: a moving average before what it is an average of.
PLACES = ("teacher.backbone", "ema.module", "backbone", "student.backbone")


def backbone_of(pl_module: L.LightningModule) -> nn.Module:
    """The network that a run is for: the one that another run would take from its checkpoint.

    Raises:
        ConfigError: If the module has none of `PLACES`.
    """
    for place in PLACES:
        found: object = pl_module
        for name in place.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.Module):
            return found
    raise ConfigError(
        f"{type(pl_module).__name__} has no backbone to look at: it is expected under one of {', '.join(PLACES)}. "
        "Take the callback out of trainer.callbacks."
    )
