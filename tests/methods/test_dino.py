"""DINO against the formulas of the paper, written out plainly."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import SMALL, Recorder, backbone, digits, dino, state, trainer
from torch import Tensor, nn

from vil_lightning.data import MultiCrop
from vil_lightning.errors import ConfigError
from vil_lightning.methods import DINO, BackboneConfig, self_distillation
from vil_lightning.methods.optimisers import adamw
from vil_lightning.methods.self_distillation import _DIAGNOSES, CollapseWatch, concat_by_size


def loss_by_loops(teacher: list[Tensor], student: list[Tensor], center: Tensor, t_temp: float, s_temp: float) -> Tensor:
    """Mean cross-entropy over all pairs of a teacher view and another student view, in float64."""
    terms = []
    for i, targets in enumerate(teacher):
        for j, predictions in enumerate(student):
            if i == j:
                continue
            probabilities = ((targets.double() - center.double()) / t_temp).softmax(-1)
            terms.append(-(probabilities * (predictions.double() / s_temp).log_softmax(-1)).sum(-1).mean())
    return torch.stack(terms).mean()


def logits_of(network: Any, views: list[Tensor]) -> list[Tensor]:
    """One view at a time."""
    return [network["head"](network["backbone"](view)) for view in views]


def last_layer(network: Any) -> Tensor:
    return network["head"].last_layer.weight_v.detach().clone()


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_local_views", [0, 2])
def test_training_step__loss_and_center(num_local_views: int) -> None:
    model = dino(teacher_temp=0.05, student_temp=0.2, warmup_teacher_temp=0.05, center_momentum=0.7)
    before: list[dict[str, Tensor]] = []

    class Before(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            before.append(state(pl_module))

    recorder = Recorder()
    data = digits(num_local_views=num_local_views)
    trainer(max_epochs=1, callbacks=[Before(), recorder]).fit(model, datamodule=data)
    assert len(recorder.losses) == 4
    for loss, (views, _), start, end in zip(recorder.losses, recorder.batches, before, recorder.states, strict=True):
        assert len(views) == 2 + num_local_views
        model.load_state_dict(start)
        with torch.no_grad():
            teacher, student = logits_of(model.teacher, views[:2]), logits_of(model.student, views)
        center = start["loss.center"][0, 0]
        assert loss == pytest.approx(float(loss_by_loops(teacher, student, center, 0.05, 0.2)), rel=1e-6)
        expected = 0.7 * center.double() + 0.3 * torch.cat(teacher).double().mean(0)
        torch.testing.assert_close(end["loss.center"][0, 0].double(), expected, rtol=1e-6, atol=1e-7)


def test_training__three_steps_by_hand() -> None:
    """Loss, clipping, AdamW, schedules and teacher, in plain torch and float64."""
    settings: dict[str, Any] = {
        "base_lr": 0.05,
        "lr_warmup": 0,
        "final_lr": 1e-4,
        "weight_decay": 0.5,
        "final_weight_decay": 1.0,
        "teacher_momentum": 0.8,
        "warmup_teacher_temp": 0.04,
        "teacher_temp": 0.08,
        "teacher_temp_warmup": "2 steps",
        "freeze_last_layer": "1 step",
        "clip_grad": 0.01,
    }
    model = dino(**settings).double()
    recorder = Recorder()
    data = digits()
    in_single = data.normalize
    data.normalize = lambda images: in_single(images).double()  # type: ignore[method-assign]

    class SingleLoss(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.loss.float()  # the networks in float64, the loss in float32 as always

    fit = trainer(max_steps=3, max_epochs=1, precision="64-true", callbacks=[recorder, SingleLoss()])
    start = state(model)
    fit.fit(model, datamodule=data)
    assert len(recorder.batches) == 3

    hand = dino(**settings).double()
    hand.load_state_dict(start)
    decayed, plain = [], []
    for name, parameter in hand.student.named_parameters():
        if parameter.requires_grad:
            kept = parameter.ndim == 1 or name.endswith(".bias") or "pos_embed" in name
            (plain if kept else decayed).append(parameter)
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": plain}], lr=1.0)
    center = torch.zeros(24, dtype=torch.float64)
    clipped = 0
    for step, (views, _) in enumerate(recorder.batches):
        views = [view.double() for view in views]
        cosine = 0.5 * (1 + math.cos(math.pi * step / 3))
        peak = 0.05 * 8 / 256
        for group, decay in zip(optimizer.param_groups, (1.0 + (0.5 - 1.0) * cosine, 0.0), strict=True):
            group["lr"] = 1e-4 + (peak - 1e-4) * cosine
            group["weight_decay"] = decay
        with torch.no_grad():
            targets = logits_of(hand.teacher, views[:2])
        loss = loss_by_loops(targets, logits_of(hand.student, views), center, (0.04, 0.06, 0.08)[step], 0.1)
        assert recorder.losses[step] == pytest.approx(float(loss), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        if step < 1:
            hand.student["head"].last_layer.weight_v.grad = None
        for parameter in decayed + plain:
            if parameter.grad is not None and parameter.grad.norm() > 0.01:
                parameter.grad *= 0.01 / (parameter.grad.norm() + 1e-6)
                clipped += 1
        optimizer.step()
        center = 0.9 * center + 0.1 * torch.cat(targets).mean(0)
        momentum = 1.0 + (0.8 - 1.0) * cosine
        with torch.no_grad():
            for ours, theirs in zip(hand.teacher.parameters(), hand.student.parameters(), strict=True):
                ours.mul_(momentum).add_(theirs, alpha=1 - momentum)
    assert clipped > 0
    assert float((model.student["head"].layers[0].weight - start["student.head.layers.0.weight"]).abs().max()) > 1e-3
    for name in ("student", "teacher"):
        for key, value in getattr(hand, name).state_dict().items():
            # The module's loss is in float32, which Adam's division by small gradients magnifies.
            actual = getattr(model, name).state_dict()[key]
            torch.testing.assert_close(actual, value, rtol=0, atol=2e-5, msg=lambda text, k=key: f"{k}: {text}")
    torch.testing.assert_close(model.loss.center[0, 0].double(), center, rtol=1e-4, atol=1e-6)


def test_training_step__loss_in_float32_under_autocast() -> None:
    """A student without opinion has a loss of ln K; bfloat16 would round it to three digits."""
    model = dino(num_prototypes=300)
    nn.init.zeros_(model.student["head"].last_layer.weight_g)
    seen: list[torch.dtype] = []
    model.loss.register_forward_pre_hook(lambda _, args: seen.extend(x.dtype for views in args for x in views))
    inside: list[torch.dtype] = []
    model.student["head"].layers[0].register_forward_hook(lambda *args: inside.append(args[2].dtype))
    recorder = Recorder()
    fit = trainer(max_steps=2, precision="bf16-mixed", callbacks=[recorder])
    fit.fit(model, datamodule=digits())
    assert set(inside) == {torch.bfloat16}
    assert set(seen) == {torch.float32}
    assert recorder.losses[0] == pytest.approx(math.log(300), rel=1e-6)


def test_concat_by_size__one_batch_per_resolution_in_order() -> None:
    views = [torch.full((2, 3, size, size), float(i)) for i, size in enumerate((16, 16, 8, 8, 8))]
    groups = concat_by_size(views)
    assert [tuple(group.shape) for group in groups] == [(4, 3, 16, 16), (6, 3, 8, 8)]
    assert torch.cat([group[:, 0, 0, 0] for group in groups]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


# --- teacher and student ----------------------------------------------------------------------------------------------


def test_init__teacher_is_a_separate_copy_of_the_student() -> None:
    model = dino()
    student, teacher = model.student.state_dict(), model.teacher.state_dict()
    assert student.keys() == teacher.keys()
    assert all(torch.equal(student[name], teacher[name]) for name in student)
    assert not {v.data_ptr() for v in student.values()} & {v.data_ptr() for v in teacher.values()}
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())


def test_training__teacher_has_no_gradients_and_no_optimizer() -> None:
    model = dino()
    modes: list[tuple[bool, bool]] = []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            assert all(p.grad is None for p in pl_module.teacher.parameters())
            modes.append(
                (
                    any(m.training for m in pl_module.teacher.modules()),
                    all(m.training for m in pl_module.student.modules()),
                )
            )

    fit = trainer(max_steps=2, callbacks=[Watch()])
    fit.fit(model, datamodule=digits())
    assert modes == [(False, True)] * 2
    held = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.student.parameters() if p.requires_grad}


def test_drop_path__in_the_student_only() -> None:
    model = dino(drop_path_rate=0.9).train()
    images = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        for parameter in model.parameters():  # blocks start near zero: make them matter
            parameter.add_(0.1 * torch.randn_like(parameter))
        student = [model.student["backbone"](images) for _ in range(2)]
        teacher = [model.teacher["backbone"](images) for _ in range(2)]
    assert not torch.equal(*student)
    assert torch.equal(*teacher)


def test_forward__is_the_teachers_backbone() -> None:
    model = dino()
    nn.init.zeros_(model.student["backbone"].norm.weight)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images), model.teacher["backbone"](images))
    assert not torch.equal(model(images), model.student["backbone"](images))


def test_freeze_last_layer__prototypes_change_only_afterwards() -> None:
    model = dino(freeze_last_layer="2 steps", lr_warmup=0)
    gradients: list[bool] = []
    layers = [last_layer(model.student)]

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            gradients.append(pl_module.student["head"].last_layer.weight_v.grad is not None)
            layers.append(last_layer(pl_module.student))

    trainer(max_epochs=1, callbacks=[Watch()]).fit(model, datamodule=digits())
    assert gradients == [False, False, True, True]
    assert torch.equal(layers[0], layers[1])
    assert torch.equal(layers[0], layers[2])
    assert not torch.equal(layers[2], layers[3])
    assert not torch.equal(last_layer(model.teacher), layers[0])


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_norm_last_layer__keeps_the_length_of_prototypes(norm_last_layer: bool) -> None:
    model = dino(norm_last_layer=norm_last_layer, lr_warmup=0)
    trainer(max_steps=2).fit(model, datamodule=digits())
    gain = model.student["head"].last_layer.weight_g
    assert torch.equal(gain, torch.ones_like(gain)) == norm_last_layer


def test_accumulation__schedules_and_teacher_count_optimizer_steps() -> None:
    model = dino(lr_warmup=0, freeze_last_layer="1 epoch")
    recorder = Recorder()
    fit = trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=[recorder])
    fit.fit(model, datamodule=digits())
    assert fit.global_step == 4
    assert model.distillation.steps["total"] == 4
    assert model.distillation.steps["freeze_last_layer"] == 2
    assert model.distillation.global_batch_size == 16
    peak = 0.05 * 16 / 256
    for batch, values in enumerate(recorder.schedules):
        share = 0.5 * (1 + math.cos(math.pi * (batch // 2) / 4))
        assert values["lr"] == pytest.approx(1e-6 + (peak - 1e-6) * share)
        assert values["teacher_momentum"] == pytest.approx(1.0 + (0.9 - 1.0) * share)
    name = "head.layers.0.weight"
    start = dino().teacher.state_dict()[name]
    for batch, (values, now) in enumerate(zip(recorder.schedules, recorder.states, strict=True)):
        before = start if batch == 0 else recorder.states[batch - 1][f"teacher.{name}"]
        if batch % 2 == 0:  # accumulates only
            assert torch.equal(now[f"teacher.{name}"], before)
        else:
            momentum = values["teacher_momentum"]
            expected = before * momentum + now[f"student.{name}"] * (1 - momentum)
            torch.testing.assert_close(now[f"teacher.{name}"], expected, rtol=1e-6, atol=1e-8)
            assert not torch.equal(now[f"teacher.{name}"], before)


def test_optimizer__groups_and_their_scheduled_values() -> None:
    model = dino(weight_decay=0.1, final_weight_decay=0.3, lr_warmup="3 steps")
    recorder = Recorder()
    fit = trainer(max_epochs=1, callbacks=[recorder])
    fit.fit(model, datamodule=digits())
    names = {id(parameter): name for name, parameter in model.student.named_parameters()}
    groups = {group["name"]: group for group in fit.optimizers[0].param_groups}
    for parameter in groups["decay"]["params"]:
        name = names[id(parameter)]
        assert parameter.ndim > 1
        assert not name.endswith("bias")
        assert "pos_embed" not in name
    undecayed = {names[id(parameter)] for parameter in groups["no_decay"]["params"]}
    assert any("pos_embed" in name for name in undecayed)
    assert groups["no_decay"]["weight_decay"] == 0.0
    assert groups["decay"]["weight_decay"] == pytest.approx(recorder.schedules[-1]["weight_decay"])
    assert [values["weight_decay"] for values in recorder.schedules] == pytest.approx(
        [0.3 - 0.1 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    )
    peak = 0.05 * 8 / 256
    assert recorder.learning_rates == pytest.approx([0, peak / 2, peak, peak])


# --- diagnoses --------------------------------------------------------------------------------------------------------

HEALTHY = {"entropy_ratio": 0.5, "loss_ratio": 0.6, "feature_std": 0.7}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("uniform", {"entropy_ratio": 1.0, "loss_ratio": 1.0}),
        ("point", {"entropy_ratio": 0.0, "loss_ratio": 0.0}),
        ("features", {"feature_std": 0.01}),
    ],
)
def test_symptoms__reported_once_when_they_last(name: str, values: dict[str, float]) -> None:
    symptoms = CollapseWatch()
    reports = [symptoms.update(**{**HEALTHY, **values}) for _ in range(40)]
    assert reports == [None] * 9 + [_DIAGNOSES[name]] + [None] * 30


def test_symptoms__interruption_starts_the_count_again() -> None:
    symptoms = CollapseWatch()
    for _ in range(5):
        assert all(symptoms.update(**{**HEALTHY, "feature_std": 0.0}) is None for _ in range(9))
        assert symptoms.update(**HEALTHY) is None


def test_symptoms__healthy_run_is_never_diagnosed() -> None:
    symptoms = CollapseWatch()
    # Early in training teacher and loss are near ln K, but not both; late, a confident teacher has a low loss.
    for i in range(200):
        share = i / 199
        report = symptoms.update(
            entropy_ratio=0.98 - 0.95 * share, loss_ratio=1.05 - 0.9 * share, feature_std=0.2 + 0.6 * share
        )
        assert report is None


def test_training__uniform_collapse_is_named() -> None:
    model = dino(teacher_temp=1e4, warmup_teacher_temp=1e4, student_temp=1e4)
    with pytest.warns(UserWarning, match=r"Step \d+: Uniform collapse.*model\.teacher_temp"):
        trainer(max_epochs=3).fit(model, datamodule=digits())


def test_training__health_is_logged() -> None:
    model = dino()
    fit = trainer(max_epochs=1)
    fit.fit(model, datamodule=digits())
    logged = {name: float(value) for name, value in fit.logged_metrics.items()}
    assert logged["health/loss_over_ln_k"] == pytest.approx(logged["train/loss"] / math.log(24), rel=1e-5)
    assert logged["health/kl"] == pytest.approx(logged["train/loss"] - logged["health/teacher_entropy"], abs=1e-5)
    assert 0 < logged["health/teacher_entropy"] < math.log(24)
    assert 0 < logged["health/feature_std"] <= 1.01
    assert logged["train/grad_norm"] > 0


class Poison(L.Callback):
    """Breaks the student before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.student["head"].layers[0].weight.fill_(float("nan"))


def test_divergence__stops_the_run_and_names_remedies(tmp_path: Path) -> None:
    model = dino()
    fit = trainer(tmp_path, max_epochs=2, callbacks=[Poison(1)])
    with pytest.raises(
        RuntimeError, match=r"train/loss or the gradient is nan.*model\.base_lr.*model\.lr_warmup.*bf16-mixed"
    ):
        fit.fit(model, datamodule=digits())
    assert fit.global_step == 2  # at the beginning of the next step, not epochs later


def test_divergence__keeps_the_good_checkpoint(tmp_path: Path) -> None:
    # The loss turns NaN in the last step before a checkpoint is due.
    saving = ModelCheckpoint(tmp_path, filename="best", every_n_train_steps=2, enable_version_counter=False)
    fit = trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[Poison(3), saving])
    with pytest.raises(RuntimeError, match="diverged"):
        fit.fit(dino(), datamodule=digits())
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert all(bool(torch.isfinite(value).all()) for value in saved["state_dict"].values())


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_errors__no_views() -> None:
    data = digits()
    data.train_transform = None
    with pytest.raises(ConfigError, match=r"data\.train_transform.*MultiCrop"):
        trainer(max_steps=4).fit(dino(), datamodule=data)


@pytest.mark.parametrize(
    ("sizes", "key"), [((16, 12), "local_size=12"), ((20, 8), "global_size=20")], ids=["local", "global"]
)
def test_errors__view_size_not_divisible_by_the_patch(sizes: tuple[int, int], key: str) -> None:
    data = digits()
    data.train_transform = MultiCrop(*sizes, 2)
    with pytest.raises(ConfigError, match=rf"data\.train_transform\.{key} does not fit the backbone"):
        trainer(max_steps=4).fit(dino(), datamodule=data)


@pytest.mark.parametrize("key", ["lr_warmup", "teacher_temp_warmup", "freeze_last_layer"])
def test_errors__duration_longer_than_the_run(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{key}='3 epochs' is 12 steps, but the run has 8"):
        trainer(max_epochs=2).fit(dino(**{key: "3 epochs"}), datamodule=digits())


def test_errors__run_without_an_end() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_epochs"):
        trainer(max_epochs=-1).fit(dino(), datamodule=digits())


def test_errors__scores_that_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 4 * 8 * 24 * (3 * 4 + 4)
    monkeypatch.setattr(self_distillation, "available_memory", lambda device: needed - 1)
    with pytest.raises(ConfigError, match=r"data\.batch_size=8 and model\.num_prototypes=24.*Reduce"):
        trainer(max_steps=4).fit(dino(), datamodule=digits())
    monkeypatch.setattr(self_distillation, "available_memory", lambda device: needed)
    trainer(max_steps=2).fit(dino(), datamodule=digits())


def test_errors__unknown_backbone_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"model\.backbone\.name='vil2_tiny_patch61_224'.*vil2_tiny_patch16_224"):
        DINO(BackboneConfig("vil2_tiny_patch61_224"))


def test_errors__argument_the_backbone_refuses() -> None:
    with pytest.raises(ConfigError, match=r"vil2_tiny_patch16_224 cannot be built with kwargs=.*no_such"):
        DINO(BackboneConfig("vil2_tiny_patch16_224", None, {**SMALL, "no_such": 1}))


def test_errors__neither_name_nor_weights() -> None:
    with pytest.raises(ConfigError, match=r"model\.backbone\.name is not set"):
        DINO(BackboneConfig())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("student_temp", 0.0),
        ("teacher_temp", -1.0),
        ("base_lr", 0.0),
        ("teacher_momentum", 1.1),
        ("center_momentum", -0.1),
    ],
)
def test_errors__values_out_of_range(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{key}={value} must be"):
        DINO(backbone(), **{key: value})


def test_configure_optimizers__length_given_in_steps_alone() -> None:
    model = dino(freeze_last_layer="1 epoch")
    fit = trainer(max_steps=6)
    fit.fit(model, datamodule=digits())
    assert fit.global_step == 6
    assert model.distillation.steps == {"lr_warmup": 2, "teacher_temp_warmup": 0, "freeze_last_layer": 4, "total": 6}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("scaler", [None, object()], ids=["bf16 or float32", "with a gradient scaler"])
def test_optimizer__is_fused_unless_gradients_are_scaled(
    scaler: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With a scaler, fused AdamW would unscale inside step(), after the gradients were clipped. Without one, it must not say
    # that it unscales: Lightning would refuse to clip.
    seen: dict[str, Any] = {}

    def make(groups: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return SimpleNamespace(_step_supports_amp_scaling=True)

    monkeypatch.setattr(torch.optim, "AdamW", make)
    stub = SimpleNamespace(
        trainer=SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler)), device=torch.device(device)
    )
    optimizer = adamw(stub, torch.nn.Linear(2, 2), lr=0.1, weight_decay=0.0)  # type: ignore[arg-type]
    assert not optimizer._step_supports_amp_scaling
    assert seen["fused"] is (True if scaler is None else None)
