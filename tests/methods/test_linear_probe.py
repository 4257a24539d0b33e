"""Linear probe and kNN of a frozen backbone."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch.loggers import CSVLogger
from tiny import SMALL, VIL, FewDigits, backbone, digits, dino, state, trainer
from torch import Tensor, nn

from vil_lightning.errors import ConfigError
from vil_lightning.knn import knn_accuracy
from vil_lightning.methods import BackboneConfig, LinearProbe
from vil_lightning.methods.backbone import weights_hash
from vil_lightning.methods.linear_probe import READOUTS, extract_features, split_for_selection


class MoreDigits(FewDigits):
    num_train = 100


def fit_probe(path: Path, model: LinearProbe, max_epochs: int = 2) -> Any:
    fit = trainer(path, max_epochs=max_epochs, logger=CSVLogger(path, name="", version="run"))
    fit.fit(model, datamodule=MoreDigits(16, 16, eval_batch_size=32, seed=0))
    return fit


def probe(config: BackboneConfig | None = None, **kwargs: Any) -> LinearProbe:
    torch.manual_seed(2)
    return LinearProbe(config or backbone(), **{"base_lrs": (0.01, 1.0), "knn_ks": (5, 20), **kwargs})


# --- a run ------------------------------------------------------------------------------------------------------------


def test_results__file_holds_scores_and_provenance(tmp_path: Path) -> None:
    model = probe()
    fit_probe(tmp_path, model)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results == json.loads(json.dumps(model.results))
    assert results["backbone"]["name"] == VIL
    assert results["backbone"]["kwargs"] == SMALL
    assert results["backbone"]["sha256"] == weights_hash(model.backbone)
    protocol = results["protocol"]
    assert (protocol["num_train"], protocol["num_val"], protocol["num_shots"]) == (90, 20, None)
    assert protocol["selection"] == "10 held-out training images"
    assert (protocol["base_lrs"], protocol["epochs"]) == ([0.01, 1.0], 2)
    linear = results["linear"]
    assert set(linear["by_pooling"]) == set(READOUTS)
    assert linear["winner"] in READOUTS
    assert linear["val_acc1"] == linear["by_pooling"][linear["winner"]]["val_acc1"]
    share = linear["val_acc1"] / 100
    assert linear["val_acc1_95"] == pytest.approx(196 * (share * (1 - share) / 20) ** 0.5, abs=1e-2)
    assert set(results["knn"]) == {"5", "20"}


def test_results__knn_of_the_features(tmp_path: Path) -> None:
    model = probe(knn_pooling="avg", poolings=["first"])
    fit_probe(tmp_path, model)
    data = MoreDigits(16, 16, seed=0)
    data.setup("fit")
    sets = []
    with torch.no_grad():
        for loader in (data.eval_train_dataloader(), data.val_dataloader()):
            images, labels = next(iter(loader))
            sets += [model.backbone.forward_features(data.normalize(images)).mean(1), labels]
    expected = knn_accuracy(*sets, ks=(5, 20))
    assert model.results["knn"] == pytest.approx({str(k): value for k, value in expected.items()})
    assert set(model.results["linear"]["by_pooling"]) == {"first"}


def test_fit__each_image_through_the_backbone_once(tmp_path: Path) -> None:
    model = probe()
    images: list[int] = []
    model.backbone.patch_embed.register_forward_hook(lambda module, args, output: images.append(len(args[0])))
    fit_probe(tmp_path, model, max_epochs=5)
    assert sum(images) == 100 + 20 + 1  # and one empty image to check the size


def test_fit__backbone_stays_as_it_was(tmp_path: Path) -> None:
    model = probe(backbone(drop_path_rate=0.5))
    before = state(model.backbone)
    fit = fit_probe(tmp_path, model)
    after = state(model.backbone)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    trained = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.heads.parameters()}
    model.train()
    assert model.heads.training
    assert not any(module.training for module in model.backbone.modules())


def test_fit__learns_separable_features(tmp_path: Path) -> None:
    class Pixels(nn.Module):
        """The image itself as one token."""

        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(()))

        def forward_features(self, images: Tensor) -> Tensor:
            return images[:, 0].flatten(1)[:, None]

        forward = forward_features

    model = probe(poolings=["avg"], base_lrs=(0.3,), knn_pooling="avg", held_out=0.2)
    model.backbone = Pixels()
    fit_probe(tmp_path, model, max_epochs=30)
    assert model.results["linear"]["val_acc1"] >= 60  # chance is 10


def test_on_train_end__winner_is_chosen_by_held_out_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = probe(poolings=["avg", "first"])
    held = {("avg", "lr0"): 60.0, ("avg", "lr1"): 80.0, ("first", "lr0"): 70.0, ("first", "lr1"): 50.0}
    val = {("avg", "lr0"): 90.0, ("avg", "lr1"): 20.0, ("first", "lr0"): 30.0, ("first", "lr1"): 99.0}
    held, val = ({key: (accuracy, -1.0) for key, accuracy in scores.items()} for scores in (held, val))
    monkeypatch.setattr(model, "_scores", lambda features, labels: held if len(labels) == 10 else val)
    fit_probe(tmp_path, model, max_epochs=1)
    linear = model.results["linear"]
    assert linear["winner"] == "avg"
    assert (linear["base_lr"], linear["held_out_acc1"], linear["val_acc1"]) == (1.0, 80.0, 20.0)
    assert linear["by_pooling"]["first"] == {"base_lr": 0.01, "held_out_acc1": 70.0, "val_acc1": 30.0}


def test_on_train_end__equal_accuracies_are_decided_by_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = probe(poolings=["avg", "first"])
    loss = {("avg", "lr0"): 0.9, ("avg", "lr1"): 0.7, ("first", "lr0"): 0.8, ("first", "lr1"): 0.6}
    monkeypatch.setattr(model, "_scores", lambda features, labels: {key: (80.0, -value) for key, value in loss.items()})
    fit_probe(tmp_path, model, max_epochs=1)
    assert (model.results["linear"]["winner"], model.results["linear"]["base_lr"]) == ("first", 1.0)


def test_fit__num_shots(tmp_path: Path) -> None:
    model = probe(num_shots=4)
    fit_probe(tmp_path, model)
    assert model.results["protocol"]["num_train"] == 4 * 10
    assert model.num_held_out == 10  # of the images that are not shots
    assert model.results["protocol"]["num_shots"] == 4


def test_fit__same_seed_same_results(tmp_path: Path) -> None:
    runs = []
    for _ in range(2):
        model = probe()
        fit_probe(tmp_path, model)
        runs.append(model.results)
    assert runs[0] == runs[1]


# --- read-outs --------------------------------------------------------------------------------------------------------


def test_extract_features__by_hand() -> None:
    model = timm.create_model(VIL, num_classes=0, **{**SMALL, "depth": 3}).eval()
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        actual = extract_features(model, images, READOUTS)
        tokens = model.forward_features(images)
    assert tokens.shape == (3, 4, 32)
    first, last = tokens[:, 0], tokens[:, 3]
    expected = {
        "bilateral_concat": torch.cat([first, last], -1),
        "bilateral_avg": (first + last) / 2,
        "avg": (tokens[:, 0] + tokens[:, 1] + tokens[:, 2] + tokens[:, 3]) / 4,
        "first": first,
        "last": last,
    }
    assert actual.keys() == {*expected, "last4"}
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("depth", [2, 3])
def test_extract_features__last4_averages_normalised_tokens_after_each_scan(depth: int) -> None:
    """Caught by hooks while the whole network runs: the last four scans."""
    model = timm.create_model(VIL, num_classes=0, **{**SMALL, "depth": depth}).eval()
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        every = model.forward_intermediates(images, norm=False, intermediates_only=True)
        actual = extract_features(model, images, ["last4"])["last4"]
        parts = [model.norm(layer.flatten(2).transpose(1, 2)).mean(1) for layer in every[-4:]]
        full = model.forward_features(images).mean(1)
    assert len(every) == len(model.feature_info)
    torch.testing.assert_close(actual, torch.cat(parts, -1))
    torch.testing.assert_close(actual[:, -32:], full)  # after the last scan comes what the network returns


def small_vit() -> dict[str, Any]:
    return {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def test_extract_features__timm_vit_without_its_class_token() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **small_vit()).eval()
    images = torch.randn(2, 3, 16, 16)
    seen: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        actual = extract_features(model, images, READOUTS)
        layers = [model.norm(tokens)[:, 1:] for tokens in seen]
    torch.testing.assert_close(actual["avg"], layers[-1].mean(1))
    torch.testing.assert_close(actual["first"], layers[-1][:, 0])
    torch.testing.assert_close(actual["last"], layers[-1][:, 3])
    torch.testing.assert_close(actual["last4"], torch.cat([layer.mean(1) for layer in layers], -1))


def test_fit__timm_vit(tmp_path: Path) -> None:
    model = probe(BackboneConfig("vit_tiny_patch16_224", None, small_vit()))
    fit_probe(tmp_path, model)
    assert set(model.results["linear"]["by_pooling"]) == set(READOUTS)


def test_fit__convolutional_network(tmp_path: Path) -> None:
    """Feature maps instead of tokens, and batch norm's counters among the buffers."""
    config = BackboneConfig("test_resnet")
    model = probe(config)
    before = weights_hash(model.backbone)
    fit_probe(tmp_path, model, max_epochs=1)
    assert model.results["backbone"]["sha256"] == before
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        maps = model.backbone.forward_features(images)
        torch.testing.assert_close(extract_features(model.backbone, images, ["avg"])["avg"], maps.mean((2, 3)))


def test_weights_hash__every_value_counts() -> None:
    model = nn.BatchNorm1d(3)
    hashes = {weights_hash(model)}
    model.weight.data[1] += 1e-6
    hashes.add(weights_hash(model))
    model.num_batches_tracked += 1
    hashes.add(weights_hash(model))
    assert len(hashes) == 3


# --- few shots --------------------------------------------------------------------------------------------------------


def test_split_for_selection__as_many_of_every_class() -> None:
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 0, 0, 1, 2])

    def split(seed: int) -> tuple[list[int], list[int]]:
        shots, held = split_for_selection(labels, 2, 0.2, torch.Generator().manual_seed(seed))
        return shots.tolist(), held.tolist()

    shots, held = split(0)
    assert labels[shots].bincount().tolist() == [2, 2, 2]
    assert len(held) == 2
    assert not set(shots) & set(held)
    assert split(0) == (shots, held)
    assert any(set(split(seed)[0]) != set(shots) for seed in range(1, 5))


def test_split_for_selection__everything_without_shots() -> None:
    kept, held = split_for_selection(torch.tensor([3, 1, 3, 1, 1]), None, 0.4, torch.Generator().manual_seed(0))
    assert len(held) == 2
    assert sorted([*kept.tolist(), *held.tolist()]) == [0, 1, 2, 3, 4]


def test_split_for_selection__no_image_left_to_choose_on() -> None:
    with pytest.raises(ConfigError, match="leaves no training image"):
        split_for_selection(torch.tensor([0, 0, 1, 1]), 2, 0.1, torch.Generator())


def test_errors__too_few_images_for_the_shots(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.num_shots=50, but class \d has \d+ training images"):
        fit_probe(tmp_path, probe(num_shots=50))


# --- where the backbone comes from ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dino") / "last.ckpt"
    fit = trainer(max_epochs=1)
    fit.fit(dino(lr_warmup=0), datamodule=digits())
    fit.save_checkpoint(path)
    return path


def test_backbone__name_kwargs_and_teacher_from_a_dino_checkpoint(checkpoint: Path) -> None:
    model = probe(BackboneConfig(weights=str(checkpoint)))
    assert model.backbone_config.name == VIL
    assert model.backbone_config.kwargs["embed_dim"] == 32
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    loaded = model.backbone.state_dict()
    assert all(torch.equal(value, saved[f"teacher.backbone.{name}"]) for name, value in loaded.items())
    assert not all(torch.equal(value, saved[f"student.backbone.{name}"]) for name, value in loaded.items())


def test_backbone__given_kwargs_override_recorded_ones(checkpoint: Path) -> None:
    model = probe(BackboneConfig(weights=str(checkpoint), kwargs={"drop_path_rate": 0.3}))
    assert model.backbone_config.kwargs == {**SMALL, "drop_path_rate": 0.3}


def test_errors__weights_without_a_record(tmp_path: Path) -> None:
    path = tmp_path / "plain.pt"
    torch.save(timm.create_model(VIL, num_classes=0, **SMALL).state_dict(), path)
    with pytest.raises(ConfigError, match=r"does not record which backbone.*Set model\.backbone\.name"):
        probe(BackboneConfig(weights=str(path)))


def test_errors__missing_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.backbone\.weights.*nowhere"):
        probe(BackboneConfig(weights=str(tmp_path / "nowhere.ckpt")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"poolings": ["avg", "cls"]}, r"model\.poolings: 'cls' is not known.*bilateral_concat"),
        ({"knn_pooling": "cls"}, r"'cls' is not known"),
        ({"held_out": 0.0}, r"model\.held_out=0\.0"),
        ({"held_out": 1.0}, r"model\.held_out=1\.0"),
        ({"base_lrs": ()}, r"model\.base_lrs=\[\]"),
        ({"base_lrs": (0.1, 0.0)}, r"model\.base_lrs"),
        ({"num_shots": 0}, r"model\.num_shots=0"),
    ],
)
def test_errors__bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        probe(**arguments)


def test_errors__anything_but_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="use `fit`"):
        probe().setup("validate")


def test_errors__image_size_the_backbone_refuses() -> None:
    with pytest.raises(ConfigError, match=r"data\.img_size=20 does not fit the backbone"):
        trainer(max_epochs=1).fit(probe(), datamodule=FewDigits(20, 16))


def test_errors__a_probe_is_not_resumed(tmp_path: Path) -> None:
    fit_probe(tmp_path, probe()).save_checkpoint(tmp_path / "probe.ckpt")
    again = trainer(tmp_path, max_epochs=3)
    with pytest.raises(ConfigError, match="not resumed"):
        again.fit(probe(), datamodule=MoreDigits(16, 16), ckpt_path=tmp_path / "probe.ckpt", weights_only=True)
