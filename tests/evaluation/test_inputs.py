"""Splits, few labels and statistics of features."""

import pytest
import torch
from sklearn.preprocessing import StandardScaler

from vil_lightning.errors import ConfigError
from vil_lightning.evaluation.inputs import channel_statistics, check_labels, chunks, few_labels, split_held_out

LABELS = torch.arange(40) % 4


def test_few_labels__lists_never_change() -> None:
    # Written down once: a change would silently make published numbers incomparable.
    assert few_labels(LABELS, per_class=2).tolist() == [10, 16, 25, 28, 29, 31, 38, 39]
    assert few_labels(LABELS, per_class=2, seed=1).tolist() == [0, 1, 3, 11, 18, 20, 37, 38]
    assert few_labels(LABELS, fraction=0.1).tolist() == [10, 16, 25, 31]


def test_few_labels__counts_of_each_class() -> None:
    labels = torch.tensor([0] * 100 + [1] * 37 + [5] * 3)
    assert labels[few_labels(labels, fraction=0.1)].bincount().tolist() == [10, 4, 0, 0, 0, 1]
    assert labels[few_labels(labels, per_class=3)].bincount().tolist() == [3, 3, 0, 0, 0, 3]
    assert few_labels(labels, fraction=1.0).tolist() == list(range(140))


def test_few_labels__fewer_are_part_of_more() -> None:
    labels = torch.arange(1000) % 7
    one, ten = set(few_labels(labels, fraction=0.01).tolist()), set(few_labels(labels, fraction=0.1).tolist())
    assert one < ten


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "one of them"),
        ({"fraction": 0.1, "per_class": 1}, "one of them"),
        ({"fraction": 0.0}, "fraction=0.0"),
        ({"fraction": 1.5}, "fraction=1.5"),
        ({"per_class": 0}, "per_class=0"),
        ({"per_class": 11}, "class 0 has 10"),
    ],
)
def test_few_labels__wrong(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        few_labels(LABELS, **options)  # type: ignore[arg-type]


def test_split_held_out__shares_of_each_class() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    kept, held = split_held_out(labels, 0.1)
    assert sorted(torch.cat([kept, held]).tolist()) == list(range(100))
    assert labels[held].bincount().tolist() == [5, 3, 2]


def test_split_held_out__small_classes_take_turns() -> None:
    labels = torch.arange(20).repeat_interleave(5)  # 0.5 of each class is due
    kept, held = split_held_out(labels, 0.1)
    assert len(held) == 10
    assert labels[held].bincount().max() == 1
    assert len(labels[kept].unique()) == 20


def test_split_held_out__never_the_only_image_of_a_class() -> None:
    labels = torch.tensor([0, 1, 1, 2])
    kept, held = split_held_out(labels, 0.9)
    assert labels[kept].unique().tolist() == [0, 1, 2]
    assert labels[held].tolist() == [1]


def test_split_held_out__nothing_to_hold_out() -> None:
    with pytest.raises(ConfigError, match="Raise held_out"):
        split_held_out(torch.arange(10), 0.5)
    with pytest.raises(ConfigError, match="held_out=1"):
        split_held_out(LABELS, 1.0)


@pytest.mark.parametrize("rows", [None, torch.tensor([7, 3, 4, 30, 31])])
def test_channel_statistics__against_scikit_learn(rows: torch.Tensor | None) -> None:
    features = (1000 + torch.randn(50, 3) * torch.tensor([0.01, 1.0, 0.0])).float()
    oracle = StandardScaler().fit((features if rows is None else features[rows]).double().numpy())
    mean, std = channel_statistics(features, rows, chunk_size=4)
    torch.testing.assert_close(mean, torch.tensor(oracle.mean_).float())
    torch.testing.assert_close(std, torch.tensor(oracle.scale_).float())
    assert std[2] == 1


@pytest.mark.parametrize("rows", [None, torch.tensor([4, 0, 2])])
def test_chunks__rows_and_their_features(rows: torch.Tensor | None) -> None:
    features = torch.randn(5, 2)
    parts = list(chunks(features, rows, 2))
    numbers = torch.cat([part for part, _ in parts])
    assert numbers.tolist() == (list(range(5)) if rows is None else rows.tolist())
    assert torch.equal(torch.cat([x for _, x in parts]), features[numbers])
    assert all(len(x) <= 2 for _, x in parts)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_check_labels__outside_the_range(wrong: int) -> None:
    with pytest.raises(ConfigError, match=f"val: image 1 has label {wrong}"):
        check_labels(torch.tensor([0, wrong, 2]), 3, "val")
