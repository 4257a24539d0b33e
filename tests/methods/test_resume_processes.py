"""A run that goes on with another number of processes sees the same images and ends with the same network, to rounding."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import digits, dino, pictures, run_in_processes, state, supervised, trainer
from torch import Tensor

from vil_lightning.errors import ConfigError
from vil_lightning.methods.run_length import divide_batch

EPOCHS, STEPS, GLOBAL_BATCH = 2, 4, 8  # steps of an epoch
METHODS = {
    "dino": (lambda: dino(lr_warmup="2 steps", teacher_temp_warmup="1 epoch"), digits),
    "supervised": (lambda: supervised(mix_prob=0.0, ema_decay=0.9, base_lr=0.2), pictures),
}


class Images(L.Callback):
    """The first view of every image, as this process gets them."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        views = batch[0]
        self.batches.append((views[0] if isinstance(views, list) else views).clone())


def run(
    world_size: int,
    out: Path,
    method: str,
    ckpt: str | None = None,
    largest: int | None = None,
    images: int = GLOBAL_BATCH,
) -> dict[str, Any]:
    """Train, with a checkpoint after every step; process 0's network, and the images of this process."""
    torch.set_num_threads(1)
    make, data = METHODS[method]
    kept, every = Images(), ModelCheckpoint(out / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    parallel: dict[str, Any] = {"devices": world_size, "strategy": "ddp"} if world_size > 1 else {}
    fit = trainer(out, max_epochs=EPOCHS, callbacks=[kept, every], enable_checkpointing=True, **parallel)
    module, source = make(), data(largest or images // world_size)
    divide_batch(fit, module, source, images)
    fit.fit(module, datamodule=source, ckpt_path=ckpt, weights_only=True)
    assert fit.global_step == EPOCHS * STEPS
    result = {"images": kept.batches, "state": state(module)}
    torch.save(result, out / f"rank{fit.global_rank}.pt")
    return result


def of_processes(out: Path, world_size: int) -> dict[str, Any]:
    """What several processes saw, as one would have: images are dealt in turn."""
    ranks = [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]
    batches = [torch.stack(parts, dim=1).flatten(0, 1) for parts in zip(*(r["images"] for r in ranks), strict=True)]
    return {"images": batches, "state": ranks[0]["state"]}


def in_processes(world_size: int, out: Path, *arguments: Any) -> dict[str, Any]:
    if world_size == 1:
        return run(1, out, *arguments)
    out.mkdir(parents=True, exist_ok=True)
    results = run_in_processes(world_size, __file__, "run", out, 300, *arguments)
    assert [code for code, _ in results] == [0] * world_size, "\n".join(error for _, error in results)
    return of_processes(out, world_size)


def check_same(got: dict[str, Any], straight: dict[str, Any], done: int) -> None:
    assert torch.equal(torch.cat(got["images"]), torch.cat(straight["images"])[done * GLOBAL_BATCH :])
    for name, value in straight["state"].items():
        torch.testing.assert_close(got["state"][name], value, rtol=1e-4, atol=2e-5, msg=name)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Uninterrupted runs of one process, by method."""
    folders = {method: tmp_path_factory.mktemp(method) for method in METHODS}
    return {method: (folder, run(1, folder, method)) for method, folder in folders.items()}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes with checkpoints."""
    folder = tmp_path_factory.mktemp("two")
    in_processes(2, folder, "dino")
    return folder


@pytest.mark.parametrize(
    ("world_size", "done"), [(1, 3), (1, 4), (1, 6), pytest.param(4, 3, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.timeout(600)
def test_resume__what_two_processes_began(
    straight: dict[str, Any], of_two: Path, tmp_path: Path, world_size: int, done: int
) -> None:
    check_same(in_processes(world_size, tmp_path, "dino", f"{of_two}/ckpt/step={done}.ckpt"), straight["dino"][1], done)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_resume__two_processes_go_on_where_one_accumulated(straight: dict[str, Any], tmp_path: Path) -> None:
    folder, whole = straight["supervised"]
    pieces = run(1, tmp_path / "pieces", "supervised", None, 2)  # 4 micro batches of 2
    check_same(pieces, whole, 0)
    check_same(in_processes(2, tmp_path / "two", "supervised", f"{tmp_path}/pieces/ckpt/step=3.ckpt"), whole, 3)
    two = in_processes(2, tmp_path / "halves", "supervised", f"{folder}/ckpt/step=6.ckpt", 2)  # 2 micro batches of 2
    check_same(two, whole, 6)


@pytest.mark.parametrize("done", [3, 4, 6])
def test_resume__another_accumulation(straight: dict[str, Any], tmp_path: Path, done: int) -> None:
    folder, whole = straight["supervised"]
    fine = run(1, tmp_path / "fine", "supervised", f"{folder}/ckpt/step={done}.ckpt", 2)
    check_same(fine, whole, done)
    assert len(fine["images"]) == 4 * len(whole["images"][done:])
    if done == 6:
        return
    again = run(1, tmp_path / "coarse", "supervised", f"{tmp_path}/fine/ckpt/step={done + 2}.ckpt", 4)
    check_same(again, whole, done + 2)


def test_resume__another_global_batch_is_refused(straight: dict[str, Any], tmp_path: Path) -> None:
    for method, (folder, _) in straight.items():
        with pytest.raises(ConfigError, match=r"started with 8 images per optimiser step, .* --global_batch_size 8"):
            run(1, tmp_path, method, f"{folder}/ckpt/step=3.ckpt", None, 4)


def test_resume__in_the_middle_of_a_micro_batch_is_refused(straight: dict[str, Any], tmp_path: Path) -> None:
    """As from a checkpoint that was written while gradients were accumulated."""
    folder, _ = straight["supervised"]
    content = torch.load(folder / "ckpt/step=3.ckpt", weights_only=True)
    content["batch"]["micro_batch"] = 4
    content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"] = 5
    torch.save(content, tmp_path / "half.ckpt")
    with pytest.raises(ConfigError, match=r"after 5 micro batches of 4 images.*no whole number of micro batches of 8"):
        run(1, tmp_path, "supervised", str(tmp_path / "half.ckpt"))


def test_loader__the_middle_of_a_batch_is_refused() -> None:
    data = pictures(8)
    data.setup("fit")
    loader = data.train_dataloader()
    with pytest.raises(ConfigError, match=r"written 12 images into an epoch, but batches are of 8 images"):
        loader.load_state_dict({"batches_done": 3, "images_per_batch": 4})  # type: ignore[attr-defined]
