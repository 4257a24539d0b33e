"""Logistic regression against scikit-learn's."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import Tensor

from vil_lightning.errors import ConfigError
from vil_lightning.evaluation.inputs import channel_statistics, split_held_out
from vil_lightning.evaluation.logistic import fit, logistic_regression


def data(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    centres = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    x = centres[labels] + 1.5 * torch.randn(count, 9, generator=generator)
    return x * torch.logspace(-1, 1, 9) + 5, labels


def scaled(x: Tensor, statistics: tuple[Tensor, Tensor]):  # type: ignore[no-untyped-def]
    return ((x - statistics[0]) / statistics[1]).double().numpy()


@pytest.mark.parametrize("C", [1e-4, 1e-2, 1.0, 100.0])
def test_fit__loss_of_scikit_learn(C: float) -> None:
    x, labels = data(300)
    statistics = channel_statistics(x)
    oracle = LogisticRegression(C=C, max_iter=10_000, tol=1e-10).fit(scaled(x, statistics), labels.numpy())
    expected = log_loss(labels, oracle.predict_proba(scaled(x, statistics)))
    penalty = (oracle.coef_**2).sum() / (2 * C * 300)

    actual = fit(x, labels, 4, C, statistics=statistics, chunk_size=70)
    assert actual.converged
    assert actual.cross_entropy == pytest.approx(expected, abs=1e-4)
    assert actual.cross_entropy + float(actual.weight.square().sum()) / (2 * C * 300) == pytest.approx(
        expected + penalty, abs=1e-5
    )
    torch.testing.assert_close(actual.weight, torch.tensor(oracle.coef_).float(), atol=0.01, rtol=0.01)


def test_fit__float64_on_some_rows_without_scaling() -> None:
    x, labels = data(200)
    x = x[:, 3:6]  # channels of comparable size, or the problem is badly conditioned
    rows = torch.arange(1, 200, 2)
    oracle = LogisticRegression(C=0.3, max_iter=10_000, tol=1e-10).fit(x[rows].double().numpy(), labels[rows].numpy())
    actual = fit(x.double(), labels, 4, 0.3, rows=rows, max_iter=5000, chunk_size=33)
    assert actual.weight.dtype == torch.float64
    expected = log_loss(labels[rows], oracle.predict_proba(x[rows].double().numpy())) + (oracle.coef_**2).sum() / 60
    assert actual.cross_entropy + float(actual.weight.square().sum()) / 60 == pytest.approx(expected, abs=1e-6)


def test_fit__does_not_depend_on_chunks_or_where_it_starts() -> None:
    x, labels = data(200)
    statistics = channel_statistics(x)
    whole = fit(x, labels, 4, 0.1, statistics=statistics)
    other = fit(x, labels, 4, 10.0, statistics=statistics)
    parts = fit(x, labels, 4, 0.1, statistics=statistics, start=other, chunk_size=7)
    torch.testing.assert_close(parts.weight, whole.weight, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(other.weight, whole.weight, atol=0.05)


def test_fit__says_when_it_has_not_converged() -> None:
    x, labels = data(200)
    assert not fit(x, labels, 4, 1.0, max_iter=2).converged


def test_logistic_regression__choice_and_score_of_scikit_learn() -> None:
    (x, labels), (val, val_labels) = data(240), data(150, seed=5)
    Cs = (1e-5, 1e-3, 1e-1, 10.0)
    result = logistic_regression(x, labels, val, val_labels, Cs=Cs[::-1], held_out=0.2, seed=3)

    kept, held = split_held_out(labels, 0.2, 3)
    statistics = channel_statistics(x, kept)
    ranking = {}
    for C in Cs:
        oracle = LogisticRegression(C=C, max_iter=10_000, tol=1e-8)
        oracle.fit(scaled(x[kept], statistics), labels[kept].numpy())
        features = scaled(x[held], statistics)
        accuracy = 100 * oracle.score(features, labels[held].numpy())
        ranking[C] = accuracy, -log_loss(labels[held], oracle.predict_proba(features))
        assert result.held_out[C] == pytest.approx(accuracy)
    assert max(ranking, key=lambda C: ranking[C]) == result.C
    assert len({accuracy for accuracy, _ in ranking.values()}) > 1

    statistics = channel_statistics(x)
    oracle = LogisticRegression(C=result.C, max_iter=10_000, tol=1e-8).fit(scaled(x, statistics), labels.numpy())
    assert result.score.value == pytest.approx(100 * oracle.score(scaled(val, statistics), val_labels.numpy()))
    assert result.score.low < result.score.value < result.score.high
    assert result.score.protocol == "logistic/l-bfgs/standardised/C=1e-05..10 of 4/held-out=0.2"
    assert (result.num_train, result.num_held_out) == (240, len(held))


def test_logistic_regression__a_single_c_holds_nothing_out() -> None:
    (x, labels), (val, val_labels) = data(100), data(50, seed=5)
    result = logistic_regression(x, labels, val, val_labels, Cs=(0.1,))
    assert (result.num_held_out, result.held_out, result.at_edge) == (0, {}, False)
    assert result.score.protocol == "logistic/l-bfgs/standardised/C=0.1"


def test_logistic_regression__choice_ignores_val() -> None:
    (x, labels), (val, val_labels) = data(200), data(100, seed=5)
    first = logistic_regression(x, labels, val, val_labels, Cs=(1e-4, 1.0))
    second = logistic_regression(x, labels, val, 3 - val_labels, Cs=(1e-4, 1.0))
    assert first.C == second.C
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert first.score.value != second.score.value


def test_logistic_regression__lower_cross_entropy_decides_between_equal_accuracies() -> None:
    labels = torch.arange(60) % 3
    x = torch.eye(3)[labels] + 0.01 * torch.randn(60, 3)
    result = logistic_regression(x, labels, x, labels, Cs=(0.01, 0.1, 1.0))
    assert set(result.held_out.values()) == {100.0}
    assert result.C == 1.0


def test_logistic_regression__bfloat16_features() -> None:
    (x, labels), (val, val_labels) = data(100), data(50, seed=5)
    halves = logistic_regression(x.bfloat16(), labels, val.bfloat16(), val_labels, Cs=(0.1,))
    same = logistic_regression(x.bfloat16().float(), labels, val.bfloat16().float(), val_labels, Cs=(0.1,))
    assert torch.equal(halves.classifier.weight, same.classifier.weight)
    assert halves.score == same.score


@pytest.mark.parametrize("best, edge", [((1e-6, 1e-5), True), ((1e-6, 0.1, 1e6), False)])
def test_logistic_regression__says_when_the_range_of_c_ends(best: tuple[float, ...], edge: bool) -> None:
    (x, labels), (val, val_labels) = data(200), data(50, seed=5)
    assert logistic_regression(x, labels, val, val_labels, Cs=best, held_out=0.3).at_edge is edge


@pytest.mark.parametrize(
    "options, message",
    [
        ({"Cs": ()}, "Cs="),
        ({"Cs": (0.0, 1.0)}, "Cs="),
        ({"num_classes": 3}, "train: image"),
        ({"held_out": 0.0}, "held_out"),
        ({"max_iter": 0}, "max_iter"),
    ],
)
def test_logistic_regression__wrong(options: dict, message: str) -> None:  # type: ignore[type-arg]
    x, labels = data(50)
    with pytest.raises(ConfigError, match=message):
        logistic_regression(x, labels, x, labels, **options)


def test_logistic_regression__val_label_outside_the_training_classes() -> None:
    x, labels = data(50)
    with pytest.raises(ConfigError, match="val: image 0 has label 4"):
        logistic_regression(x, labels, x, labels + 4)
