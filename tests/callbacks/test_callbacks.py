"""Callbacks observe: they report the right things and leave the run as it is."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vil_lightning.callbacks import OnlineKNN, RunSummary, Throughput, ViewPictures
from vil_lightning.data import Digits, MultiCrop
from vil_lightning.knn import knn_accuracy
from vil_lightning.methods import DINO, BackboneConfig

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "drop_path_rate": 0.5}


def data() -> Digits:
    return Digits(batch_size=16, train_transform=MultiCrop(16, 8, 1), seed=0)


def dino() -> DINO:
    torch.manual_seed(1)
    settings: dict[str, Any] = {"lr_warmup": "0 steps", "freeze_last_layer": "0 steps", "base_lr": 0.01}
    backbone = BackboneConfig("vil2_tiny_patch16_224", None, SMALL)
    return DINO(backbone, num_prototypes=16, head_hidden_dim=16, head_bottleneck_dim=8, **settings)


def fit(
    callbacks: list[L.Callback], folder: Path, epochs: int = 1, log_every_n_steps: int = 1
) -> tuple[L.Trainer, DINO, Digits]:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        limit_train_batches=2,
        log_every_n_steps=log_every_n_steps,
        logger=TensorBoardLogger(folder, name="", version="run"),
        callbacks=callbacks,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, module_data = dino(), data()
    trainer.fit(model, module_data)
    return trainer, model, module_data


def log_of(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "run")).Reload()


@pytest.mark.parametrize("max_bank_size", [50_000, 100])
def test_online_knn__is_the_knn_accuracy_of_the_teachers_features(tmp_path: Path, max_bank_size: int) -> None:
    trainer, model, module_data = fit([OnlineKNN(k=5, max_bank_size=max_bank_size)], tmp_path)
    model.eval()
    features = []
    for source in (module_data.train_source, module_data.val_source):
        images = torch.stack([source[i][0] for i in range(len(source))])
        images = torch.nn.functional.interpolate(images, size=(16, 16), mode="bicubic", antialias=True)
        with torch.no_grad():
            vectors = model.teacher["backbone"](module_data.normalize(images))
        features.append((vectors, torch.tensor([source[i][1] for i in range(len(source))])))
    (bank, bank_labels), (queries, labels) = features
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(module_data.seed))
    used = order[:max_bank_size] if max_bank_size < len(bank) else torch.arange(len(bank))
    expected = knn_accuracy(bank[used], bank_labels[used], queries, labels, ks=(5,))[5]
    assert float(trainer.callback_metrics["val/knn_acc1"]) == pytest.approx(expected, abs=100 / 359 + 1e-4)
    assert expected > 20  # far above chance: a meaningless bank would show


class Watch(L.Callback):
    """Notes what surrounds the callbacks that run between its two hooks."""

    def __init__(self) -> None:
        self.states: list[tuple[Any, ...]] = []

    def note(self, module: L.LightningModule) -> None:
        modes = tuple(child.training for child in module.modules())
        gradients = tuple(p.grad is None or float(p.grad.abs().sum()) for p in module.parameters())
        self.states.append((modes, tuple(torch.get_rng_state().tolist()), gradients))


class WatchedKNN(OnlineKNN):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.watch.note(pl_module)
        super().on_train_epoch_end(trainer, pl_module)
        self.watch.note(pl_module)


def test_online_knn__leaves_mode_random_state_and_gradients(tmp_path: Path) -> None:
    watch = Watch()
    fit([WatchedKNN(watch)], tmp_path)
    before, after = watch.states
    assert before == after
    assert True in before[0]  # the student was training
    assert False in before[0]  # the teacher was not


def test_callbacks__do_not_change_the_weights(tmp_path: Path) -> None:
    _, plain, _ = fit([], tmp_path / "plain", epochs=2)
    observers = [OnlineKNN(), ViewPictures(every_n_epochs=1), Throughput(), RunSummary()]
    _, observed, _ = fit(observers, tmp_path / "observed", epochs=2)
    start = dino().state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, observed.state_dict()[name]), name
    assert not torch.equal(start["student.head.layers.0.weight"], plain.state_dict()["student.head.layers.0.weight"])


@pytest.mark.parametrize(("every", "expected"), [(1, 3), (2, 2), (3, 1)])
def test_online_knn__runs_every_few_epochs_and_at_the_end(tmp_path: Path, every: int, expected: int) -> None:
    fit([OnlineKNN(every_n_epochs=every)], tmp_path, epochs=3)
    assert len(log_of(tmp_path).Scalars("val/knn_acc1")) == expected


def test_view_pictures__shows_a_row_per_image_and_a_column_per_view(tmp_path: Path) -> None:
    fit([ViewPictures(num_images=4, every_n_epochs=2, size=32)], tmp_path, epochs=3)
    pictures = log_of(tmp_path).Images("views/global_then_local")
    assert [picture.step for picture in pictures] == [0, 4]  # epochs 0 and 2
    assert (pictures[0].height, pictures[0].width) == (4 * 36 + 4, 3 * 36 + 4)


def test_throughput__logs_a_positive_speed(tmp_path: Path) -> None:
    fit([Throughput()], tmp_path)
    speeds = [value.value for value in log_of(tmp_path).Scalars("speed/images_per_second")]
    assert len(speeds) == 2
    assert min(speeds) > 0


def test_throughput__without_logs_there_is_none(tmp_path: Path) -> None:
    fit([Throughput()], tmp_path, log_every_n_steps=0)
    assert "speed/images_per_second" not in log_of(tmp_path).Tags()["scalars"]


def test_throughput__counts_images_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 2.0, 5.0])
    monkeypatch.setattr("vil_lightning.callbacks.progress.time.monotonic", lambda: next(now))
    logged: dict[str, float] = {}

    class Stub:
        world_size, log_every_n_steps, global_step = 2, 2, 1
        device = torch.device("cpu")

        def log(self, name: str, value: float) -> None:
            logged[name] = value

    stub, callback = Stub(), Throughput()
    batch = ([torch.zeros(10, 3, 2, 2)], torch.zeros(10))
    callback.on_train_batch_start(stub, stub, batch, 0)  # type: ignore[arg-type]
    callback.on_train_batch_end(stub, stub, None, batch, 0)  # type: ignore[arg-type]
    assert logged == {}
    stub.global_step = 2
    callback.on_train_batch_start(stub, stub, batch, 1)  # type: ignore[arg-type]
    callback.on_train_batch_end(stub, stub, None, batch, 1)  # type: ignore[arg-type]
    assert logged == {"speed/images_per_second": 2 * 2 * 10 / 5.0}


def test_run_summary__prints_start_and_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    checkpoint = ModelCheckpoint("checkpoints/some", save_last=True)
    fit([RunSummary({"model.num_prototypes": 16}), checkpoint], tmp_path)
    out = capsys.readouterr().out
    assert out.count("auto: parallel up to") == 1  # once, for all blocks of both networks
    for part in ("DINO, 16 prototypes", "vil2_tiny_patch16_224", "2 steps", "Digits: 1438 training and 359 val"):
        assert part in out
    assert "Finished at step 2." in out
    assert "--model.backbone.weights checkpoints/some/last.ckpt" in out
    content = log_of(tmp_path).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"model.num_prototypes" in content
