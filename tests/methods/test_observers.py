"""Instruments that look at features leave a run as it is, and see on two processes what they see on one."""

import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tiny import FewDigits, digits, dino, run_in_two_processes, state, trainer

from vil_lightning.callbacks.feature_health import FeatureHealth
from vil_lightning.callbacks.online_probe import OnlineProbe
from vil_lightning.callbacks.pca_maps import PCAMaps
from vil_lightning.callbacks.projector import EmbeddingProjector
from vil_lightning.data.loading import ImageSource

HOOKS = ("on_fit_start", "on_train_start", "on_train_batch_end", "on_train_epoch_end", "on_train_end")


def observers() -> list[L.Callback]:
    every = {"every_n_epochs": 1}
    return [PCAMaps(**every), FeatureHealth(**every), EmbeddingProjector(**every), OnlineProbe(**every)]


def test_observers__leave_the_weights_as_they_are(tmp_path: Path) -> None:
    start = state(dino(drop_path_rate=0.3))
    ends = []
    for callbacks in ([], observers()):
        model = dino(drop_path_rate=0.3)
        logger = TensorBoardLogger(tmp_path, name="", version=str(len(callbacks)))
        trainer(tmp_path, max_epochs=3, callbacks=callbacks, logger=logger).fit(model, datamodule=digits())
        ends.append(state(model))
    plain, observed = ends
    assert plain.keys() == observed.keys()
    for name, value in plain.items():
        assert torch.equal(value, observed[name]), name
    assert max(float((value - start[name]).abs().max()) for name, value in plain.items()) > 1e-3
    assert (tmp_path / "4" / "projector_config.pbtxt").is_file()  # they did look


def surroundings(module: L.LightningModule) -> tuple[Any, ...]:
    modes = tuple(part.training for part in module.modules())
    hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())
    gradients = tuple(p.grad is None or float(p.grad.abs().sum()) for p in module.parameters())
    numpy_state = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    generators = (tuple(torch.get_rng_state().tolist()), random.getstate(), tuple(numpy_state))
    return modes, hooks, gradients, generators, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")


def test_observers__leave_modes_random_states_and_gradients(tmp_path: Path) -> None:
    seen: list[str] = []

    def watch(callback: L.Callback, hook: str) -> None:
        original = getattr(callback, hook)

        def compared(fit: L.Trainer, module: Any, *args: Any) -> None:
            module.student["backbone"].patch_embed.eval()  # a part that a user keeps in that mode
            before = surroundings(module)
            original(fit, module, *args)
            assert surroundings(module) == before, f"{type(callback).__name__}.{hook}"
            assert {True, False} <= set(before[0])
            seen.append(hook)

        setattr(callback, hook, compared)

    callbacks = observers()
    for callback in callbacks:
        for hook in HOOKS:
            if hook in type(callback).__dict__:
                watch(callback, hook)
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    fit = trainer(tmp_path, max_epochs=2, callbacks=callbacks, logger=logger, precision="bf16-mixed")
    fit.fit(dino(drop_path_rate=0.3), datamodule=digits())
    assert set(seen) == set(HOOKS)


# --- two processes ----------------------------------------------------------------------------------------------------


class OddDigits(FewDigits):
    """19 val images: the second process gets one of them twice."""

    def build_sources(self) -> tuple[ImageSource, ImageSource, list[str]]:
        train, val, classes = super().build_sources()
        val.images, val.labels = val.images[:19], val.labels[:19]  # type: ignore[attr-defined]
        return train, val, classes


def observe(world_size: int, out: Path) -> None:
    torch.set_num_threads(1)
    parallel = {"devices": world_size, "strategy": "ddp"} if world_size > 1 else {}
    logger = TensorBoardLogger(out, name="", version=f"world{world_size}")
    fit = trainer(out, max_epochs=1, callbacks=observers(), logger=logger, **parallel)
    model = dino(base_lr=1e-6)  # so that both runs look at the same network
    with torch.no_grad():  # gates that differ from image to image
        for name, parameter in model.named_parameters():
            if name.endswith("fgate.weight"):
                torch.nn.init.normal_(parameter, std=20, generator=torch.Generator().manual_seed(0))
    views = digits().train_transform
    batch_size = 8 // world_size
    data = OddDigits(16, batch_size, train_transform=views, eval_batch_size=4, seed=0)
    fit.fit(model, datamodule=data)
    names = ("health/", "val/probe", "train/probe")
    logged = {name: float(value) for name, value in fit.callback_metrics.items() if name.startswith(names)}
    # What the method itself logs of its own half of a batch.
    logged = {name: value for name, value in logged.items() if name not in METHODS_OWN}
    torch.save(logged, out / f"world{world_size}_rank{fit.global_rank}.pt")


METHODS_OWN = ("health/loss_over_ln_k", "health/teacher_entropy", "health/kl", "health/feature_std")


@pytest.mark.timeout(180)
def test_observers__two_processes_see_what_one_sees(tmp_path: Path) -> None:
    observe(1, tmp_path)
    results = run_in_two_processes(__file__, "observe", tmp_path, timeout=150)
    assert [code for code, _ in results] == [0, 0], "\n".join(error for _, error in results)
    one = torch.load(tmp_path / "world1_rank0.pt", weights_only=True)
    two = [torch.load(tmp_path / f"world2_rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert two[0] == two[1]
    assert two[0].keys() == one.keys()
    assert len(one) == 10  # four of the features, alignment, three of the gates, two of the probe
    assert 0.01 < one["health/fgate_shut"] < 0.99
    for name, value in one.items():
        assert two[0][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    for world in ("world1", "world2"):
        assert (tmp_path / world / "00004" / "val_features" / "tensors.tsv").is_file()
