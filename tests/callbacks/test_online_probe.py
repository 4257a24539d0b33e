"""The linear classifier of a running pretraining: the accuracy scikit-learn gets from the same features, and no state."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from small_runs import digits, digits_of_one_view, dino, features_of, fit, log_of, mae, val_digits
from torch import Tensor

from vil_lightning.callbacks.online_probe import OnlineProbe
from vil_lightning.errors import ConfigError


def accuracy_by_hand(model: Any, data: Any, used: Tensor, weight_decay: float) -> tuple[float, float]:
    """Accuracy in percent and loss on the bank, by scikit-learn in float64."""
    images = torch.stack([data.eval_transform(data.train_source[int(i)][0]) for i in used])
    labels = torch.tensor([data.train_source[int(i)][1] for i in used]).numpy()
    val_images, val_labels = val_digits(data)
    backbone = model.teacher["backbone"] if hasattr(model, "teacher") else model.backbone
    bank, queries = (features_of(backbone, data.normalize(x)).double().numpy() for x in (images, val_images))
    mean, deviation = bank.mean(0), bank.std(0, ddof=1)
    bank, queries = (bank - mean) / deviation, (queries - mean) / deviation
    theirs = LogisticRegression(C=1 / (weight_decay * len(bank)), tol=1e-8, max_iter=5000).fit(bank, labels)
    losses = -theirs.predict_log_proba(bank)[range(len(bank)), labels]
    return 100 * float((theirs.predict(queries) == val_labels.numpy()).mean()), float(losses.mean())


@pytest.mark.parametrize(("bank_size", "weight_decay"), [(50_000, 1e-3), (50_000, 1.0), (40, 1e-3)])
def test_online_probe__equals_scikit_learns_on_the_same_features(
    tmp_path: Path, bank_size: int, weight_decay: float
) -> None:
    probe = OnlineProbe(max_bank_size=bank_size, weight_decay=weight_decay)
    trainer, model, data = fit(tmp_path, [probe])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(data.seed))
    used = order[:bank_size] if bank_size < 64 else torch.arange(64)
    accuracy, loss = accuracy_by_hand(model, data, used, weight_decay)
    assert float(trainer.callback_metrics["val/probe_acc1"]) == pytest.approx(accuracy, abs=100 / 40 + 1e-4)
    assert float(trainer.callback_metrics["train/probe_loss"]) == pytest.approx(loss, rel=0.02, abs=1e-3)
    assert accuracy > 30


def test_online_probe__of_a_network_without_teacher(tmp_path: Path) -> None:
    trainer, model, data = fit(tmp_path, [OnlineProbe()], mae(), digits_of_one_view())
    accuracy, _ = accuracy_by_hand(model, data, torch.arange(64), 1e-3)
    assert float(trainer.callback_metrics["val/probe_acc1"]) == pytest.approx(accuracy, abs=100 / 40 + 1e-4)


def test_online_probe__gives_the_same_again_and_has_no_state(tmp_path: Path) -> None:
    class Twice(OnlineProbe):
        logged: list[dict[str, Any]] = []

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            before = torch.get_rng_state()
            log_dict = pl_module.log_dict
            pl_module.log_dict = lambda values, **_: self.logged.append(dict(values))  # type: ignore[assignment]
            super().on_train_epoch_end(trainer, pl_module)
            torch.randn(3)
            OnlineProbe.on_train_epoch_end(OnlineProbe(), trainer, pl_module)
            pl_module.log_dict = log_dict  # type: ignore[method-assign]
            torch.set_rng_state(before)

    probe = Twice()
    fit(tmp_path, [probe])
    first, second = probe.logged
    assert first == second
    assert probe.state_dict() == {}


@pytest.mark.parametrize(("every", "expected"), [(1, 3), (2, 2), (3, 1)])
def test_online_probe__every_few_epochs_and_at_the_end(tmp_path: Path, every: int, expected: int) -> None:
    fit(tmp_path, [OnlineProbe(every_n_epochs=every, max_iter=2)], max_epochs=3)
    assert len(log_of(tmp_path).Scalars("val/probe_acc1")) == expected


def test_online_probe__of_a_diverged_network_is_left_out(tmp_path: Path) -> None:
    model = dino()
    torch.nn.init.constant_(model.teacher["backbone"].norm.weight, torch.nan)
    trainer, _, _ = fit(tmp_path, [OnlineProbe()], model, digits(), limit_train_batches=1)
    assert "val/probe_acc1" not in trainer.callback_metrics


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs=0 must be at least 1"),
        ({"max_bank_size": 0}, "max_bank_size=0 must be at least 1"),
        ({"max_iter": -1}, "max_iter=-1 must be at least 1"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must not be negative"),
    ],
)
def test_online_probe__refuses_what_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"OnlineProbe: {message}"):
        OnlineProbe(**settings)
