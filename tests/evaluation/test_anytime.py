"""Accuracy of answers to the upper part of an image."""

import sys
from pathlib import Path

import pytest
import torch

sys.path += [str(Path(__file__).parent)]
from small import subject

from vil_lightning.errors import ConfigError
from vil_lightning.evaluation import Anytime, LogisticRegression
from vil_lightning.evaluation.readouts import read_out

NAMES = ("bilateral_concat", "avg", "last")
NETWORKS = pytest.mark.parametrize("name", ["vil2_tiny_patch16_224", "vit_tiny_patch16_224"])


@NETWORKS
def test_shown__what_lies_below_has_no_influence(name: str) -> None:
    network = subject(name).build()
    images = torch.randn(3, 3, 16, 16)
    changed = images.clone()
    changed[:, :, 8:] = torch.randn(3, 3, 8, 16)
    half, other = read_out(network, images, NAMES, 0.5), read_out(network, changed, NAMES, 0.5)
    for readout in NAMES:
        assert torch.equal(half[readout], other[readout])
    changed[:, :, 7] += 1  # the last row of pixels that is shown
    assert not torch.allclose(half["avg"], read_out(network, changed, NAMES, 0.5)["avg"])


def test_shown__equals_a_network_of_that_size() -> None:
    """ViL pads with zeros around the grid, so that the upper half alone is an image of half the height."""
    network = subject().build()
    images = torch.randn(3, 3, 16, 16)
    shown = read_out(network, images, NAMES, 0.5)
    small = subject().build()
    small.set_input_size((8, 16))  # type: ignore[operator]
    state = network.state_dict()
    key = next(name for name in state if name.startswith("pos_embed"))
    state[key] = state[key][:, :2]
    small.load_state_dict(state)
    tokens = small.forward_features(images[:, :, :8])  # type: ignore[operator]
    for readout, expected in (("avg", tokens.mean(1)), ("last", tokens[:, -1])):
        torch.testing.assert_close(shown[readout], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("shown", "rows"), [(0.01, 1), (0.25, 1), (0.26, 2), (0.75, 3), (0.99, 4)])
def test_shown__rows_are_rounded_up(shown: float, rows: int) -> None:
    network = subject().build()
    images = torch.randn(1, 3, 16, 16).requires_grad_()
    read_out(network, images, ["max"], shown)["max"].sum().backward()
    assert images.grad is not None
    seen = images.grad.abs().sum((0, 1, 3)) > 0
    assert seen[: 4 * rows].all()
    assert not seen[4 * rows :].any()


def test_anytime__the_whole_image_is_the_ordinary_logistic_regression(tmp_path: Path) -> None:
    case = subject()
    case.cache_dir = tmp_path
    scores = Anytime(fractions=[0.5, 1.0], C=0.01).run(case)
    (ordinary,) = LogisticRegression(Cs=[0.01]).run(case)
    assert [score.name for score in scores] == [
        "50 % of the rows, whole images",
        "50 % of the rows, equal parts",
        "100 % of the rows, whole images",
    ]
    assert scores[-1].value == ordinary.value
    assert scores[1].value > scores[0].value  # a classifier of parts knows parts
    assert len({score.protocol for score in scores}) == 3
    assert len(list(tmp_path.iterdir())) == 4  # train and val, whole and in part: none stands for the other
    assert Anytime(fractions=[0.5, 1.0], C=0.01).run(case) == scores


def test_anytime__refuses_what_cannot_work() -> None:
    with pytest.raises(ConfigError, match=r"Anytime hides patches from the network.*not with a ResNet"):
        Anytime().check(subject("resnet18"))
    with pytest.raises(ConfigError, match=r"fractions=\[0.5, 1.5\] must be in \(0, 1\]"):
        Anytime(fractions=[0.5, 1.5])
    with pytest.raises(ConfigError, match=r"readout='avg/last4' is not computed of parts of images"):
        Anytime(readout="avg/last4")
