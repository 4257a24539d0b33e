"""Weighted nearest neighbours, against a double loop."""

import math

import pytest
import torch

from vil_lightning.knn import knn_accuracy


def by_loops(bank, bank_labels, queries, query_labels, k, temperature):  # type: ignore[no-untyped-def]
    """The formula, one pair of features at a time."""
    hits = 0
    for query, truth in zip(queries.double().tolist(), query_labels.tolist(), strict=True):
        similarities = []
        for feature, label in zip(bank.double().tolist(), bank_labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(query, feature, strict=True))
            lengths = math.sqrt(sum(a * a for a in query)) * math.sqrt(sum(b * b for b in feature))
            similarities.append((dot / lengths, label))
        votes: dict[int, float] = {}
        for similarity, label in sorted(similarities, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(similarity / temperature)
        hits += max(votes, key=lambda label: votes[label]) == truth
    return 100 * hits / len(queries)


def clusters(count: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    labels = torch.randint(0, 5, (count,))
    return (centres[labels] + noise * torch.randn(count, 8)) * torch.rand(count, 1).add(0.5), labels


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_knn_accuracy__against_a_double_loop(noise: float, temperature: float) -> None:
    bank, queries = clusters(60, noise), clusters(37, noise)
    ks = (1, 3, 10, 60)
    actual = knn_accuracy(*bank, *queries, ks=ks, temperature=temperature, chunk_size=10)
    expected = {k: by_loops(*bank, *queries, k, temperature) for k in ks}
    assert actual == pytest.approx(expected)


def test_knn_accuracy__k_larger_than_the_bank() -> None:
    bank, queries = clusters(12, 1.0), clusters(20, 1.0)
    actual = knn_accuracy(*bank, *queries, ks=(12, 200))
    assert actual[200] == actual[12] == pytest.approx(by_loops(*bank, *queries, 12, 0.07))


def test_knn_accuracy__sharp_temperature_gives_finite_votes() -> None:
    # exp(1 / 0.01) = exp(100) overflows float32; votes of inf would make the first class win.
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    bank_labels = torch.tensor([2, 2, 1, 0])
    queries, query_labels = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([2, 0])
    assert knn_accuracy(bank, bank_labels, queries, query_labels, ks=(3, 4), temperature=0.01) == {3: 100.0, 4: 100.0}


def test_knn_accuracy__opposite_features_at_a_sharp_temperature() -> None:
    # exp(-1 / 0.01) is 0 in float32: with all votes 0 the first class would win.
    bank, bank_labels = torch.tensor([[-1.0, 0.0], [-1.0, 0.0], [-1.0, -0.1]]), torch.tensor([1, 0, 1])
    query, label = torch.tensor([[1.0, 0.0]]), torch.tensor([1])
    assert knn_accuracy(bank, bank_labels, query, label, ks=(3,), temperature=0.01) == {3: 100.0}


def test_knn_accuracy__half_precision_features() -> None:
    bank, queries = clusters(60, 1.0), clusters(37, 1.0)
    halves = (bank[0].bfloat16(), bank[1]), (queries[0].bfloat16(), queries[1])
    actual = knn_accuracy(*halves[0], *halves[1], ks=(5,))
    assert actual[5] == pytest.approx(by_loops(*halves[0], *halves[1], 5, 0.07))


def test_knn_accuracy__class_that_is_missing_from_the_bank() -> None:
    bank, labels = torch.eye(2), torch.tensor([0, 1])
    assert knn_accuracy(bank, labels, torch.eye(2), torch.tensor([0, 7]), ks=(1,)) == {1: 50.0}
