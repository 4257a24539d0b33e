"""The confusion matrix and the worst images, on answers that are known."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.nn import functional as F

from vil_lightning.callbacks import ClassificationPictures
from vil_lightning.callbacks.classification import confusion_picture, worst_picture
from vil_lightning.data import Digits
from vil_lightning.methods import BackboneConfig, Supervised

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2}


class Watched(ClassificationPictures):
    """Keeps what it is about to draw."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.drawn: list[tuple[int, Tensor | None, list[Any]]] = []

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.drawn.append((trainer.current_epoch, self._counts, self._worst))
        super().on_validation_epoch_end(trainer, pl_module)

    on_test_epoch_end = on_validation_epoch_end


def stub(**settings: Any) -> Any:
    """A trainer in `validate`."""
    state = SimpleNamespace(fn="validate")
    data = SimpleNamespace(denormalize=lambda image: image + 1)
    values = {
        "global_step": 0,
        "estimated_stepping_batches": 100,
        "sanity_checking": False,
        "current_epoch": 0,
        "max_epochs": 3,
        "training": False,
        "state": state,
    }
    return SimpleNamespace(**{**values, "datamodule": data, **settings})


def batch_of(predictions: list[int], labels: list[int], sure: list[float]) -> tuple[dict[str, Tensor], Any]:
    """Logits `sure` for the predicted class, 0 for the two others."""
    logits = F.one_hot(torch.tensor(predictions), 3) * torch.tensor(sure)[:, None]
    images = torch.arange(len(labels)).float()[:, None, None, None].expand(-1, 3, 4, 4)
    real = torch.ones(len(labels), dtype=torch.bool)
    return {"logits": logits, "labels": torch.tensor(labels), "real": real}, (images, torch.tensor(labels))


def test_confusion__counts_the_real_images_of_all_batches() -> None:
    callback, trainer = ClassificationPictures(num_worst=2), stub()
    outputs, batch = batch_of([0, 0, 1, 2, 1], [0, 1, 1, 2, 0], [1.0, 3.0, 1.0, 1.0, 2.0])
    outputs["real"][2] = False
    callback.on_validation_batch_end(trainer, None, outputs, batch, 0)  # type: ignore[arg-type]
    outputs, batch = batch_of([2, 0, 0], [0, 1, 1], [5.0, 1.0, 4.0])
    callback.on_validation_batch_end(trainer, None, outputs, batch, 1)  # type: ignore[arg-type]
    outputs["real"][:] = False
    callback.on_validation_batch_end(trainer, None, outputs, batch, 2)  # type: ignore[arg-type]
    assert callback._counts is not None
    assert callback._counts.tolist() == [[1, 1, 1], [3, 0, 0], [0, 0, 1]]  # rows: true classes
    # The two highest losses of all batches, highest first: -log softmax of 0 next to 5, and next to 4.
    losses = [float(torch.tensor([0.0, value, 0.0]).logsumexp(0)) for value in (5.0, 4.0)]
    assert [entry[0] for entry in callback._worst] == pytest.approx(losses)
    assert [(label, predicted) for _, _, label, predicted in callback._worst] == [(0, 2), (1, 0)]
    assert [float(picture.mean()) for _, picture, _, _ in callback._worst] == [1.0, 3.0]  # images 0 and 2, denormalised


def test_confusion__process_without_a_real_image_takes_part() -> None:
    """All processes must add up their counts, or none."""
    callback = ClassificationPictures()
    outputs, batch = batch_of([0], [0], [1.0])
    outputs["real"][:] = False
    callback.on_validation_batch_end(stub(), None, outputs, batch, 0)  # type: ignore[arg-type]
    assert callback._counts is not None
    assert callback._counts.tolist() == [[0] * 3] * 3
    assert callback._worst == []


def test_confusion__too_many_classes() -> None:
    callback = ClassificationPictures(max_classes=2)
    outputs, batch = batch_of([0, 1], [0, 0], [1.0, 1.0])
    callback.on_validation_batch_end(stub(), None, outputs, batch, 0)  # type: ignore[arg-type]
    assert callback._counts is None
    assert len(callback._worst) == 2


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, True),
        ({"sanity_checking": True}, False),
        ({"training": True, "state": SimpleNamespace(fn="fit")}, False),
        ({"training": True, "state": SimpleNamespace(fn="fit"), "current_epoch": 1}, True),  # every second
        ({"training": True, "state": SimpleNamespace(fn="fit"), "current_epoch": 2}, True),  # the last
    ],
    ids=str,
)
def test_pictures__when(settings: dict[str, Any], wanted: bool) -> None:
    callback = ClassificationPictures(every_n_epochs=2)
    outputs, batch = batch_of([0, 1], [0, 0], [1.0, 1.0])
    callback.on_validation_batch_end(stub(**settings), None, outputs, batch, 0)  # type: ignore[arg-type]
    assert (callback._counts is not None) == wanted


def test_confusion_picture__darker_for_larger_shares() -> None:
    picture = confusion_picture(torch.tensor([[9, 1], [0, 0]])).long()
    assert picture.shape == (3, 640, 640)
    cells = picture[:, [160, 160, 480, 480], [160, 480, 160, 480]].sum(0).tolist()
    assert cells[0] < cells[1] < cells[2] == cells[3] == 3 * 255
    assert confusion_picture(torch.eye(200).long()).shape == (3, 600, 600)


def test_worst_picture__one_place_per_image() -> None:
    images = [torch.full((3, 8, 8), value) for value in (0.0, 0.25, 0.5, 0.75, 1.0)]
    sheet = worst_picture([(1.0, image, 0, 1) for image in images], ["zero", "one"], 24)
    assert sheet.shape == (3, 2 * (24 + 28 + 6), 4 * (24 + 6))
    seen = [int(sheet[0, 12 + 58 * (i // 4), 12 + 30 * (i % 4)]) for i in range(5)]
    assert seen == pytest.approx([0, 63, 127, 191, 255], abs=1)


def run(tmp_path: Path, function: str, epochs: int = 3) -> tuple[Watched, L.Trainer]:
    callback = Watched(num_worst=4, every_n_epochs=2, size=24)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        limit_train_batches=1,
        logger=TensorBoardLogger(tmp_path, name="", version="run"),
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    model = Supervised(BackboneConfig("vil2_tiny_patch16_224", None, SMALL), lr_warmup=0, ema_decay=0.5)
    getattr(trainer, function)(model, datamodule=Digits(batch_size=16, eval_batch_size=100, seed=0))
    return callback, trainer


def test_pictures__of_a_run(tmp_path: Path) -> None:
    callback, trainer = run(tmp_path, "fit")
    # The sanity check comes first, which counts nothing; then epochs 0, 1 and 2.
    assert [(epoch, counts is not None) for epoch, counts, _ in callback.drawn] == [
        (0, False),
        (0, False),
        (1, True),
        (2, True),
    ]
    _, counts, worst = callback.drawn[-1]
    assert counts is not None
    assert int(counts.sum()) == 359
    shown = float(trainer.callback_metrics["val/ema_acc1"])  # of the network that is put to use
    assert 100 * int(counts.diagonal().sum()) / 359 == pytest.approx(shown, abs=1e-3)
    losses = [entry[0] for entry in worst]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    log = EventAccumulator(str(tmp_path / "run")).Reload()
    for tag in ("errors/confusion (rows: true class)", "errors/highest loss (true > predicted)"):
        assert [picture.step for picture in log.Images(tag)] == [2, 3]


@pytest.mark.parametrize("function", ["validate", "test"])
def test_pictures__of_a_score(tmp_path: Path, function: str) -> None:
    callback, _ = run(tmp_path, function)
    ((_, counts, _),) = callback.drawn
    assert counts is not None
    assert int(counts.sum()) == 359
    assert len(EventAccumulator(str(tmp_path / "run")).Reload().Tags()["images"]) == 2
