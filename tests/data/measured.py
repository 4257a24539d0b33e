"""Measuring how often a transform does something."""

import math
from typing import Any

import pytest
import torch

from vil_lightning.data import transforms


def image(size: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (3, size, size), dtype=torch.uint8)


def count_calls(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, int]:
    """Replace operations by ones that only count."""
    calls = dict.fromkeys(names, 0)

    def replacement(name: str) -> Any:
        def count(picture: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            calls[name] += 1
            return picture

        return count

    for name in names:
        monkeypatch.setattr(transforms.TF, name, replacement(name))
    return calls


def assert_rate(count: int, trials: int, probability: float, deviations: float = 4) -> None:
    """Within so many standard deviations of the binomial distribution."""
    deviation = math.sqrt(trials * probability * (1 - probability))
    assert abs(count - trials * probability) <= deviations * deviation
