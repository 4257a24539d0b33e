"""The authors' training logs: the right numbers, on the steps of our own run, written once."""

import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

from vil_lightning.callbacks import PublishedCurve
from vil_lightning.callbacks.published_curve import main, read_curves, write_curve
from vil_lightning.errors import ConfigError

TINY = "vil2_tiny_e800_pretrain_192"
SHORT = "vil2_base_e400_finetune_224"  # 5 epochs
TAGS = ["train/acc1", "train/loss", "val/acc1", "val/loss"]


@pytest.mark.parametrize(
    ("curve", "epoch", "train_loss", "train_acc", "val_acc", "val_loss"),
    [
        (TINY, 1, 6.689, 0.8, 4.05, 5.875),
        (TINY, 25, 3.842, 37.4, 57.94, 1.828),
        (TINY, 400, 2.966, 50.7, 70.16, 1.219),
        (TINY, 800, 2.358, 60.4, 76.98, 0.934),
        ("vil2_small_e400_pretrain_192", 100, 2.989, 50.7, 71.40, 1.164),
        ("vil2_base_e400_pretrain_192", 400, 1.752, 71.2, 81.55, 0.793),
    ],
)
def test_read_curves__are_the_official_logs(
    curve: str, epoch: int, train_loss: float, train_acc: float, val_acc: float, val_loss: float
) -> None:
    values = read_curves()[curve].values[epoch]
    assert values["train/loss"] == pytest.approx(train_loss, abs=6e-4)
    assert values["train/acc1"] == pytest.approx(train_acc, abs=0.06)
    assert values["val/acc1"] == pytest.approx(val_acc, abs=6e-3)
    assert values["val/loss"] == pytest.approx(val_loss, abs=6e-4)


def test_read_curves__fine_tuning_and_the_late_start_of_one_log() -> None:
    curves = read_curves()
    assert len(curves) == 8
    finished = {name: curve.values[curve.epochs]["val/acc1"] for name, curve in curves.items()}
    expected = {"vil2_tiny_e800": 78.34, "vil2_tiny_e400": 77.25, "vil2_small_e400": 81.48, "vil2_base_e400": 82.41}
    for model, accuracy in expected.items():
        assert finished[f"{model}_finetune_224"] == pytest.approx(accuracy, abs=6e-3)
    late = curves["vil2_tiny_e400_pretrain_192"]
    assert (min(late.values), max(late.values), late.epochs) == (361, 400, 400)
    assert set(range(1, 801)) - set(curves[TINY].values) == {377, 378, 379, 380, 390}


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def test_write_curve__is_a_tensorboard_run_with_our_tags(tmp_path: Path) -> None:
    folder = write_curve(TINY, tmp_path, steps_per_epoch=625)
    assert folder == tmp_path / f"published_{TINY}"
    log = read(folder)
    assert sorted(log.Tags()["scalars"]) == TAGS
    values = log.Scalars("val/acc1")
    assert len(values) == 795
    by_step = {value.step: value.value for value in values}
    assert by_step[25 * 625 - 1] == pytest.approx(57.94, abs=6e-3)
    assert max(by_step) == 800 * 625 - 1


def test_write_curve__replaces_what_it_wrote_before(tmp_path: Path) -> None:
    for steps in (10, 10, 20):
        folder = write_curve(SHORT, tmp_path, steps_per_epoch=steps)
    assert [value.step for value in read(folder).Scalars("val/loss")] == [19, 39, 59, 79, 99]
    assert len(list(folder.iterdir())) == 1


def test_write_curve__leaves_an_equal_file_alone(tmp_path: Path) -> None:
    (file,) = write_curve(SHORT, tmp_path, steps_per_epoch=10).iterdir()
    before = file.stat().st_ino
    (again,) = write_curve(SHORT, tmp_path, steps_per_epoch=10).iterdir()
    assert again.stat().st_ino == before


@pytest.mark.parametrize(
    ("epoch", "value", "line"),
    [
        (25, 57.84, "epoch 25: val/acc1 57.8, published 57.9 (-0.1)"),
        (25, 57.93, "epoch 25: val/acc1 57.9, published 57.9 (+0.0)"),
        (25.5, 60.0, "epoch 25.5: val/acc1 60.0, published 57.9 (+2.1) at epoch 25"),
        (379, 60.0, "epoch 379: val/acc1 60.0, published 69.8 (-9.8) at epoch 376"),
        (0.5, 1.0, None),
    ],
)
def test_verdict__compares_with_the_same_epoch_or_names_another(epoch: float, value: float, line: str | None) -> None:
    assert PublishedCurve(TINY).verdict(epoch, value) == line


def test_verdict__says_nothing_before_the_log_begins_and_knows_the_loss() -> None:
    assert PublishedCurve("vil2_tiny_e400_pretrain_192").verdict(360, 70.0) is None
    line = PublishedCurve(TINY, metric="val/loss").verdict(25, 2.0)
    assert line == "epoch 25: val/loss 2.000, published 1.828 (+0.172)"


def test_published_curve__refuses_unknown_names() -> None:
    with pytest.raises(ConfigError, match=f"curve='resnet'.*{TINY}"):
        PublishedCurve("resnet")
    with pytest.raises(ConfigError, match=r"metric='val/knn_acc1'.*val/acc1"):
        PublishedCurve(TINY, metric="val/knn_acc1")


class Toy(L.LightningModule):
    """Logs the epoch number as its accuracy."""

    def __init__(self, log_val: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.log_val = log_val

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.weight * batch).sum()
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if self.log_val:
            self.log("val/acc1", float(self.current_epoch + 1))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, callback: PublishedCurve, module: Toy | None = None, **kwargs: Any) -> L.Trainer:
    settings: dict[str, Any] = {"max_epochs": 5, "logger": TensorBoardLogger(folder, name="", version="mine"), **kwargs}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **settings,
    )
    loader = DataLoader(torch.ones(7, 1), batch_size=1)  # type: ignore[arg-type]
    trainer.fit(module or Toy(), loader, loader)
    return trainer


@pytest.mark.parametrize("accumulate", [1, 3])
def test_published_curve__shares_the_steps_of_the_run(tmp_path: Path, accumulate: int) -> None:
    fit(tmp_path, PublishedCurve(SHORT), accumulate_grad_batches=accumulate)
    published, own = read(tmp_path / f"published_{SHORT}"), read(tmp_path / "mine")
    steps = [value.step for value in own.Scalars("val/acc1")]
    assert steps == [epoch * math.ceil(7 / accumulate) - 1 for epoch in range(1, 6)]
    assert [value.step for value in published.Scalars("val/acc1")] == steps
    assert [value.step for value in own.Scalars("train/loss")] == steps
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", f"published_{SHORT}"]


def test_published_curve__prints_a_line_after_every_validation(tmp_path: Path, capsys: Any) -> None:
    trainer = fit(tmp_path, PublishedCurve(SHORT), num_sanity_val_steps=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert lines == [
        "epoch 1: val/acc1 1.0, published 82.4 (-81.4)",
        "epoch 2: val/acc1 2.0, published 82.4 (-80.4)",
        "epoch 3: val/acc1 3.0, published 82.4 (-79.4)",
        "epoch 4: val/acc1 4.0, published 82.4 (-78.4)",
        "epoch 5: val/acc1 5.0, published 82.4 (-77.4)",
    ]
    trainer.validate(trainer.lightning_module, DataLoader(torch.ones(2, 1)), verbose=False)  # type: ignore[arg-type]
    assert "published" not in capsys.readouterr().out


def test_published_curve__names_the_epoch_when_validating_within_one(tmp_path: Path, capsys: Any) -> None:
    fit(tmp_path, PublishedCurve(SHORT), max_epochs=2, val_check_interval=3, limit_train_batches=6)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [line.split(":")[0] for line in lines] == ["epoch 1", "epoch 1.5", "epoch 2"]
    assert lines[1].endswith("at epoch 1")


def test_published_curve__warns_of_another_schedule(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"this run has 3 epochs, vil2_base_e400_finetune_224 had 5\. Their schedules"):
        fit(tmp_path, PublishedCurve(SHORT), max_epochs=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Their schedules")
        fit(tmp_path, PublishedCurve(SHORT))


def test_published_curve__warns_when_the_metric_is_never_logged(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="metric='val/acc1' was not logged") as caught:
        fit(tmp_path, PublishedCurve(SHORT), Toy(log_val=False))
    assert sum("was not logged" in str(warning.message) for warning in caught) == 1


def test_published_curve__writes_nothing_without_tensorboard(tmp_path: Path) -> None:
    fit(tmp_path, PublishedCurve(SHORT), logger=False, default_root_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_command_line__writes_all_curves(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vil_lightning.callbacks.published_curve", "--steps_per_epoch"]
    run = subprocess.run([*command, "2", "--logdir", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"published_{name}" for name in read_curves())


def test_command_line__no_steps(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["published_curve", "--steps_per_epoch", "0"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "--steps_per_epoch 0 must be at least 1" in capsys.readouterr().err
