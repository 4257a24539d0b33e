"""`last.ckpt` is the last state of a run, whatever `best.ckpt` does."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vil_lightning.callbacks import LastCheckpoint

SCORES = [0.1, 0.7, 0.3, 0.2]  # best after epoch 1
STEPS_PER_EPOCH = 3


class Line(L.LightningModule):
    """Counts its steps in a weight; its score per epoch is given."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = scores
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return -self.weight

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/acc1", self.scores[self.current_epoch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def run(folder: Path, scores: list[float], epochs: int, ckpt_path: Path | None = None, **settings: Any) -> L.Trainer:
    often = {key: settings.pop(key) for key in list(settings) if key.startswith(("every_n", "train_time"))}
    best = ModelCheckpoint(
        folder, "best", monitor="val/acc1", mode="max", auto_insert_metric_name=False, enable_version_counter=False
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=[best, LastCheckpoint(folder, **often), *settings.pop("callbacks", [])],
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    loader = DataLoader(torch.zeros(STEPS_PER_EPOCH, 1))  # type: ignore[arg-type]
    trainer.fit(Line(scores), loader, DataLoader(torch.zeros(1, 1)), ckpt_path=ckpt_path, weights_only=True)  # type: ignore[arg-type]
    return trainer


def steps_in(path: Path) -> int:
    content = torch.load(path, weights_only=True)
    assert int(content["state_dict"]["weight"]) == content["global_step"]
    return int(content["global_step"])


def best_recorded(path: Path) -> float:
    """The best value that the checkpoint remembers."""
    states = torch.load(path, weights_only=True)["callbacks"]
    return max(float(s["best_model_score"]) for s in states.values() if s.get("best_model_score") is not None)


def test_last__is_the_last_state_when_nothing_improves(tmp_path: Path) -> None:
    run(tmp_path, SCORES, 4)
    assert steps_in(tmp_path / "last.ckpt") == 4 * STEPS_PER_EPOCH
    assert steps_in(tmp_path / "best.ckpt") == 2 * STEPS_PER_EPOCH
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "best.ckpt"}
    assert best_recorded(tmp_path / "last.ckpt") == pytest.approx(0.7)


def test_last__is_there_after_every_epoch(tmp_path: Path) -> None:
    found: list[int] = []

    class Look(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch:
                found.append(steps_in(tmp_path / "last.ckpt"))

    run(tmp_path, SCORES, 4, callbacks=[Look()])
    assert found == [3, 6, 9]


def test_last__resumed_run_remembers_the_best(tmp_path: Path) -> None:
    run(tmp_path, SCORES, 3)
    assert best_recorded(tmp_path / "last.ckpt") == pytest.approx(0.7)
    resumed = run(tmp_path, SCORES, 4, tmp_path / "last.ckpt")
    best = resumed.checkpoint_callbacks[0]
    assert isinstance(best, ModelCheckpoint)
    assert float(best.best_model_score) == pytest.approx(0.7)  # type: ignore[arg-type]
    assert steps_in(tmp_path / "best.ckpt") == 6  # 0.2 has not replaced it
    assert steps_in(tmp_path / "last.ckpt") == 12
    better = run(tmp_path, [0.1, 0.7, 0.3, 0.2, 0.9], 5, tmp_path / "last.ckpt")
    assert better.global_step == 15
    assert steps_in(tmp_path / "best.ckpt") == 15


def test_last__every_few_steps_and_at_the_end(tmp_path: Path) -> None:
    found: list[int] = []

    class Look(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            path = tmp_path / "last.ckpt"
            found.append(steps_in(path) if path.exists() else 0)

    run(tmp_path, SCORES, 3, every_n_train_steps=4, callbacks=[Look()])
    assert found == [0, 0, 0, 0, 4, 4, 4, 4, 8]
    assert steps_in(tmp_path / "last.ckpt") == 9


def test_last__every_few_epochs_and_at_the_end(tmp_path: Path) -> None:
    found: list[int] = []

    class Look(L.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            path = tmp_path / "last.ckpt"
            found.append(steps_in(path) if path.exists() else 0)

    run(tmp_path, SCORES, 3, every_n_epochs=2, callbacks=[Look()])
    assert found == [0, 0, 6]
    assert steps_in(tmp_path / "last.ckpt") == 9


def test_last__by_time_at_least_at_the_end(tmp_path: Path) -> None:
    run(tmp_path, SCORES, 2, train_time_interval=timedelta(hours=1))
    assert steps_in(tmp_path / "last.ckpt") == 6


def test_last__without_validation(tmp_path: Path) -> None:
    run(tmp_path, SCORES, 2, limit_val_batches=0)
    assert steps_in(tmp_path / "last.ckpt") == 6


def test_last__nothing_in_a_development_run(tmp_path: Path) -> None:
    run(tmp_path, SCORES, 2, fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_lightning__still_needs_this_callback(tmp_path: Path) -> None:
    """Should this fail, Lightning's own `save_last` does the same by now."""
    callback = ModelCheckpoint(tmp_path, "best", monitor="val/acc1", mode="max", save_last=True)
    settings: dict[str, Any] = {"logger": False, "num_sanity_val_steps": 0, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=4, callbacks=[callback], enable_model_summary=False, **settings)
    loader = DataLoader(torch.zeros(STEPS_PER_EPOCH, 1))  # type: ignore[arg-type]
    trainer.fit(Line(SCORES), loader, DataLoader(torch.zeros(1, 1)))  # type: ignore[arg-type]
    assert steps_in(tmp_path / "last.ckpt") < 4 * STEPS_PER_EPOCH


def test_last__by_steps_knows_what_the_validation_of_its_step_found(tmp_path: Path) -> None:
    # Saved in the last step of an epoch, before the validation that finds the best score.
    run(tmp_path, [0.1, 0.7], 2, every_n_train_steps=STEPS_PER_EPOCH)
    assert steps_in(tmp_path / "last.ckpt") == 6
    assert best_recorded(tmp_path / "last.ckpt") == pytest.approx(0.7)
    resumed = run(tmp_path, [0.1, 0.7, 0.4], 3, tmp_path / "last.ckpt", every_n_train_steps=STEPS_PER_EPOCH)
    assert resumed.global_step == 9
    assert steps_in(tmp_path / "best.ckpt") == 6


class Stop(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("stopped")


@pytest.mark.parametrize("wanted", [False, True])
def test_last__on_an_error_if_wanted(tmp_path: Path, wanted: bool) -> None:
    callback = LastCheckpoint(tmp_path, save_on_exception=wanted)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[callback, Stop()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.fit(Line(SCORES), DataLoader(torch.zeros(STEPS_PER_EPOCH, 1)))  # type: ignore[arg-type]
    assert steps_in(tmp_path / "last.ckpt") == (5 if wanted else 3)


def test_last__by_steps_is_written_again_after_the_validation_of_its_step(tmp_path: Path) -> None:
    found: list[float] = []

    class Look(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch:
                found.append(best_recorded(tmp_path / "last.ckpt"))

    run(tmp_path, [0.7, 0.1], 2, every_n_train_steps=STEPS_PER_EPOCH, callbacks=[Look()])
    assert found == [pytest.approx(0.7)]
