"""SimMIM: mask units, the loss and the steps against a loop written out by hand, and what a run of it needs."""

import copy
import inspect
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_mae import CONFIGS, SMALL, VIT, build_recipe, flat, images, patch_pixels, recipe_of
from test_resume import same
from test_supervised import rate_by_hand
from tiny import VIL, FewDigits, Steps, digits, pictures, state, trainer
from torch import Tensor, nn

from vil_lightning.errors import ConfigError
from vil_lightning.methods import BackboneConfig, LinearProbe, SimMIM, Supervised
from vil_lightning.methods.masked import unpatchify
from vil_lightning.methods.randomness import seed_step


def simmim(name: str = VIL, backbone: dict[str, Any] | None = None, **kwargs: Any) -> SimMIM:
    torch.manual_seed(1)
    settings: dict[str, Any] = {"mask_unit": 2, "mask_ratio": 0.5, "base_lr": 0.2, "lr_warmup": "2 steps"}
    return SimMIM(BackboneConfig(name, None, {**SMALL, **(backbone or {})}), **{**settings, **kwargs})


def loss_by_hand(prediction: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
    """In float64. Mean over hidden patches of the mean absolute difference in a patch of 4 x 4 px."""
    width, errors = images.shape[3] // 4, []
    for b, k in hidden.nonzero().tolist():
        target = patch_pixels(images[b].double(), k // width, k % width, 4, 4)
        errors.append((prediction[b, k].double() - target).abs().sum() / len(target))
    return torch.stack(errors).mean()


# --- masks and predictions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1, 2, 4])
@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_draw_mask__hides_whole_units_on_their_own_grid(size: tuple[int, int], unit: int) -> None:
    model, x = simmim(mask_unit=unit, mask_ratio=0.6, backbone={"img_size": size}), torch.zeros(64, 3, *size)
    hidden, visible = model.draw_mask(x)
    h, w = size[0] // 4, size[1] // 4
    units = hidden.view(64, h // unit, unit, w // unit, unit).transpose(2, 3).flatten(3)
    assert torch.equal(units.any(-1), units.all(-1))
    total = (h // unit) * (w // unit)
    wanted = -(-6 * total // 10)  # the official code rounds up
    assert units.any(-1).flatten(1).sum(1).tolist() == [wanted] * 64
    for mask, places in zip(hidden.tolist(), visible.tolist(), strict=True):
        assert places == [k for k in range(h * w) if not mask[k]]
    assert len({tuple(mask.tolist()) for mask in hidden}) > 1


@pytest.mark.parametrize(("name", "kwargs"), [(VIL, {}), ("vit_tiny_patch16_224", VIT)], ids=["vil", "vit"])
def test_predict_patches__mask_tokens_stand_for_hidden_patches(name: str, kwargs: dict[str, Any]) -> None:
    model, x = simmim(name, kwargs).double().eval(), images().double()
    hidden, visible = model.draw_mask(x)
    spoilt = torch.where(unpatchify(hidden[..., None].expand(-1, -1, 16), (4, 4), (4, 4)), torch.nan, x)
    actual = model.predict_patches(x, visible)
    assert torch.equal(model.predict_patches(spoilt, visible), actual)

    def replace(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        return torch.where(hidden.view(*embedded.shape[:-1], 1), model.mask_token, embedded)

    model.backbone.patch_embed.register_forward_hook(replace)
    tokens = model.backbone.forward_features(x)[:, -16:]
    torch.testing.assert_close(actual, tokens @ model.head.weight.T + model.head.bias, rtol=1e-12, atol=1e-12)


def test_reconstruct__visible_pixels_stay_and_hidden_ones_are_predicted() -> None:
    model, x = simmim(backbone={"img_size": (16, 24)}).eval(), images(16, 24)
    torch.manual_seed(3)
    result = model.reconstruct(x)
    torch.manual_seed(3)
    hidden, visible = model.draw_mask(x)
    predicted = model.predict_patches(x, visible)
    assert not result["reconstruction"].requires_grad
    assert (result["mask"].shape, result["reconstruction"].shape) == ((3, 1, 16, 24), (3, 3, 16, 24))
    for b, k in itertools.product(range(3), range(24)):
        place = (slice(k // 6 * 4, k // 6 * 4 + 4), slice(k % 6 * 4, k % 6 * 4 + 4))
        assert (result["mask"][b, 0][place] == float(hidden[b, k])).all()
        if hidden[b, k]:
            assert torch.equal(patch_pixels(result["reconstruction"][b], k // 6, k % 6, 4, 4), predicted[b, k])
        else:
            assert torch.equal(result["reconstruction"][b][(slice(None), *place)], x[b][(slice(None), *place)])


# --- runs -------------------------------------------------------------------------------------------------------------


def test_defaults__are_the_papers() -> None:
    defaults = {name: p.default for name, p in inspect.signature(SimMIM).parameters.items()}
    paper = {"mask_ratio": 0.6, "mask_unit": 2, "betas": (0.9, 0.999), "weight_decay": 0.05}
    assert {name: defaults[name] for name in paper} == paper


def test_fit__equals_a_loop_by_hand(tmp_path: Path) -> None:
    steps, decay, model = Steps(), 0.1, simmim(weight_decay=0.1, final_lr=1e-4, backbone={"drop_path_rate": 0.2})
    network = copy.deepcopy(model).train()
    fit = trainer(tmp_path, max_steps=2, max_epochs=1, callbacks=[steps], accumulate_grad_batches=2)
    fit.fit(model, datamodule=pictures())
    peak = 0.2 * 16 / 512
    assert (fit.global_step, model.optimisation.peak_lr) == (2, pytest.approx(peak, rel=1e-12))
    groups = []
    for name, parameter in network.named_parameters():
        if "fc_norm" not in name:
            free = parameter.ndim <= 1 or name.endswith((".bias", "pos_embed.embed"))
            groups.append({"params": [parameter], "weight_decay": 0.0 if free else decay})
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.999))
    for number, (x, _) in enumerate(steps.batches):
        seed_step(SimpleNamespace(current_epoch=0, global_rank=0), number)
        units = torch.zeros(8, 4, dtype=torch.bool).scatter(1, torch.rand(8, 4).topk(2).indices, True)
        hidden = torch.stack([units[:, (k // 8) * 2 + k % 4 // 2] for k in range(16)], dim=1)
        visible = torch.stack([(~mask).nonzero().flatten() for mask in hidden])
        loss = loss_by_hand(network.predict_patches(x, visible), x, hidden) / 2
        assert steps.losses[number] == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        if number % 2:
            assert network.mask_token.grad.abs().min() > 0
            for group in optimizer.param_groups:
                group["lr"] = rate_by_hand(number // 2 + 1, 2, 2, peak, 1e-4)
                assert group["lr"] == pytest.approx(next(iter(steps.rates[number].values())), rel=1e-9)
            optimizer.step()
            for name, value in network.named_parameters():
                # Where absolute differences cancel, AdamW makes whole steps of what rounding leaves of a gradient.
                clear = torch.ones_like(value, dtype=torch.bool) if value.grad is None else value.grad.abs() > 1e-5
                off = (steps.states[number][name] - value).abs()
                assert (off <= 1e-5 + 1e-4 * value.abs())[clear & (off > 0)].all(), name
                assert clear.any() or "gate" in name, name
            optimizer.zero_grad()
            with torch.no_grad():  # so that the next step starts from the same numbers
                for name, value in network.named_parameters():
                    value.copy_(steps.states[number][name])
    assert number == 3
    assert {"train/loss", "train/grad_norm", "schedule/lr"} <= fit.callback_metrics.keys()


def test_fit__bf16_and_a_plain_vit(tmp_path: Path) -> None:
    steps, model = Steps(), simmim("vit_tiny_patch16_224", VIT, lr_warmup=0)
    trainer(tmp_path, max_steps=2, precision="bf16-mixed", callbacks=[steps]).fit(model, datamodule=pictures())
    assert all(0 < loss < 10 for loss in steps.losses)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in state(model).values())


def resumable(path: Path, ckpt_path: Path | None) -> tuple[Steps, dict[str, Tensor]]:
    steps, model = Steps(), simmim(backbone={"drop_path_rate": 0.3})
    every = ModelCheckpoint(path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit = trainer(path, max_epochs=2, callbacks=[steps, every], enable_checkpointing=True)
    fit.fit(model, datamodule=pictures(), ckpt_path=ckpt_path, weights_only=True)
    return steps, {**state(model), **flat(fit.optimizers[0].state_dict()["state"])}


def test_resume_and_checkpoint(tmp_path: Path) -> None:
    recorded, whole = resumable(tmp_path / "whole", None)
    torch.manual_seed(12345)
    resumed, end = resumable(tmp_path / "resumed", tmp_path / "whole/step=6.ckpt")
    assert same(resumed.batches, recorded.batches[6:])
    assert resumed.losses == recorded.losses[6:]
    assert same(end, whole)

    path, steps = str(tmp_path / "whole/step=8.ckpt"), Steps()
    tuned = Supervised(BackboneConfig(None, path, {}), new_head=True, lr_warmup=0)
    trainer(tmp_path, max_steps=1, max_epochs=1, callbacks=[steps]).fit(tuned, datamodule=pictures())
    for network in (steps.start, LinearProbe(BackboneConfig(None, path, {})).backbone):
        for name, value in state(network).items():
            if not name.startswith(("head.", "fc_norm.")):
                assert torch.equal(value, whole[f"backbone.{name}"]), name


# Two processes equal one: see test_mae.py, which trains this method, too.


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 0.0}, r"model\.mask_ratio=0\.0 hides 0 of 4 mask units"),
        ({"mask_ratio": 1.0}, r"model\.mask_ratio=1\.0 hides 4 of 4"),
        ({"mask_ratio": 0.8}, r"model\.mask_ratio=0\.8 hides 4 of 4"),
        ({"mask_ratio": -0.1}, r"model\.mask_ratio=-0\.1"),
        ({"mask_unit": 3}, r"model\.mask_unit=3 does not divide the grid of 4 x 4"),
        ({"mask_unit": 4}, r"model\.mask_ratio=0\.5 hides 1 of 1"),
        ({"mask_unit": 0}, r"model\.mask_unit=0 must be at least 1"),
        ({"base_lr": -1.0}, r"model\.base_lr=-1\.0 must be positive"),
        ({"backbone": {"stride": 2}}, r"SimMIM: model\.backbone\.kwargs\.stride=\(2, 2\)"),
    ],
    ids=str,
)
def test_settings__are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simmim(**settings)


def test_settings__backbone_and_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"SimMIM hides patches.*model\.backbone\.name"):
        SimMIM(BackboneConfig("convnext_atto", None, {}))
    for data in (digits(), FewDigits(16, 8)):
        with pytest.raises(
            ConfigError, match=r"data\.train_transform to a TrainTransform.*configs/pretrain_simmim\.yaml"
        ):
            trainer(tmp_path, max_epochs=1).fit(simmim(), datamodule=data)
    model = simmim(backbone={"img_size": 64}, mask_unit=8)  # divides the grid at 64 px, not that at 16
    with pytest.raises(ConfigError, match=r"model\.mask_unit=8 does not divide the grid of 4 x 4"):
        trainer(tmp_path, max_epochs=1).fit(model, datamodule=pictures())


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_recipe__has_the_official_numbers_of_vit_b(size: str) -> None:
    fit, model, data, batch = recipe_of(CONFIGS / f"imagenet/pretrain_simmim_vil2_{size}.yaml")
    assert (fit["max_epochs"], batch, model["base_lr"], model["lr_warmup"]) == (800, 2048, 1e-4, "10 epochs")
    assert (model["weight_decay"], model["betas"], fit["gradient_clip_val"]) == (0.05, [0.9, 0.999], 5.0)
    assert (model["mask_ratio"], model["mask_unit"], model["backbone"]["kwargs"]["drop_path_rate"]) == (0.6, 2, 0.1)
    view = data["train_transform"]["init_args"]
    assert (view["scale"], view["hflip_prob"]) == ([0.67, 1.0], 0.5)
    assert model["backbone"]["name"] == f"vil2_{size}_patch16_224"
    hidden, _ = build_recipe(SimMIM, model).draw_mask(torch.zeros(1, 3, 224, 224))
    assert int(hidden.sum()) == 30 * 4


def test_recipe__of_the_digits() -> None:
    _, model, _, _ = recipe_of(CONFIGS / "pretrain_simmim.yaml")
    build_recipe(SimMIM, model)
