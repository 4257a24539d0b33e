"""Training methods: one LightningModule per file."""

from vil_lightning.methods.backbone import BackboneConfig
from vil_lightning.methods.dino import DINO
from vil_lightning.methods.linear_probe import LinearProbe
from vil_lightning.methods.supervised import Supervised

__all__ = ["DINO", "BackboneConfig", "LinearProbe", "Supervised"]
