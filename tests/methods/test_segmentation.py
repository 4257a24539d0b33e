"""Segmentation: what it learns, how it scores, which inputs it refuses."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import VIL, FewDigits, run_in_two_processes, trainer
from torch import Tensor
from torch.nn import functional as F

from vil_lightning.data.segmentation import ShapesSegmentation
from vil_lightning.dense import IGNORED
from vil_lightning.errors import ConfigError
from vil_lightning.methods import BackboneConfig
from vil_lightning.methods.backbone import weights_hash
from vil_lightning.methods.segmentation import Segmentation, pixel_loss

TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2}
COARSE = {**TINY, "patch_size": 8}


def shapes(**kwargs: Any) -> ShapesSegmentation:
    settings: dict[str, Any] = {"img_size": 32, "batch_size": 4, "num_train": 16, "num_val": 5, "eval_batch_size": 2}
    return ShapesSegmentation(**{**settings, "seed": 0, **kwargs})


def model(head: Any = "linear", kwargs: dict[str, Any] = COARSE, **settings: Any) -> Segmentation:
    torch.manual_seed(1)
    defaults: dict[str, Any] = {"base_lr": 1e-2, "lr_warmup": 0}
    if head == "upernet":
        defaults["width"] = 8
    return Segmentation(BackboneConfig(VIL, None, kwargs), head, **{**defaults, **settings})


def scored(root: Path | None = None, **kwargs: Any) -> L.Trainer:
    return trainer(root, **{"limit_val_batches": 1.0, **kwargs})


def built(module: Segmentation, data: Any = None) -> Segmentation:
    """With its head, without a run."""
    data = data or shapes()
    data.setup()
    module.trainer = trainer()
    module.trainer.datamodule = data
    module.configure_model()
    return module


# --- what it learns ---------------------------------------------------------------------------------------------------


def constant_miou(masks: Tensor) -> float:
    """Of calling every pixel ground, in percent."""
    return 100 * float((masks == 0).float().mean()) / 5


@pytest.mark.parametrize("shuffled", [False, True])
def test_probe__solves_what_is_linearly_solvable_and_no_more(shuffled: bool) -> None:
    data = shapes(batch_size=32, num_train=128, num_val=32, shuffle_masks=shuffled)
    module = model(kwargs=TINY, base_lr=0.1, lr_batch_size=32, final_lr=0.0, weight_decay=0.0)
    before = weights_hash(module.backbone)
    epochs = 8 if shuffled else 25
    scored(max_epochs=epochs, check_val_every_n_epoch=epochs).fit(module, datamodule=data)
    assert weights_hash(module.backbone) == before
    masks = torch.stack([data.val_source[i][1] for i in range(32)])
    if shuffled:
        assert module.results["miou"] == pytest.approx(constant_miou(masks), abs=3)
    else:
        assert module.results["miou"] >= 90


def test_upernet__overfits_a_batch_and_moves_the_backbone() -> None:
    data = shapes(num_train=4, num_val=4)
    module = model("upernet", base_lr=1e-2, lr_batch_size=4, width=16)
    before = {name: p.detach().clone() for name, p in module.backbone.named_parameters()}
    scored(max_epochs=40, check_val_every_n_epoch=40).fit(module, datamodule=data)
    final = float(module.trainer.callback_metrics["train/loss"])
    assert final < 0.5 * (1 + module.aux_weight) * np.log(5)
    for name, p in module.backbone.named_parameters():
        used = not name.startswith(("norm.", "fc_norm."))  # the features come from before them
        assert p.requires_grad == used, name
        assert torch.equal(p, before[name]) != used, name


# --- the parts --------------------------------------------------------------------------------------------------------


def test_pixel_loss__is_the_mean_over_labelled_pixels() -> None:
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    masks = torch.randint(-1, 3, (2, 4, 5), dtype=torch.int16)
    losses = [
        -torch.log_softmax(logits[b, :, y, x], 0)[masks[b, y, x]]
        for b in range(2)
        for y in range(4)
        for x in range(5)
        if masks[b, y, x] != IGNORED
    ]
    assert float(pixel_loss(logits, masks)) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-6)
    assert float(pixel_loss(logits, torch.full_like(masks, IGNORED))) == 0


@pytest.mark.parametrize("weight", [None, 0.0, 2.0])
def test_upernet__loss_adds_the_auxiliary_head(weight: float | None) -> None:
    module = built(model("upernet", aux_weight=weight)).eval()
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    module.optimisation.start = module.optimisation.watch = lambda module, loss=None: loss  # type: ignore[method-assign]
    images, masks = torch.randn(2, 3, 32, 32), torch.randint(-1, 5, (2, 32, 32))
    with torch.no_grad():
        loss = module.training_step((images, masks), 0)
        maps = module.backbone.forward_intermediates(images, indices=[0, 1], intermediates_only=True)  # type: ignore[operator]
        main, auxiliary = module.decoder([maps[0], maps[0], maps[0], maps[1]])
    expected = [
        F.cross_entropy(F.interpolate(x, size=(32, 32), mode="bilinear"), masks, ignore_index=-1)
        for x in (main, auxiliary)
    ]
    assert float(loss) == pytest.approx(
        float(expected[0] + (0.4 if weight is None else weight) * expected[1]), rel=1e-5
    )


def test_linear__concatenates_normalised_maps() -> None:
    module = built(model(blocks=[0, 1])).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps = module.backbone.forward_intermediates(images, indices=[0, 1], norm=True, intermediates_only=True)  # type: ignore[operator]
        expected = F.interpolate(module.decoder(torch.cat(maps, 1)), size=(32, 32), mode="bilinear")
        torch.testing.assert_close(module(images), expected)


def test_forward__windows_cover_odd_sizes_and_one_window_is_the_whole_image() -> None:
    whole = built(model()).eval()
    images = torch.randn(1, 3, 37, 45)
    with torch.no_grad():
        expected = whole(images)
        assert expected.shape == (1, 5, 37, 45)
        whole.window, whole.stride = 64, 40
        torch.testing.assert_close(whole(images), expected)
        whole.window, whole.stride = 24, 16
        windows = whole(images)
        assert windows.shape == (1, 5, 37, 45)
        assert windows.isfinite().all()
        assert not torch.allclose(windows, expected)
        whole.window = None
        whole.eval_size = 32
        small = F.interpolate(images, size=(32, 32), mode="bicubic")
        scaled = F.interpolate(whole.predict_pixels(small)[0], size=(37, 45), mode="bilinear")
        torch.testing.assert_close(whole(images), scaled)


def test_stride__is_two_thirds_of_the_window() -> None:
    assert model(window=512).stride == 341
    assert model(window=512, stride=100).stride == 100
    assert model().stride is None


@pytest.mark.parametrize("size", [512, 1024])
@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_high_resolution__position_embedding_is_interpolated(head: str, size: int) -> None:
    kwargs = {"img_size": 64, "patch_size": 32, "embed_dim": 32, "depth": 2}
    module = built(model(head, kwargs)).eval()
    image = torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert module(image).shape == (1, 5, size, size)
        dynamic = module._features(image)[-1]
        module.backbone.set_input_size(size)  # type: ignore[operator]
        torch.testing.assert_close(module._features(image)[-1], dynamic, rtol=1e-4, atol=1e-4)
        module.backbone.pos_embed.embed.mul_(5)  # type: ignore[union-attr,operator]
        assert not torch.allclose(module._features(image)[-1], dynamic, atol=1e-2)


def test_vit__works_alike() -> None:
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "dynamic_img_size": True}
    for head in ("linear", "upernet"):
        settings = {"width": 8} if head == "upernet" else {}
        module = Segmentation(BackboneConfig("vit_tiny_patch16_224", None, kwargs), head, lr_warmup=0, **settings)  # type: ignore[arg-type]
        scored(max_epochs=1).fit(module, datamodule=shapes(num_train=8))
        assert 0 < module.results["pixel_acc"] <= 100


# --- schedule and groups ----------------------------------------------------------------------------------------------


class Rates(L.Callback):
    def __init__(self) -> None:
        self.rates: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        groups = trainer.optimizers[0].param_groups
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        self.rates.append({name: rates[id(p)] for name, p in pl_module.named_parameters() if id(p) in rates})


@pytest.mark.parametrize("power", [None, 1.0, 0.9])
def test_learning_rate__schedule_and_layer_decay(power: float | None) -> None:
    watch, total, warmup, peak, end = Rates(), 8, 2, 0.04 * 4 / 16, 1e-5
    kwargs = {**COARSE, "depth": 4}  # two pairs: stem, pair 0, pair 1, decoder
    settings: dict[str, Any] = {"base_lr": 0.04, "lr_warmup": "2 steps", "final_lr": end, "layer_decay": 0.5}
    module = model("upernet", kwargs, poly_power=power, **settings)
    trainer(max_epochs=2, callbacks=[watch]).fit(module, datamodule=shapes())
    assert len(watch.rates) == total
    for step, rates in enumerate(watch.rates, start=1):
        progress = (step - warmup) / (total - warmup)
        falling = (1 + np.cos(np.pi * progress)) / 2 if power is None else (1 - progress) ** power
        expected = peak * step / warmup if step <= warmup else end + (peak - end) * falling
        assert rates["decoder.classifier.weight"] == pytest.approx(expected)
        assert rates["backbone.blocks.3.norm.weight"] == pytest.approx(expected * 0.5)
        assert rates["backbone.blocks.0.norm.weight"] == pytest.approx(expected * 0.25)
        assert rates["backbone.patch_embed.proj.weight"] == pytest.approx(expected * 0.125)


# --- resume, two processes --------------------------------------------------------------------------------------------


def test_resume__within_an_epoch_ends_in_the_same_state(tmp_path: Path) -> None:
    def run(ckpt_path: Path | None, folder: Path) -> Segmentation:
        module = model("upernet", {**COARSE, "drop_path_rate": 0.3})
        saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        fit = trainer(folder, max_epochs=2, callbacks=[saver], enable_checkpointing=True)
        fit.fit(module, datamodule=shapes(), ckpt_path=ckpt_path, weights_only=True)
        assert fit.global_step == 8
        return module

    straight = run(None, tmp_path / "straight")
    resumed = run(tmp_path / "straight/step=3.ckpt", tmp_path / "resumed")
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    other = model("linear", {**COARSE, "drop_path_rate": 0.3})
    with pytest.raises(
        ConfigError, match=r"ckpt_path: the checkpoint has model\.head=upernet, but model\.head is linear"
    ):
        scored().validate(other, datamodule=shapes(), ckpt_path=tmp_path / "straight/step=3.ckpt", weights_only=True)
    # Its backbone is one that every other recipe can start from.
    config = BackboneConfig(None, str(tmp_path / "straight/step=8.ckpt"))
    probe = Segmentation(config, "linear", lr_warmup=0)
    for name, value in straight.backbone.state_dict().items():
        assert torch.equal(value, probe.backbone.state_dict()[name]), name


def validate(world_size: int, out: Path) -> None:
    """Score an untrained head on 5 images and save what process 0 gets."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    parallel = {"devices": world_size, "strategy": "ddp"} if world_size > 1 else {}
    module = model(background=0)
    fit = scored(out, **parallel)
    data = shapes()
    module = built(module, data)
    torch.nn.init.normal_(module.decoder[1].weight, std=1.0)  # type: ignore[index]
    fit.validate(module, datamodule=data, verbose=False)
    torch.save(module.results, out / f"world{world_size}_rank{fit.global_rank}.pt")


@pytest.mark.timeout(240)
def test_ddp__two_processes_score_like_one(tmp_path: Path) -> None:
    validate(1, tmp_path)
    results = run_in_two_processes(__file__, "validate", tmp_path, timeout=200)
    assert [code for code, _ in results] == [0, 0], "\n".join(error for _, error in results)
    one = torch.load(tmp_path / "world1_rank0.pt", weights_only=True)
    assert 0 < one["miou"] < 100
    assert one["pca_foreground"]["best"] > 0
    for rank in range(2):
        two = torch.load(tmp_path / f"world2_rank{rank}.pt", weights_only=True)
        assert two["miou"] == one["miou"]
        assert two["iou"] == pytest.approx(one["iou"], nan_ok=True)
        assert two["pca_foreground"] == pytest.approx(one["pca_foreground"])


def test_foreground__is_reported_before_training_and_leaves_it_alone(tmp_path: Path) -> None:
    losses = []
    for background in (None, 0):
        module = model("upernet", {**COARSE, "drop_path_rate": 0.3}, background=background)
        fit = trainer(max_steps=3)
        fit.fit(module, datamodule=shapes())
        losses.append(float(fit.callback_metrics["train/loss"]))
    assert losses[0] == losses[1]
    assert set(module.results["pca_foreground"]) == {"positive", "negative", "best", "everything"}
    source = module.trainer.datamodule.val_source  # type: ignore[attr-defined]
    masks = torch.stack([source[i][1] for i in range(5)])
    assert module.results["pca_foreground"]["everything"] == pytest.approx(
        100 * float((masks != 0).float().mean()), rel=1e-5
    )


# --- wrong inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "settings", "message"),
    [
        ("linear", {"width": 8}, r"model\.width=8 is for model\.head=upernet"),
        ("linear", {"aux_weight": 0.4}, r"model\.aux_weight=0\.4 is for model\.head=upernet"),
        ("linear", {"layer_decay": 0.5}, r"model\.layer_decay=0\.5 is for model\.head=upernet"),
        ("upernet", {"layer_decay": 1.5}, r"model\.layer_decay=1\.5 must be in \(0, 1\]"),
        ("upernet", {"aux_weight": -1.0}, r"model\.aux_weight=-1\.0 must not be negative"),
        ("linear", {"stride": 8}, r"model\.stride=8 must be between 1 and model\.window=None"),
        ("linear", {"window": 8, "stride": 9}, r"model\.stride=9 must be between 1 and model\.window=8"),
        ("linear", {"window": 0}, r"model\.window=0 must be positive"),
        ("linear", {"blocks": [2]}, r"model\.blocks=\[2\] must be at least one block.* from 0 to 1"),
        ("linear", {"blocks": []}, r"model\.blocks=\[\] must be at least one block"),
        ("upernet", {"blocks": [0, 1]}, r"model\.blocks=\[0, 1\] must be four blocks"),
        ("upernet", {"blocks": [1, 0, 1, 1]}, r"must be four blocks in ascending order"),
        ("linear", {"base_lr": 0.0}, r"model\.base_lr=0\.0 must be positive"),
    ],
    ids=str,
)
def test_wrong__arguments(head: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model(head, **settings)


def test_wrong__backbone_with_several_grids() -> None:
    assert len({info["reduction"] for info in timm.create_model("resnet18").feature_info}) > 1
    with pytest.raises(ConfigError, match=r"model\.blocks=.* of resnet18 have patches of"):
        Segmentation(BackboneConfig("resnet18"), "upernet")


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({}, FewDigits(16, 8), r"Segmentation needs images with masks, but data is FewDigits"),
        ({"background": 5}, shapes(), r"model\.background=5 must be one of the classes 0 to 4"),
        ({"head": "upernet"}, shapes(batch_size=1), r"data\.batch_size=1: the batch norms of UperNet"),
        ({"kwargs": {**COARSE, "dynamic_img_size": False}, "window": 16}, shapes(), r"model\.window=16 does not fit"),
    ],
    ids=["no masks", "background", "one image", "fixed size"],
)
def test_wrong__is_refused_before_the_first_step(settings: dict[str, Any], data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(max_steps=1).fit(model(**settings), datamodule=data)


def test_wrong__untrained_head_and_predictions() -> None:
    with pytest.raises(ConfigError, match="no trained head to score: set --ckpt_path"):
        model().check_trained(None)
    with pytest.raises(ConfigError, match="writes no predictions"):
        trainer().predict(model(), datamodule=shapes())
