"""A small network on some digits, for tests of tasks."""

from typing import Any

from vil_lightning.data import Digits
from vil_lightning.evaluation.subject import Subject
from vil_lightning.methods.backbone import BackboneConfig

VIL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2}
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


def subject(name: str = "vil2_tiny_patch16_224", weights: str | None = None, **options: Any) -> Subject:
    """On digits 0 to 3: 174 training and 144 val images, unless told otherwise."""
    kwargs = {"vil2_tiny_patch16_224": VIL, "vit_tiny_patch16_224": VIT}.get(name, {})
    data = Digits(**{"img_size": 16, "classes": "0-3", "train_fraction": 0.3, "seed": 0, **options})
    data.setup("fit")
    return Subject(BackboneConfig(name, weights, dict(kwargs)), data, progress=False, device="cpu")
