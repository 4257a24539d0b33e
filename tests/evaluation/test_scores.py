"""Intervals against a bootstrap of images one by one, and against scipy's binomial."""

import numpy as np
import pytest
import torch
from scipy.stats import binom

from vil_lightning.evaluation.scores import (
    accuracy_score,
    bootstrap_interval,
    class_mean_interval,
    class_mean_score,
    resample,
)


def outcomes(right: int, wrong: int) -> torch.Tensor:
    return torch.arange(right + wrong) < right


@pytest.mark.parametrize("right, wrong", [(160, 40), (9, 1), (3, 500)])
def test_bootstrap_interval__binomial_quantiles(right: int, wrong: int) -> None:
    count = right + wrong
    low, high = bootstrap_interval(outcomes(right, wrong), num_resamples=20_000)
    expected = 100 * binom.ppf([0.025, 0.975], count, right / count) / count
    step = 100 / count  # the mean of 0s and 1s moves in steps
    assert low == pytest.approx(expected[0], abs=1.01 * step)
    assert high == pytest.approx(expected[1], abs=1.01 * step)
    assert low < 100 * right / count < high


def test_bootstrap_interval__is_fixed_by_its_seed() -> None:
    correct = outcomes(700, 300)
    assert bootstrap_interval(correct) == bootstrap_interval(correct.flip(0))
    assert bootstrap_interval(correct, seed=1) != bootstrap_interval(correct, seed=2)


def test_bootstrap_interval__leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    bootstrap_interval(outcomes(7, 3))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("right, value", [(8, 100.0), (0, 0.0)])
def test_bootstrap_interval__without_variation(right: int, value: float) -> None:
    assert bootstrap_interval(outcomes(right, 8 - right)) == (value, value)


def test_resample__multinomial_moments() -> None:
    counts = torch.tensor([5, 0, 30, 65])
    draws = resample(counts, 20_000, seed=0)
    assert (draws.sum(1) == 100).all()
    share = counts / 100
    torch.testing.assert_close(draws.mean(0), counts.double(), atol=0.15, rtol=0)
    covariance = 100 * (torch.diag(share) - share[:, None] * share)
    torch.testing.assert_close(torch.cov(draws.T), covariance.double(), atol=0.7, rtol=0)


def test_class_mean_interval__images_drawn_one_by_one() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 2, 3], 150, p=[0.7, 0.27, 0.03])
    correct = rng.random(150) < 0.6
    correct[labels == 3] = False  # the last class has no correct image
    means = []
    for _ in range(4000):
        drawn = rng.integers(0, 150, 150)
        present = [c for c in (0, 2, 3) if (labels[drawn] == c).any()]
        means.append(100 * np.mean([correct[drawn][labels[drawn] == c].mean() for c in present]))
    expected = np.percentile(means, [2.5, 97.5])
    actual = class_mean_interval(torch.tensor(correct), torch.tensor(labels), num_resamples=4000)
    assert actual == pytest.approx(expected, abs=0.8)


def test_class_mean_score__against_scikit_learn() -> None:
    from sklearn.metrics import balanced_accuracy_score

    truth, guess = torch.randint(0, 4, (90,)), torch.randint(0, 4, (90,))
    score = class_mean_score("mean of classes", truth == guess, truth, "p")
    assert score.value == pytest.approx(100 * balanced_accuracy_score(truth, guess))
    assert score.low < score.value < score.high


def test_accuracy_score__fields() -> None:
    score = accuracy_score("kNN", outcomes(3, 1), "knn/dino/k=20")
    assert (score.name, score.value, score.protocol, score.num_images) == ("kNN", 75.0, "knn/dino/k=20", 4)
    assert score.low <= 75.0 <= score.high
