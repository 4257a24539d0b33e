"""LeJEPA: the loss against its definition, steps against a hand-written loop, resuming and two processes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_resume import same
from tiny import backbone, digits, pictures, run_in_two_processes, state, trainer
from torch import Tensor

from vil_lightning.errors import ConfigError
from vil_lightning.methods import LeJEPA
from vil_lightning.methods.randomness import seed_step


def lejepa(drop_path_rate: float = 0.0, **kwargs: Any) -> LeJEPA:
    torch.manual_seed(1)
    settings: dict[str, Any] = {"head_hidden_dim": 16, "proj_dim": 4, "num_directions": 8, "lr_warmup": "2 steps"}
    return LeJEPA(backbone(drop_path_rate=drop_path_rate), **{**settings, "base_lr": 0.05, **kwargs})


class Kept(L.Callback):
    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.losses: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append([view.clone() for view in batch[0]])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def oracle(projected: Tensor, directions: Tensor, weight: float) -> Tensor:
    """The paper's loss of (V, B, P): integral of the squared distance of characteristic functions, times B, and agreement."""
    knots = torch.linspace(0, 3, 17, dtype=projected.dtype)
    gauss = torch.exp(-(knots**2) / 2)
    statistics = []
    for view in projected:
        for direction in (directions / directions.norm(dim=0)).T:
            phases = (view @ direction)[:, None] * knots
            distance = (phases.cos().mean(0) - gauss) ** 2 + phases.sin().mean(0) ** 2
            statistics.append(2 * torch.trapezoid(distance * gauss, knots) * len(view))  # even: twice the half line
    agreement = ((projected - projected[:2].mean(0)) ** 2).mean()
    return weight * torch.stack(statistics).mean() + (1 - weight) * agreement


def test_loss__is_the_papers() -> None:
    model = lejepa().double()
    projected = torch.randn(5, 6, 4, dtype=torch.float64)
    torch.manual_seed(7)
    directions = torch.randn(4, 8, dtype=torch.float64)
    torch.manual_seed(7)
    loss = model.loss(global_proj=projected[:2], local_proj=projected[2:])
    assert loss.item() == pytest.approx(oracle(projected, directions, 0.05).item(), rel=1e-6)


def test_three_steps__equal_a_hand_written_loop() -> None:
    kept, model = Kept(), lejepa(final_lr=1e-3)
    reference = lejepa(final_lr=1e-3)
    fit = trainer(max_steps=3, max_epochs=1, callbacks=[kept])
    fit.fit(model, datamodule=digits())
    lr = 0.05 * 8 / 256
    rates = [lr / 2, lr, 1e-3]  # warm-up of two steps, then half a cosine that ends with the last step
    assert kept.rates == pytest.approx(rates)
    network = [*reference.backbone.named_parameters(), *reference.head.named_parameters()]
    decayed = [p for name, p in network if p.ndim > 1 and name != "pos_embed.embed"]
    others = [p for name, p in network if p.ndim <= 1 or name == "pos_embed.embed"]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}])
    reference.train()
    for step, views in enumerate(kept.batches):
        seed_step(SimpleNamespace(current_epoch=0, global_rank=0), step)  # type: ignore[arg-type]
        features = [reference.backbone(torch.cat(same_size)) for same_size in (views[:2], views[2:])]
        projected = reference.head(torch.cat(features)).unflatten(0, (len(views), -1))
        loss = oracle(projected, torch.randn(4, 8), 0.05)
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert kept.losses[step] == pytest.approx(loss.item(), rel=1e-5)
    # Batch norm removes every shift before it: this bias has no gradient, and Adam makes steps of rounding errors.
    shifts = {"backbone.fc_norm.bias"}
    for name, value in reference.state_dict().items():
        if name in shifts or "running_mean" in name:
            continue
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("done", [1, 3])
def test_resume__ends_in_the_same_state(tmp_path: Path, done: int) -> None:
    def run(path: Path, ckpt_path: Path | None = None) -> tuple[LeJEPA, Kept, Any]:
        kept, model = Kept(), lejepa(drop_path_rate=0.2)
        every = ModelCheckpoint(path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        fit = trainer(path, max_epochs=1, callbacks=[kept, every], enable_checkpointing=True)
        fit.fit(model, datamodule=digits(), ckpt_path=ckpt_path, weights_only=True)
        return model, kept, fit.optimizers[0].state_dict()

    whole, recorded, optimizer = run(tmp_path / "whole")
    resumed, again, resumed_optimizer = run(tmp_path / "resumed", tmp_path / f"whole/step={done}.ckpt")
    assert same(again.batches, recorded.batches[done:])
    assert again.losses == recorded.losses[done:]
    assert same(state(resumed), state(whole))
    assert same(resumed_optimizer, optimizer)


def train(world_size: int, out: Path) -> None:
    torch.set_num_threads(1)
    model = lejepa(lr_warmup=0)
    parallel = {"devices": world_size, "strategy": "ddp"} if world_size > 1 else {}
    kept = GlobalSigreg()
    fit = trainer(out, max_steps=1, max_epochs=1, callbacks=[kept], **parallel)
    fit.fit(model, datamodule=digits(8 // world_size))
    torch.save(kept.value, out / f"sigreg{world_size}_rank{fit.global_rank}.pt")


class GlobalSigreg(L.Callback):
    """SIGReg of embeddings that depend on the process only through which images it has."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(5)
        embeddings = torch.stack([view.flatten(1)[:, :4] for view in batch[0][:2]])
        self.value = pl_module.loss.sigreg(embeddings.float())


@pytest.mark.timeout(150)
def test_ddp__sigreg_sees_the_images_of_all_processes(tmp_path: Path) -> None:
    train(1, tmp_path)
    results = run_in_two_processes(__file__, "train", tmp_path, timeout=100)
    assert [code for code, _ in results] == [0, 0], "\n".join(error for _, error in results)
    one, two, other = (
        torch.load(tmp_path / f"sigreg{name}.pt", weights_only=True) for name in ("1_rank0", "2_rank0", "2_rank1")
    )
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"base_lr": 0.0}, "base_lr"),
        ({"sigreg_weight": 0.0}, "sigreg_weight"),
        ({"num_directions": 0}, "num_directions"),
    ],
)
def test_bad_values__name_their_key(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{key}"):
        lejepa(**settings)


def test_views__without_local_ones_are_refused() -> None:
    for data in (pictures(), digits(num_local_views=0)):
        with pytest.raises(ConfigError, match=r"data\.train_transform"):
            trainer(max_steps=2, max_epochs=1).fit(lejepa(), datamodule=data)


def test_run__logs_both_parts_of_the_loss() -> None:
    model = lejepa()
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 64)
    kept = Kept()
    fit = trainer(max_steps=2, max_epochs=1, callbacks=[kept])
    fit.fit(model, datamodule=digits())
    assert {"train/loss", "health/agreement", "health/sigreg", "health/feature_std"} <= set(fit.callback_metrics)
    metrics = {name: float(value) for name, value in fit.callback_metrics.items()}
    combined = 0.05 * metrics["health/sigreg"] + 0.95 * metrics["health/agreement"]
    assert metrics["train/loss"] == pytest.approx(combined, rel=1e-5)
