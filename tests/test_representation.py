"""Each measure against its definition, written out in loops and in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from vil_lightning.representation import (
    alignment,
    feature_std,
    logistic_regression,
    principal_components,
    rankme,
    uniformity,
)


def features(num: int = 30, dim: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    """Some, around a common mean, with channels of different deviations."""
    return (torch.randn(num, dim, dtype=torch.float64) * torch.linspace(0.1, 2, dim) + 0.5).to(dtype)


def unit_rows(x: Tensor) -> list[list[float]]:
    return [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in x.tolist()]


def squared_distance(a: list[float], b: list[float]) -> float:
    return sum((u - v) ** 2 for u, v in zip(a, b, strict=True))


# --- rank -------------------------------------------------------------------------------------------------------------


def test_rankme__is_the_exponential_of_the_entropy_of_the_singular_values() -> None:
    x = features()
    eigenvalues = np.linalg.eigvalsh(x.numpy().T @ x.numpy())
    values = [math.sqrt(value) for value in eigenvalues]
    shares = [value / sum(values) + 1e-7 for value in values]
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert float(rankme(x)) == pytest.approx(expected, rel=1e-9)
    assert 2 < expected < 6.9  # neither extreme


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_rankme__counts_equally_long_directions(rank: int) -> None:
    directions, _ = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))
    vectors, _ = torch.linalg.qr(torch.randn(20, 7, dtype=torch.float64))
    x = vectors[:, :rank] @ directions[:rank]
    assert float(rankme(x)) == pytest.approx(rank, rel=1e-4)
    assert float(rankme(1000 * x)) == pytest.approx(rank, rel=1e-4)
    assert float(rankme(x.T)) == pytest.approx(rank, rel=1e-4)


def test_rankme__of_equal_and_of_zero_features_is_1() -> None:
    assert float(rankme(torch.ones(9, 5))) == pytest.approx(1, abs=1e-4)
    assert float(rankme(torch.zeros(9, 5))) == pytest.approx(1, abs=1e-4)


# --- spread -----------------------------------------------------------------------------------------------------------


def test_feature_std__is_the_mean_deviation_of_unit_vectors_times_the_root_of_the_width() -> None:
    x = features()
    columns = zip(*unit_rows(x), strict=True)
    deviations = [float(np.std(column, ddof=1)) for column in columns]
    assert float(feature_std(x)) == pytest.approx(sum(deviations) / 7 * math.sqrt(7), rel=1e-9)


def test_feature_std__is_1_for_a_uniform_cloud_and_0_for_one_point() -> None:
    assert float(feature_std(torch.randn(4000, 64))) == pytest.approx(1, abs=0.02)
    assert float(feature_std(torch.ones(10, 64) * torch.rand(10, 1))) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_alignment__is_the_mean_power_of_the_distances_of_unit_vectors(alpha: float) -> None:
    x, y = features(), features()
    pairs = zip(unit_rows(x), unit_rows(y), strict=True)
    distances = [math.sqrt(squared_distance(a, b)) ** alpha for a, b in pairs]
    assert float(alignment(x, y, alpha)) == pytest.approx(sum(distances) / 30, rel=1e-9)
    if alpha == 2:
        assert torch.equal(alignment(x, y), alignment(x, y, 2))


def test_alignment__of_the_same_directions_is_0() -> None:
    x = features()
    assert float(alignment(x, 3 * x)) == pytest.approx(0, abs=1e-12)
    assert float(alignment(x, -x)) == pytest.approx(4, rel=1e-9)


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_uniformity__is_the_log_of_the_mean_gaussian_potential_of_all_pairs(t: float) -> None:
    x = features()
    rows = unit_rows(x)
    potentials = [math.exp(-t * squared_distance(a, b)) for a, b in itertools.combinations(rows, 2)]
    assert float(uniformity(x, t)) == pytest.approx(math.log(sum(potentials) / len(potentials)), rel=1e-9)
    if t == 2:
        assert torch.equal(uniformity(x), uniformity(x, 2))


def test_uniformity__from_one_point_to_the_sphere() -> None:
    assert float(uniformity(torch.ones(10, 16) * torch.rand(10, 1))) == pytest.approx(0, abs=1e-5)
    assert float(uniformity(torch.eye(20))) == pytest.approx(-4, rel=1e-5)
    assert float(uniformity(torch.randn(500, 256))) == pytest.approx(-4, abs=0.1)


@pytest.mark.parametrize("measure", [rankme, feature_std, uniformity, lambda x: alignment(x, x.flip(0))])
def test_measures__of_half_precision_are_computed_in_float32(measure: object) -> None:
    x = features(dtype=torch.bfloat16)
    value = measure(x)  # type: ignore[operator]
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(measure(x.double())), rel=1e-4)  # type: ignore[operator]


# --- principal components ---------------------------------------------------------------------------------------------


def test_principal_components__are_the_eigenvectors_of_the_covariance() -> None:
    x = features(200, 6)
    mean, basis = principal_components(x, 3)
    values, vectors = np.linalg.eigh(np.cov(x.numpy().T))
    np.testing.assert_allclose(mean.numpy(), x.numpy().mean(0), rtol=1e-12)
    assert basis.shape == (6, 3)
    for i in range(3):  # numpy's order is rising
        expected = vectors[:, -1 - i]
        expected = expected * np.sign(expected[np.abs(expected).argmax()])
        np.testing.assert_allclose(basis[:, i].numpy(), expected, atol=1e-9)
    assert values[-1] > values[-2] > values[-3]


def test_principal_components__have_a_sign_that_does_not_depend_on_the_data() -> None:
    x = features(50, 5, torch.float32)
    _, basis = principal_components(x, 4)
    _, of_mirrored = principal_components(-x, 4)
    torch.testing.assert_close(of_mirrored, basis, atol=1e-5, rtol=0)
    assert torch.equal(basis.abs().amax(0), basis.amax(0))
    torch.testing.assert_close(basis.T @ basis, torch.eye(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("k", "shape"), [(0, (9, 4)), (5, (9, 4)), (3, (2, 4))])
def test_principal_components__refuse_more_than_there_are(k: int, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"k={k} must be between 1 and {min(shape)}"):
        principal_components(torch.randn(shape), k)


# --- logistic regression ----------------------------------------------------------------------------------------------


def classes(num: int = 90, num_classes: int = 3) -> tuple[Tensor, Tensor]:
    """Overlapping clouds."""
    labels = torch.arange(num) % num_classes
    return torch.randn(num, 4, dtype=torch.float64) + 1.5 * F.one_hot(labels, 4), labels


def test_logistic_regression__equals_scikit_learns() -> None:
    x, labels = classes()
    weight, bias, loss = logistic_regression(x, labels, 3, weight_decay=0.01, max_iter=200)
    # Their objective is ours times the number of images, over the weight decay.
    theirs = LogisticRegression(C=1 / (0.01 * 90), tol=1e-10, max_iter=1000).fit(x.numpy(), labels.numpy())
    # A constant added to all classes changes no probability.
    np.testing.assert_allclose(weight.numpy(), theirs.coef_, atol=1e-4)
    expected_bias = theirs.intercept_ - theirs.intercept_.mean()
    np.testing.assert_allclose((bias - bias.mean()).numpy(), expected_bias, atol=1e-4)
    log_probabilities = theirs.predict_log_proba(x.numpy())
    assert loss == pytest.approx(-log_probabilities[np.arange(90), labels.numpy()].mean(), abs=1e-6)
    assert 0.1 < loss < 1.0


def test_logistic_regression__does_not_depend_on_chunks() -> None:
    x, labels = classes()
    whole = logistic_regression(x, labels, 3, 0.01, 50)
    parts = logistic_regression(x, labels, 3, 0.01, 50, chunk_size=7)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_logistic_regression__leaves_no_trace_in_any_context(context: type) -> None:
    x, labels = classes()
    x.requires_grad_()
    before = torch.get_rng_state()
    with context():
        weight, _, _ = logistic_regression(x * 1.0, labels, 4, 0.01, 20)
    assert x.grad is None
    assert not weight.requires_grad
    assert weight.shape == (4, 4)
    assert float(weight.abs().max()) > 0.1
    assert torch.equal(torch.get_rng_state(), before)
    again, _, _ = logistic_regression(x.detach(), labels, 4, 0.01, 20)
    assert torch.equal(again, weight)


def test_logistic_regression__knows_classes_that_never_occur() -> None:
    x, labels = classes()
    weight, bias, _ = logistic_regression(x, labels, 5, 0.01, 100)
    scores = F.linear(x, weight, bias)
    assert scores.shape == (90, 5)
    assert set(scores.argmax(1).tolist()) == {0, 1, 2}
