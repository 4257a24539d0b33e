"""Every method trains in bfloat16, with and without float32 weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_any_number_of_processes as methods
import torch
from tiny import backbone, digits, trainer

from vil_lightning.methods import LinearProbe

NAMES = [
    *methods.FEW,
    *("drop", "mask_token", "simmim", "autoregressive", "dino", "ibot", "dinov2, centering", "distillation"),
]


@pytest.fixture(scope="module")
def contestants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Callable[[], Any], Callable[[int], Any]]]:
    return methods.everything(tmp_path_factory.mktemp("teacher"))


# On a CPU, torch 2.15's gradient of a bfloat16 convolution with stride 2 is NaN now and then if the map is one pixel, as the
# last ones of a ResNet are at 16 px: under autocast, too.
RUNS = [(n, p) for n in NAMES for p in ("bf16-mixed", "bf16-true") if n != "dino of a resnet"]


@pytest.mark.parametrize(("name", "precision"), RUNS)
def test_bf16__two_steps(name: str, precision: Any, contestants: dict[str, Any], tmp_path: Path) -> None:
    make, data = contestants[name]
    losses = {}
    for chosen in (precision, "32-true"):
        torch.manual_seed(1)
        model, curve = make(), methods.Curve()
        torch.manual_seed(1)
        fit = trainer(tmp_path, max_steps=2, max_epochs=1, precision=chosen, callbacks=[curve], limit_val_batches=1)
        fit.fit(model, datamodule=data(4))
        losses[chosen] = curve.losses
        floats = {value.dtype for value in model.state_dict().values() if value.is_floating_point()}
        assert torch.bfloat16 in floats if chosen == "bf16-true" else floats == {torch.float32}
        assert all(value.isfinite().all() for value in model.state_dict().values())
    assert losses[precision][0] == pytest.approx(losses["32-true"][0], rel=0.1)
    assert losses[precision][1] < 2 * losses["32-true"][0]  # steps of these sizes need not agree
    assert losses[precision] != losses["32-true"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16__linear_probe(precision: Any, tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_epochs=2, precision=precision)
    probe = LinearProbe(backbone(), poolings=["avg", "last4"], base_lrs=[0.1, 1.0], knn_ks=[3])
    fit.fit(probe, datamodule=digits())
    assert 0 < probe.final_metrics["val/linear_acc1"] <= 100
