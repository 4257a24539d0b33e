"""The smallest runs that still have every part: shared by the tests of the methods."""

import copy
import os
import socket
from pathlib import Path
from typing import Any

import forks
import lightning as L
import torch
from torch import Tensor, nn

from vil_lightning.data import Digits, MultiCrop, TrainTransform
from vil_lightning.data.loading import ImageSource
from vil_lightning.methods import DINO, BackboneConfig, Supervised

VIL = "vil2_tiny_patch16_224"
SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2}


class FewDigits(Digits):
    """The first digits only, so that an epoch is a few steps."""

    num_train = 32

    def build_sources(self) -> tuple[ImageSource, ImageSource, list[str]]:
        train, val, classes = super().build_sources()
        for source, count in ((train, self.num_train), (val, 20)):
            source.images, source.labels = source.images[:count], source.labels[:count]  # type: ignore[attr-defined]
        return train, val, classes


def digits(batch_size: int = 8, num_local_views: int = 2, **kwargs: Any) -> FewDigits:
    views = MultiCrop(16, 8, num_local_views, hflip_prob=0.0, blur_probs=(0.0, 0.0, 0.0), solarize_prob=0.0)
    return FewDigits(16, batch_size, train_transform=views, **{"seed": 0, **kwargs})


def backbone(**kwargs: Any) -> BackboneConfig:
    return BackboneConfig(VIL, None, {**SMALL, **kwargs})


def dino(drop_path_rate: float = 0.0, **kwargs: Any) -> DINO:
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "num_prototypes": 24,
        "head_hidden_dim": 16,
        "head_bottleneck_dim": 8,
        "freeze_last_layer": 0,
        "lr_warmup": "2 steps",
        "base_lr": 0.05,
        "teacher_momentum": 0.9,
    }
    return DINO(backbone(drop_path_rate=drop_path_rate), **{**settings, **kwargs})


def trainer(root: Path | None = None, **kwargs: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
        "default_root_dir": root,
    }
    return L.Trainer(**{**quiet, **kwargs})


def state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


class Recorder(L.Callback):
    """Keeps the batches and, after every batch, the values of the schedules and the module's state."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.schedules: list[dict[str, float]] = []
        self.states: list[dict[str, Tensor]] = []
        self.losses: list[float] = []
        self.learning_rates: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(([view.clone() for view in batch[0]], batch[1].clone()))
        names = ("lr", "weight_decay", "teacher_momentum", "teacher_temp")
        self.schedules.append({name: pl_module.scheduled(name) for name in names})

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.states.append(state(pl_module))
        self.losses.append(float(outputs["loss"]))
        self.learning_rates.append(trainer.optimizers[0].param_groups[0]["lr"])


# --- supervised -------------------------------------------------------------------------------------------------------


def pictures(batch_size: int = 8, data: type[FewDigits] = FewDigits, **kwargs: Any) -> FewDigits:
    """Digits under one random view; 4 steps per epoch with the default batch."""
    view = TrainTransform(16, scale=(0.6, 1.0), hflip_prob=0.0, three_augment=False)
    return data(16, batch_size, **{"train_transform": view, "eval_batch_size": 8, "seed": 0, **kwargs})


def supervised(
    drop_path_rate: float = 0.0, kind: type[Supervised] = Supervised, weights: Any = None, **kwargs: Any
) -> Supervised:
    settings: dict[str, Any] = {"lr_warmup": "2 steps", "base_lr": 0.5, "final_lr": 1e-4}
    config = BackboneConfig(VIL, weights and str(weights), {**SMALL, "drop_path_rate": drop_path_rate})
    model = kind(config, **{**settings, **kwargs})
    torch.manual_seed(1)  # the network is built when the run starts
    return model


def built(model: Supervised) -> Supervised:
    """The module with its network, without a run; needs `num_classes`."""
    model.trainer = trainer()
    model.configure_model()
    return model


class Steps(L.Callback):
    """Keeps the network a run starts with, its batches, and what is there after every batch."""

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.states: list[dict[str, Tensor]] = []
        self.losses: list[float] = []
        self.rates: list[dict[int, float]] = []  # learning rate of each parameter, by id

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.start = copy.deepcopy(pl_module.backbone)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append((batch[0].clone(), batch[1].clone()))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.states.append(state(pl_module))
        self.losses.append(float(outputs["loss"]))
        groups = trainer.optimizers[0].param_groups
        self.rates.append({id(p): group["lr"] for group in groups for p in group["params"]})


# --- several processes ------------------------------------------------------------------------------------------------


def run_in_two_processes(
    test_file: str, function: str, folder: Path, timeout: float = 120, anew: bool = False
) -> list[tuple[int, str]]:
    """`run_in_processes` with two."""
    return run_in_processes(2, test_file, function, folder, timeout, anew=anew)


def run_in_processes(
    count: int, test_file: str, function: str, folder: Path, timeout: float = 120, *arguments: Any, anew: bool = False
) -> list[tuple[int, str]]:
    """Call `function(count, folder, *arguments)` of a test file in `count` processes with the environment of a cluster.

    Args:
        timeout, anew: See `forks.run`.

    Returns:
        Exit code and error output of each.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = f"import sys; from pathlib import Path; sys.path.insert(0, {str(Path(test_file).parent)!r})\n"
    script += f"from {Path(test_file).stem} import {function}\n"
    call = f"{function}({count}, Path({str(folder)!r}), *{arguments!r})"
    script += f"if __name__ == '__main__': {call}\n"
    (folder / "main.py").write_text(script)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PL_"))},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    environments = [
        {**environment, "LOCAL_RANK": str(rank), "NODE_RANK": "0", "RANK": str(rank)} for rank in range(count)
    ]
    return forks.run(folder / "main.py", environments, timeout, anew)
