"""kNN in chunks: against loops, scikit-learn and the version in one piece."""

import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from vil_lightning.errors import ConfigError
from vil_lightning.evaluation import knn as module
from vil_lightning.evaluation.knn import knn, knn_scores
from vil_lightning.knn import knn_accuracy


def clusters(count: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    centres = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (count,), generator=generator)
    features = centres[labels] + 1.5 * torch.randn(count, 12, generator=generator)
    return (features * torch.rand(count, 1, generator=generator).add(0.5)).to(dtype), labels


def by_loops(bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int, temperature: float) -> list[int]:
    """The class of each query, one pair of features at a time in float64; equal neighbours in the order of the bank."""
    classes = []
    for query in queries.double().tolist():
        similarities = []
        for feature in bank.double().tolist():
            dot = sum(a * b for a, b in zip(query, feature, strict=True))
            similarities.append(dot / math.hypot(*query) / math.hypot(*feature))
        order = sorted(range(len(bank)), key=lambda i: (-round(similarities[i], 12), i))[:k]
        votes: dict[int, float] = defaultdict(float)
        for i in order:
            votes[int(bank_labels[i])] += math.exp(similarities[i] / temperature)
        classes.append(min(votes, key=lambda label: (-round(votes[label], 9), label)))
    return classes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_knn__against_loops(temperature: float, dtype: torch.dtype) -> None:
    (bank, bank_labels), (queries, labels) = clusters(90, 0, dtype), clusters(41, 1, dtype)
    actual = knn(bank, bank_labels, queries, labels, ks=(1, 4, 30), temperature=temperature)
    for k, correct in actual.items():
        expected = torch.tensor(by_loops(bank, bank_labels, queries, k, temperature)) == labels
        assert torch.equal(correct, expected), k


def test_knn__against_scikit_learn() -> None:
    (bank, bank_labels), (queries, labels) = clusters(3000, 0), clusters(300, 1)

    def vote(distances):  # type: ignore[no-untyped-def]
        return torch.tensor((1 - distances) / 0.07).exp().numpy()

    oracle = KNeighborsClassifier(20, weights=vote, metric="cosine", algorithm="brute").fit(bank, bank_labels)
    expected = torch.tensor(oracle.predict(queries)) == labels
    assert 0.2 < expected.double().mean() < 0.95
    assert torch.equal(knn(bank, bank_labels, queries, labels, ks=(20,), bank_chunk=1024)[20], expected)


def test_knn__as_in_one_piece() -> None:
    (bank, bank_labels), (queries, labels) = clusters(2500, 0), clusters(700, 1)
    actual = knn(bank, bank_labels, queries, labels, query_chunk=1, bank_chunk=1)
    expected = knn_accuracy(bank, bank_labels, queries, labels)
    assert {k: 100 * float(c.double().mean()) for k, c in actual.items()} == pytest.approx(expected)


@pytest.mark.parametrize("query_chunk, bank_chunk", [(1, 1), (256, 2048), (300, 3000), (10_000, 10_000)])
def test_knn__neighbours_do_not_depend_on_chunks(query_chunk: int, bank_chunk: int, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    # Every feature stands in the bank many times, in other chunks, under other labels: the lower place must win.
    base = torch.randn(50, 33, generator=torch.Generator().manual_seed(0))
    bank, queries = base.repeat(101, 1), torch.randn(600, 33, generator=torch.Generator().manual_seed(1))
    found = []
    original = module._nearest

    def spy(*arguments):  # type: ignore[no-untyped-def]
        found.append(original(*arguments))
        return found[-1]

    monkeypatch.setattr(module, "_nearest", spy)
    ones = torch.zeros(len(bank), dtype=torch.int64), torch.zeros(len(queries), dtype=torch.int64)
    knn(bank, ones[0], queries, ones[1], ks=(150,), query_chunk=query_chunk, bank_chunk=bank_chunk)
    places = torch.cat([p for _, p in found])
    order = (queries.double() @ torch.nn.functional.normalize(base.double(), dim=1).T).argsort(1, descending=True)
    expected = (order[:, :2, None] + 50 * torch.arange(101)).flatten(1)[:, :150]
    assert torch.equal(places, expected)


def test_products__same_bits_in_any_company() -> None:
    # A product of one row and one of many round differently, unless both are computed in tiles of one shape.
    x, y = torch.randn(300, 384), torch.randn(2100, 384)

    def products(x: Tensor, y: Tensor) -> Tensor:
        padded = module._unit(x, 256, torch.device("cpu")), module._unit(y, 1024, torch.device("cpu"))
        return module._products(*padded)[: len(x), : len(y)]

    whole = products(x, y)
    assert torch.equal(products(x[:1], y), whole[:1])
    assert torch.equal(products(x, y[:17]), whole[:, :17])
    assert torch.equal(products(x[256:], y[1024:]), whole[256:, 1024:])


def test_knn__tied_votes_go_to_the_lower_class() -> None:
    bank, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([4, 2, 0])
    query = torch.tensor([[3.0, 0.0]])
    assert knn(bank, labels, query, torch.tensor([4]), ks=(1,))[1].item()  # the lower place
    assert knn(bank, labels, query, torch.tensor([2]), ks=(2,))[2].item()  # one vote each


def test_knn__k_larger_than_the_bank() -> None:
    (bank, bank_labels), (queries, labels) = clusters(12, 0), clusters(20, 1)
    actual = knn(bank, bank_labels, queries, labels, ks=(12, 200))
    assert torch.equal(actual[200], actual[12])
    assert torch.equal(actual[12], torch.tensor(by_loops(bank, bank_labels, queries, 12, 0.07)) == labels)


def test_knn__a_single_query_and_a_class_that_the_bank_lacks() -> None:
    bank, labels = torch.eye(2), torch.tensor([0, 1])
    assert knn(bank, labels, torch.eye(2)[:1], torch.tensor([0]), ks=(1,))[1].tolist() == [True]
    assert knn(bank, labels, torch.eye(2), torch.tensor([7, 1]), ks=(1, 2))[1].tolist() == [False, True]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_knn__sharp_temperature(sign: float) -> None:
    # exp(±1 / 0.01) is infinite or 0 in float32: then the first class would win.
    bank, labels = sign * torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.1]]), torch.tensor([1, 0, 1])
    query = torch.tensor([[1.0, 0.0]])
    assert knn(bank, labels, query, torch.tensor([1]), ks=(3,), temperature=0.001)[3].item()


def test_keys__order_of_similarities_then_of_places() -> None:
    similarity = torch.tensor([[-1.0, -0.0, 0.0, 0.5, -1e-30, 1.0, 0.5, -0.25]])
    keys = module._keys(similarity, torch.arange(2**31, 2**31 + 8))
    assert keys.argsort(1, descending=True).tolist() == [[5, 3, 6, 1, 2, 4, 7, 0]]
    assert torch.equal(module._similarity_of(keys), similarity.abs() * similarity.sign())


def test_knn__restores_the_precision_of_products() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        knn(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([0, 1]), ks=(1,))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"query_labels": torch.tensor([0, -1])}, "label -1"),
        ({"query_labels": torch.tensor([0, 3]), "num_classes": 3}, "label 3"),
        ({"bank_labels": torch.tensor([5, 0]), "num_classes": 3}, "label 5"),
        ({"bank_labels": torch.tensor([0])}, "labels"),
        ({"queries": torch.eye(3)[:2]}, "width"),
        ({"bank": torch.zeros(0, 2), "bank_labels": torch.zeros(0, dtype=torch.int64)}, "at least one"),
        ({"bank": torch.tensor([[1.0, float("nan")], [0.0, 1.0]])}, "not finite"),
        ({"ks": ()}, "ks="),
        ({"ks": (0,)}, "ks="),
        ({"temperature": 0.0}, "temperature"),
        ({"bank_chunk": 0}, "bank_chunk"),
    ],
)
def test_knn__wrong(changes: dict, message: str) -> None:  # type: ignore[type-arg]
    labels = torch.tensor([0, 1])
    arguments = {"bank": torch.eye(2), "bank_labels": labels, "queries": torch.eye(2), "query_labels": labels}
    with pytest.raises(ConfigError, match=message):
        knn(**arguments | changes)


def test_knn_scores__names_and_protocols() -> None:
    (bank, bank_labels), (queries, labels) = clusters(300, 0), clusters(100, 1)
    scores = knn_scores(bank, bank_labels, queries, labels, ks=(10, 20))
    expected = knn_accuracy(bank, bank_labels, queries, labels, ks=(10, 20))
    assert [s.protocol for s in scores] == ["knn/dino/k=10", "knn/dino/k=20"]
    assert [s.value for s in scores] == pytest.approx(list(expected.values()))
    assert knn_scores(bank, bank_labels, queries, labels, (5,), 0.1)[0].protocol == "knn/dino/temperature=0.1/k=5"


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    (bank, bank_labels), (queries, labels) = clusters(900, 0), clusters(301, 1)
    results = [knn(bank, bank_labels, queries[:m], labels[:m], ks=(5, 20)) for m in (301, 1)]
    broken = queries.clone()
    broken[300] = float("nan")  # seen by the second process alone
    try:
        knn(bank, bank_labels, broken, labels)
    except ConfigError:
        torch.save(results, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_knn__two_processes(tmp_path: Path) -> None:
    # Forked: a process of its own would take seconds to import torch. Tests run with one thread, so nothing is lost by it.
    torch.multiprocessing.start_processes(_process, args=(str(tmp_path),), nprocs=2, start_method="fork")
    (bank, bank_labels), (queries, labels) = clusters(900, 0), clusters(301, 1)
    for rank in (0, 1):
        results = torch.load(tmp_path / str(rank), weights_only=True)
        for m, actual in zip((301, 1), results, strict=True):
            expected = knn(bank, bank_labels, queries[:m], labels[:m], ks=(5, 20))
            assert all(torch.equal(actual[k], expected[k]) for k in (5, 20))
