"""FSDP2: two processes with slices of the networks train what two processes with whole networks, and one, train.

Also their checkpoints, which are those of any other run, what is refused, and callbacks that look at a sharded network.
"""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_autoregressive import method as autoregressive
from test_distillation import distillation, write_teacher
from test_ibot import make as ibot
from test_lejepa import lejepa
from test_mae import mae
from test_observers import observers
from test_segmentation import model as segmentation
from test_segmentation import shapes
from test_simmim import simmim
from tiny import backbone, digits, dino, pictures, run_in_two_processes, state, supervised, trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from vil_lightning import load_weights
from vil_lightning.backbones.weights import read_file
from vil_lightning.callbacks import OnlineKNN, ReconstructionPictures
from vil_lightning.callbacks.scan_pictures import ScanPictures
from vil_lightning.checkpoint_io import AtomicCheckpointIO
from vil_lightning.errors import ConfigError
from vil_lightning.methods import DINO, BackboneConfig, DINOv2, LinearProbe, Supervised
from vil_lightning.methods.backbone import build_backbone, resolve_backbone
from vil_lightning.methods.fully_sharded import FullyShardedStrategy, check_strategy
from vil_lightning.sharding import full, is_sharded

GLOBAL_BATCH, STEPS = 8, 3
Case = tuple[Callable[[Path], Any], Callable[..., Any], dict[str, Any]]


def recomputing(**kwargs: Any) -> DINO:
    model = dino(lr_warmup=0, **kwargs)
    model.student["backbone"].set_grad_checkpointing(True)
    return model


def resnet(folder: Path) -> Supervised:
    """Batch norms, and no blocks."""
    torch.manual_seed(1)
    return Supervised(BackboneConfig("resnet18"), ema_decay=0.8, lr_warmup=0, base_lr=0.05)


def scored(**kwargs: Any) -> Any:
    """Without anything random, so that it is the same on one process and on two."""
    return supervised(mix_prob=0.0, ema_decay=0.8, layer_decay=0.7, lr_warmup=0, **kwargs)


QUICK: dict[str, Case] = {
    "dino": (lambda _: dino(lr_warmup=0, drop_path_rate=0.2), digits, {"gradient_clip_val": 100.0}),
    "supervised": (lambda _: scored(), pictures, {"gradient_clip_val": 0.5, "limit_val_batches": 1.0}),
    "mae": (lambda _: mae(), pictures, {}),
}
SLOW: dict[str, Case] = {
    "mae, ViT decoder": (lambda _: mae(decoder="vit", hidden="mask_token"), pictures, {"gradient_clip_val": 0.5}),
    "simmim": (lambda _: simmim(), pictures, {}),
    "autoregressive": (lambda _: autoregressive(), pictures, {}),
    "lejepa": (lambda _: lejepa(), digits, {}),
    "ibot": (lambda _: ibot(), digits, {}),
    "dinov2": (lambda _: ibot(DINOv2, shared_head=False, targets="sinkhorn", layer_decay=0.9), digits, {}),
    "distillation": (lambda folder: distillation(write_teacher(folder, "vil")), pictures, {}),
    "drop path, mixing, freezing": (
        lambda _: supervised(0.2, ema_decay=0.8, freeze=["blocks.0."], head_only="1 steps"),
        pictures,
        {},
    ),
    "lamb": (lambda _: supervised(optimizer="lamb", base_lr=0.05), pictures, {}),
    "sgd": (lambda _: supervised(optimizer="sgd"), pictures, {}),
    "batch norm": (resnet, pictures, {}),
    "accumulation": (lambda _: dino(lr_warmup=0), digits, {"accumulate_grad_batches": 2, "max_steps": 2}),
    "clipped by value": (
        lambda _: dino(lr_warmup=0),
        digits,
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ),
    "recomputation": (lambda _: recomputing(), digits, {}),
    "bf16-mixed": (lambda _: dino(lr_warmup=0), digits, {"precision": "bf16-mixed"}),
    "bf16-true": (lambda _: dino(lr_warmup=0), digits, {"precision": "bf16-true"}),
}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one, which does not outlive the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    # Lightning sets them; by the seed of an earlier run it would draw a network anew that is drawn when the run starts.
    for name in ("MASTER_ADDR", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "PL_GLOBAL_SEED"):
        monkeypatch.delenv(name, raising=False)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def wholes(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: full(value.detach()).clone() for name, value in module.state_dict().items()}


def compare(cases: dict[str, Case], out: Path, world_size: int = 2, accelerator: str = "cpu") -> None:
    """Train every case with whole networks and sharded; process 0 saves both results and what has been logged."""
    for name, (make, data, settings) in cases.items():
        results: dict[str, Any] = {}
        for kind in ("whole", "sharded"):
            module = make(out)
            whole = "ddp" if world_size > 1 else "auto"
            settings = {"max_steps": STEPS, "max_epochs": 1, "accelerator": accelerator, **settings}
            strategy = FullyShardedStrategy() if kind == "sharded" else whole
            fit = trainer(out, devices=world_size, strategy=strategy, **settings)
            fit.fit(module, datamodule=data(GLOBAL_BATCH // world_size))
            assert is_sharded(module) == (kind == "sharded")
            if kind == "sharded":
                parts = list(module.parameters())
                assert all(isinstance(parameter, DTensor) for parameter in parts)
                kept = sum(parameter.to_local().numel() for parameter in parts)
                assert kept / sum(parameter.numel() for parameter in parts) == pytest.approx(1 / world_size, rel=0.2)
                for states in fit.optimizers[0].state.values():
                    assert all(isinstance(value, DTensor) for key, value in states.items() if key != "step")
            logged = {key: float(value) for key, value in fit.callback_metrics.items()}
            results[kind] = {"state": wholes(module), "logged": logged}
        if fit.global_rank == 0:
            torch.save(results, out / f"{name}.pt")


def quick(world_size: int, out: Path) -> None:
    """All that the quick tests need of two processes, since starting them takes longer than running them."""
    torch.set_num_threads(1)
    compare(QUICK, out)
    save_and_resume(out)
    look(out)


ON_GPUS: dict[str, Case] = {
    **QUICK,
    "bf16": (lambda _: dino(lr_warmup=0), digits, {"precision": "bf16-mixed"}),
}


def on_gpus(world_size: int, out: Path) -> None:
    compare(ON_GPUS, out, accelerator="gpu")


def slow(world_size: int, out: Path) -> None:
    torch.set_num_threads(1)
    compare(SLOW, out)


def check_equal(out: Path, cases: dict[str, Case]) -> None:
    for name, (make, _, settings) in cases.items():
        results = torch.load(out / f"{name}.pt", weights_only=True)
        whole, sharded = results["whole"], results["sharded"]
        loose = settings.get("precision") == "bf16-true"  # a last bit is 1/256
        rtol, atol = (0.02, 0.01) if loose else (1e-4, 2e-5)
        assert whole["state"].keys() == sharded["state"].keys()
        for key, expected in whole["state"].items():
            torch.testing.assert_close(sharded["state"][key], expected, rtol=rtol, atol=atol, msg=f"{name}: {key}")
        assert whole["logged"].keys() == sharded["logged"].keys()
        assert {"train/loss", "train/grad_norm"} <= whole["logged"].keys()
        for key, value in whole["logged"].items():
            if "per_second" not in key:
                assert sharded["logged"][key] == pytest.approx(value, rel=0.02 if loose else 1e-4, abs=1e-6), (
                    name,
                    key,
                )
        if hasattr(start := make(out), "backbone") or hasattr(start, "student"):  # Supervised builds its own later
            moved = max(
                float((whole["state"][k].float() - v.float()).abs().max()) for k, v in start.state_dict().items()
            )
            assert moved > 1e-3, name  # far more than what is tolerated above


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes, after one, have left what they have trained, saved and seen."""
    folder = tmp_path_factory.mktemp("two")
    for name in MODELS:
        _, module = run(name, folder / f"{name} one", 1)
        torch.save(state(module), folder / f"{name} one.pt")
    results = run_in_two_processes(__file__, "quick", folder, timeout=200)
    assert [code for code, _ in results] == [0, 0], "\n".join(error for _, error in results)
    return folder


@pytest.mark.timeout(240)
def test_sharded__trains_what_ddp_trains(two: Path) -> None:
    check_equal(two, QUICK)


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_sharded__on_one_device_trains_the_same(accelerator: str, alone: None, tmp_path: Path) -> None:
    compare(QUICK, tmp_path, world_size=1, accelerator=accelerator)
    check_equal(tmp_path, QUICK)


@pytest.mark.gpu
@pytest.mark.timeout(240)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_sharded__on_two_gpus_trains_what_ddp_trains(tmp_path: Path) -> None:
    results = run_in_two_processes(__file__, "on_gpus", tmp_path, timeout=200)
    assert [code for code, _ in results] == [0, 0], "\n".join(error for _, error in results)
    check_equal(tmp_path, ON_GPUS)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_sharded__trains_what_ddp_trains_with_every_method_and_setting(tmp_path: Path) -> None:
    write_teacher(tmp_path, "vil")
    results = run_in_two_processes(__file__, "slow", tmp_path, timeout=360)
    assert [code for code, _ in results] == [0, 0], "\n".join(error for _, error in results)
    check_equal(tmp_path, SLOW)


# --- checkpoints ------------------------------------------------------------------------------------------------------

MODELS: dict[str, tuple[Callable[[], Any], Callable[..., Any]]] = {
    "dino": (lambda: dino(lr_warmup=0, final_weight_decay=0.1), digits),
    "supervised": (scored, pictures),
}
SAVED_AT, END = 2, 4


def run(
    name: str, folder: Path, world_size: int, ckpt_path: Path | None = None, **kwargs: Any
) -> tuple[L.Trainer, Any]:
    """To the end, with a checkpoint in between, from the start or from a checkpoint."""
    make, data = MODELS[name]
    module = make()
    if world_size > 1:
        kwargs |= {"devices": world_size, "strategy": FullyShardedStrategy()}
    checkpoints = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=SAVED_AT, save_top_k=-1)
    fit = trainer(
        folder,
        max_epochs=1,
        limit_val_batches=1.0,
        enable_checkpointing=True,
        callbacks=[checkpoints],
        plugins=[AtomicCheckpointIO()],
        **kwargs,
    )
    fit.fit(module, datamodule=data(GLOBAL_BATCH // world_size), ckpt_path=ckpt_path, weights_only=True)
    assert fit.global_step == END
    return fit, module


def save_and_resume(out: Path) -> None:
    """Straight through, and from the checkpoint of one process."""
    for name in MODELS:
        run(name, out / f"{name} two", 2)
        _, module = run(name, out / f"{name} one then two", 2, out / f"{name} one" / f"step={SAVED_AT}.ckpt")
        torch.save(wholes(module), out / f"{name} one then two {torch.distributed.get_rank()}.pt")
    # Scores of an earlier state, which is read into the slices that are there.
    fit, module = run("supervised", out / "scored", 2)
    path = out / "supervised two" / f"step={SAVED_AT}.ckpt"
    (scores,) = fit.validate(module, pictures(GLOBAL_BATCH // 2), ckpt_path=path, weights_only=True)
    torch.save(scores, out / "scores.pt")


def close(actual: Any, expected: Any, where: str) -> None:
    """Nested containers of the same structure and types, tensors within float32 rounding of three steps."""
    assert type(actual) is type(expected), where
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5, msg=lambda text: f"{where}: {text}")
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            close(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
            close(one, other, f"{where}[{i}]")
    else:
        assert actual == expected, where


@pytest.mark.timeout(240)
def test_checkpoint__is_that_of_one_process_and_goes_both_ways(two: Path, tmp_path: Path) -> None:
    for name in MODELS:
        end, folder = torch.load(two / f"{name} one.pt", weights_only=True), two / f"{name} two"
        assert sorted(path.name for path in folder.iterdir()) == [f"step={SAVED_AT}.ckpt", f"step={END}.ckpt"]  # files
        for step in (SAVED_AT, END):
            of_one, of_two = (read_file(two / f"{name} {kind}" / f"step={step}.ckpt") for kind in ("one", "two"))
            for key in ("state_dict", "optimizer_states", "backbone", "global_step", "epoch", "lr_schedulers"):
                close(of_two[key], of_one[key], f"{name} step {step} {key}")
            assert of_two.keys() == of_one.keys()
        # One process continues what two have begun, and two what one has begun.
        _, resumed = run(name, tmp_path / f"{name} two then one", 1, folder / f"step={SAVED_AT}.ckpt")
        close(state(resumed), end, f"{name} two then one")
        for rank in range(2):
            other_way = torch.load(two / f"{name} one then two {rank}.pt", weights_only=True)
            close(other_way, end, f"{name} one then two")
        # As weights for another recipe.
        config = resolve_backbone(BackboneConfig(None, str(folder / f"step={END}.ckpt")))
        network = build_backbone(config)
        source = {"dino": "teacher.backbone.", "supervised": "ema.module."}[name]
        close(network.norm.weight.detach(), end[source + "norm.weight"], name)
        report = load_weights(network, folder / f"step={END}.ckpt", allow_missing=("head.", "fc_norm."))
        assert not report.missing


@pytest.mark.timeout(240)
def test_checkpoint__is_scored_by_a_trainer_that_has_sharded_its_network(two: Path) -> None:
    path = two / "supervised one" / f"step={SAVED_AT}.ckpt"
    fit = trainer(limit_val_batches=1.0)
    (scores,) = fit.validate(scored(), pictures(GLOBAL_BATCH), ckpt_path=path, weights_only=True)
    of_two = torch.load(two / "scores.pt", weights_only=True)
    assert {"val/loss", "val/ema_acc1"} <= scores.keys()
    assert of_two == {key: pytest.approx(value, rel=1e-4) for key, value in scores.items()}


# --- looking at a sharded network -------------------------------------------------------------------------------------


def look(out: Path) -> None:
    """All callbacks that run the network, of which some do so on the first process only if it has all of it."""
    for name, make, data, watch in (
        ("dino", lambda: dino(lr_warmup=0), digits, lambda: [*observers(), OnlineKNN(k=5), ScanPictures()]),
        ("mae", mae, pictures, lambda: [ReconstructionPictures()]),
    ):
        for kind in ("ddp", "sharded"):
            strategy = FullyShardedStrategy() if kind == "sharded" else "ddp"
            logger = TensorBoardLogger(out, name="", version=f"{name} {kind}")
            fit = trainer(out, max_epochs=1, devices=2, strategy=strategy, callbacks=watch(), logger=logger)
            fit.fit(make(), datamodule=data(GLOBAL_BATCH // 2))
            if fit.global_rank == 0:
                seen = {key: float(value) for key, value in fit.callback_metrics.items()}
                torch.save(seen, out / f"{name} {kind}.pt")


@pytest.mark.timeout(240)
def test_callbacks__see_a_sharded_network_as_they_see_a_whole_one(two: Path) -> None:
    wanted = {"dino": {"scans/gates", "pca/patches"}, "mae": {"reconstruction/image, seen, predicted"}}
    for name in wanted:
        of_whole, of_sharded = (torch.load(two / f"{name} {kind}.pt", weights_only=True) for kind in ("ddp", "sharded"))
        assert of_whole.keys() == of_sharded.keys()
        for key, value in of_whole.items():
            if "per_second" not in key:
                assert of_sharded[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
        tags = [pictures_in(two / f"{name} {kind}") for kind in ("ddp", "sharded")]
        assert tags[0] == tags[1]
        assert wanted[name] & tags[0], tags[0]


def pictures_in(folder: Path) -> set[str]:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return set(accumulator.Tags()["images"])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "data", "message"),
    [
        (
            lambda: LinearProbe(backbone()),
            digits,
            "trainer.strategy=FullyShardedStrategy: LinearProbe cannot be sharded.*trainer.strategy to auto",
        ),
        (segmentation, shapes, "trainer.strategy=FullyShardedStrategy: Segmentation cannot be sharded"),
        (
            lambda: supervised(optimizer="adafactor"),
            pictures,
            "model.optimizer=adafactor cannot be sharded.*adamw, lamb, sgd",
        ),
    ],
    ids=["probe", "segmentation", "optimiser"],
)
def test_sharded__refuses_what_it_cannot_do(make: Any, data: Any, message: str, alone: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, max_epochs=1, strategy=FullyShardedStrategy()).fit(make(), datamodule=data())


def test_other_ways_of_sharding__are_refused(alone: None, tmp_path: Path) -> None:
    """Lightning's own strategy would train without averaging gradients; norms under FSDP1 would be those of slices."""
    with pytest.raises(
        ConfigError, match=r"trainer\.strategy=ModelParallelStrategy does not fit.*configs/trainer/fsdp.yaml"
    ):
        trainer(tmp_path, max_epochs=1, strategy=ModelParallelStrategy()).fit(dino(), datamodule=digits())
    fsdp1: Any = SimpleNamespace(strategy=FSDPStrategy())  # it needs a GPU to run
    with pytest.raises(ConfigError, match=r"trainer\.strategy=FSDPStrategy does not fit"):
        check_strategy(fsdp1)
    check_strategy(trainer(tmp_path))
