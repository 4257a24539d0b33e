"""Two processes with half the batch each train the same networks as one process, and stop together."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tiny import FewDigits, digits, dino, run_in_two_processes, trainer

from vil_lightning.callbacks import OnlineKNN
from vil_lightning.data.loading import ImageSource

STEPS, GLOBAL_BATCH = 3, 8


def train(world_size: int, out: Path) -> None:
    """Train for a few steps and save what process 0 ends with (and process 1, to compare)."""
    torch.set_num_threads(1)
    model = dino(lr_warmup=0, final_weight_decay=0.1)
    parallel = {"devices": world_size, "strategy": "ddp"} if world_size > 1 else {}
    fit = trainer(out, max_steps=STEPS, max_epochs=1, **parallel)
    fit.fit(model, datamodule=digits(GLOBAL_BATCH // world_size))
    assert fit.global_step == STEPS
    assert model.distillation.global_batch_size == GLOBAL_BATCH
    torch.save(model.state_dict(), out / f"world{world_size}_rank{fit.global_rank}.pt")


@pytest.mark.timeout(120)
def test_ddp__two_processes_equal_one(tmp_path: Path) -> None:
    train(1, tmp_path)
    results = run_in_two_processes(__file__, "train", tmp_path, anew=True)
    assert [code for code, _ in results] == [0, 0], "\n".join(error for _, error in results)

    one = torch.load(tmp_path / "world1_rank0.pt", weights_only=True)
    two, other = (torch.load(tmp_path / f"world2_rank{rank}.pt", weights_only=True) for rank in range(2))
    start = dino().state_dict()
    assert one.keys() == two.keys()
    for name, expected in one.items():
        assert torch.equal(two[name], other[name]), f"{name} differs between the processes"
        torch.testing.assert_close(two[name], expected, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    moved = max(float((one[name] - start[name]).abs().max()) for name in one)
    assert moved > 1e-3  # far more than what is tolerated above


class PoisonedRank(L.Callback):
    """Spoils the second batch of process 1."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and batch_idx == 1:
            for view in batch[0]:
                view.fill_(torch.nan)


def diverge(world_size: int, out: Path) -> None:
    torch.set_num_threads(1)
    fit = trainer(out, max_epochs=2, callbacks=[PoisonedRank()], devices=world_size, strategy="ddp")
    fit.fit(dino(), datamodule=digits(GLOBAL_BATCH // world_size))


@pytest.mark.timeout(150)
def test_ddp__a_broken_loss_of_one_process_stops_both(tmp_path: Path) -> None:
    results = run_in_two_processes(__file__, "diverge", tmp_path, timeout=100)
    for code, error in results:
        assert code != 0
        assert "The run has diverged" in error


class OddDigits(FewDigits):
    """19 val images: the second process gets one of them twice."""

    def build_sources(self) -> tuple[ImageSource, ImageSource, list[str]]:
        train, val, classes = super().build_sources()
        val.images, val.labels = val.images[:19], val.labels[:19]  # type: ignore[attr-defined]
        return train, val, classes


class KeepFeatures(L.Callback):
    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        self.features, self.labels = OnlineKNN()._features(trainer, pl_module, loader)


def gather(world_size: int, out: Path) -> None:
    torch.set_num_threads(1)
    kept = KeepFeatures()
    parallel = {"devices": world_size, "strategy": "ddp"} if world_size > 1 else {}
    fit = trainer(out, max_steps=1, max_epochs=1, callbacks=[kept], **parallel)
    fit.fit(
        dino(lr_warmup=0),
        datamodule=OddDigits(16, 4, train_transform=digits().train_transform, eval_batch_size=4, seed=0),
    )
    torch.save((kept.features, kept.labels), out / f"features{world_size}_rank{fit.global_rank}.pt")


@pytest.mark.timeout(150)
def test_ddp__online_knn_sees_every_image_once_and_in_order(tmp_path: Path) -> None:
    gather(1, tmp_path)
    results = run_in_two_processes(__file__, "gather", tmp_path, timeout=100)
    assert [code for code, _ in results] == [0, 0], "\n".join(error for _, error in results)
    features, labels = torch.load(tmp_path / "features1_rank0.pt", weights_only=True)
    assert len(labels) == 19
    for rank in range(2):
        of_two, labels_of_two = torch.load(tmp_path / f"features2_rank{rank}.pt", weights_only=True)
        assert torch.equal(labels_of_two, labels)
        torch.testing.assert_close(of_two, features, rtol=1e-5, atol=1e-6)
