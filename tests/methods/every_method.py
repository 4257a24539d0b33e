"""Every training method, with its options that change what a step does, at the smallest size: for tests that hold for all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch
from tiny import SMALL, VIL, FewDigits, digits, pictures

from vil_lightning.data.segmentation import ShapesSegmentation
from vil_lightning.methods import (
    DINO,
    IBOT,
    MAE,
    Autoregressive,
    BackboneConfig,
    DINOv2,
    Distillation,
    LeJEPA,
    LinearProbe,
    Segmentation,
    SimMIM,
    Supervised,
)

Run = tuple[L.LightningModule, L.LightningDataModule]

FINE = {"patch_size": 4}  # a grid of 4 x 4 patches
DROP = {"drop_path_rate": 0.5}  # half of the batch in every block
PROTOTYPES: dict[str, Any] = {
    "num_prototypes": 24,
    "head_hidden_dim": 16,
    "head_bottleneck_dim": 8,
    "freeze_last_layer": 0,
}
DECODER: dict[str, Any] = {"decoder_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}


def _config(**kwargs: Any) -> BackboneConfig:
    return BackboneConfig(VIL, None, {**SMALL, **DROP, **kwargs})


def _teacher(folder: Path) -> BackboneConfig:
    """Untrained, from a file of this project."""
    torch.manual_seed(3)
    kwargs = {**SMALL, **FINE}
    weights = {
        f"backbone.{name}": value
        for name, value in timm.create_model(VIL, num_classes=0, **kwargs).state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": weights, "backbone": {"name": VIL, "kwargs": kwargs}}, folder / "teacher.ckpt")
    return BackboneConfig(None, str(folder / "teacher.ckpt"))


def _shapes() -> ShapesSegmentation:
    return ShapesSegmentation(img_size=32, batch_size=4, num_train=16, num_val=5, eval_batch_size=2, seed=0)


def _probe_data() -> FewDigits:
    return FewDigits(16, 8, eval_batch_size=32, seed=0)


METHODS: dict[str, Callable[..., Run]] = {
    "dino": lambda folder, **kw: (DINO(_config(), lr_warmup=0, **PROTOTYPES, **kw), digits()),
    "ibot": lambda folder, **kw: (
        IBOT(_config(**FINE), lr_warmup=0, teacher_temp_warmup=0, **PROTOTYPES, **kw),
        digits(),
    ),
    "dinov2": lambda folder, **kw: (
        DINOv2(
            _config(**FINE),
            lr_warmup=0,
            teacher_temp_warmup=0,
            shared_head=False,
            targets="sinkhorn",
            **PROTOTYPES,
            **kw,
        ),
        digits(),
    ),
    "mae": lambda folder, **kw: (MAE(_config(**FINE), lr_warmup=0, **DECODER, **kw), pictures()),
    "mae_block": lambda folder, **kw: (
        MAE(_config(**FINE), mask_kind="block", mask_ratio=0.5, hidden="mask_token", lr_warmup=0, **DECODER, **kw),
        pictures(),
    ),
    "simmim": lambda folder, **kw: (SimMIM(_config(**FINE), mask_ratio=0.5, lr_warmup=0, **kw), pictures()),
    "autoregressive": lambda folder, **kw: (
        Autoregressive(_config(**FINE, block_design="unidirectional"), cluster_size=2, lr_warmup=0, **DECODER, **kw),
        pictures(),
    ),
    "lejepa": lambda folder, **kw: (
        LeJEPA(_config(), head_hidden_dim=16, proj_dim=4, num_directions=8, lr_warmup=0, **kw),
        digits(),
    ),
    "distillation": lambda folder, **kw: (
        Distillation(_config(), _teacher(folder), teacher_img_size=24, teacher_mean=(0.1, 0.2, 0.3), lr_warmup=0, **kw),
        pictures(),
    ),
    "supervised": lambda folder, **kw: (
        Supervised(_config(), erase_prob=0.5, ema_decay=0.9, label_smoothing=0.1, lr_warmup=0, **kw),
        pictures(),
    ),
    "supervised_binary": lambda folder, **kw: (
        Supervised(
            _config(),
            loss="binary_cross_entropy",
            target_threshold=0.2,
            mix_prob=0.0,
            optimizer="lamb",
            lr_warmup=0,
            **kw,
        ),
        pictures(),
    ),
    "linear_probe": lambda folder, **kw: (
        LinearProbe(_config(), ["avg", "first"], (0.01, 1.0), knn_ks=(5,), **kw),
        _probe_data(),
    ),
    "segmentation_linear": lambda folder, **kw: (
        Segmentation(BackboneConfig(VIL, None, {**SMALL, "img_size": 32}), lr_warmup=0, **kw),
        _shapes(),
    ),
    "segmentation_upernet": lambda folder, **kw: (
        Segmentation(
            BackboneConfig(VIL, None, {**SMALL, "img_size": 32, "patch_size": 4}), "upernet", width=8, lr_warmup=0, **kw
        ),
        _shapes(),
    ),
}
COMPILABLE = [name for name in METHODS if not name.startswith(("linear_probe", "segmentation"))]


def build(name: str, folder: Path, **settings: Any) -> Run:
    """The method and its data; the same weights every time."""
    torch.manual_seed(1)
    module, data = METHODS[name](folder, **settings)
    torch.manual_seed(1)  # some networks are built when the run starts
    return module, data
