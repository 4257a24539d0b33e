"""Scores on shifted images."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

sys.path += [str(Path(__file__).parent)]
from small import VIL, subject

from vil_lightning.data.images import EncodedImage
from vil_lightning.errors import ConfigError
from vil_lightning.evaluation import LogisticRegression, Robustness
from vil_lightning.evaluation.corruptions import STRENGTHS, CorruptedEvalTransform, corrupt
from vil_lightning.evaluation.logistic import logistic_regression
from vil_lightning.evaluation.robustness import folder_source
from vil_lightning.evaluation.subject import Subject
from vil_lightning.methods.backbone import BackboneConfig, build_backbone


def write(folder: Path, case: Subject, classes: list[str], change: Any = None, count: int = 5) -> Path:
    """The first val images of some classes as files."""
    labels = torch.tensor(case.data.val_source.labels)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in (labels == case.data.classes.index(name)).nonzero().flatten()[:count].tolist():
            image, _ = case.data.val_source[i]
            pixels = image.numpy() if not isinstance(image, EncodedImage) else None
            assert pixels is not None
            pixels = pixels if change is None else change(pixels)
            Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(folder / name / f"{i:04}.png")
    return folder


# --- corruptions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corruption", STRENGTHS)
def test_corrupt__stronger_is_further_away(corruption: str) -> None:
    coarse = 255 * torch.rand(1, 3, 9, 9)
    image = torch.nn.functional.interpolate(coarse, (64, 64), mode="bilinear")[0].to(torch.uint8)
    distances = []
    for severity in range(1, 6):
        result = corrupt(image, corruption, severity, torch.Generator().manual_seed(0))
        assert result.shape == image.shape
        assert result.dtype == torch.uint8
        distances.append((result.float() - image.float()).square().mean().item())
    assert distances[0] > 0
    assert distances == sorted(distances)
    assert len(set(distances)) == 5


def test_corrupt__noise_and_contrast_have_their_strength() -> None:
    image = torch.full((3, 100, 100), 128, dtype=torch.uint8)
    noisy = corrupt(image, "gaussian_noise", 2, torch.Generator().manual_seed(0)).float()
    assert noisy.std().item() == pytest.approx(255 * 0.12, rel=0.02)
    halves = torch.cat([torch.zeros(3, 4, 8), torch.full((3, 4, 8), 200.0)], dim=1).to(torch.uint8)
    flat = corrupt(halves, "contrast", 3, torch.Generator())
    assert flat.unique().tolist() == [80, 120]  # 100 -+ 0.2 * 100


def test_corrupted_transform__depends_on_the_image_alone() -> None:
    image = torch.full((3, 16, 16), 128, dtype=torch.uint8)
    transform = CorruptedEvalTransform(16, 1.0, "gaussian_noise", 1)

    def of(index: int) -> torch.Tensor:
        return transform(image, lambda view: np.random.default_rng(index))

    assert torch.equal(of(1), of(1))
    assert not torch.equal(of(1), of(2))


# --- scores -----------------------------------------------------------------------------------------------------------


def test_robustness__val_is_the_ordinary_score_and_corruptions_are_worse(tmp_path: Path) -> None:
    case = subject()
    case.cache_dir = tmp_path
    task = Robustness(corruptions=["contrast", "gaussian_noise"], severities=[1, 5])
    task.check(case)
    scores = {score.name: score for score in task.run(case)}
    assert list(scores) == ["val", "contrast", "gaussian_noise", "corruptions, mean"]
    assert scores["val"].value == LogisticRegression(Cs=[0.01]).run(case)[0].value
    assert scores["contrast"].value < scores["val"].value
    mean = (scores["contrast"].value + scores["gaussian_noise"].value) / 2
    assert scores["corruptions, mean"].value == pytest.approx(mean)
    assert len(list(tmp_path.iterdir())) == 2 + 4  # every corruption and severity has features of its own


def test_robustness__a_corruption_is_the_mean_of_its_severities() -> None:
    case = subject()
    values = [Robustness(corruptions=["contrast"], severities=[i]).run(case)[1].value for i in (1, 5)]
    (_, both) = Robustness(corruptions=["contrast"], severities=[1, 5]).run(case)
    assert both.value == pytest.approx(sum(values) / 2)
    assert values[0] > values[1]


def test_robustness__another_seed_is_another_noise_also_from_a_cache(tmp_path: Path) -> None:
    keys = []
    torch.save(subject().build().state_dict(), tmp_path / "weights.pt")
    for seed in (0, 1, 0):
        case = subject(weights=str(tmp_path / "weights.pt"), seed=seed)
        case.cache_dir = tmp_path
        shifted = case.on_val(transform=CorruptedEvalTransform(16, 1.0, "gaussian_noise", 3))
        keys.append(shifted.features("val", ["avg"])["avg"].key)
    assert keys[0] == keys[2] != keys[1]


def test_robustness__workers_change_nothing() -> None:
    task = Robustness(corruptions=["gaussian_noise"], severities=[3])
    assert task.run(subject()) == task.run(subject(num_workers=2))


def test_robustness__a_folder_of_all_classes_is_val_again(tmp_path: Path) -> None:
    case = subject()
    folder = write(tmp_path / "sketch", case, case.data.classes, count=1000)
    val, sketch = Robustness(sets={"sketch": str(folder)}).run(case)
    assert sketch.value == val.value
    assert sketch.num_images == val.num_images


def test_robustness__a_subset_of_the_classes_only_competes_with_itself(tmp_path: Path) -> None:
    case = subject()
    chosen = [case.data.classes[1], case.data.classes[3]]
    folder = write(tmp_path / "a", case, chosen, lambda pixels: 255 - pixels, count=20)
    _, score = Robustness(sets={"a": str(folder)}, readout="avg").run(case)
    train = case.features("train", ["avg"])["avg"]
    shifted = case.on_val(folder_source(folder, case.data.classes)).features("val", ["avg"])["avg"]
    fitted = logistic_regression(
        train.features, train.labels, shifted.features, shifted.labels, Cs=[0.01], seed=0
    ).classifier
    hits = []
    for row, label in zip(shifted.features, shifted.labels.tolist(), strict=True):
        logits = ((row - fitted.mean) / fitted.std) @ fitted.weight.T + fitted.bias
        hits.append((1 if logits[1] > logits[3] else 3) == label)
    assert score.value == pytest.approx(100 * sum(hits) / len(hits))
    assert "classes=2" in score.protocol


def test_robustness__layout_of_imagenet_c(tmp_path: Path) -> None:
    case = subject()
    for severity in (1, 2):
        write(
            tmp_path / f"c/dark/{severity}",
            case,
            case.data.classes,
            lambda p, s=severity: (p / (8 * s)).astype("uint8"),
        )
        write(tmp_path / f"c/same/{severity}", case, case.data.classes)
    scores = {s.name: s for s in Robustness(corrupted=str(tmp_path / "c"), severities=[1, 2]).run(case)}
    assert list(scores) == ["val", "dark, folder", "same, folder", "corruptions, mean"]
    assert scores["dark, folder"].value < scores["same, folder"].value
    assert scores["same, folder"].num_images == 20


def test_robustness__a_network_with_a_head_uses_it(tmp_path: Path) -> None:
    case = subject()
    torch.manual_seed(3)
    network = build_backbone(BackboneConfig("vil2_tiny_patch16_224", kwargs=case.backbone.kwargs), num_classes=4)
    torch.nn.init.normal_(network.head.weight)  # type: ignore[union-attr, arg-type]
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    case = subject(weights=str(tmp_path / "weights.pt"))
    val, contrast = Robustness(corruptions=["contrast"], severities=[5]).run(case)
    assert val.protocol == "robustness/val/head"
    images, labels = case.data.val_images(list(range(len(case.data.val_source))))
    with torch.no_grad():
        flat = torch.stack([corrupt(image, "contrast", 5, torch.Generator()) for image in images])
        for score, pixels in ((val, images), (contrast, flat)):
            correct = network.eval()(case.data.normalize(pixels)).argmax(1) == torch.tensor(labels)
            assert score.value == pytest.approx(100 * correct.double().mean().item())
    assert (
        Robustness(corruptions=["contrast"], classifier="logistic")
        .run(case)[0]
        .protocol.startswith("robustness/val/logistic")
    )


def with_head(path: Path, num_classes: int = 4, classes: list[str] | None = None) -> Subject:
    """A checkpoint with a classifier, of this project if it names its classes."""
    network = build_backbone(BackboneConfig("vil2_tiny_patch16_224", kwargs=dict(VIL)), num_classes=num_classes)
    state: dict[str, Any] = network.state_dict()
    if classes is not None:
        weights = {f"backbone.{name}": value for name, value in state.items()}
        state = {
            "state_dict": weights,
            "classes": classes,
            "backbone": {"name": "vil2_tiny_patch16_224", "kwargs": VIL},
        }
    torch.save(state, path)
    return subject(weights=str(path))


def test_robustness__the_head_skips_unreadable_images(tmp_path: Path) -> None:
    case = with_head(tmp_path / "weights.pt")
    folder = write(tmp_path / "a", case, case.data.classes)
    whole = Robustness(sets={"a": str(folder)}).run(case)[1]
    (folder / "0").joinpath(sorted(p.name for p in (folder / "0").iterdir())[0]).write_bytes(b"no picture")
    case.data.max_bad_fraction = 0.5
    assert Robustness(sets={"a": str(folder)}).run(case)[1].num_images == whole.num_images - 1 == 19


def test_robustness__a_head_of_other_classes_is_not_taken(tmp_path: Path) -> None:
    cases = [
        with_head(tmp_path / "more.pt", num_classes=7),
        with_head(tmp_path / "named.pt", classes=["cat", "dog", "car", "ship"]),
    ]
    for case in cases:
        with pytest.raises(ConfigError, match=r"classifier=head, but .* holds a classifier of . classes"):
            Robustness(corruptions=["contrast"], classifier="head").check(case)
        assert "logistic" in Robustness(corruptions=["contrast"], severities=[1]).run(case)[0].protocol
    named = with_head(tmp_path / "right.pt", classes=["0", "1", "2", "3"])
    assert Robustness(corruptions=["contrast"], severities=[1]).run(named)[0].notes == ()
    unnamed = with_head(tmp_path / "unnamed.pt")
    assert "does not name its classes" in Robustness(corruptions=["contrast"], severities=[1]).run(unnamed)[0].notes[0]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "sets, corrupted and corruptions are all empty"),
        ({"corruptions": ["fog"]}, "corruptions: 'fog' is not known. Available: gaussian_noise,"),
        ({"corruptions": ["contrast"], "severities": [6]}, "severities: 6 is not known"),
        ({"corruptions": ["contrast"], "readout": "mean"}, "Robustness: readout 'mean' is not known"),
    ],
)
def test_robustness__wrong_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Robustness(**kwargs)


def test_robustness__what_does_not_fit_is_refused_before_features(tmp_path: Path) -> None:
    case = subject()
    (tmp_path / "a/seven").mkdir(parents=True)
    (tmp_path / "b/0").mkdir(parents=True)
    for kwargs, message in (
        ({"sets": {"a": str(tmp_path / "a")}}, "1 folder.* named as no class of the data: seven. The classes are 0, 1"),
        ({"sets": {"b": str(tmp_path / "b")}}, "b holds no images"),
        ({"sets": {"c": str(tmp_path / "c")}}, "c holds no class folders"),
        ({"corrupted": str(tmp_path / "c")}, "corrupted=.*c is no folder"),
        ({"corruptions": ["contrast"], "classifier": "head"}, "classifier=head, but .* holds no classifier"),
    ):
        with pytest.raises(ConfigError, match=message):
            Robustness(**kwargs).check(case)  # type: ignore[arg-type]
