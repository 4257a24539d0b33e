"""Measuring how often a transform does something."""

import math

import torch
from torch import Tensor

from vil_lightning.data.loading import ViewGenerators
from vil_lightning.data.photometry import PARAMETERS
from vil_lightning.data.transforms import TrainingTransform, View


def image(size: int = 8) -> Tensor:
    return torch.randint(0, 256, (3, size, size), dtype=torch.uint8)


def draw(number: int = 0) -> ViewGenerators:
    """Generators of the `number`-th draw."""
    return ViewGenerators(0, 0, number)


def parameters_of(transform: TrainingTransform, draws: int) -> list[dict[str, Tensor]]:
    """What is drawn for the photometry, for every view: name -> (draws,)."""
    picture = image()
    drawn = [transform(picture, draw(i)) for i in range(draws)]
    views = [[sample] if isinstance(sample, View) else sample for sample in drawn]
    stacked = [torch.stack([sample[v].parameters for sample in views]) for v in range(len(views[0]))]
    return [dict(zip(PARAMETERS, columns.T, strict=True)) for columns in stacked]


def assert_rate(count: int | Tensor, trials: int, probability: float, deviations: float = 4) -> None:
    """Within so many standard deviations of the binomial distribution."""
    deviation = math.sqrt(trials * probability * (1 - probability))
    assert abs(float(count) - trials * probability) <= deviations * deviation


def assert_uniform(values: Tensor, low: float, high: float) -> None:
    """Range, mean and spread of a uniform distribution, within four standard errors."""
    count, width = len(values), high - low
    slack = 1e-6 * max(abs(low), abs(high))  # parameters are float32
    assert low - slack <= float(values.min()) < low + 12 * width / count
    assert high - 12 * width / count < float(values.max()) <= high + slack
    assert abs(float(values.mean()) - (low + high) / 2) < 4 * width / math.sqrt(12 * count)
    assert abs(float(values.std()) - width / math.sqrt(12)) < 4 * width / math.sqrt(12) / math.sqrt(count)
