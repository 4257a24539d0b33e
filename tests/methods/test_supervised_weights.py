"""Fine-tuning: which weights a supervised run starts with, what it trains of them, and what others take from it."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm
import torch
from lightning.pytorch.utilities import rank_zero_info
from test_resume import same
from tiny import SMALL, VIL, FewDigits, Steps, backbone, built, dino, pictures, state, supervised, trainer
from torch import Tensor

from vil_lightning import load_weights
from vil_lightning.backbones.layers import resize_position_embedding
from vil_lightning.data.loading import ImageSource
from vil_lightning.errors import ConfigError
from vil_lightning.methods import BackboneConfig, LinearProbe, Supervised
from vil_lightning.methods.backbone import build_backbone, resolve_backbone


class FiveDigits(FewDigits):
    """Another number of classes."""

    def build_sources(self) -> tuple[ImageSource, ImageSource, list[str]]:
        train, val, classes = super().build_sources()
        for source in (train, val):
            source.labels = [label % 5 for label in source.labels]  # type: ignore[attr-defined]
        return train, val, classes[:5]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a supervised run on ten classes, with a moving average."""
    path = tmp_path_factory.mktemp("classifier") / "last.ckpt"
    fit = trainer(max_epochs=1)
    fit.fit(supervised(ema_decay=0.5, drop_path_rate=0.1), datamodule=pictures())
    fit.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a self-distillation run: no classifier, a student and a teacher."""
    path = tmp_path_factory.mktemp("pretrained") / "last.ckpt"
    model = dino()
    content = {f"{name}": value + (0.5 if name.startswith("teacher.") else 0) for name, value in state(model).items()}
    torch.save({"state_dict": content, "backbone": {"name": VIL, "kwargs": SMALL}}, path)
    return path


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts: list[str] = []

    def keep(text: str) -> None:
        texts.append(text)
        rank_zero_info(text)

    monkeypatch.setattr("vil_lightning.methods.backbone.rank_zero_info", keep)
    return texts


def average(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, weights_only=True)["state_dict"]
    return {name.removeprefix("ema.module."): v for name, v in content.items() if name.startswith("ema.module.")}


def body(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if not name.startswith("head.")}


def start(model: Supervised, data: FewDigits | None = None) -> dict[str, Tensor]:
    """The weights that a run starts with."""
    steps = Steps()
    fit = trainer(max_epochs=1, limit_train_batches=1, callbacks=[steps])
    model.lr_warmup = 0
    fit.fit(model, datamodule=data or pictures())
    return state(steps.start)


# --- the classifier ---------------------------------------------------------------------------------------------------


def test_weights__without_a_classifier_need_a_new_head(pretrained: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)model\.backbone\.weights.*head\.weight.*model\.new_head=true"):
        start(supervised(weights=pretrained))


def test_weights__of_a_teacher_get_a_new_head(pretrained: Path, messages: list[str]) -> None:
    model = supervised(weights=pretrained, new_head=True)
    first = start(model)
    content = torch.load(pretrained, weights_only=True)["state_dict"]
    for name, value in body(first).items():
        if not name.startswith("fc_norm."):
            assert torch.equal(value, content[f"teacher.backbone.{name}"]), name
    assert first["head.weight"].shape == (10, 64)
    assert 0 < float(first["head.weight"].abs().max()) < 1e-3
    assert "The classifier (10 classes) is new." in messages
    assert any("missing" in text and str(pretrained) in text for text in messages)


def test_weights__are_taken_from_the_moving_average(classifier: Path) -> None:
    first = start(supervised(weights=classifier))
    content = torch.load(classifier, weights_only=True)["state_dict"]
    assert same(first, average(classifier))
    assert not torch.equal(first["head.weight"], content["backbone.head.weight"])


def test_weights__other_recipes_take_the_moving_average(classifier: Path) -> None:
    probe = LinearProbe(BackboneConfig(weights=str(classifier)))
    frozen = build_backbone(probe.backbone_config)
    assert same(state(frozen), {n: average(classifier)[n] for n in state(frozen)})
    assert probe.backbone_config.kwargs["drop_path_rate"] == 0.1  # as recorded
    model = timm.create_model(VIL, num_classes=10, **SMALL)
    load_weights(model, classifier)
    assert same(state(model), average(classifier))


def test_classifier__of_another_size_is_refused(classifier: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)head\.weight: file \(10, 64\), model \(5, 64\).*model\.new_head=true"):
        start(supervised(weights=classifier, num_classes=5), pictures(data=FiveDigits))


@pytest.mark.parametrize("data", [FewDigits, FiveDigits])
def test_classifier__new_whatever_the_file_holds(classifier: Path, data: type[FewDigits], messages: list[str]) -> None:
    count = 5 if data is FiveDigits else 10
    model = supervised(weights=classifier, new_head=True)
    first = start(model, pictures(data=data))
    assert model.num_classes == count
    assert same(body(first), body(average(classifier)))
    assert first["head.weight"].shape == (count, 64)
    assert not torch.equal(first["head.weight"][:5], average(classifier)["head.weight"][:5])
    assert not first["head.bias"].any()
    assert f"The classifier ({count} classes) is new." in messages


def test_classes__number_is_that_of_the_weights_or_of_the_data(classifier: Path) -> None:
    scored = supervised(weights=classifier)
    trainer(limit_val_batches=1).validate(scored, datamodule=pictures(), verbose=False)
    assert scored.num_classes == 10
    fresh = supervised()
    trainer(limit_val_batches=1).validate(fresh, datamodule=pictures(data=FiveDigits), verbose=False)
    assert fresh.num_classes == 5
    assert fresh.metrics.keys() == {"loss", "acc1"}  # the best five of five are no score


@pytest.mark.parametrize("function", ["fit", "validate", "test"])
def test_classes__that_do_not_match_are_refused_before_a_step(classifier: Path, function: str) -> None:
    class NoStep(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise AssertionError

        on_validation_batch_start = on_test_batch_start = on_train_batch_start

    run = trainer(max_epochs=2, callbacks=[NoStep()], limit_val_batches=1.0)
    with pytest.raises(ConfigError, match=r"has 10 classes, the data 5.*model\.new_head=true"):
        getattr(run, function)(supervised(weights=classifier), datamodule=pictures(data=FiveDigits))


def test_classes__names_go_with_the_weights(classifier: Path) -> None:
    model = supervised(weights=classifier)
    trainer().predict(model, datamodule=pictures())
    assert model.classes == [str(digit) for digit in range(10)]
    model = supervised(weights=classifier, new_head=True, num_classes=3)  # those are others
    trainer().predict(model, datamodule=pictures())
    assert model.classes == []


def test_classes__names_of_another_number_are_left_out(classifier: Path, tmp_path: Path) -> None:
    content = torch.load(classifier, weights_only=True)
    torch.save({**content, "classes": ["cat", "dog"]}, tmp_path / "odd.ckpt")
    assert built(supervised(weights=tmp_path / "odd.ckpt")).classes == []


def test_timm_weights__with_another_classifier_need_a_new_head() -> None:
    config = resolve_backbone(BackboneConfig("resnet18.a1_in1k", None, {"pretrained": True}))
    with pytest.raises(
        ConfigError, match=r"kwargs\.pretrained: the classifier.*1000 classes, 10.*model\.new_head=true"
    ):
        build_backbone(config, 10)


# --- the body ---------------------------------------------------------------------------------------------------------


def test_position_embedding__is_resampled_to_the_images(classifier: Path, messages: list[str]) -> None:
    model = supervised(weights=classifier)
    model.backbone_config.kwargs = {**SMALL, "img_size": 32}
    first = start(model, FewDigits(32, 8, eval_batch_size=8, seed=0))
    saved = average(classifier)
    assert first["pos_embed.embed"].shape == (1, 4, 4, 32)
    expected = resize_position_embedding(saved["pos_embed.embed"], (4, 4))
    assert torch.equal(first["pos_embed.embed"], expected)
    assert any("resized 1 (pos_embed.embed)" in text for text in messages)
    del first["pos_embed.embed"], saved["pos_embed.embed"]
    assert same(first, saved)


def moved(model: Supervised, **settings: Any) -> list[set[str]]:
    """Parameters that have changed, after every batch."""
    steps = Steps()
    fit = trainer(max_epochs=1, callbacks=[steps], **settings)
    fit.fit(model, datamodule=pictures())
    first = steps.start.state_dict()
    return [{n for n in first if not torch.equal(first[n], after[f"backbone.{n}"])} for after in steps.states]


def test_freeze__trains_the_others() -> None:
    model = supervised(freeze=["patch_embed.", "pos_embed", "blocks.0."], lr_warmup=0, weight_decay=0.5, ema_decay=0.9)
    names = {name for name, _ in built(supervised(num_classes=10)).backbone.named_parameters()}
    frozen = {name for name in names if name.startswith(("patch_embed.", "pos_embed", "blocks.0."))}
    assert len(frozen) > 10
    assert moved(model)[-1] == names - frozen
    grouped = {id(p) for group in model.trainer.optimizers[0].param_groups for p in group["params"]}
    assert grouped == {id(p) for name, p in model.backbone.named_parameters() if name not in frozen}


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        (["blocks.7."], r"model\.freeze: no parameter of vil2_tiny_patch16_224 starts with 'blocks\.7\.'.*patch_embed"),
        (["patch_embed.", "wings"], r"model\.freeze: no parameter .*'wings'"),
        ([""], r"model\.freeze=\[''\] leaves nothing to train"),
        (["patch_embed", "pos_embed", "blocks", "norm", "fc_norm", "head"], "leaves nothing to train"),
    ],
    ids=str,
)
def test_freeze__refuses(prefixes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(supervised(num_classes=10, freeze=prefixes))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_head_only__body_rests_and_then_moves(accumulate: int) -> None:
    model = supervised(head_only="50%", lr_warmup=0, weight_decay=0.5)
    changed = moved(model, accumulate_grad_batches=accumulate)
    head = {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    everything = {name for name, _ in model.backbone.named_parameters()}
    # Four batches: the first half of the steps, the second half. (A new classifier is near zero and has no bias, so the
    # norm before it may rest at first.)
    assert changed[1] <= head
    assert "head.weight" in changed[1]
    assert changed[3] == everything
    if accumulate == 1:
        assert changed[2] == everything


def test_backbone__of_another_library() -> None:
    """Everything that is done by name holds for a network with batch norms and another name for its classifier."""
    config = BackboneConfig("resnet18", None, {"zero_init_last": False})
    rates = {"lr_warmup": 0, "base_lr": 1.0, "final_lr": 1e-3, "layer_decay": 0.8}
    model = Supervised(config, freeze=["conv1.", "layer1."], head_only="1 step", ema_decay=0.9, **rates)
    changed = moved(model, limit_train_batches=2)
    parameters = {name for name, _ in model.backbone.named_parameters()}
    assert changed[0] & parameters == {"fc.weight", "fc.bias"}
    assert changed[1] & parameters == {n for n in parameters if not n.startswith(("conv1.", "layer1."))}


def test_recorded_kwargs__go_with_the_weights(classifier: Path) -> None:
    config = BackboneConfig(None, str(classifier), {"drop_path_rate": 0.3})
    model = built(Supervised(config))
    assert model.backbone_config.name == VIL
    assert model.backbone_config.kwargs == {**backbone().kwargs, "drop_path_rate": 0.3}
    assert model.num_classes == 10
