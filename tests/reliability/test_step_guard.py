"""A step that is not finite changes nothing, is named, and is kept; a run that does not recover is stopped."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).parents[1] / "methods"))
from tiny import digits, dino, pictures, run_in_two_processes, state, supervised, trainer

from vil_lightning.callbacks import LastCheckpoint
from vil_lightning.errors import ConfigError
from vil_lightning.reliability import DivergedError, FaultPolicy, StepGuard


class Spoil(L.Callback):
    """Makes the images of some batches NaN."""

    def __init__(self, *batches: int) -> None:
        self.batches = batches
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.states.append(state(pl_module))
        if batch_idx in self.batches:
            for view in batch[0] if isinstance(batch[0], list) else batch[:1]:
                view.fill_(torch.nan)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.after = state(pl_module)


def fit(model: Any, data: Any, folder: Path, spoil: Spoil, policy: FaultPolicy, **kwargs: Any) -> tuple[Any, StepGuard]:
    guard = StepGuard(policy)
    run = trainer(folder, **{"max_epochs": 1, "callbacks": [spoil, guard], **kwargs})
    run.fit(model, datamodule=data)
    return run, guard


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_skip__a_bad_batch_changes_neither_weights_nor_statistics_nor_optimiser(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil = Spoil(2)
    model = dino()
    run, guard = fit(model, digits(), tmp_path, spoil, FaultPolicy())
    before, after = spoil.states[2], spoil.states[3]
    moved = changed(before, after)
    assert moved
    assert all(name.startswith("teacher.") for name in moved)  # towards the student, which is as good as it was
    assert changed(spoil.states[1], before) >= {"loss.center", "student.backbone.patch_embed.proj.weight"}
    assert all(value.isfinite().all() for value in state(model).values())
    assert run.global_step == 4  # schedules go on
    assert guard.skipped == 1
    assert guard.skipped_in_row == 0
    steps = {int(s["step"]) for s in run.optimizers[0].state.values() if "step" in s}
    assert steps == {3}
    message = caplog.text
    for part in ("step 2 ", "batch 2", "rank 0", "loss not finite", "student.backbone", "are not finite themselves"):
        assert part in message, part


def test_skip__the_batch_is_kept_with_its_images_and_weights_and_can_be_replayed(tmp_path: Path) -> None:
    spoil, model = Spoil(2), supervised()
    seen: list[list[int]] = []

    class Numbers(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            sampler = trainer.train_dataloader.sampler  # type: ignore[union-attr]
            seen.append([index for _, index in list(sampler)[batch_idx * 8 : batch_idx * 8 + 8]])

    guard = StepGuard(FaultPolicy())
    trainer(tmp_path, max_epochs=1, callbacks=[Numbers(), spoil, guard]).fit(model, datamodule=pictures())
    (path,) = (tmp_path / "faults").iterdir()
    assert path.name == "step=00000002-rank=0.pt"
    fault = torch.load(path, weights_only=True)
    assert (fault["global_step"], fault["epoch"], fault["rank"]) == (2, 0, 0)
    assert fault["images"] == seen[2]
    assert not changed(spoil.states[2], fault["state_dict"])
    images, labels = fault["batches"][0]["batch"]
    assert images.isnan().all()
    assert labels.shape == (8,)
    model.load_state_dict(fault["state_dict"])
    assert not model.backbone(images).isfinite().any()


def test_skip__goes_with_accumulation(tmp_path: Path) -> None:
    """One bad batch of two spoils the step, not the next."""
    spoil, model = Spoil(0), supervised()
    run, guard = fit(model, pictures(), tmp_path, spoil, FaultPolicy(), accumulate_grad_batches=2)
    assert not changed(spoil.states[0], spoil.states[2])
    assert run.global_step == 2
    assert guard.skipped == 1
    assert changed(spoil.states[2], state(model))


def test_skip__of_accumulated_batches_puts_back_what_stood_before_the_first(tmp_path: Path) -> None:
    spoil, model = Spoil(0), dino()
    fit(model, digits(), tmp_path, spoil, FaultPolicy(), accumulate_grad_batches=2)
    assert torch.equal(spoil.states[2]["loss.center"], spoil.states[0]["loss.center"])
    assert not torch.equal(spoil.after["loss.center"], spoil.states[2]["loss.center"])


@pytest.mark.parametrize(("other", "skipped"), [(1.0, 0), (0.0, 1)])
def test_skip__what_is_broken_in_another_process_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: float, skipped: int
) -> None:
    """As with sharded gradients, of which each process sees its own part."""
    guard, model, run = StepGuard(FaultPolicy(save_batches=False)), Line(), trainer(tmp_path)
    model.trainer = run
    model.weight.grad = torch.ones(3)
    guard._finite = torch.tensor(True)
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    monkeypatch.setattr(run.strategy, "reduce", lambda value, reduce_op: value + other)  # their sum
    guard.on_before_optimizer_step(run, model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert guard.skipped == skipped
    assert (model.weight.grad is None) == bool(skipped)


def test_stop__after_too_many_in_a_row_names_where(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spoil, model = Spoil(1, 2, 3), supervised()
    with pytest.raises(DivergedError, match=r"3 step\(s\) in a row, more than faults.max_skipped_steps=2") as error:
        fit(model, pictures(), tmp_path, spoil, FaultPolicy(max_skipped_steps=2))
    for part in (
        "step 3 ",
        "rank 0",
        "images [",
        "first module whose output is not finite is backbone.patch_embed.proj",
    ):
        assert part in str(error.value), part
    assert all(value.isfinite().all() for value in state(model).values())
    assert caplog.text.count("Skipped a step") == 2


class Line(L.LightningModule):
    def __init__(self, losses: list[float] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.losses = losses

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.weight.sum() * batch.mean()
        return loss if self.losses is None else loss - loss.detach() + self.losses[batch_idx]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class SpoilGradient(Line):
    """The loss of one batch is finite, its gradient is not."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1:
            loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss


def run_line(model: Line, folder: Path, batches: int, **kwargs: Any) -> L.Trainer:
    run = trainer(folder, max_epochs=1, **kwargs)
    run.fit(model, DataLoader(torch.ones(batches, 1)))  # type: ignore[arg-type]
    return run


def test_skip__a_gradient_alone_that_is_not_finite(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = SpoilGradient()
    run_line(model, tmp_path, 3, callbacks=[guard := StepGuard(FaultPolicy())])
    assert guard.skipped == 1
    assert model.weight.isfinite().all()
    assert "gradients not finite in 1 of 1 tensors (weight)" in caplog.text


def test_skip__off_leaves_it_to_the_method(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="The run has diverged"):
        fit(dino(), digits(), tmp_path, Spoil(1), FaultPolicy(max_skipped_steps=None))


def test_skip__does_not_change_a_good_run(tmp_path: Path) -> None:
    plain, guarded = dino(drop_path_rate=0.2), dino(drop_path_rate=0.2)
    trainer(tmp_path, max_epochs=1).fit(plain, datamodule=digits())
    fit(guarded, digits(), tmp_path, Spoil(), FaultPolicy())
    assert not changed(state(plain), state(guarded))


def test_skip__under_a_gradient_scaler_the_loss_alone_counts(tmp_path: Path) -> None:
    """float16 finds its scale by overflowing: these steps are the scaler's to skip."""
    guard = StepGuard(FaultPolicy(max_skipped_steps=0))
    run = trainer(tmp_path, max_epochs=1, callbacks=[guard])
    run.strategy.precision_plugin.scaler = object()  # type: ignore[attr-defined]
    model = Line()
    model.trainer = run
    model.weight.grad = torch.full((3,), torch.inf)
    guard._finite = torch.tensor(True)
    guard.on_before_optimizer_step(run, model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert guard.skipped == 0


class SpoilRank(Spoil):
    """Of process 1 only."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)


def spoiled_rank(world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    model = dino()
    run, guard = fit(model, digits(4), folder, SpoilRank(2), FaultPolicy(), devices=world_size, strategy="ddp")
    torch.save((guard.skipped, run.global_step, state(model)), folder / f"rank{run.global_rank}.pt")


@pytest.mark.timeout(150)
def test_skip__all_processes_skip_together(tmp_path: Path) -> None:
    results = run_in_two_processes(__file__, "spoiled_rank", tmp_path, timeout=100)
    assert [code for code, _ in results] == [0, 0], "\n".join(error for _, error in results)
    (skipped, step, first), (skipped_1, step_1, second) = (
        torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert (skipped, skipped_1, step, step_1) == (1, 1, 4, 4)
    assert not changed(first, second)
    assert all(value.isfinite().all() for value in first.values())
    assert "rank 0: loss finite" in results[0][1]
    assert "rank 1: loss not finite" in results[1][1]
    assert [path.name for path in (tmp_path / "faults").iterdir()] == ["step=00000002-rank=1.pt"]


# --- spikes -----------------------------------------------------------------------------------------------------------

CALM = [1.0 + 0.01 * (i % 7) for i in range(30)]


def test_spike__is_named_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = FaultPolicy(spike_window=20)
    run = run_line(Line([*CALM, 5.0, *CALM]), tmp_path, 61, callbacks=[StepGuard(policy)])
    assert run.global_step == 61
    (record,) = (r for r in caplog.records if "spike" in r.getMessage())
    assert "Loss spike: 5 at step 30" in record.getMessage()


def test_spike__calm_and_falling_losses_are_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    falling = [10 * 0.97**i for i in range(100)]
    run_line(Line(falling), tmp_path, 100, callbacks=[StepGuard(FaultPolicy(spike_window=20))])
    run_line(Line(CALM * 3), tmp_path, 90, callbacks=[StepGuard(FaultPolicy(spike_window=20))])
    assert "spike" not in caplog.text


def test_spike__rolls_back_to_the_last_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = FaultPolicy(spike_window=20, roll_back=True)
    last = LastCheckpoint(tmp_path, every_n_train_steps=25)
    weights: list[Tensor] = []
    steps: list[int] = []  # that the optimiser counts

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            weights.append(pl_module.weight.detach().clone())
            steps.append(max((int(s["step"]) for s in trainer.optimizers[0].state.values()), default=0))

    guard = StepGuard(policy, tmp_path / "last.ckpt")
    model = Line([*CALM, 5.0, *CALM[:3]])
    run = run_line(model, tmp_path, 34, callbacks=[guard, Look(), last], enable_checkpointing=True)
    assert guard.roll_backs == 1
    assert run.global_step == 34
    # Seen after the batch behind it; weights 25 are those of the checkpoint.
    assert torch.equal(weights[32], weights[25])
    assert not torch.equal(weights[31], weights[25])
    assert (steps[31], steps[32]) == (31, 25)
    assert "step 25 again" in caplog.text


def test_spike__too_many_roll_backs_stop_the_run(tmp_path: Path) -> None:
    policy = FaultPolicy(spike_window=10, roll_back=True, max_roll_backs=1)
    last = LastCheckpoint(tmp_path, every_n_train_steps=5)
    losses = [*CALM, 5.0, *CALM, 5.0, *CALM]
    with pytest.raises(DivergedError, match=r"after 1 roll-backs \(faults.max_roll_backs\)"):
        run_line(
            Line(losses),
            tmp_path,
            len(losses),
            callbacks=[StepGuard(policy, tmp_path / "last.ckpt"), last],
            enable_checkpointing=True,
        )


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"max_skipped_steps": -1}, "faults.max_skipped_steps=-1"),
        ({"spike_factor": 0.0}, "faults.spike_factor=0.0"),
        ({"spike_window": 3}, "faults.spike_window=3"),
        ({"max_roll_backs": 0}, "faults.max_roll_backs=0"),
        ({"roll_back": True, "spike_factor": None}, "faults.spike_factor"),
    ],
)
def test_policy__refuses(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        FaultPolicy(**settings)


def test_roll_back__needs_something_to_go_back_to() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.save_last"):
        StepGuard(FaultPolicy(roll_back=True), None)
