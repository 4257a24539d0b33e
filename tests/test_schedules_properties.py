"""Schedules of any length: bounds, ends, monotone pieces, no jumps. Durations: what is read, and what is refused."""

import itertools
import math
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vil_lightning.errors import ConfigError
from vil_lightning.schedules import cosine, linear_cosine, linear_then_constant, resolve_steps, warmup_cosine

VALUES = st.floats(0, 10)
LENGTHS = st.integers(1, 400)


def monotone(values: list[float]) -> bool:
    steps = [b - a for a, b in itertools.pairwise(values)]
    return all(step >= -1e-9 for step in steps) or all(step <= 1e-9 for step in steps)


def check(schedule: Callable[[int], float], length: int, bounds: tuple[float, ...], slope: float) -> list[float]:
    """Finite, within bounds, and no step larger than `slope`. Returns the values, also some beyond the end."""
    values = [schedule(step) for step in range(length + 5)]
    assert all(math.isfinite(value) for value in values)
    assert min(bounds) - 1e-9 <= min(values)
    assert max(values) <= max(bounds) + 1e-9
    assert all(abs(b - a) <= slope + 1e-9 for a, b in itertools.pairwise(values))
    return values


def cosine_slope(length: int, change: float) -> float:
    """The steepest step of half a cosine."""
    return abs(change) if length <= 1 else abs(change) * math.pi / 2 / length


@settings(max_examples=150)
@given(LENGTHS, VALUES, VALUES)
def test_cosine__any_length(length: int, start: float, end: float) -> None:
    values = check(
        lambda step: cosine(step, length, start, end), length, (start, end), cosine_slope(length, end - start)
    )
    assert values[0] == pytest.approx(start, abs=1e-9)
    assert values[length:] == pytest.approx([end] * 5, abs=1e-9)
    assert monotone(values)


@settings(max_examples=150)
@given(LENGTHS, st.data(), VALUES, VALUES)
def test_warmup_cosine__any_length(length: int, data: st.DataObject, peak: float, end: float) -> None:
    warmup = data.draw(st.integers(0, length))
    slope = max(peak / max(warmup - 1, 1), cosine_slope(length - warmup, end - peak))
    values = check(lambda step: warmup_cosine(step, length, warmup, peak, end), length, (0, peak, end), slope)
    assert monotone(values[:warmup])
    assert monotone(values[warmup:])
    if warmup > 1:
        assert values[0] == 0
    if warmup:
        assert values[warmup - 1] == pytest.approx(peak)
    if warmup < length:
        assert values[length:] == pytest.approx([end] * 5, abs=1e-9)


@settings(max_examples=150)
@given(LENGTHS, st.data(), VALUES, VALUES, VALUES)
def test_linear_cosine__any_length(length: int, data: st.DataObject, start: float, peak: float, end: float) -> None:
    warmup = data.draw(st.integers(0, length))
    slope = max(abs(peak - start) / max(warmup, 1), cosine_slope(length - warmup, end - peak))
    bounds = (start, peak, end) if warmup else (peak, end)
    values = check(lambda step: linear_cosine(step, length, warmup, start, peak, end), length, bounds, slope)
    assert monotone(values[:warmup])
    assert monotone(values[max(warmup - 1, 0) :])
    if warmup:
        assert values[warmup - 1] == pytest.approx(peak)
    if warmup < length:  # the last step has the final rate
        assert values[length - 1] == pytest.approx(end, abs=1e-9)


@settings(max_examples=150)
@given(LENGTHS, st.data(), VALUES, VALUES)
def test_linear_then_constant__any_length(length: int, data: st.DataObject, start: float, end: float) -> None:
    warmup = data.draw(st.integers(0, length))
    slope = abs(end - start) / max(warmup, 1)
    values = check(lambda step: linear_then_constant(step, warmup, start, end), length, (start, end), slope)
    assert values[0] == (start if warmup else end)
    assert values[warmup:] == [end] * (length + 5 - warmup)
    assert monotone(values)


@settings(max_examples=200)
@given(
    st.floats(0, 1e5, allow_subnormal=False), st.sampled_from(["steps", "epochs", "%"]), st.integers(1, 500), LENGTHS
)
def test_resolve_steps__any_duration_is_within_the_run_or_refused(
    number: float, unit: str, steps_per_epoch: int, epochs: int
) -> None:
    total = steps_per_epoch * epochs
    factor = {"steps": 1.0, "epochs": float(steps_per_epoch), "%": total / 100}[unit]
    number = round(number, 3)
    known = {"steps_per_epoch": steps_per_epoch, "total_steps": total, "key": "model.lr_warmup"}
    wanted = round(number * factor)
    if wanted > total:
        with pytest.raises(ConfigError, match=r"model\.lr_warmup"):
            resolve_steps(f"{number} {unit}", **known)
        assert resolve_steps(f"{number} {unit}", **known, cut=True) == total
    else:
        assert resolve_steps(f"{number} {unit}", **known) == wanted


@settings(max_examples=200)
@given(st.one_of(st.text(max_size=12), st.floats(), st.integers(), st.booleans()))
def test_resolve_steps__anything_is_a_duration_or_a_config_error(duration: object) -> None:
    steps = 0
    with suppress(ConfigError):
        steps = resolve_steps(duration, steps_per_epoch=10, total_steps=1000, key="model.lr_warmup")  # type: ignore[arg-type]
    assert 0 <= steps <= 1000
