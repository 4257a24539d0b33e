"""What "auto" chooses: the published value at the published size, something smaller below."""

import pytest

from vil_lightning.methods.small_data import choose_num_prototypes, choose_teacher_momentum, choose_teacher_temp

IMAGENET = 1_281_167


@pytest.mark.parametrize(
    ("num_images", "largest", "expected"),
    [
        (IMAGENET, 65536, 65536),
        (IMAGENET, 8192, 8192),
        (14_000_000, 65536, 65536),
        (126_000, 65536, 8192),
        (50_000, 65536, 2048),
        (1438, 65536, 1024),
        (1, 65536, 1024),
    ],
)
def test_choose_num_prototypes__a_twentieth_of_the_images(num_images: int, largest: int, expected: int) -> None:
    value, reason = choose_num_prototypes(num_images, largest)
    assert value == expected
    assert str(num_images) in reason


@pytest.mark.parametrize(
    ("steps", "longest", "expected"),
    [
        (100 * IMAGENET // 512, 0.996, 0.996),
        (125_000, 0.992, 0.992),
        (2500, 0.996, 0.996),
        (1000, 0.996, 0.99),
        (1000, 0.992, 0.99),
        (50, 0.996, 0.9),
        (0, 0.996, 0.9),
    ],
)
def test_choose_teacher_momentum__a_tenth_of_the_run(steps: int, longest: float, expected: float) -> None:
    value, reason = choose_teacher_momentum(steps, longest)
    assert value == pytest.approx(expected, rel=1e-12)
    assert f"averages over {round(1 / (1 - expected))} of {steps} steps" in reason


@pytest.mark.parametrize(("epochs", "expected"), [(1, 0.04), (100, 0.04), (300, 0.07), (800, 0.07)])
def test_choose_teacher_temp__as_dino_on_imagenet(epochs: int, expected: float) -> None:
    assert choose_teacher_temp(epochs * IMAGENET)[0] == expected
