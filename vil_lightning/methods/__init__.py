"""Training methods: one LightningModule per file."""

from vil_lightning.methods.autoregressive import Autoregressive
from vil_lightning.methods.backbone import BackboneConfig
from vil_lightning.methods.dino import DINO
from vil_lightning.methods.dinov2 import DINOv2
from vil_lightning.methods.distillation import Distillation
from vil_lightning.methods.ibot import IBOT
from vil_lightning.methods.lejepa import LeJEPA
from vil_lightning.methods.linear_probe import LinearProbe
from vil_lightning.methods.mae import MAE
from vil_lightning.methods.segmentation import Segmentation
from vil_lightning.methods.simmim import SimMIM
from vil_lightning.methods.supervised import Supervised

__all__ = [
    "DINO",
    "IBOT",
    "MAE",
    "Autoregressive",
    "BackboneConfig",
    "DINOv2",
    "Distillation",
    "LeJEPA",
    "LinearProbe",
    "Segmentation",
    "SimMIM",
    "Supervised",
]
