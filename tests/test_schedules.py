"""Durations and schedules, against numpy."""

import numpy as np
import pytest

from vil_lightning.errors import ConfigError
from vil_lightning.schedules import cosine, linear_cosine, linear_then_constant, resolve_steps, warmup_cosine


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        ("500 steps", 500),
        ("1 step", 1),
        ("0 steps", 0),
        ("1 epoch", 40),
        ("10 epochs", 400),
        ("2.5 epochs", 100),
        (".5epochs", 20),
        ("  3 epochs ", 120),
        ("5e-1 epochs", 20),
        ("10%", 80),
        ("12.5 %", 100),
        ("100%", 800),
        (0, 0),
        (0.0, 0),
        (0.25, 200),
        (0.001, 1),
    ],
)
def test_resolve_steps__every_unit(duration: str | float, expected: int) -> None:
    assert resolve_steps(duration, steps_per_epoch=40, total_steps=800, key="model.lr_warmup") == expected


def test_resolve_steps__epochs_of_a_fractional_number_of_steps() -> None:
    assert resolve_steps("3 epochs", steps_per_epoch=5.5, total_steps=100, key="model.lr_warmup") in (16, 17)
    assert resolve_steps("4 epochs", steps_per_epoch=5.5, total_steps=100, key="model.lr_warmup") == 22


@pytest.mark.parametrize(
    "duration",
    [
        "",
        "ten epochs",
        "10",
        "-1 epochs",
        "10 days",
        "epochs",
        "1 epoch 2 steps",
        "10 %%",
        1,
        10,
        1.0,
        -0.1,
        True,
        None,
    ],
)
def test_resolve_steps__unreadable(duration: object) -> None:
    with pytest.raises(ConfigError, match=r"model\.some_key=.*is no duration.*10 epochs"):
        resolve_steps(duration, steps_per_epoch=40, total_steps=800, key="model.some_key")  # type: ignore[arg-type]


@pytest.mark.parametrize("duration", ["801 steps", "21 epochs", "101%"])
def test_resolve_steps__longer_than_the_run(duration: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.some_key=.*the run has 800.*trainer\.max_epochs"):
        resolve_steps(duration, steps_per_epoch=40, total_steps=800, key="model.some_key")


@pytest.mark.parametrize("warmup", [0, 1, 2, 10, 50])
def test_warmup_cosine__pieces(warmup: int) -> None:
    total, peak, end = 50, 3e-3, 1e-6
    rest = total - warmup
    ramp = np.linspace(0, peak, warmup) if warmup > 1 else np.full(warmup, peak)
    fall = np.array([end + 0.5 * (peak - end) * (1 + np.cos(np.pi * i / rest)) for i in range(rest)])
    actual = [warmup_cosine(step, total, warmup, peak, end) for step in range(total)]
    np.testing.assert_allclose(actual, np.concatenate([ramp, fall]), rtol=1e-12, atol=1e-18)


def test_cosine__rises_as_well_as_falls() -> None:
    expected = 0.4 + 0.5 * (0.04 - 0.4) * (1 + np.cos(np.pi * np.arange(30) / 30))
    np.testing.assert_allclose([cosine(step, 30, 0.04, 0.4) for step in range(30)], expected, rtol=1e-12)


def test_cosine__stays_at_the_end_beyond_the_run() -> None:
    assert cosine(31, 30, 0.04, 0.4) == pytest.approx(0.4)
    assert cosine(1000, 30, 0.04, 0.4) == pytest.approx(0.4)


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_linear_then_constant__pieces(warmup: int) -> None:
    expected = np.concatenate([np.linspace(0.04, 0.07, warmup, endpoint=False), np.full(20 - warmup, 0.07)])
    actual = [linear_then_constant(step, warmup, 0.04, 0.07) for step in range(20)]
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize(("text", "steps"), [("0", 0), ("0.1", 10), ("0.25", 25)])
def test_resolve_steps__numbers_as_text(text: str, steps: int) -> None:
    assert resolve_steps(text, steps_per_epoch=10, total_steps=100, key="k") == steps


@pytest.mark.parametrize("warmup", [0, 1, 2, 10, 50])
def test_linear_cosine__pieces(warmup: int) -> None:
    """Warm-up without its first value, 0; peak at its last step; the end at the last step of the run."""
    total, peak, end = 50, 3e-3, 1e-6
    ramp = np.linspace(0, peak, warmup + 1)[1:]
    rest = total - warmup
    fall = np.array([end + 0.5 * (peak - end) * (1 + np.cos(np.pi * i / rest)) for i in range(1, rest + 1)])
    actual = [linear_cosine(step, total, warmup, 0.0, peak, end) for step in range(total)]
    np.testing.assert_allclose(actual, np.concatenate([ramp, fall]), rtol=1e-9, atol=1e-15)
    if warmup:
        assert actual[0] == pytest.approx(peak / warmup)
        assert actual[warmup - 1] == pytest.approx(peak)
        assert max(actual) == pytest.approx(peak)
    if warmup < total:
        assert actual[-1] == pytest.approx(end)


def test_linear_cosine__peaks_of_the_published_recipes() -> None:
    """ViL-T, 800 epochs of 625 updates: warm-up of 5 epochs to 2e-3; the middle of the cosine is half of it."""
    total, warmup = 800 * 625, 5 * 625
    rate = [linear_cosine(step, total, warmup, 0.0, 2e-3, 1e-6) for step in (0, warmup - 1, warmup, total - 1)]
    assert rate[:2] == pytest.approx([2e-3 / warmup, 2e-3], rel=1e-12)
    assert 1.9999e-3 < rate[2] < 2e-3
    assert rate[3] == pytest.approx(1e-6, rel=1e-9)
    middle = linear_cosine(warmup + (total - warmup) // 2 - 1, total, warmup, 0.0, 2e-3, 1e-6)
    assert middle == pytest.approx((2e-3 + 1e-6) / 2, rel=1e-4)


def test_linear_cosine__from_a_rate_above_zero() -> None:
    actual = [linear_cosine(step, 20, 4, 1e-6, 1e-3, 1e-5) for step in range(4)]
    np.testing.assert_allclose(actual, np.linspace(1e-6, 1e-3, 5)[1:], rtol=1e-12)


@pytest.mark.parametrize("warmup", [0, 5])
def test_linear_cosine__constant_if_it_ends_at_the_peak(warmup: int) -> None:
    actual = [linear_cosine(step, 30, warmup, 0.0, 1e-5, 1e-5) for step in range(30)]
    assert actual[warmup:] == [1e-5] * (30 - warmup)


def test_linear_cosine__stays_at_the_end_beyond_the_run() -> None:
    assert linear_cosine(1000, 30, 5, 0.0, 1e-3, 1e-6) == pytest.approx(1e-6)
