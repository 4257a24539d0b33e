"""What is evaluated: a frozen network and the images it is scored on."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vil_lightning.data.datamodule import ImageDataModule
from vil_lightning.data.loading import ImageSource
from vil_lightning.data.transforms import EvalTransform, TrainingTransform
from vil_lightning.errors import ConfigError
from vil_lightning.evaluation.features import FeatureSet, Precision, extract
from vil_lightning.methods.backbone import BackboneConfig, build_backbone, resolve_backbone

_OWN_READOUTS = ("bilateral_concat", "bilateral_avg", "avg", "max", "first", "last")  # of a network's `global_pool`


@dataclass
class Subject:
    """A network with its images.

    Args:
        backbone: Resolved.
        data: After `setup`, with labels.
        cache_dir: Of features.
        precision: "32" or "bf16".
        device: "auto", "cpu", "cuda", ...
        seed: Draws few labels and held-out images.
        progress: Show bars.
    """

    backbone: BackboneConfig
    data: ImageDataModule
    cache_dir: Path | None = None
    precision: Precision = "32"
    device: str = "auto"
    seed: int = 0
    progress: bool = True
    pooling: str = field(init=False)

    def __post_init__(self) -> None:
        self.backbone = resolve_backbone(self.backbone)
        self.pooling = own_pooling(self.build(quiet=False))

    def build(self, quiet: bool = True) -> nn.Module:
        """The network, in evaluation mode; without weights, that of the data's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.data.seed)
            return build_backbone(self.backbone, quiet=quiet).eval().requires_grad_(False)

    @property
    def place(self) -> str:
        """The device of everything that is computed from features."""
        if self.device != "auto":
            return self.device
        return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"

    def readout(self, name: str) -> str:
        """The read-out to take; `auto` is the network's own, `auto/last4` that of its last four blocks."""
        return self.pooling + name.removeprefix("auto") if name.startswith("auto") else name

    def features(
        self, split: Literal["train", "val"], readouts: Sequence[str], shown: float = 1.0
    ) -> dict[str, FeatureSet]:
        """Computed, or from the cache; of the upper part of images if `shown` is below 1."""
        return extract(
            self.backbone,
            self.data,
            split,
            readouts,
            cache_dir=self.cache_dir,
            precision=self.precision,
            device=self.device,
            progress=self.progress,
            shown=shown,
        )

    def on_val(self, source: ImageSource | None = None, transform: EvalTransform | None = None) -> "Subject":
        """The same network with other val images, or another transform of them. The training images are the same."""
        other, data = copy.copy(self), copy.copy(self.data)
        data.val_source = self.data.val_source if source is None else source
        data.eval_transform = self.data.eval_transform if transform is None else transform
        data._eval_datasets, data.known_bad = {}, {}
        other.data = data
        return other

    def finisher(self, transform: TrainingTransform) -> ImageDataModule:
        """A copy of the images' module that finishes views of this transform on the device."""
        data = copy.copy(self.data)
        data.train_transform = transform
        return data

    def at_size(self, img_size: int) -> "Subject":
        """The same network on the same images at another resolution; position embeddings are resampled."""
        other, data = copy.copy(self), copy.copy(self.data)
        data.img_size, data.eval_transform = img_size, EvalTransform(img_size, self.data.eval_transform.crop_pct)
        data._eval_datasets = {}
        other.data = data
        other.backbone = replace(self.backbone, kwargs={**self.backbone.kwargs, "img_size": img_size})
        return other


def own_pooling(backbone: nn.Module) -> str:
    """The read-out that a network is made for, by its `global_pool`; `avg` for one with a class token or none.

    Raises:
        ConfigError: If it has another one.
    """
    pooling: Any = getattr(backbone, "global_pool", None) or getattr(
        getattr(backbone, "head", None), "global_pool", None
    )
    name = pooling if isinstance(pooling, str) else getattr(pooling, "pool_type", "avg")
    if name in ("token", "", "avgmax", "map", "fast"):
        name = "avg"
    if name not in _OWN_READOUTS:
        raise ConfigError(
            f"backbone.kwargs.global_pool={name!r} is no read-out of features. Set readout in the tasks to one of "
            f"{', '.join(_OWN_READOUTS)}, or backbone.kwargs.global_pool."
        )
    return name
