"""Runs of a few steps on a few digits, for the tests of the callbacks."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from vil_lightning.data import Digits, MultiCrop, TrainTransform
from vil_lightning.data.loading import ImageSource
from vil_lightning.methods import DINO, MAE, BackboneConfig

VIL = "vil2_tiny_patch16_224"
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "drop_path_rate": 0.5}


class FewDigits(Digits):
    """The first digits only: 64 to train on, 40 to look at."""

    def build_sources(self) -> tuple[ImageSource, ImageSource, list[str]]:
        train, val, classes = super().build_sources()
        for source, count in ((train, 64), (val, 40)):
            source.images, source.labels = source.images[:count], source.labels[:count]  # type: ignore[attr-defined]
        return train, val, classes


def digits(**kwargs: Any) -> FewDigits:
    """Three views of each image; an epoch is two steps."""
    return FewDigits(16, 32, train_transform=MultiCrop(16, 8, 1), seed=0, **kwargs)


def digits_of_one_view() -> FewDigits:
    view = TrainTransform(16, hflip_prob=0.0, three_augment=False)
    return FewDigits(16, 32, train_transform=view, seed=0)


def dino(name: str = VIL, **kwargs: Any) -> DINO:
    torch.manual_seed(1)
    settings: dict[str, Any] = {"lr_warmup": 0, "freeze_last_layer": 0, "base_lr": 0.02, "teacher_momentum": 0.5}
    backbone = BackboneConfig(name, None, {**SMALL, **kwargs} if name == VIL else kwargs)
    return DINO(backbone, num_prototypes=16, head_hidden_dim=16, head_bottleneck_dim=8, **settings)


def mae() -> MAE:
    torch.manual_seed(1)
    return MAE(BackboneConfig(VIL, None, SMALL), decoder_dim=32, decoder_depth=1, base_lr=0.05, lr_warmup=0)


def fit(
    folder: Path, callbacks: list[L.Callback], model: Any = None, data: FewDigits | None = None, **kwargs: Any
) -> tuple[L.Trainer, Any, FewDigits]:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
        "logger": TensorBoardLogger(folder, name="", version="run"),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(callbacks=callbacks, **{**settings, **kwargs})
    model, data = model or dino(), data or digits()
    trainer.fit(model, datamodule=data)
    return trainer, model, data


def log_of(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "run")).Reload()


def val_digits(data: FewDigits, places: list[int] | range = range(40)) -> tuple[Tensor, Tensor]:
    """uint8 images (n, 3, 16, 16) and labels (n,) of the val set, one by one."""
    data.setup()
    chosen = [data.val_source[i] for i in places]
    images = torch.stack([data.eval_transform(image) for image, _ in chosen])
    return images, torch.tensor([label for _, label in chosen])


@torch.no_grad()
def features_of(backbone: nn.Module, images: Tensor) -> Tensor:
    """Pooled vectors (n, D) of normalised images; leaves the network in evaluation mode."""
    return backbone.eval()(images)
