"""Distillation: what is compared, and how, against formulas and a loop by hand; the frozen teacher; what a run of it needs."""

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import timm
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from test_mae import CONFIGS, SMALL, VIT, flat, images
from test_resume import same
from test_supervised import rate_by_hand
from tiny import VIL, FewDigits, Steps, digits, pictures, run_in_two_processes, state, trainer
from torch import Tensor, nn

from vil_lightning.data import TrainTransform
from vil_lightning.errors import ConfigError
from vil_lightning.methods import BackboneConfig, LinearProbe, Supervised
from vil_lightning.methods.backbone import weights_hash
from vil_lightning.methods.distillation import Distillation, align, encode, feature_loss, whiten
from vil_lightning.methods.randomness import seed_step

VIT_NAME = "vit_tiny_patch16_224"
# Student and teacher of one architecture: should one be taken for the other, no shape would tell.
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vil": (VIL, SMALL),
    "vit": (
        VIT_NAME,
        {**VIT, "patch_size": 2, "embed_dim": 48, "num_heads": 3, "reg_tokens": 2, "drop_path_rate": 0.9},
    ),
    "convnet": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 40), "drop_path_rate": 0.9}),
}


def write_teacher(folder: Path, kind: str, seed: int = 9) -> str:
    """A checkpoint like that of a DINO run."""
    path = folder / f"{kind}{seed}.ckpt"
    if not path.is_file():
        torch.manual_seed(seed)
        name, kwargs = TEACHERS[kind]
        network = timm.create_model(name, num_classes=0, **kwargs)
        for parameter in network.parameters():  # also what starts at zero, such as the gamma of a block
            parameter.data += 0.02 * torch.randn_like(parameter)
        weights = {f"teacher.backbone.{name}": value for name, value in network.state_dict().items()}
        torch.save({"state_dict": weights, "backbone": {"name": name, "kwargs": kwargs}}, path)
    return str(path)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    for kind in TEACHERS:
        write_teacher(folder, kind)
    return folder


def distillation(
    teacher: str, kind: type[Distillation] = Distillation, name: str = VIL, backbone: Any = None, **kwargs: Any
) -> Distillation:
    torch.manual_seed(1)
    settings: dict[str, Any] = {"base_lr": 0.1, "lr_warmup": "2 steps", "final_lr": 1e-4}
    student = BackboneConfig(name, None, {**SMALL, **(backbone or {})})
    return kind(student, BackboneConfig(None, teacher), **{**settings, **kwargs})


class Quiet(Distillation):
    """For a step without a run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logged: dict[str, float] = {}
        self.trainer = trainer()
        self.trainer.datamodule = pictures()  # type: ignore[attr-defined]
        self.optimisation.lr_at = lambda module: 0.0  # type: ignore[method-assign,assignment]
        self.setup("fit")

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self.logged[name] = float(value.detach())

    def log_dict(self, values: Any, *args: Any, **kwargs: Any) -> None:
        self.logged |= {name: float(value.detach()) for name, value in values.items()}


# --- formulas, in float64 ---------------------------------------------------------------------------------------------


def triangle(distance: float) -> float:
    return max(0.0, 1 - abs(distance))


def cubic(distance: float, a: float = -0.5) -> float:
    d = abs(distance)
    if d < 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def resampling(old: int, new: int, kernel: Callable[[float], float]) -> Tensor:
    """Matrix (new, old): values between the centres of cells, averaged over a wider kernel where cells are lost."""
    rows, scale = [], max(old / new, 1.0)
    for i in range(new):
        centre = (i + 0.5) * old / new
        row = torch.tensor([kernel((j + 0.5 - centre) / scale) for j in range(old)], dtype=torch.float64)
        rows.append(row / row.sum())
    return torch.stack(rows)


def whitened(vector: Tensor) -> Tensor:
    mean = vector.sum() / len(vector)
    return (vector - mean) / ((vector - mean).pow(2).sum() / len(vector) + 1e-5).sqrt()


def vector_loss(kind: str, prediction: Tensor, target: Tensor) -> Tensor:
    """Of one vector and its whitened target."""
    if kind == "cosine":
        return 1 - (prediction * target).sum() / (prediction.pow(2).sum() * target.pow(2).sum()).sqrt()
    d = (prediction - target).abs()
    return torch.where(d < 2, d * d / 4, d - 1).sum() / len(d)


def loss_by_hand(
    kind: str, prediction: Tensor, target: Tensor, grid: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss, mean cosine, and that of the mean target; of (B, D), or of (B, h, w, D) and the teacher's (B, h', w', D)."""
    prediction, target = prediction.double(), target.double()
    if grid is not None:
        down, right = (resampling(old, new, triangle) for old, new in zip(target.shape[1:3], grid, strict=True))
        target = torch.einsum("ij,bjkd,lk->bild", down, target, right)
    pairs = [(p, whitened(t)) for p, t in zip(prediction.flatten(0, -2), target.flatten(0, -2), strict=True)]
    losses = [vector_loss(kind, p, t) for p, t in pairs]
    cosines = [1 - vector_loss("cosine", p, t) for p, t in pairs]
    constant = torch.stack([t for _, t in pairs]).mean(0)
    constants = [1 - vector_loss("cosine", constant, t) for _, t in pairs]
    return torch.stack(losses).mean(), torch.stack(cosines).mean(), torch.stack(constants).mean()


@pytest.mark.parametrize(("old", "new"), [((16, 16), (14, 14)), ((4, 4), (2, 2)), ((3, 5), (5, 4)), ((1, 1), (3, 2))])
def test_align__bilinear_between_centres_and_averaging_where_it_shrinks(
    old: tuple[int, int], new: tuple[int, int]
) -> None:
    tokens = torch.randn(2, *old, 6, dtype=torch.float64)
    down, right = (resampling(o, n, triangle) for o, n in zip(old, new, strict=True))
    expected = torch.einsum("ij,bjkd,lk->bild", down, tokens, right)
    torch.testing.assert_close(align(tokens, new), expected, rtol=1e-12, atol=1e-12)
    interpolated = nn.functional.interpolate(tokens.permute(0, 3, 1, 2), new, mode="bilinear", antialias=True)
    torch.testing.assert_close(align(tokens, new), interpolated.permute(0, 2, 3, 1), rtol=1e-9, atol=1e-9)


def test_align__an_easy_case_and_equal_grids() -> None:
    tokens = torch.arange(6, dtype=torch.float64).view(1, 1, 6, 1)
    # Away from the edges a straight line stays one, at the centres of the three new cells.
    assert align(tokens, (1, 3))[0, 0, 1, 0] == pytest.approx(2.5, rel=1e-12)
    assert align(torch.tensor([0.0, 4.0]).view(1, 2, 1, 1), (4, 1)).flatten().tolist() == [0.0, 1.0, 3.0, 4.0]
    assert align(tokens, (1, 6)) is tokens


def test_whiten__every_vector_on_its_own() -> None:
    vectors = 3 * torch.randn(2, 3, 4, 10, dtype=torch.float64) + torch.randn(2, 3, 4, 1, dtype=torch.float64)
    actual = whiten(vectors)
    for mine, vector in zip(actual.flatten(0, 2), vectors.flatten(0, 2), strict=True):
        torch.testing.assert_close(mine, whitened(vector), rtol=1e-12, atol=1e-12)
    assert whiten(torch.ones(3, 5)).abs().max() == 0


@pytest.mark.parametrize("kind", ["smooth_l1", "cosine"])
def test_feature_loss__by_definition(kind: str) -> None:
    prediction, target = 3 * torch.randn(4, 2, 3, 7, dtype=torch.float64), torch.randn(4, 2, 3, 7, dtype=torch.float64)
    assert ((prediction - target).abs() > 2).any()
    pairs = zip(prediction.flatten(0, 2), target.flatten(0, 2), strict=True)
    expected = torch.stack([vector_loss(kind, p, t) for p, t in pairs]).mean()
    torch.testing.assert_close(feature_loss(kind, prediction, target), expected, rtol=1e-12, atol=0)


# --- any two networks -------------------------------------------------------------------------------------------------

NETWORKS: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    (VIL, {**SMALL, "patch_size": (2, 8)}, (8, 2)),  # no square, though it could be one
    (VIL, {**SMALL, "stride": 2, "global_pool": "middle_cls"}, (7, 7)),
    ("vim_tiny_patch16_224", SMALL, (4, 4)),
    (VIT_NAME, {**VIT, "reg_tokens": 3}, (4, 4)),
    (VIT_NAME, {**VIT, "patch_size": 8, "global_pool": "avg", "class_token": False}, (2, 2)),
    ("vit_small_patch16_dinov3", {**SMALL, "num_heads": 2}, (4, 4)),
    (*TEACHERS["convnet"], (2, 3)),
    ("resnet10t", {"output_stride": 8}, (2, 2)),
    ("swin_tiny_patch4_window7_224", {"img_size": 16, "embed_dim": 24, "depths": (1, 1), "num_heads": (1, 1)}, (2, 2)),
]


@pytest.mark.parametrize(("name", "kwargs", "grid"), NETWORKS, ids=lambda value: str(value)[:40])
def test_encode__every_patch_at_its_place_beside_the_pooled_vector(
    name: str, kwargs: dict[str, Any], grid: tuple[int, int]
) -> None:
    network = timm.create_model(name, num_classes=0, **kwargs).eval()
    x = images(64, 96, batch=2) if name.startswith("convnext") else images(batch=2)
    with torch.no_grad():
        results, tokens = encode(network, x, ("image", "patch")), network.forward_features(x)
        torch.testing.assert_close(results["image"], network(x))
    assert results["patch"].shape == (2, *grid, network.num_features)
    if name == VIL and kwargs.get("global_pool"):  # with a class token in the middle
        tokens = torch.cat([tokens[:, :25], tokens[:, 26:]], dim=1)
    elif name.startswith("vim"):
        tokens = torch.cat([tokens[:, :8], tokens[:, 9:]], dim=1)
    for i in range(grid[0]):
        for j in range(grid[1]):
            if tokens.ndim == 3:
                expected = tokens[:, tokens.shape[1] - grid[0] * grid[1] + i * grid[1] + j]
            else:
                expected = tokens[:, i, j] if name.startswith("swin") else tokens[:, :, i, j]
            assert torch.equal(results["patch"][:, i, j], expected)
    assert encode(network, x, ("image",)).keys() == {"image"}


def test_teacher_view__size_mean_and_deviation(teachers: Path) -> None:
    mean, std = (0.2, 0.3, 0.4), (0.5, 0.25, 0.3)
    x = images(16, 16)
    assert distillation(str(teachers / "vit9.ckpt"), Quiet).teacher_view(x) is x
    model = distillation(str(teachers / "vit9.ckpt"), Quiet, teacher_mean=mean, teacher_std=std)
    pixels = x.double() * 0.376 + 0.305  # what mean and std of the digits stand for
    to_teacher = lambda p: (p - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)  # noqa: E731
    torch.testing.assert_close(model.teacher_view(x).double(), to_teacher(pixels), rtol=1e-5, atol=1e-5)
    for size in (12, 24):
        model.teacher_img_size = size
        matrix = resampling(16, size, cubic)
        resized = torch.einsum("ij,bcjk,lk->bcil", matrix, pixels, matrix)
        assert resized.min() < 0
        assert resized.max() > 1
        expected = to_teacher(resized.clamp(0, 1))
        torch.testing.assert_close(model.teacher_view(x).double(), expected, rtol=1e-5, atol=2e-5)
    model.teacher_norm = model.data_norm
    torch.testing.assert_close(model.teacher_view(x).double(), (resized.clamp(0, 1) - 0.305) / 0.376, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["smooth_l1", "cosine"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 3.0), (1.0, 0.0), (0.0, 2.0)], ids=str)
@pytest.mark.parametrize("teacher", ["vit", "convnet"])
def test_training_step__loss_by_hand(teachers: Path, teacher: str, weights: tuple[float, float], kind: str) -> None:
    name, kwargs = TEACHERS[teacher]
    settings = {"loss": kind, "image_weight": weights[0], "patch_weight": weights[1], "teacher_std": (0.5, 0.4, 0.3)}
    settings |= {"teacher_img_size": 64} if teacher == "convnet" else {}  # 2 x 2
    model, x = distillation(str(teachers / f"{teacher}9.ckpt"), Quiet, head_hidden_dim=20, **settings).train(), images()
    loss = model.training_step((x, torch.zeros(3)), 0)

    network = timm.create_model(name, num_classes=0, **kwargs).eval()
    content = torch.load(teachers / f"{teacher}9.ckpt", weights_only=True)["state_dict"]
    network.load_state_dict({key.removeprefix("teacher.backbone."): value for key, value in content.items()})
    with torch.no_grad():
        features = network.forward_features(model.teacher_view(x))
        pooled = network.forward_head(features)
    maps = features[:, 3:].unflatten(1, (8, 8)) if teacher == "vit" else features.permute(0, 2, 3, 1)
    assert maps.shape[1] == (8 if teacher == "vit" else 2)
    tokens = model.backbone.forward_features(x)
    expected = torch.zeros(())
    for part, weight, mine, taught, grid in (
        ("image", weights[0], model.backbone.forward_head(tokens), pooled, None),
        ("patch", weights[1], tokens.unflatten(1, (4, 4)), maps, (4, 4)),
    ):
        assert (part in model.heads) == (f"train/loss_{part}" in model.logged) == (weight > 0)
        if weight > 0:
            first, norm, _, second = model.heads[part]
            prediction = second(nn.functional.gelu(norm(first(mine))))
            part_loss, cosine, constant = loss_by_hand(kind, prediction, taught, grid)
            assert model.logged[f"train/loss_{part}"] == pytest.approx(part_loss.item(), rel=1e-5)
            assert model.logged[f"health/cosine_{part}"] == pytest.approx(cosine.item(), abs=1e-6)
            assert model.logged[f"health/cosine_constant_{part}"] == pytest.approx(constant.item(), abs=1e-6)
            expected = expected + weight * part_loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert model.logged["train/loss"] == loss.item()


# --- runs -------------------------------------------------------------------------------------------------------------


class Watch(Steps):
    """Also looks at the teacher after every batch, and at which trained parameters have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.teachers: list[str] = []
        self.missing: list[str] = []

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.missing += [n for n, p in pl_module.named_parameters() if p.requires_grad and p.grad is None]
        assert all(p.grad is None for p in pl_module.target.parameters())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.teachers.append(weights_hash(pl_module.target))
        assert not any(module.training for module in pl_module.target.modules())
        assert all(module.training for module in pl_module.backbone.modules())


@pytest.mark.parametrize("kind", ["smooth_l1", "cosine"])
def test_fit__equals_a_loop_by_hand(teachers: Path, tmp_path: Path, kind: str) -> None:
    steps, decay, path = Watch(), 0.1, str(teachers / "vit9.ckpt")
    settings = {"weight_decay": decay, "loss": kind, "patch_weight": 2.0, "backbone": {"drop_path_rate": 0.2}}
    model = distillation(path, **settings)
    before = weights_hash(model.target)
    fit = trainer(tmp_path, max_epochs=1, limit_train_batches=3, callbacks=[steps], gradient_clip_val=0.5)
    fit.fit(model, datamodule=pictures())
    peak = 0.1 * 8 / 256
    assert (fit.global_step, model.optimisation.peak_lr) == (3, pytest.approx(peak, rel=1e-12))
    assert steps.teachers == [before] * 3

    network = distillation(path, **settings).train()
    groups = []
    for name, parameter in [*network.backbone.named_parameters(), *network.heads.named_parameters()]:
        free = parameter.ndim <= 1 or name.endswith((".bias", "pos_embed.embed"))
        groups.append({"params": [parameter], "weight_decay": 0.0 if free else decay})
    assert sum(map(len, steps.rates)) == 3 * len(groups)
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.999))
    for number, (x, _) in enumerate(steps.batches):
        seed_step(SimpleNamespace(current_epoch=0, global_rank=0), number)  # type: ignore[arg-type]
        tokens = network.backbone.forward_features(x)
        image, patch = network.heads["image"], network.heads["patch"]
        pooled = network.backbone.forward_head(tokens) @ image.weight.T + image.bias
        predicted = tokens.unflatten(1, (4, 4)) @ patch.weight.T + patch.bias
        with torch.no_grad():
            taught = network.target.forward_features(x)
        loss, _, _ = loss_by_hand(kind, pooled, taught[:, 0])
        loss = loss + 2 * loss_by_hand(kind, predicted, taught[:, 3:].unflatten(1, (8, 8)), (4, 4))[0]
        assert steps.losses[number] == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate_by_hand(number + 1, 3, 2, peak, 1e-4)
            assert group["lr"] == pytest.approx(next(iter(steps.rates[number].values())), rel=1e-9)
        optimizer.step()
        optimizer.zero_grad()
        for name, value in network.state_dict().items():
            off = (steps.states[number][name] - value).abs()
            # AdamW makes steps of what rounding leaves of a gradient next to nothing: a few numbers may be off.
            wrong = int((off > 2e-6 + 1e-4 * value.abs()).sum())
            assert wrong <= max(1, value.numel() // 500), f"{name} after step {number}: {wrong} of {value.numel()}"
    start = distillation(path, **settings).state_dict()
    assert min(float((value - start[n]).abs().max()) for n, value in state(model).items() if "gate" not in n) > 1e-4
    assert float(fit.callback_metrics["train/grad_norm"]) == pytest.approx(norm.item(), rel=1e-4)
    logged = {"train/loss", "train/loss_image", "train/loss_patch", "train/grad_norm", "schedule/lr"}
    assert logged | {"health/cosine_image", "health/cosine_patch"} <= set(fit.callback_metrics)


@pytest.mark.parametrize(
    ("teacher", "name", "backbone", "kwargs"),
    [
        ("vil", VIL, {}, {"image_weight": 0.0}),
        ("vit", VIL, {"patch_size": 8}, {"patch_weight": 0.0}),
        ("convnet", VIL, {"stride": 2}, {"teacher_img_size": 64, "head_hidden_dim": 8, "loss": "cosine"}),
        ("vil", VIT_NAME, {**VIT, "patch_size": 8}, {"image_weight": 0.0}),
        ("vil", VIT_NAME, {**VIT, "global_pool": "avg"}, {"image_weight": 0.0}),
        ("vit", VIT_NAME, VIT, {"patch_weight": 0.0}),
    ],
    ids=str,
)
def test_fit__any_pair_and_every_trained_parameter_has_a_gradient(
    teachers: Path, tmp_path: Path, teacher: str, name: str, backbone: dict[str, Any], kwargs: dict[str, Any]
) -> None:
    """DDP would wait for one that has none."""
    steps, model = Watch(), distillation(str(teachers / f"{teacher}9.ckpt"), name=name, backbone=backbone, **kwargs)
    trainer(tmp_path, max_steps=2, max_epochs=1, callbacks=[steps]).fit(model, datamodule=pictures())
    assert len(steps.losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in steps.losses)
    assert steps.missing == []


def test_fit__a_convolutional_student(teachers: Path, tmp_path: Path) -> None:
    """Its batch norm does not see the empty image that is tried before the run."""

    class Start(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            self.mean = pl_module.backbone.bn1.running_mean.clone()

    start, steps = Start(), Watch()
    torch.manual_seed(1)
    model = Distillation(BackboneConfig("resnet10t"), BackboneConfig(None, str(teachers / "vit9.ckpt")), lr_warmup=0)
    trainer(tmp_path, max_steps=2, max_epochs=1, callbacks=[start, steps]).fit(model, datamodule=pictures())
    assert start.mean.abs().max() == 0
    assert model.backbone.bn1.running_mean.abs().max() > 0
    assert model.grids == {"student": (1, 1), "teacher": (8, 8)}
    assert steps.missing == []


def test_fit__overfits_one_batch(teachers: Path, tmp_path: Path) -> None:
    class Eight(FewDigits):
        num_train = 8

    steps, model = Watch(), distillation(str(teachers / "vit9.ckpt"), final_lr=1e-3)
    trainer(tmp_path, max_epochs=30, callbacks=[steps]).fit(model, datamodule=pictures(data=Eight))
    assert steps.losses[-1] < 0.5 * steps.losses[0]


def test_fit__bf16(teachers: Path, tmp_path: Path) -> None:
    def run(precision: str) -> tuple[Distillation, list[float]]:
        steps, model = Steps(), distillation(str(teachers / "vit9.ckpt"), teacher_img_size=12)
        trainer(tmp_path, max_steps=2, precision=precision, callbacks=[steps]).fit(model, datamodule=pictures())
        return model, steps.losses

    _, losses = run("32-true")
    model, rounded = run("bf16-mixed")
    assert rounded == pytest.approx(losses, rel=0.02)
    assert rounded != losses
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in state(model).values())
    _, coarse = run("bf16-true")
    assert coarse == pytest.approx(losses, rel=0.05)


def test_compile__equals_eager(teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(compile: bool) -> list[float]:
        steps, model = (
            Steps(),
            distillation(str(teachers / "vit9.ckpt"), compile=compile, lr_warmup=0, backbone={"depth": 1}),
        )
        trainer(tmp_path, max_steps=1, callbacks=[steps]).fit(model, datamodule=pictures())
        return steps.losses

    compiled = []
    with_backend = functools.partial(torch.compile, backend="eager")  # the default needs a C++ compiler, and a minute
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or with_backend(function))
    losses = run(False)
    assert compiled == []
    assert run(True) == pytest.approx(losses, rel=1e-5)
    assert compiled == [encode]


# --- resuming and checkpoints -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(teachers: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Steps, dict[str, Tensor]]:
    """An uninterrupted run with a checkpoint after each of its 8 steps; student and teacher are of one architecture."""
    path = tmp_path_factory.mktemp("straight")
    return path, *resumable(teachers, path, None)


def resumable(teachers: Path, path: Path, ckpt_path: Path | None) -> tuple[Steps, dict[str, Tensor]]:
    steps, model = Watch(), distillation(str(teachers / "vil9.ckpt"), backbone={"drop_path_rate": 0.3})
    every = ModelCheckpoint(path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit = trainer(path, max_epochs=2, callbacks=[steps, every], enable_checkpointing=True)
    fit.fit(model, datamodule=pictures(), ckpt_path=ckpt_path, weights_only=True)
    assert fit.global_step == 8
    return steps, {**state(model), **flat(fit.optimizers[0].state_dict()["state"])}


@pytest.mark.parametrize("done", [3, 4], ids=["mid-epoch", "boundary"])
def test_resume__ends_in_the_same_state(
    teachers: Path, straight: tuple[Path, Steps, dict[str, Tensor]], tmp_path: Path, done: int
) -> None:
    path, recorded, whole = straight
    torch.manual_seed(12345)
    resumed, end = resumable(teachers, tmp_path, path / f"step={done}.ckpt")
    assert same(resumed.batches, recorded.batches[done:])
    assert resumed.losses == recorded.losses[done:]
    assert same(end, whole)
    assert resumed.teachers == recorded.teachers[done:]  # type: ignore[attr-defined]


def test_resume__refuses_another_teacher(
    teachers: Path, straight: tuple[Path, Steps, dict[str, Tensor]], tmp_path: Path
) -> None:
    def resume(teacher: str = "vil9", **kwargs: Any) -> None:
        model = distillation(str(tmp_path / f"{teacher}.ckpt"), backbone={"drop_path_rate": 0.3}, **kwargs)
        trainer(tmp_path, max_epochs=2).fit(model, datamodule=pictures(), ckpt_path=straight[0] / "step=7.ckpt")

    for kind, seed in (("vil", 9), ("vil", 10), ("vit", 9)):
        write_teacher(tmp_path, kind, seed)
    resume()  # a copy of the same file at another place will do
    with pytest.raises(ConfigError, match=r"another teacher: its sha256 was .*model\.teacher\.weights"):
        resume("vil10")
    with pytest.raises(ConfigError, match=r"another teacher: its name was vil2_tiny_patch16_224, but is vit_tiny"):
        resume("vit9")
    with pytest.raises(ConfigError, match=r"another teacher: its img_size was None, but is 12"):
        resume(teacher_img_size=12)
    with pytest.raises(ConfigError, match=r"another teacher: its mean was \[0\.305, .*but is \[0\.5, "):
        resume(teacher_mean=(0.5, 0.5, 0.5))
    for settings in ({"head_hidden_dim": 8}, {"image_weight": 0.0}):
        with pytest.raises(ConfigError, match=r"checkpoint's heads are .*model\.head_hidden_dim"):
            resume(**settings)


def test_resume__still_misses_what_belongs_to_the_student(
    teachers: Path, straight: tuple[Path, Steps, dict[str, Tensor]]
) -> None:
    saved = torch.load(straight[0] / "step=8.ckpt", weights_only=True)["state_dict"]
    model = distillation(str(teachers / "vil9.ckpt"))
    assert model.load_state_dict(saved).missing_keys == []
    del saved["backbone.norm.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*backbone\.norm\.weight"):
        model.load_state_dict(saved)


def test_checkpoint__holds_the_student_alone(
    teachers: Path, straight: tuple[Path, Steps, dict[str, Tensor]], tmp_path: Path
) -> None:
    path = str(straight[0] / "step=8.ckpt")
    content = torch.load(path, weights_only=True)
    assert {name.split(".")[0] for name in content["state_dict"]} == {"backbone", "heads"}
    assert content["backbone"] == {"name": VIL, "kwargs": {**SMALL, "drop_path_rate": 0.3}}
    teacher, kwargs = content["teacher"], {"name": VIL, "kwargs": SMALL}
    assert teacher == {**kwargs, "sha256": teacher["sha256"], "img_size": None, "mean": [0.305] * 3, "std": [0.376] * 3}

    student = {n.removeprefix("backbone."): v for n, v in straight[2].items() if n.startswith("backbone.")}
    teacher_weights = torch.load(teachers / "vil9.ckpt", weights_only=True)["state_dict"]
    tuned, steps = Supervised(BackboneConfig(None, path), new_head=True, lr_warmup=0), Steps()
    trainer(tmp_path, max_steps=1, max_epochs=1, callbacks=[steps]).fit(tuned, datamodule=pictures())
    again = Distillation(BackboneConfig(None, path), BackboneConfig(None, path))  # a student can teach
    for network in (steps.start, LinearProbe(BackboneConfig(None, path)).backbone, again.backbone, again.target):
        loaded = {n: v for n, v in state(network).items() if not n.startswith("head.")}
        assert same(loaded, student)
        name = "blocks.0.mixer.proj_up.weight"
        assert not torch.equal(loaded[name], teacher_weights[f"teacher.backbone.{name}"])


# --- two processes ----------------------------------------------------------------------------------------------------


def train(world_size: int, out: Path) -> None:
    torch.set_num_threads(1)
    for name, settings in {"both": {"teacher_img_size": 12}, "patch": {"image_weight": 0.0, "loss": "cosine"}}.items():
        model = distillation(write_teacher(out, "vit"), lr_warmup=0, **settings)
        parallel = {"devices": world_size, "strategy": "ddp"} if world_size > 1 else {}
        fit = trainer(out, max_steps=3, max_epochs=1, **parallel)
        fit.fit(model, datamodule=pictures(8 // world_size))
        assert (fit.global_step, model.optimisation.global_batch_size) == (3, 8)
        torch.save(model.state_dict(), out / f"{name}_world{world_size}_rank{fit.global_rank}.pt")


@pytest.mark.timeout(300)
def test_ddp__two_processes_equal_one(tmp_path: Path) -> None:
    train(1, tmp_path)
    results = run_in_two_processes(__file__, "train", tmp_path, timeout=240)
    assert [code for code, _ in results] == [0, 0], "\n".join(error for _, error in results)
    start = distillation(write_teacher(tmp_path, "vit")).state_dict()
    for name in ("both", "patch"):
        one = torch.load(tmp_path / f"{name}_world1_rank0.pt", weights_only=True)
        two, other = (torch.load(tmp_path / f"{name}_world2_rank{rank}.pt", weights_only=True) for rank in range(2))
        assert same(two, other), f"{name} differs between the processes"
        for key, expected in one.items():
            torch.testing.assert_close(two[key], expected, rtol=1e-4, atol=1e-5, msg=f"{name} {key}")
        assert max(float((one[key] - start[key]).abs().max()) for key in one) > 1e-3


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_weight": -1.0}, r"model\.image_weight=-1\.0"),
        ({"image_weight": 0.0, "patch_weight": 0.0}, r"model\.patch_weight=0\.0 .*nor both 0"),
        ({"head_hidden_dim": 0}, r"model\.head_hidden_dim=0 must be at least 1"),
        ({"teacher_img_size": 0}, r"model\.teacher_img_size=0 must be at least 1"),
        ({"teacher_std": (0.1, 0.0, 0.1)}, r"model\.teacher_std=\[0\.1, 0\.0, 0\.1\] must be positive"),
        ({"base_lr": 0.0}, r"model\.base_lr=0\.0 must be positive"),
    ],
    ids=str,
)
def test_settings__are_named(teachers: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        distillation(str(teachers / "vit9.ckpt"), **settings)


def test_settings__teacher(teachers: Path) -> None:
    student = BackboneConfig(VIL, None, SMALL)
    for teacher, message in (
        (
            BackboneConfig(VIL, None, SMALL),
            r"model\.teacher\.weights is not set, and an untrained vil2_tiny_patch16_224 has",
        ),
        (BackboneConfig(), r"untrained network has nothing to teach.*model\.teacher\.kwargs\.pretrained: true"),
        (BackboneConfig(VIL, None, {**SMALL, "pretrained": False}), r"model\.teacher\.weights is not set"),
        (
            BackboneConfig(None, "checkpoints/pretrain_dino/last.ckpt"),
            r"model\.teacher\.weights: no weights file at checkpoints/pretrain_dino/last\.ckpt\. Train the teacher first: "
            r"python main\.py fit --config configs/pretrain_dino\.yaml$",
        ),
        (BackboneConfig(VIL, "weights/vil.th"), r"model\.teacher\.weights: no weights file at weights/vil\.th\.$"),
        (BackboneConfig("vit_tinny_patch16_224", str(teachers / "vit9.ckpt")), r"model\.teacher\.name='vit_tinny"),
        (BackboneConfig(VIL, str(teachers / "vil9.ckpt"), {"depth": 3}), r"model\.teacher\.weights: .*does not fit"),
        (BackboneConfig(VIL, str(teachers / "vil9.ckpt"), {"pretrained": True}), r"model\.teacher\.kwargs\.pretrained"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            Distillation(student, teacher)
        assert "model.backbone" not in str(caught.value)


def test_settings__data_and_sizes(teachers: Path, tmp_path: Path) -> None:
    def run(teacher: BackboneConfig | str, data: Any = None, student: Any = None, **kwargs: Any) -> None:
        if isinstance(teacher, str):
            teacher = BackboneConfig(None, str(teachers / f"{teacher}9.ckpt"))
        model = Distillation(student or BackboneConfig(VIL, None, SMALL), teacher, lr_warmup=0, **kwargs)
        trainer(tmp_path, max_epochs=1, limit_train_batches=1).fit(model, datamodule=data or pictures())

    for data in (digits(), FewDigits(16, 8)):  # several views, and none at random
        with pytest.raises(
            ConfigError, match=r"data\.train_transform to a TrainTransform.*pretrain_distillation\.yaml"
        ):
            run("vit", data)
    fixed = BackboneConfig(VIL, None, {**SMALL, "dynamic_img_size": False, "img_size": 32})
    with pytest.raises(
        ConfigError, match=r"data\.train_transform\.img_size=16 does not fit the backbone.*model\.backbone"
    ):
        run("vit", student=fixed)
    fixed = BackboneConfig(None, str(teachers / "vit9.ckpt"), {"dynamic_img_size": False})
    with pytest.raises(
        ConfigError, match=r"model\.teacher_img_size=24 does not fit the teacher.*model\.teacher\.kwargs"
    ):
        run(fixed, teacher_img_size=24)
    fixed.kwargs["img_size"] = 24
    with pytest.raises(ConfigError, match=r"data\.train_transform\.img_size=16 does not fit the teacher"):
        run(fixed)
    run(fixed, teacher_img_size=24)
    # Its 17 tokens are 4 x 4 patches and a class token that it does not own up to.
    volo = BackboneConfig("volo_d1_224", None, {"img_size": 64})
    data = pictures(train_transform=TrainTransform(64, three_augment=False))
    with pytest.raises(
        ConfigError, match=r"model\.backbone: the 17 patch tokens of this VOLO .* 64 x 64 px fill no grid"
    ):
        run("vit", data, volo)
    several = timm.create_model("crossvit_9_240", num_classes=0)
    with pytest.raises(ConfigError, match=r"model\.backbone: CrossVit returns several feature maps"), torch.no_grad():
        encode(several, torch.zeros(1, 3, 240, 240), ("image",))


def test_reports__say_what_runs(teachers: Path, tmp_path: Path) -> None:
    model = distillation(str(teachers / "vit9.ckpt"), lr_warmup="1 step", image_weight=0.5, teacher_img_size=12)
    trainer(tmp_path, max_epochs=1, limit_train_batches=2).fit(model, datamodule=pictures())
    lines = model.run_info()
    assert lines["method"] == "distillation, smooth_l1 loss (image x 0.5, patch x 1), linear heads"
    assert lines["teacher"].startswith("vit_tiny_patch16_224 {'img_size': 16, 'patch_size': 2")
    assert lines["teacher"].endswith(f"weights {teachers / 'vit9.ckpt'}, 0.06 M parameters")
    assert lines["teacher's view"] == "12 px, mean (0.305, 0.305, 0.305), std (0.376, 0.376, 0.376)"
    assert lines["patch tokens"] == "student 4 x 4, teacher 6 x 6"
    assert lines["learning rate"] == "0.00313 = 0.1 x 8 / 256, to 0.0001"
    assert model(images()).shape == (3, 64)
    assert model.next_command("a.ckpt").endswith("configs/linear_probe.yaml --model.backbone.weights a.ckpt")


# --- recipes ----------------------------------------------------------------------------------------------------------


def recipe_of(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]:
    """Trainer, model and data of a recipe, and its global batch, of which the comments are right."""
    text = path.read_text()
    recipe = yaml.safe_load(text)
    fit, model, data = recipe["trainer"], recipe["model"]["init_args"], recipe["data"]["init_args"]
    per_micro_batch = data["batch_size"] * fit.get("devices", 1)
    batch = recipe.get("global_batch_size", per_micro_batch)
    accumulate = batch // per_micro_batch
    found = re.search(r"base_lr: \S+ +# x (\d+) / 256 = (\S+)", text)
    assert found is not None
    assert int(found[1]) == batch
    assert float(found[2]) == pytest.approx(model["base_lr"] * batch / 256)
    if path.parent.name == "imagenet":
        micro = f" x {accumulate} accumulated" if accumulate > 1 else ""
        assert f"# Batch:  {fit['devices']} GPUs x {data['batch_size']}{micro} = {batch}." in text
    view = TrainTransform(**data["train_transform"]["init_args"])
    assert view.img_size == data["img_size"]
    assert not view.three_augment
    assert not any(view.color_jitter)
    return fit, model, data, batch


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_recipe__has_the_official_numbers(size: str, tmp_path: Path) -> None:
    fit, model, data, batch = recipe_of(CONFIGS / f"imagenet/pretrain_distillation_vil2_{size}.yaml")
    assert (fit["max_epochs"], batch, fit["gradient_clip_val"]) == (100, 2048, 3.0)
    # Per 512 images, and scaled with the batch, there: 3e-4 and, at the end, 5e-6.
    assert (model["base_lr"], model["final_lr"]) == (3e-4 / 2, 5e-6 * batch / 512)
    assert (model["weight_decay"], model["betas"], model["lr_warmup"]) == (0.05, [0.9, 0.999], "10 epochs")
    view = data["train_transform"]["init_args"]
    assert (view["scale"], view["hflip_prob"]) == ([0.08, 1.0], 0.5)
    assert model["backbone"]["name"] == f"vil2_{size}_patch16_224"
    assert not {"loss", "head_hidden_dim", "image_weight", "patch_weight"} & model.keys()
    teacher = dict(model.pop("teacher"))
    assert teacher["kwargs"]["pretrained"]
    assert timm.is_model_pretrained(teacher["name"])

    # With one block, from a file instead of the network: the whole way of the weights, from 37 x 37 positions to 16 x 16.
    shallow = timm.create_model(teacher["name"].split(".")[0], num_classes=0, depth=1)
    torch.save(shallow.state_dict(), tmp_path / "teacher.pth")
    overlay = {"depth": 1, "pretrained_cfg_overlay": {"file": str(tmp_path / "teacher.pth")}}
    model["backbone"]["kwargs"] = {**model["backbone"].get("kwargs", {}), "depth": 2}
    config = BackboneConfig(teacher["name"], None, {**teacher["kwargs"], **overlay})
    built = Distillation(BackboneConfig(**model.pop("backbone")), config, **model)
    assert same(state(built.target), state(shallow))
    imagenet = pictures(1, train_transform=TrainTransform(**view), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    trainer(tmp_path, fast_dev_run=1).fit(built, datamodule=imagenet)
    assert built.grids == {"student": (14, 14), "teacher": (16, 16)}
    assert built.teacher_norm == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # its own, not that of the data
    assert "pretrained" not in str(built.teacher_record["kwargs"])


def test_recipe__of_the_digits(teachers: Path) -> None:
    text = (CONFIGS / "pretrain_distillation.yaml").read_text()
    _, model, _, _ = recipe_of(CONFIGS / "pretrain_distillation.yaml")
    weights = model["teacher"]["weights"]
    first = re.search(r"# First: +python main\.py fit --config configs/(\w+)\.yaml", text.splitlines()[1])
    assert first is not None
    assert weights == f"checkpoints/{first[1]}/last.ckpt"
    with pytest.raises(ConfigError, match=rf"Train the teacher first: .*{first[1]}\.yaml"):
        Distillation(BackboneConfig(**model["backbone"]), BackboneConfig(**model["teacher"]))
    model["teacher"]["weights"] = str(teachers / "vil9.ckpt")
    Distillation(BackboneConfig(**model.pop("backbone")), BackboneConfig(**model.pop("teacher")), **model)
