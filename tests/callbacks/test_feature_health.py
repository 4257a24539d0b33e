"""Health of the features: the right numbers, and words exactly when something is wrong."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_runs import VIL, digits, digits_of_one_view, dino, features_of, fit, log_of, mae, val_digits
from torch import Tensor, nn

from vil_lightning.callbacks.feature_health import FeatureHealth
from vil_lightning.errors import ConfigError
from vil_lightning.representation import alignment, feature_std, rankme, uniformity

GATES = ("health/fgate_shut", "health/fgate_stuck", "health/igate_extreme")


def measured(features: Tensor) -> dict[str, float]:
    return {
        "health/rankme": float(rankme(features)),
        "health/rankme_ratio": float(rankme(features)) / min(features.shape),
        "health/val_feature_std": float(feature_std(features)),
        "health/uniformity": float(uniformity(features)),
    }


class Batches(L.Callback):
    def __init__(self) -> None:
        self.views: list[list[Tensor]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.views.append([view.clone() for view in batch[0]])


class Spoil(L.Callback):
    """Changes the teacher at the end of an epoch; runs before the callbacks that come later in the list."""

    def __init__(self, change: Any, epochs: range = range(100)) -> None:
        self.change = change
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch in self.epochs:
            with torch.no_grad():
                self.change(pl_module.teacher["backbone"])


def messages(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught if str(warning.message).startswith("Step ")]


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_images", "places"), [(2048, range(40)), (5, [0, 10, 20, 29, 39])])
def test_feature_health__is_that_of_the_teachers_features(tmp_path: Path, max_images: int, places: Any) -> None:
    batches = Batches()
    trainer, model, data = fit(tmp_path, [FeatureHealth(max_images=max_images), batches])
    images, _ = val_digits(data, places)
    images = data.normalize(images)
    logged = {name: {v.step: v.value for v in log_of(tmp_path).Scalars(name)} for name in measured(torch.eye(3))}
    for name, expected in measured(features_of(dino().teacher["backbone"], images)).items():
        assert logged[name][0] == pytest.approx(expected, rel=1e-4), name
    backbone = model.teacher["backbone"]
    for name, expected in measured(features_of(backbone, images)).items():
        assert logged[name][1] == pytest.approx(expected, rel=1e-4), name
        assert float(trainer.callback_metrics[name]) == pytest.approx(expected, rel=1e-4), name
        assert logged[name][1] != pytest.approx(logged[name][0], rel=2e-4), name  # twice what is tolerated above

    first, second, _ = batches.views[-1]
    assert len(batches.views) == 2
    expected_alignment = float(alignment(features_of(backbone, first), features_of(backbone, second)))
    assert float(trainer.callback_metrics["health/alignment"]) == pytest.approx(expected_alignment, rel=1e-4)
    assert expected_alignment > 0.1
    assert [float(trainer.callback_metrics[name]) for name in GATES] == [0, 0, 0]


def test_feature_health__without_views_and_without_gates(tmp_path: Path) -> None:
    trainer, model, data = fit(tmp_path / "mae", [FeatureHealth()], mae(), digits_of_one_view())
    assert "health/alignment" not in trainer.callback_metrics
    features = features_of(model.backbone, data.normalize(val_digits(data)[0]))  # without drop path
    assert float(trainer.callback_metrics["health/rankme"]) == pytest.approx(float(rankme(features)), rel=1e-4)
    vit = dino("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=48, depth=1, dynamic_img_size=True)
    trainer, model, data = fit(tmp_path / "vit", [FeatureHealth()], vit)
    assert "health/alignment" in trainer.callback_metrics
    assert not set(GATES) & set(trainer.callback_metrics)
    features = features_of(model.teacher["backbone"], data.normalize(val_digits(data)[0]))
    assert float(trainer.callback_metrics["health/rankme"]) == pytest.approx(float(rankme(features)), rel=1e-4)


@pytest.mark.parametrize(("every", "expected"), [(2, [0, 3, 5]), (3, [0, 5])])
def test_feature_health__before_training_every_few_epochs_and_at_the_end(
    tmp_path: Path, every: int, expected: list[int]
) -> None:
    fit(tmp_path, [FeatureHealth(every_n_epochs=every)], max_epochs=3)
    assert [value.step for value in log_of(tmp_path).Scalars("health/rankme")] == expected
    assert [value.step for value in log_of(tmp_path).Scalars("health/alignment")] == expected[1:]


def test_feature_health__gates_of_all_scans_and_heads(tmp_path: Path) -> None:
    def change(backbone: nn.Module) -> None:
        first, second = (module for module in backbone.modules() if hasattr(module, "fgate"))
        first.fgate.bias[:] = -20.0
        second.igate.bias[0] = 20.0

    trainer, model, _ = fit(tmp_path, [Spoil(change), FeatureHealth()])
    shut, stuck, extreme = (float(trainer.callback_metrics[name]) for name in GATES)
    assert (shut, stuck) == (0.5, 0)
    num_heads = model.teacher["backbone"].blocks[1].mixer.branches[0].num_heads
    assert extreme == pytest.approx(0.5 / num_heads)


# --- words ------------------------------------------------------------------------------------------------------------


def one_point(backbone: nn.Module) -> None:
    for norm in (backbone.norm, backbone.fc_norm):
        if hasattr(norm, "weight"):
            norm.weight.fill_(1e-5)
            norm.bias.fill_(1.0)


def few_directions(backbone: nn.Module) -> None:
    """Zeros in most channels."""
    for norm in (backbone.norm, backbone.fc_norm):
        if hasattr(norm, "weight"):
            norm.weight[3:] = 0.0
            norm.bias[3:] = 0.0


def shut_gates(backbone: nn.Module) -> None:
    backbone.blocks[1].mixer.branches[0].fgate.bias.fill_(-30.0)


def stuck_gates(backbone: nn.Module) -> None:
    backbone.blocks[0].mixer.branches[0].fgate.bias.fill_(30.0)


def extreme_gates(backbone: nn.Module) -> None:
    backbone.blocks[0].mixer.branches[0].igate.bias.fill_(-30.0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (one_point, ["Complete collapse", "Dimensional collapse"]),
        (few_directions, ["Dimensional collapse: the features of val images fill"]),
        (shut_gates, ["In blocks.1.mixer.branches.0, 100% of the forget gates are shut"]),
        (stuck_gates, ["In blocks.0.mixer.branches.0, 100% of the forget gates never forget"]),
        (extreme_gates, ["In blocks.0.mixer.branches.0, 100% of the input gates are far out"]),
    ],
)
def test_feature_health__names_a_lasting_symptom_once(tmp_path: Path, change: Any, expected: list[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, [Spoil(change), FeatureHealth(patience=2)], max_epochs=4, limit_train_batches=1)
    said = messages(caught)
    assert len(said) == len(expected)
    for message, beginning in zip(said, expected, strict=True):
        assert message.startswith(f"Step 2: {beginning}")  # at the second observation, once
        assert "model.base_lr" in message


def test_feature_health__waits_for_what_lasts(tmp_path: Path) -> None:
    class Restore(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            pl_module.teacher.load_state_dict(pl_module.student.state_dict())

    health = FeatureHealth(patience=2)
    spoil = [Spoil(one_point, range(0, 1)), Spoil(one_point, range(2, 3))]  # not in a row
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, [Restore(), *spoil, health], max_epochs=4, limit_train_batches=1)
    assert messages(caught) == []
    lows = [value.value for value in log_of(tmp_path).Scalars("health/val_feature_std") if value.value < 0.02]
    assert len(lows) == 2  # the symptom was there


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        (VIL, {}),
        ("vil_tiny_patch16_224", {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2}),
        (
            "vit_tiny_patch16_224",
            {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "dynamic_img_size": True},
        ),
    ],
)
def test_feature_health__is_silent_on_a_run_that_is_well(tmp_path: Path, name: str, kwargs: dict[str, Any]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, [FeatureHealth(patience=1)], dino(name, **kwargs), max_epochs=2)
    assert messages(caught) == []


def test_feature_health__survives_what_is_not_finite(tmp_path: Path) -> None:
    def diverge(backbone: nn.Module) -> None:
        backbone.norm.weight.fill_(torch.nan)

    model = dino()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, _, _ = fit(tmp_path, [Spoil(diverge), FeatureHealth(patience=1)], model)
    (said,) = messages(caught)
    assert "not finite" in said
    assert "health/rankme" not in trainer.callback_metrics


def test_feature_health__of_a_continued_run_remembers(tmp_path: Path) -> None:
    def checkpoint() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "kept", filename="end", save_top_k=-1)

    first = FeatureHealth(patience=2)
    settings: dict[str, Any] = {"limit_train_batches": 1, "enable_checkpointing": True}
    fit(tmp_path / "first", [Spoil(few_directions), first, checkpoint()], max_epochs=1, **settings)
    rank = log_of(tmp_path / "first").Scalars("health/rankme")[0].value

    second = FeatureHealth(patience=2)
    trainer = L.Trainer(
        callbacks=[Spoil(few_directions), second],
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_train_batches=1,
        limit_val_batches=0,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(dino(), datamodule=digits(), ckpt_path=str(tmp_path / "kept" / "end.ckpt"), weights_only=True)
    (said,) = messages(caught)  # the second observation, of which the first was before the checkpoint
    assert f"and filled {rank:.1f} before training" in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs=0 must be at least 1"),
        ({"patience": 0}, "patience=0 must be at least 1"),
        ({"max_images": 1}, "max_images=1 must be at least 2"),
    ],
)
def test_feature_health__refuses_what_cannot_be(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=f"FeatureHealth: {message}"):
        FeatureHealth(**settings)
