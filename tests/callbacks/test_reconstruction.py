"""Pictures of what a masked autoencoder predicts: the same images and masks every time, and no trace in the run."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from vil_lightning.callbacks import ReconstructionPictures
from vil_lightning.data import Digits, TrainTransform
from vil_lightning.methods import MAE, BackboneConfig, SimMIM

TAG = "reconstruction/image, seen, predicted"
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "drop_path_rate": 0.5}
COLLECTIVES = ("all_gather", "all_reduce", "barrier", "broadcast")


def data() -> Digits:
    view = TrainTransform(16, hflip_prob=0.0, three_augment=False)
    return Digits(16, 16, train_transform=view, seed=0)


def module(kind: type[L.LightningModule] = MAE) -> Any:
    torch.manual_seed(1)
    small = {"decoder_dim": 32, "decoder_depth": 1} if kind is MAE else {"mask_unit": 2, "mask_ratio": 0.5}
    return kind(BackboneConfig("vil2_tiny_patch16_224", None, SMALL), base_lr=0.05, lr_warmup=0, **small)


def fit(folder: Path, callbacks: list[L.Callback], epochs: int = 1, kind: Any = MAE, **kwargs: Any) -> Any:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        limit_train_batches=2,
        limit_val_batches=0,
        logger=TensorBoardLogger(folder, name="", version="run"),
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    model = module(kind)
    trainer.fit(model, datamodule=data())
    return model


class Kept(ReconstructionPictures):
    """Notes what the network is given and returns, the sheets, and what surrounds each call."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.calls: list[tuple[Tensor, dict[str, Tensor], bool]] = []
        self.sheets: list[Tensor] = []
        self.around: list[tuple[Any, Any]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        reconstruct, writer = pl_module.reconstruct, trainer.loggers[0].experiment
        add_image = writer.add_image

        def noted(images: Tensor) -> dict[str, Tensor]:
            result = reconstruct(images)
            self.calls.append((images.clone(), result, pl_module.backbone.training))
            return result

        def written(tag: str, sheet: Tensor, step: int) -> None:
            self.sheets.append(sheet.clone())
            add_image(tag, sheet, step)

        pl_module.__dict__["reconstruct"], writer.add_image = noted, written
        before = self.surroundings(pl_module)
        super().on_train_epoch_end(trainer, pl_module)
        self.around.append((before, self.surroundings(pl_module)))
        del pl_module.__dict__["reconstruct"]
        writer.add_image = add_image

    def surroundings(self, module: Any) -> tuple[Any, ...]:
        modes = tuple(child.training for child in module.modules())
        gradients = tuple(p.grad is None or float(p.grad.abs().sum()) for p in module.parameters())
        return modes, tuple(torch.get_rng_state().tolist()), gradients, torch.is_grad_enabled()


@pytest.mark.parametrize("kind", [MAE, SimMIM])
def test_pictures__same_images_and_masks_every_time(tmp_path: Path, kind: Any) -> None:
    kept = Kept(num_images=5, every_n_epochs=1, size=32)
    fit(tmp_path, [kept], epochs=3, kind=kind)
    assert len(kept.calls) == 3
    images, first, _ = kept.calls[0]
    source = data()
    source.setup("fit")
    places = [0, 90, 179, 268, 358] if len(source.val_source) == 359 else []
    wanted = torch.stack([source.eval_transform(source.val_source[i][0]) for i in places])
    assert torch.equal(images, source.normalize(wanted))
    assert len({tuple(mask.flatten().tolist()) for mask in first["mask"]}) > 1
    for other, result, training in kept.calls:
        assert not training
        assert torch.equal(other, images)
        assert torch.equal(result["mask"], first["mask"])
        seen = result["mask"].expand_as(images) == 0
        assert torch.equal(result["reconstruction"][seen], images[seen])
    assert not torch.equal(kept.calls[2][1]["reconstruction"], first["reconstruction"])  # the network has learned
    again = Kept(num_images=5, every_n_epochs=1, size=32)
    fit(tmp_path / "again", [again], kind=kind)
    assert torch.equal(again.calls[0][1]["mask"], first["mask"])


def test_pictures__rows_and_columns(tmp_path: Path) -> None:
    kept = Kept(num_images=3, every_n_epochs=1, size=32)
    fit(tmp_path, [kept])
    (sheet,), (images, result, _) = kept.sheets, kept.calls[0]
    assert sheet.shape == (3, 3 * 36 + 4, 3 * 36 + 4)
    original = data().denormalize(images)
    columns = [original, torch.where(result["mask"] == 1, 0.5, original), data().denormalize(result["reconstruction"])]
    for row in range(3):
        for column, pictures in enumerate(columns):
            tile = sheet[:, 4 + 36 * row : 36 + 36 * row, 4 + 36 * column : 36 + 36 * column]
            assert (tile[:, ::2, ::2] - pictures[row]).abs().max() < 1e-5  # 16 px, each shown as 2 x 2
            assert torch.equal(tile[:, ::2, ::2], tile[:, 1::2, 1::2])
    (logged,) = EventAccumulator(str(tmp_path / "run")).Reload().Images(TAG)
    assert (logged.step, logged.height, logged.width) == (2, 112, 112)


@pytest.mark.parametrize(("every", "expected"), [(1, [2, 4, 6]), (2, [4, 6]), (5, [6])])
def test_pictures__every_few_epochs_and_at_the_end(tmp_path: Path, every: int, expected: list[int]) -> None:
    fit(tmp_path, [ReconstructionPictures(num_images=1, every_n_epochs=every)], epochs=3)
    assert [picture.step for picture in EventAccumulator(str(tmp_path / "run")).Reload().Images(TAG)] == expected


def test_pictures__leave_the_run_as_it_is(tmp_path: Path) -> None:
    class PartlyEvaluated(Kept):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            pl_module.backbone.patch_embed.eval()  # a part that a user keeps in that mode
            super().on_train_epoch_end(trainer, pl_module)

    kept = PartlyEvaluated(num_images=2, every_n_epochs=1)
    fit(tmp_path, [kept], epochs=2)
    for before, after in kept.around:
        assert before == after
        assert True in before[0]
        assert False in before[0]


def test_pictures__do_not_change_the_weights(tmp_path: Path) -> None:
    plain = fit(tmp_path / "plain", [], epochs=2)
    watched = fit(tmp_path / "watched", [ReconstructionPictures(every_n_epochs=1)], epochs=2)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


def test_pictures__in_the_precision_of_the_run(tmp_path: Path) -> None:
    kept = Kept(num_images=2, every_n_epochs=1)
    fit(tmp_path, [kept], precision="bf16-mixed")
    assert kept.sheets[0].dtype == torch.float32
    assert kept.sheets[0].isfinite().all()


@pytest.fixture
def no_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 0 alone would wait for the others forever."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"collective operation in {sys._getframe(1).f_code.co_name}")

    for name in COLLECTIVES:
        monkeypatch.setattr(torch.distributed, name, refuse)
        for owner in (L.pytorch.strategies.SingleDeviceStrategy, L.LightningModule):
            if hasattr(owner, name):
                monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setattr(L.pytorch.strategies.SingleDeviceStrategy, "reduce", refuse)


@pytest.mark.parametrize("first", [True, False])
def test_pictures__from_one_process_without_collectives(
    tmp_path: Path, no_collectives: None, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    model, source = module(), data()
    source.setup("fit")
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=1, logger=logger, enable_checkpointing=False)
    trainer.datamodule = source
    monkeypatch.setattr(type(trainer), "is_global_zero", property(lambda self: first))
    calls = []
    monkeypatch.setattr(model, "reconstruct", lambda images: (calls.append(1), MAE.reconstruct(model, images))[1])
    ReconstructionPictures().on_train_epoch_end(trainer, model)
    assert len(calls) == int(first)
