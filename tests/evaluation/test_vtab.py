"""Transfer by the protocol of VTAB-1k."""

import copy
import hashlib
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path += [str(Path(__file__).parent)]
from small import subject

from vil_lightning.data import Digits
from vil_lightning.data.loading import TensorSource
from vil_lightning.errors import ConfigError
from vil_lightning.evaluation import vtab
from vil_lightning.evaluation.command import evaluate_parser
from vil_lightning.evaluation.vtab import SquareTransform, VTAB1k, fixed_rows, mean_of_means_interval
from vil_lightning.methods import Supervised

FAST: dict[str, Any] = {"num_seeds": 1, "epochs": 2, "num_train": 80, "num_val": 40, "batch_size": 16}
FEW: dict[str, Any] = {**FAST, "lrs": [1e-2, 1e-6]}


class Training:
    """What one training was given, and what came out."""

    def __init__(self, case: Any, method: Supervised, rows: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        self.lr, self.method, self.rows = method.base_lr, method, rows.tolist()
        self.transform, self.epochs, self.batch_size, self.seed = args
        self.clip = kwargs["gradient_clip_val"]
        self.scored = list(case.data.val_source.labels)
        self.correct = original(case, method, rows, *args, **kwargs)


original = vtab.fine_tune


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[Training]:
    found: list[Training] = []

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        found.append(Training(*args, **kwargs))
        return found[-1].correct

    monkeypatch.setattr(vtab, "fine_tune", recorded)
    return found


def digits(classes: str, **options: Any) -> Digits:
    return Digits(img_size=16, classes=classes, seed=0, **{"train_fraction": 0.4, **options})


def expected_rows(num_images: int, num_train: int, num_val: int) -> tuple[list[int], list[int]]:
    order = sorted(range(num_images), key=lambda i: hashlib.sha256(b"vtab/%d" % i).hexdigest())
    return sorted(order[:num_train]), sorted(order[num_train : num_train + num_val])


# --- the lists --------------------------------------------------------------------------------------------------------


def test_rows__are_those_of_a_fixed_list() -> None:
    train, val = fixed_rows(5000, 800, 200)
    assert (train.tolist(), val.tolist()) == expected_rows(5000, 800, 200)
    assert len(set(train.tolist()) | set(val.tolist())) == 1000
    assert train[:5].tolist() == [0, 19, 20, 24, 28]  # must never change
    assert val[:5].tolist() == [3, 11, 13, 14, 17]


def test_rows__do_not_depend_on_the_seed_or_on_random_numbers(trainings: list[Training]) -> None:
    for seed in (0, 7):
        case = subject()
        case.seed = seed
        torch.manual_seed(seed)
        VTAB1k(**FAST, lrs=[1e-3]).run(case)
    assert trainings[0].rows == trainings[1].rows
    assert [training.seed for training in trainings] == [0, 0]  # added to the subject's


# --- the protocol -----------------------------------------------------------------------------------------------------


def test_vtab__chooses_on_held_out_images_and_trains_again_on_all(trainings: list[Training]) -> None:
    case = subject()
    (score,) = VTAB1k(**{**FEW, "num_seeds": 2}).run(case)
    labels = case.data.train_source.labels
    train, val = expected_rows(len(labels), 80, 40)
    assert [(t.lr, t.seed) for t in trainings] == [(lr, s) for lr in (1e-2, 1e-6, 1e-2) for s in (0, 1)]
    for training in trainings[:4]:
        assert training.rows == train
        assert training.scored == [labels[i] for i in val]
    for training in trainings[4:]:
        assert training.rows == sorted(train + val)
        assert training.scored == list(case.data.val_source.labels)
    hits = torch.stack([training.correct for training in trainings[4:]]).double()
    assert score.value == pytest.approx(100 * hits.mean().item())
    assert score.num_images == hits.shape[1]
    assert score.low <= score.value <= score.high
    means = [100 * torch.stack([t.correct for t in trainings[i : i + 2]]).double().mean().item() for i in (0, 2)]
    assert means[0] > means[1]
    assert f"learning rate 0.01, {means[0]:.1f} %" in score.notes[0]


def test_vtab__takes_the_best_rate_wherever_it_stands(trainings: list[Training]) -> None:
    VTAB1k(**{**FEW, "lrs": [1e-6, 1e-2, 1e-7]}).run(subject())
    assert trainings[-1].lr == 1e-2


def test_vtab__test_labels_do_not_change_the_choice(trainings: list[Training]) -> None:
    case = subject()
    (honest,) = VTAB1k(**FEW).run(case)
    images = torch.stack([case.data.val_source[i][0] for i in range(len(case.data.val_source))])
    case.data.val_source = TensorSource(images, (torch.tensor(case.data.val_source.labels) + 1) % 4)
    (poisoned,) = VTAB1k(**FEW).run(case)
    assert poisoned.notes == honest.notes  # the rate and its accuracy
    assert [t.lr for t in trainings[:3]] == [t.lr for t in trainings[3:]]
    assert poisoned.value < honest.value - 20


def test_vtab__one_rate_is_not_chosen(trainings: list[Training]) -> None:
    (score,) = VTAB1k(**FAST, lrs=[1e-3]).run(subject())
    assert len(trainings) == 1
    assert score.notes[0] == "learning rate 0.001, not chosen"


def test_vtab__trains_by_the_published_recipe(trainings: list[Training]) -> None:
    case = subject()
    case.backbone.kwargs["drop_path_rate"] = 0.3  # that of pretraining
    VTAB1k(**FAST, lrs=[1e-3]).run(case)
    (training,) = trainings
    method = training.method
    assert (training.clip, training.transform, training.epochs, training.batch_size) == (None, None, 2, 16)
    assert (method.lr_warmup, method.warmup_lr, method.final_lr) == ("10%", 0.0, 0.0)
    assert (method.weight_decay, method.layer_decay, method.betas) == (0.05, 0.65, (0.9, 0.999))
    assert (method.mixup, method.label_smoothing, method.erase_prob, method.head_only) == (None, 0.0, 0.0, 0)
    assert method.lr == pytest.approx(1e-3 * 16 / 64)  # per 64 images
    assert "drop_path_rate" not in method.backbone_config.kwargs
    assert case.backbone.kwargs["drop_path_rate"] == 0.3


def test_vtab__runs_the_published_budget_unless_told_otherwise() -> None:
    task = VTAB1k()
    assert task.lrs == [1e-3, 7.5e-4, 5e-4, 2.5e-4, 1e-4]
    assert (task.num_seeds, task.epochs, task.num_train, task.num_val, task.batch_size) == (5, 50, 800, 200, 64)
    assert task._protocol().startswith("vtab-1k/changed=none/")
    reduced = VTAB1k(epochs=3, lrs=[1e-3])._protocol()
    assert "changed=lrs+epochs/" in reduced
    assert "epochs=3" in reduced


def test_vtab__repeated_runs_are_equal_and_change_nothing() -> None:
    case = subject(repeats=2)
    own = copy.copy(case.data.__dict__)
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    torch.manual_seed(5)
    first = VTAB1k(**FEW).run(case)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert case.data.__dict__ == own
    assert logging.getLogger("lightning.pytorch").level == logging.INFO
    assert VTAB1k(**FEW).run(case) == first


def test_vtab__a_timm_network() -> None:
    (score,) = VTAB1k(**{**FAST, "epochs": 20}, lrs=[1e-2]).run(subject("vit_tiny_patch16_224"))
    assert score.value > 50


# --- several data sets ------------------------------------------------------------------------------------------------


def test_vtab__means_count_data_sets_alike(trainings: list[Training]) -> None:
    sets = {"CIFAR-100": digits("0-3"), "SVHN": digits("4-9"), "EuroSAT": digits("5-8"), "mine": digits("2-6")}
    task = VTAB1k(**FAST, lrs=[1e-3], datasets=sets)
    case = subject()
    task.check(case)
    scores = {score.name.removeprefix("VTAB-1k, "): score for score in task.run(case)}
    assert list(scores) == [*sets, "natural, mean", "specialized, mean", "mean"]
    own = {name: 100 * t.correct.double().mean().item() for name, t in zip(sets, trainings, strict=True)}
    for name, value in own.items():
        assert scores[name].value == pytest.approx(value)
    assert scores["natural, mean"].value == pytest.approx((own["CIFAR-100"] + own["SVHN"]) / 2)
    assert scores["specialized, mean"].value == pytest.approx(own["EuroSAT"])
    assert scores["mean"].value == pytest.approx(sum(own.values()) / 4)
    assert scores["natural, mean"].notes == ("2 of the 7 data sets",)
    assert scores["mean"].protocol.endswith("/CIFAR-100+SVHN+EuroSAT+mine")
    assert scores["mean"].low < scores["mean"].value < scores["mean"].high


def test_vtab__there_are_nineteen_data_sets() -> None:
    assert [len(members) for members in vtab.GROUPS.values()] == [7, 4, 8]


def test_interval__of_several_means_is_that_of_independent_ones() -> None:
    """Variance of the mean of two independent means: (p q / n + p' q' / n') / 4."""
    first, second = torch.zeros(400, dtype=torch.float64), torch.zeros(100, dtype=torch.float64)
    first[:200], second[:20] = 1, 1
    low, high = mean_of_means_interval([first, second], num_resamples=4000)
    deviation = 100 * ((0.25 / 400 + 0.16 / 100) / 4) ** 0.5
    assert (low + high) / 2 == pytest.approx(35, abs=0.4)
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.06)
    same = mean_of_means_interval([first, first], num_resamples=4000)  # two sets of images, not one of twice the weight
    assert same[1] - same[0] == pytest.approx(2 * 1.96 * 100 * (0.25 / 400 / 2) ** 0.5, rel=0.06)


def test_square__sees_the_whole_image() -> None:
    image = torch.zeros(3, 10, 40, dtype=torch.uint8)
    image[:, :, -8:] = 255  # the centre crop of 10 px would not see it
    result = SquareTransform(20)(image)
    assert result.shape == (3, 20, 20)
    assert (result[:, :, -3:] == 255).all()
    assert (result[:, :, :14] == 0).all()


def test_vtab__images_are_resized_to_a_square_in_training_and_scoring() -> None:
    case = VTAB1k(**FAST)._cases(subject(repeats=2))["Digits"]
    assert case.data.repeats == 1  # an epoch is a pass over all images
    assert isinstance(case.data.eval_transform, SquareTransform)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"num_val": 0}, "num_val=0 must be at least 1"),
        ({"lrs": []}, "lrs="),
        ({"lrs": [1e-3, 1e-3]}, "different positive numbers"),
        ({"lrs": [1e-3, 0.0]}, "different positive numbers"),
        ({"datasets": {}}, "datasets is empty"),
        ({"datasets": {"dtd": None, "D-T-D": None}}, "differ in punctuation only"),
    ],
)
def test_vtab__wrong_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VTAB1k(**kwargs)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (VTAB1k(num_train=170), "174 training and 144 val images; num_train=170 and num_val=200 need 370"),
        (VTAB1k(**FAST, layer_decay=1.5), "layer_decay=1.5"),
        (VTAB1k(**FAST, datasets={"other": Digits(img_size=20)}), "img_size of data set other=20"),
    ],
)
def test_vtab__what_does_not_fit_is_refused_before_training(
    task: VTAB1k, message: str, trainings: list[Training]
) -> None:
    with pytest.raises(ConfigError, match=message):
        task.check(subject("vit_tiny_patch16_224"))
    assert trainings == []


def test_vtab__data_sets_are_read_from_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "suite.yaml"
    recipe.write_text(
        "data: vil_lightning.data.Digits\n"
        "tasks:\n"
        "  - class_path: vil_lightning.evaluation.vtab.VTAB1k\n"
        "    init_args:\n"
        "      epochs: 3\n"
        "      datasets:\n"
        "        svhn:\n"
        "          class_path: vil_lightning.data.Digits\n"
        "          init_args: {img_size: 16, classes: 0-3}\n"
    )
    parser = evaluate_parser()
    config = parser.parse_args(["--config", str(recipe)])
    (task,) = (getattr(parser, "instantiate", None) or parser.instantiate_classes)(config).tasks
    assert isinstance(task.datasets["svhn"], Digits)
    assert task.epochs == 3
