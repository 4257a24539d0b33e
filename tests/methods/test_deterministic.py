"""With `trainer.deterministic: true`, two runs of a recipe end with the same weights, bit for bit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from every_method import METHODS, build
from test_resume import same
from tiny import state, trainer
from torch.nn import functional as F

from vil_lightning.backbones.layers import resize_position_embedding
from vil_lightning.cli import build_cli


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """The switch is one of the process."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark


class Losses(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


def run(name: str, folder: Path) -> tuple[dict[str, torch.Tensor], Any, list[float], bool]:
    module, data = build(name, folder)
    start, losses = state(module), Losses()
    fit = trainer(folder, max_steps=3, max_epochs=2, deterministic=True, callbacks=[losses])
    fit.fit(module, datamodule=data)
    end = state(module)
    moved = any(key not in start or not torch.equal(start[key], value) for key, value in end.items())
    return end, fit.optimizers[0].state_dict(), losses.losses, moved


@pytest.mark.parametrize("name", METHODS)
def test_run__ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    weights, optimizer, losses, moved = run(name, tmp_path)
    torch.manual_seed(987)  # what else happens in a process must not matter
    torch.rand(3)
    again, optimizer_again, losses_again, _ = run(name, tmp_path)
    assert moved
    assert len(losses) == 3
    assert losses == losses_again
    assert same(weights, again)
    assert same(optimizer, optimizer_again)


@pytest.mark.parametrize("recipe", ["pretrain_dino", "train_supervised", "linear_probe", "segmentation_probe"])
def test_overlay__lies_over_any_recipe(recipe: str) -> None:
    weights = ["--model.backbone.name", "vil2_tiny_patch16_224"] if recipe == "linear_probe" else []
    build_cli(
        ["--config", f"configs/{recipe}.yaml", "--config", "configs/overlays/deterministic.yaml", *weights], run=False
    )
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.benchmark is False


@pytest.mark.parametrize("size", [(2, 2), (7, 3), (14, 14), (20, 5), (1, 9)])
def test_position_embedding__is_resized_without_an_operator_that_gpus_lack(size: tuple[int, int]) -> None:
    """The gradient of bicubic interpolation has no deterministic form on GPUs; a product of matrices does the same."""
    embed = torch.randn(1, 7, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, *size, 6, dtype=torch.float64)
    results = []
    for enabled in (False, True):
        torch.use_deterministic_algorithms(enabled)
        output = resize_position_embedding(embed, size)
        results.append((output, *torch.autograd.grad((output * weight).sum(), embed)))
    for plain, deterministic in zip(*results, strict=True):
        torch.testing.assert_close(deterministic, plain, rtol=1e-12, atol=1e-12)


def test_position_embedding__is_resized_in_single_precision_under_autocast() -> None:
    embed = torch.randn(1, 7, 5, 6)
    torch.use_deterministic_algorithms(True)
    expected = resize_position_embedding(embed, (4, 9))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resize_position_embedding(embed, (4, 9)), expected)


def test_position_embedding__the_deterministic_form_does_not_interpolate(monkeypatch: pytest.MonkeyPatch) -> None:
    embed = torch.randn(1, 4, 4, 2, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    resized, interpolate = [], F.interpolate

    def recorded(image: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        resized.append(image.requires_grad)
        return interpolate(image, *args, **kwargs)

    monkeypatch.setattr(F, "interpolate", recorded)
    resize_position_embedding(embed, (3, 5)).sum().backward()
    assert not any(resized)  # at most constants
