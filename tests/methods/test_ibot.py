"""iBOT and DINOv2 against the formulas of the papers, written out plainly, and what a run of them needs."""

import inspect
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from test_mae import CONFIGS, SMALL, VIT
from test_resume import same
from tiny import VIL, Recorder, digits, pictures, run_in_two_processes, state, trainer
from torch import Tensor, nn
from torch.nn import functional as F

from vil_lightning.errors import ConfigError
from vil_lightning.losses.prototypes import sinkhorn_targets
from vil_lightning.methods import IBOT, BackboneConfig, DINOv2, LinearProbe
from vil_lightning.methods.ibot import read_patches
from vil_lightning.methods.masked import patchify, unpatchify

K = 24


def make(kind: type[IBOT] = IBOT, name: str = VIL, kwargs: dict[str, Any] | None = None, **settings: Any) -> IBOT:
    torch.manual_seed(1)
    defaults: dict[str, Any] = {
        "num_prototypes": K,
        "head_hidden_dim": 16,
        "head_bottleneck_dim": 8,
        "freeze_last_layer": 0,
        "teacher_temp": 0.05,
        "warmup_teacher_temp": 0.05,
        "teacher_temp_warmup": 0,
        "lr_warmup": 0,
        "base_lr": 0.05 if kind is IBOT else 0.02,
        "teacher_momentum": 0.9,
    }
    return kind(BackboneConfig(name, None, {**SMALL, **(kwargs or {})}), **{**defaults, **settings})


def views(batch: int = 4, local: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    sizes = [16, 16] + [8] * local
    return [torch.randn(batch, 3, size, size, generator=generator) for size in sizes]


def cross_entropy(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    return -(targets * (logits / temperature).log_softmax(-1)).sum(-1)


# --- what the networks see --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kwargs"), [(VIL, {}), ("vit_tiny_patch16_224", VIT)], ids=["vil", "vit"])
def test_student__does_not_see_hidden_pixels_and_the_teacher_does(name: str, kwargs: dict[str, Any]) -> None:
    model, x = make(name=name, kwargs=kwargs).eval(), views()
    hidden = model.draw_mask(torch.cat(x[:2]))
    spoilt = unpatchify(hidden[..., None].expand(-1, -1, 16), (4, 4), (4, 4))
    others = [torch.where(part, 1e3, view) for part, view in zip(spoilt.chunk(2), x[:2], strict=True)]
    for ours, theirs in zip(model.student_scores(x, hidden), model.student_scores(others + x[2:], hidden), strict=True):
        assert torch.equal(ours, theirs)
    before, after = (model.teacher_scores(torch.cat(both[:2]), hidden)[0] for both in (x, others))
    changed = (before != after).any(-1)
    assert torch.equal(changed, hidden.any(1))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("pool", ["bilateral_concat", "avg"])
def test_scores__one_image_and_one_patch_at_a_time(pool: str, shared: bool) -> None:
    model, x = make(kwargs={"global_pool": pool}, shared_head=shared).eval(), views()
    nn.init.normal_(model.student["mask_token"].weight)
    for network in (model.student, model.teacher):
        network["backbone"].fc_norm.weight.data.uniform_(0.5, 2)
    large = torch.cat(x[:2])
    hidden = model.draw_mask(large)
    images, patches, features = model.student_scores(x, hidden)
    teacher_images, teacher_patches, mean = model.teacher_scores(large, hidden)
    body, head = model.student["backbone"], model.student["image_head"]
    patch_head = head if shared else model.student["patch_head"]
    number, every_patch = 0, []
    for i, image in enumerate(large):
        tokens = body.forward_features(
            image[None], hidden=hidden[i : i + 1], mask_token=model.student["mask_token"].weight
        )
        torch.testing.assert_close(images[i], head(body.forward_head(tokens))[0])
        torch.testing.assert_close(features[i], body.forward_head(tokens)[0])
        seen = model.teacher["backbone"].forward_features(image[None])
        torch.testing.assert_close(
            teacher_images[i], model.teacher["image_head"](model.teacher["backbone"](image[None]))[0]
        )
        for n in range(16):

            def read(token: Tensor, norm: Any) -> Tensor:
                if not shared:
                    return token
                token = torch.cat([token, token]) if pool == "bilateral_concat" else token
                return F.layer_norm(token, token.shape, norm.weight, norm.bias, norm.eps)

            teacher_head = model.teacher["image_head" if shared else "patch_head"]
            every_patch.append(teacher_head(read(seen[0, n], model.teacher["backbone"].fc_norm)[None])[0])
            if hidden[i, n]:
                torch.testing.assert_close(patches[number], patch_head(read(tokens[0, n], body.fc_norm)[None])[0])
                number += 1
    assert number == len(patches) == int(hidden.sum())
    torch.testing.assert_close(teacher_patches, torch.stack(every_patch)[hidden.flatten()])
    torch.testing.assert_close(mean[0], torch.stack(every_patch).mean(0))
    for i, small in enumerate(x[2:]):
        torch.testing.assert_close(images[(2 + i) * 4 : (3 + i) * 4], head(body(small)))


def test_read_patches__with_a_class_token_as_they_are() -> None:
    for name, kwargs, prefix in ((VIL, {"global_pool": "middle_cls"}, None), ("vit_tiny_patch16_224", VIT, 1)):
        model = make(name=name, kwargs=kwargs).eval()
        body = model.student["backbone"]
        tokens = body.forward_features(views()[0])
        patches = body.split_tokens(tokens)[0] if prefix is None else tokens[:, prefix:]
        assert torch.equal(read_patches(body, tokens, as_images=True), patches)


# --- training ---------------------------------------------------------------------------------------------------------


class Masks(L.Callback):
    """Keeps the masks of a run."""

    def __init__(self) -> None:
        self.masks: list[Tensor] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        draw = pl_module.draw_mask

        def recorded(images: Tensor) -> Tensor:
            mask = draw(images)
            self.masks.append(mask)
            return mask

        pl_module.draw_mask = recorded


@pytest.mark.parametrize("targets", ["centering", "sinkhorn"])
@pytest.mark.parametrize(("kind", "shared"), [(IBOT, True), (DINOv2, False)], ids=["ibot", "dinov2"])
def test_fit__three_steps_by_hand(kind: type[IBOT], shared: bool, targets: str) -> None:
    """Losses, centres, AdamW, schedules and teacher, in plain torch; the networks in float64."""
    settings: dict[str, Any] = {
        "shared_head": shared,
        "targets": targets,
        "weight_decay": 0.5,
        "final_weight_decay": 1.0,
        "final_lr": 1e-4,
        "teacher_momentum": 0.8,
        "teacher_temp": 0.08,
        "teacher_temp_warmup": "2 steps",
        "freeze_last_layer": "1 step",
        "clip_grad": None,
        "image_weight": 0.7,
        "patch_weight": 1.3,
        "center_momentum": 0.6,
        "mask_prob": 0.75,
    }
    if kind is DINOv2:
        settings |= {"koleo_weight": 0.3, "layer_decay": 0.5, "patch_embed_lr_scale": 0.2}
    model = make(kind, **settings).double()
    recorder, masks = Recorder(), Masks()
    data = digits()
    in_single = data.normalize
    data.normalize = lambda images: in_single(images).double()  # type: ignore[method-assign]

    class SingleCenters(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.image_center.float(), pl_module.patch_center.float()  # in float32, as the losses always are

    start = state(model)
    fit = trainer(max_steps=3, max_epochs=1, precision="64-true", callbacks=[masks, recorder, SingleCenters()])
    fit.fit(model, datamodule=data)
    assert len(recorder.batches) == 3

    hand = make(kind, **settings).double()
    hand.load_state_dict(start)
    peak = 0.05 * 8 / 256 if kind is IBOT else 0.02 * math.sqrt(8 / 1024)
    groups = []
    for name, parameter in hand.student.named_parameters():
        free = parameter.ndim == 1 or name.endswith(".bias") or "pos_embed" in name
        scale = 1.0
        if kind is DINOv2 and name.startswith("backbone."):  # two scans are one layer: stem, pair, head
            scale = 0.25 if "embed" in name else 0.5 if ".blocks." in name else 1.0
            scale *= 0.2 if "patch_embed" in name else 1.0
        groups.append({"params": [parameter], "scale": scale, "free": free})
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    centers = torch.zeros(2, K, dtype=torch.float64)
    for step, ((x, _), hidden) in enumerate(zip(recorder.batches, masks.masks[-3:], strict=True)):
        x = [view.double() for view in x]
        cosine = 0.5 * (1 + math.cos(math.pi * step / 3))
        for group in optimizer.param_groups:
            group["lr"] = (1e-4 + (peak - 1e-4) * cosine) * group["scale"]
            group["weight_decay"] = 0.0 if group["free"] else 1.0 - 0.5 * cosine
        temperature = (0.05, 0.065, 0.08)[step]

        student, teacher = hand.student, hand.teacher
        patch_name = "image_head" if shared else "patch_head"
        with torch.no_grad():
            seen = teacher["backbone"].forward_features(torch.cat(x[:2]))
            image_scores = teacher["image_head"](teacher["backbone"].forward_head(seen))
            every_patch = teacher[patch_name](read_patches(teacher["backbone"], seen, shared))
            if targets == "sinkhorn":
                image_targets, patch_targets = (
                    sinkhorn_targets(s, temperature) for s in (image_scores, every_patch[hidden])
                )
            else:
                image_targets = ((image_scores - centers[0]) / temperature).softmax(-1)
                patch_targets = ((every_patch[hidden] - centers[1]) / temperature).softmax(-1)
                centers[0] = 0.6 * centers[0] + 0.4 * image_scores.mean(0)
                centers[1] = 0.6 * centers[1] + 0.4 * every_patch.flatten(0, 1).mean(0)
        token = student["mask_token"].weight
        tokens = student["backbone"].forward_features(torch.cat(x[:2]), hidden=hidden, mask_token=token)
        features = [*student["backbone"].forward_head(tokens).chunk(2), *(student["backbone"](view) for view in x[2:])]
        pairs = [
            cross_entropy(image_targets.chunk(2)[t], student["image_head"](features[v]), 0.1).mean()
            for t in range(2)
            for v in range(4)
            if t != v
        ]
        patch_scores = student[patch_name](read_patches(student["backbone"], tokens, shared)[hidden])
        per_patch, of_images, number = cross_entropy(patch_targets, patch_scores, 0.1), [], 0
        for count in hidden.sum(1).tolist():
            of_images.append(per_patch[number : number + count].sum() / max(count, 1))
            number += count
        loss = 0.7 * torch.stack(pairs).mean() + 1.3 * torch.stack(of_images).mean()
        if kind is DINOv2:
            for view in features[:2]:
                unit = F.normalize(view, dim=-1)
                distance = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist") + 10 * torch.eye(8)
                loss = loss - 0.3 * distance.min(1).values.log().mean()
        assert recorder.losses[step] == pytest.approx(float(loss), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for name in {"image_head", patch_name}:
                for parameter in student[name].last_layer.parameters():
                    parameter.grad = None
        optimizer.step()
        momentum = 1.0 - 0.2 * cosine
        with torch.no_grad():
            for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                ours.mul_(momentum).add_(theirs, alpha=1 - momentum)
    for name in ("student", "teacher"):
        for key, value in getattr(hand, name).state_dict().items():
            # The module's losses are in float32, which Adam's division by small gradients magnifies.
            actual = getattr(model, name).state_dict()[key]
            torch.testing.assert_close(actual, value, rtol=0, atol=3e-5, msg=lambda text, k=key: f"{k}: {text}")
    moved = model.state_dict()["student.mask_token.weight"] - start["student.mask_token.weight"]
    assert moved.abs().max() > 1e-3
    if targets == "centering":
        both = torch.cat([model.image_center.value, model.patch_center.value]).double()
        torch.testing.assert_close(both, centers, rtol=1e-4, atol=1e-6)


def test_fit__auto_settings_follow_the_data_and_are_said(tmp_path: Path) -> None:
    settings = {
        "num_prototypes": "auto",
        "teacher_momentum": "auto",
        "teacher_temp": "auto",
        "warmup_teacher_temp": 0.04,
    }
    model = make(DINOv2, **settings)
    trainer(tmp_path, max_epochs=1, limit_train_batches=2).fit(model, datamodule=digits())
    assert model.student["image_head"].last_layer.weight_v.shape[0] == 1024
    assert (model.distillation.teacher_momentum, model.distillation.teacher_temp) == (0.9, 0.04)
    lines = model.run_info()
    assert lines["model.num_prototypes"].startswith("1024 (about 32 training images / 20")
    assert {"model.teacher_momentum", "model.teacher_temp"} <= lines.keys()
    assert not any(line.startswith("model.") for line in make().distillation.chosen)


@pytest.mark.parametrize(
    ("kind", "name", "kwargs", "settings"),
    [
        (IBOT, VIL, {}, {"shared_head": False, "mask_prob": 0.0}),
        (DINOv2, VIL, {"global_pool": "middle_cls"}, {"targets": "sinkhorn"}),
        (IBOT, VIL, {"conv_kind": "causal1d", "block_design": "quaddirectional_shared"}, {}),
        (DINOv2, "vit_tiny_patch16_224", VIT, {"shared_head": False}),
        (IBOT, "deit3_small_patch16_224", VIT, {"norm_last_layer": True}),
    ],
    ids=str,
)
def test_fit__every_trained_parameter_has_a_gradient(
    tmp_path: Path, kind: type[IBOT], name: str, kwargs: dict[str, Any], settings: dict[str, Any]
) -> None:
    """DDP would wait for one that has none."""
    missing: list[str] = []

    class Watch(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
            missing.extend(n for n, p in pl_module.named_parameters() if p.requires_grad and p.grad is None)

    fit = trainer(tmp_path, max_epochs=1, limit_train_batches=1, callbacks=[Watch()])
    fit.fit(make(kind, name, kwargs, **settings), datamodule=digits())
    assert math.isfinite(float(fit.callback_metrics["train/loss"]))
    assert missing == []
    wanted = {
        "train/loss_image",
        "train/loss_patch",
        "health/teacher_entropy",
        "schedule/teacher_temp",
        "train/grad_norm",
    }
    assert wanted <= fit.callback_metrics.keys()


def test_fit__bf16_with_losses_in_float32(tmp_path: Path) -> None:
    def run(precision: str) -> list[float]:
        recorder = Recorder()
        fit = trainer(tmp_path, max_steps=2, precision=precision, callbacks=[recorder])
        fit.fit(make(DINOv2), datamodule=digits())
        return recorder.losses

    rounded, exact = run("bf16-mixed"), run("32-true")
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact


def test_fit__accumulated_batches_move_the_teacher_once(tmp_path: Path) -> None:
    recorder = Recorder()
    fit = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, callbacks=[recorder])
    fit.fit(make(), datamodule=digits(4))
    key = "teacher.backbone.patch_embed.proj.weight"
    changed = [not torch.equal(a[key], b[key]) for a, b in zip(recorder.states, recorder.states[1:], strict=False)]
    assert changed == [True, False, True, False, True, False, True]


def test_compile__blocks_of_both_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *args, **kwargs: compiled.append(self))
    model = make(compile=True)
    blocks = [*model.student["backbone"].blocks, *model.teacher["backbone"].blocks]
    assert [id(block) for block in compiled] == [id(block) for block in blocks]


@pytest.mark.parametrize("kind", [IBOT, DINOv2])
def test_resume__ends_in_the_same_state(tmp_path: Path, kind: type[IBOT]) -> None:
    def run(path: Path, ckpt_path: Path | None) -> tuple[Recorder, IBOT, Any]:
        recorder, model = Recorder(), make(kind, kwargs={"drop_path_rate": 0.3}, teacher_temp_warmup="1 epoch")
        every = ModelCheckpoint(path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        fit = trainer(path, max_epochs=2, callbacks=[recorder, every], enable_checkpointing=True)
        fit.fit(model, datamodule=digits(), ckpt_path=ckpt_path, weights_only=True)
        return recorder, model, fit.optimizers[0].state_dict()

    recorded, whole, optimizer = run(tmp_path / "whole", None)
    for done in (3, 4):
        torch.manual_seed(12345)
        resumed, end, resumed_optimizer = run(tmp_path / f"resumed{done}", tmp_path / f"whole/step={done}.ckpt")
        assert same(resumed.batches, recorded.batches[done:])
        assert resumed.losses == recorded.losses[done:]
        assert same(resumed.schedules, recorded.schedules[done:])
        assert same(state(end), state(whole))
        assert same(resumed_optimizer, optimizer)

    probe = LinearProbe(BackboneConfig(None, str(tmp_path / "whole/step=8.ckpt"), {}))
    for name, value in state(probe.backbone).items():
        assert torch.equal(value, state(whole)[f"teacher.backbone.{name}"]), name


# --- two processes ----------------------------------------------------------------------------------------------------


class ContentDINOv2(DINOv2):
    """Which patches are hidden, and how many, depends on their pixels alone: not on which process has an image."""

    def draw_mask(self, images: Tensor) -> Tensor:
        return (1000 * patchify(images.double(), (4, 4)).sum(-1)).sin() > 0.4


def contestants() -> dict[str, IBOT]:
    # KoLeo looks at one process's batch, by its definition.
    return {
        "centering": make(ContentDINOv2, koleo_weight=0.0),
        "sinkhorn": make(ContentDINOv2, koleo_weight=0.0, targets="sinkhorn", shared_head=False),
    }


def train(world_size: int, out: Path) -> None:
    torch.set_num_threads(1)
    for name, model in contestants().items():
        parallel = {"devices": world_size, "strategy": "ddp"} if world_size > 1 else {}
        fit = trainer(out, max_steps=3, max_epochs=1, **parallel)
        fit.fit(model, datamodule=digits(8 // world_size))
        assert fit.global_step == 3
        assert model.distillation.global_batch_size == 8
        torch.save(model.state_dict(), out / f"{name}_world{world_size}_rank{fit.global_rank}.pt")


@pytest.mark.timeout(150)
def test_ddp__two_processes_equal_one(tmp_path: Path) -> None:
    train(1, tmp_path)
    results = run_in_two_processes(__file__, "train", tmp_path)
    assert [code for code, _ in results] == [0, 0], "\n".join(error for _, error in results)
    for name, model in contestants().items():
        one = torch.load(tmp_path / f"{name}_world1_rank0.pt", weights_only=True)
        two, other = (torch.load(tmp_path / f"{name}_world2_rank{rank}.pt", weights_only=True) for rank in range(2))
        assert same(two, other), f"{name} differs between the processes"
        for key, expected in one.items():
            torch.testing.assert_close(two[key], expected, rtol=1e-4, atol=2e-5, msg=f"{name} {key}")
        assert max(float((one[key] - value).abs().max()) for key, value in model.state_dict().items()) > 1e-3


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_prob": 1.5}, r"model\.mask_prob=1\.5 must be in \[0, 1\]"),
        ({"mask_ratio": (0.5, 0.1)}, r"model\.mask_ratio=\[0\.5, 0\.1\]"),
        ({"mask_ratio": (0.0, 0.1)}, r"model\.mask_ratio=\[0\.0, 0\.1\]"),
        ({"mask_ratio": (0.1, 1.0)}, r"model\.mask_ratio=\[0\.1, 1\.0\]"),
        ({"patch_weight": -1.0}, r"model\.patch_weight=-1\.0 must not be negative"),
        ({"student_temp": 0.0}, r"model\.student_temp=0\.0 must be positive"),
        ({"teacher_temp": 0.0}, r"model\.teacher_temp=0\.0 must be positive"),
        ({"layer_decay": 0.0}, r"model\.layer_decay=0\.0 must be in \(0, 1\]"),
        ({"kwargs": {"global_pool": "bilateral_cls_concat"}}, r"model\.shared_head: .* 64 channels, a patch 32"),
        ({"kwargs": {"stride": 2}}, r"iBOT: model\.backbone\.kwargs\.stride=\(2, 2\)"),
        ({"name": "convnext_atto", "kwargs": None}, r"iBOT hides patches.*model\.backbone\.name"),
    ],
    ids=str,
)
def test_settings__are_named(settings: dict[str, Any], message: str) -> None:
    if settings.get("name") == "convnext_atto":
        with pytest.raises(ConfigError, match=message):
            IBOT(BackboneConfig("convnext_atto", None, {}))
        return
    with pytest.raises(ConfigError, match=message):
        make(**settings)


def test_settings__data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"DINOv2 trains on several views.*configs/pretrain_dinov2\.yaml"):
        trainer(tmp_path, max_epochs=1).fit(make(DINOv2), datamodule=pictures())
    with pytest.raises(ConfigError, match=r"model\.koleo_weight=0\.1.*data\.batch_size is 1"):
        trainer(tmp_path, max_epochs=1).fit(make(DINOv2), datamodule=digits(1))


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_defaults__are_the_official_ones() -> None:
    def defaults(kind: type[IBOT]) -> dict[str, Any]:
        return {name: p.default for name, p in inspect.signature(kind).parameters.items()}

    both: dict[str, Any] = {"head_hidden_dim": 2048, "head_bottleneck_dim": 256, "shared_head": True, "mask_prob": 0.5}
    both |= {"mask_ratio": (0.1, 0.5), "student_temp": 0.1, "center_momentum": 0.9, "weight_decay": 0.04}
    both |= {"final_weight_decay": 0.4, "clip_grad": 3.0, "freeze_last_layer": "1 epoch", "lr_warmup": "10 epochs"}
    both |= {"final_lr": 1e-6, "teacher_temp_warmup": "30 epochs", "image_weight": 1.0, "patch_weight": 1.0}
    for kind in (IBOT, DINOv2):
        assert {name: defaults(kind)[name] for name in both} == both
    assert (defaults(IBOT)["base_lr"], IBOT.lr_batch_size, IBOT.lr_rule, IBOT.longest_memory) == (
        5e-4,
        256,
        "linear",
        0.996,
    )
    assert (DINOv2.lr_batch_size, DINOv2.lr_rule, DINOv2.longest_memory) == (1024, "sqrt", 0.992)
    dinov2 = {"base_lr": 4e-3, "koleo_weight": 0.1, "layer_decay": 0.9, "patch_embed_lr_scale": 0.2}
    assert {name: defaults(DINOv2)[name] for name in dinov2} == dinov2
    assert inspect.signature(IBOT).parameters.keys() == inspect.signature(DINOv2).parameters.keys()


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize("method", ["ibot", "dinov2"])
def test_recipe__of_imagenet(method: str, size: str) -> None:
    text = (CONFIGS / f"imagenet/pretrain_{method}_vil2_{size}.yaml").read_text()
    recipe = yaml.safe_load(text)
    fit, model, data = recipe["trainer"], recipe["model"]["init_args"], recipe["data"]["init_args"]
    batch = fit["devices"] * fit.get("num_nodes", 1) * data["batch_size"]
    assert model["backbone"]["name"] == f"vil2_{size}_patch16_224"
    assert batch == (1024 if method == "ibot" else 2048)
    assert f"= {batch}" in text
    view = data["train_transform"]["init_args"]
    crops = ([0.25, 1.0], [0.05, 0.25], 10) if method == "ibot" else ([0.32, 1.0], [0.05, 0.32], 8)
    assert (view["global_scale"], view["local_scale"], view["num_local_views"]) == crops
    assert fit["max_epochs"] == (800 if method == "ibot" else 200)
    assert (model["teacher_temp"], model["warmup_teacher_temp"]) == (0.07, 0.04)
    assert model["num_prototypes"] == (8192 if method == "ibot" else 65536)
    # What the file spells out is what the class has by default.
    defaults = inspect.signature(IBOT if method == "ibot" else DINOv2).parameters
    for key in ("mask_prob", "mask_ratio", "base_lr", "final_lr", "weight_decay", "final_weight_decay", "clip_grad"):
        value = defaults[key].default
        assert model[key] == (list(value) if isinstance(value, tuple) else value), key


@pytest.mark.parametrize("method", ["ibot", "dinov2"])
def test_recipe__of_the_digits(method: str) -> None:
    model = yaml.safe_load((CONFIGS / f"pretrain_{method}.yaml").read_text())["model"]["init_args"]
    config = BackboneConfig(**model.pop("backbone"))
    kind = IBOT if method == "ibot" else DINOv2
    assert f"pretrain_{method}.yaml" in kind.recipe
    kind(config, **model)
