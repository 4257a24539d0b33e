"""Fine-tuning as a score."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "integration")]
from shrunk import PRETRAIN, invoke
from small import subject

from vil_lightning.data import MultiCrop, TrainTransform
from vil_lightning.data.loading import TransformedDataset
from vil_lightning.errors import ConfigError
from vil_lightning.evaluation import FineTune, finetune
from vil_lightning.evaluation.inputs import few_labels
from vil_lightning.evaluation.subject import Subject
from vil_lightning.methods import Supervised
from vil_lightning.methods.backbone import BackboneConfig

FAST: dict[str, Any] = {"epochs": 2, "head_epochs": 0, "batch_size": 16}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Supervised]:
    """The networks that were trained."""
    found: list[Supervised] = []
    original = finetune.fine_tune

    def recorded(case: Any, method: Supervised, *args: Any) -> torch.Tensor:
        found.append(method)
        return original(case, method, *args)

    monkeypatch.setattr(finetune, "fine_tune", recorded)
    return found


def test_finetune__is_the_accuracy_of_the_network_in_the_end(trained: list[Supervised]) -> None:
    case = subject()
    (score,) = FineTune(**FAST, drop_path_rate=0.5).run(case)  # which must not be active when the network is scored
    assert trained[0].trainer.global_step == 2 * (len(case.data.train_source) // 16)
    network = trained[0].backbone.eval()
    images, labels = case.data.val_images(list(range(len(case.data.val_source))))
    with torch.no_grad():
        correct = network(case.data.normalize(images)).argmax(1) == torch.tensor(labels)
    assert score.value == pytest.approx(100 * correct.double().mean().item())
    assert score.low <= score.value <= score.high
    assert score.num_images == len(labels)


def test_finetune__learns(trained: list[Supervised]) -> None:
    (score,) = FineTune(epochs=8, head_epochs=1, batch_size=16, base_lr=0.2).run(subject())
    assert score.value > 80


def test_finetune__neither_the_subject_nor_random_numbers_change() -> None:
    case = subject()
    before = (case.data.train_source, case.data.batch_size, case.data.train_transform, case.data.seed)
    torch.manual_seed(5)
    np.random.seed(5)
    first = FineTune(**FAST).run(case)
    drawn = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    assert torch.equal(drawn[0], torch.rand(3))
    assert np.array_equal(drawn[1], np.random.rand(3))
    assert before == (case.data.train_source, case.data.batch_size, case.data.train_transform, case.data.seed)
    assert FineTune(**FAST).run(case) == first


def test_finetune__sees_the_few_labels_only(monkeypatch: pytest.MonkeyPatch, trained: list[Supervised]) -> None:
    case = subject()
    seen: set[int] = set()
    original = TransformedDataset.__getitem__

    def watched(self: TransformedDataset, key: Any) -> Any:
        if isinstance(self.transform, TrainTransform):
            seen.add(self.source.indices[key[1]])  # type: ignore[attr-defined]
        return original(self, key)

    monkeypatch.setattr(TransformedDataset, "__getitem__", watched)
    task = FineTune(**FAST, per_class=4, num_draws=2)
    task.check(case)
    (score,) = task.run(case)
    labels = torch.tensor(case.data.train_source.labels)
    drawn = [set(few_labels(labels, per_class=4, seed=seed).tolist()) for seed in (0, 1)]
    assert seen == drawn[0] | drawn[1]
    assert len(trained) == 2
    assert "4-per-class" in score.protocol
    assert "draws=2" in score.protocol


def test_finetune__layer_decay_holds_the_lower_layers_back(trained: list[Supervised]) -> None:
    case = subject()
    start = case.build().state_dict()
    moved = {}
    for decay in (1.0, 0.05):
        FineTune(**FAST, layer_decay=decay, weight_decay=0.0).run(case)
        end = trained[-1].backbone.state_dict()
        moved[decay] = [(end[name] - start[name]).norm().item() for name in ("patch_embed.proj.weight", "norm.weight")]
    assert moved[0.05][0] < 0.05 * moved[1.0][0]
    assert moved[0.05][1] > 0.02 * moved[1.0][1]


def test_finetune__starts_from_the_subjects_weights(trained: list[Supervised], tmp_path: Path) -> None:
    weights = {name: torch.randn_like(value) for name, value in subject().build().state_dict().items()}
    torch.save(weights, tmp_path / "weights.pt")
    case = subject(weights=str(tmp_path / "weights.pt"))
    FineTune(epochs=1, head_epochs=0, base_lr=1e-9, batch_size=16, weight_decay=0.0).run(case)
    end = trained[0].backbone.state_dict()
    torch.testing.assert_close(end["patch_embed.proj.weight"], weights["patch_embed.proj.weight"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": 2, "head_epochs": 2}, "head_epochs=2 from 0 to below epochs"),
        ({"num_draws": 3}, "num_draws=3 draws images, but all are used"),
        ({"train_transform": MultiCrop(16, 8)}, "train_transform=MultiCrop must be a TrainTransform"),
    ],
)
def test_finetune__wrong_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FineTune(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"per_class": 4000}, "per_class=4000"), ({"layer_decay": 1.5}, "layer_decay=1.5")]
)
def test_finetune__what_does_not_fit_is_refused_before_training(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FineTune(**kwargs).check(subject())


def test_finetune__what_the_network_does_not_take_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match=r"drop_path_rate=2\.0"):
        FineTune(drop_path_rate=2.0)
    with pytest.raises(ConfigError, match=r"train_transform\.img_size=20"):
        FineTune(train_transform=TrainTransform(20)).check(subject("vit_tiny_patch16_224"))
    with pytest.raises(ConfigError, match="drop_path_rate"):
        FineTune(drop_path_rate=0.1).check(subject("vgg11"))


def test_finetune__check_leaves_random_numbers_alone() -> None:
    case = subject()
    torch.manual_seed(5)
    FineTune(drop_path_rate=0.1).check(case)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


def test_finetune__starts_from_the_teacher_of_a_dino_checkpoint(tmp_path: Path, trained: list[Supervised]) -> None:
    result = invoke([*PRETRAIN, "--run_name", "dino"], tmp_path)
    assert result.code == 0, result.err
    path = tmp_path / "checkpoints/dino/last.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    name = "patch_embed.proj.weight"
    teacher, student = state[f"teacher.backbone.{name}"], state[f"student.backbone.{name}"]
    assert (teacher - student).abs().max() > 1e-4  # so that the tolerance below tells them apart
    case = Subject(BackboneConfig(None, str(path)), subject().data, progress=False, device="cpu")
    task = FineTune(epochs=1, head_epochs=0, base_lr=1e-9, batch_size=16, weight_decay=0.0)
    task.check(case)
    task.run(case)
    torch.testing.assert_close(trained[0].backbone.state_dict()[name], teacher, atol=1e-5, rtol=0)


def test_finetune__a_timm_network_learns() -> None:
    task = FineTune(epochs=20, head_epochs=0, batch_size=16, base_lr=0.2)
    case = subject("vit_tiny_patch16_224")
    task.check(case)
    (score,) = task.run(case)
    assert score.value > 60


def test_finetune__another_augmentation_is_another_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "fine_tune", lambda *args: torch.tensor([True, False]))
    plain: dict[str, Any] = {"three_augment": False, "hflip_prob": 0.0}
    scores = [
        FineTune(**FAST, train_transform=TrainTransform(16, color_jitter=jitter, **plain)).run(subject())[0]
        for jitter in ((0.0, 0.0, 0.0, 0.0), (0.3, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0))
    ]
    assert scores[0] == scores[2]
    assert scores[0].protocol != scores[1].protocol
    assert '"color_jitter": [0.3, 0.0, 0.0, 0.0]' in scores[1].notes[1]
