"""Losses on prototypes against loops in float64, and against lightly's where it has the same."""

import math

import pytest
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss
from lightly.loss.swav_loss import sinkhorn
from torch import Tensor

from vil_lightning.losses.prototypes import centered_targets, patch_loss, sinkhorn_targets, view_loss


def softmax(values: list[float]) -> list[float]:
    weights = [math.exp(value - max(values)) for value in values]
    return [weight / sum(weights) for weight in weights]


def cross_entropy(target: Tensor, logits: Tensor, temperature: float) -> float:
    probabilities = softmax([value / temperature for value in logits.tolist()])
    return -sum(t * math.log(p) for t, p in zip(target.tolist(), probabilities, strict=True))


@pytest.mark.parametrize(("teacher_views", "student_views"), [(2, 2), (2, 5), (1, 3), (3, 4)])
def test_view_loss__mean_over_pairs_of_different_views(teacher_views: int, student_views: int) -> None:
    torch.manual_seed(0)
    student = torch.randn(student_views, 3, 7, dtype=torch.float64)
    targets = torch.randn(teacher_views, 3, 7, dtype=torch.float64).softmax(-1)
    terms = [
        cross_entropy(targets[t, b], student[v, b], 0.2)
        for t in range(teacher_views)
        for v in range(student_views)
        if t != v
        for b in range(3)
    ]
    assert float(view_loss(student, targets, 0.2)) == pytest.approx(sum(terms) / len(terms), rel=1e-12)


def test_view_loss__is_the_one_of_dino() -> None:
    torch.manual_seed(0)
    teacher, student, center = torch.randn(2, 4, 9), torch.randn(5, 4, 9), torch.randn(9)
    oracle = DINOLoss(9, student_temp=0.1)
    oracle.center.copy_(center.view(1, 1, 9))
    expected = oracle(list(teacher), list(student), teacher_temp=0.05)
    torch.testing.assert_close(view_loss(student, centered_targets(teacher, center, 0.05), 0.1), expected)


def test_patch_loss__mean_of_an_image_then_of_images() -> None:
    torch.manual_seed(0)
    hidden = torch.tensor([[True, False, True, True], [False] * 4, [False, True, False, False]])
    student, targets = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64).softmax(-1)
    terms = [cross_entropy(targets[m], student[m], 0.3) for m in range(4)]
    expected = (sum(terms[:3]) / 3 + 0 + terms[3]) / 3
    assert float(patch_loss(student, targets, hidden, 0.3)) == pytest.approx(expected, rel=1e-12)

    oracle = IBOTPatchLoss(6, teacher_temp=0.5, student_temp=0.3)
    teacher = torch.randn(4, 6)
    expected_tensor = oracle(teacher, student.float(), hidden.view(3, 2, 2))
    actual = patch_loss(student.float(), centered_targets(teacher, torch.zeros(6), 0.5), hidden, 0.3)
    torch.testing.assert_close(actual, expected_tensor)


def test_patch_loss__nothing_hidden_is_zero_with_a_gradient() -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    loss = patch_loss(student, torch.zeros(0, 5), torch.zeros(2, 3, dtype=torch.bool), 0.1)
    loss.backward()
    assert float(loss.detach()) == 0
    assert student.grad is not None


def test_centered_targets__logits_less_center_sharpened() -> None:
    logits, center = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([0.2, 1.5, -0.5])
    expected = softmax([0.8 / 0.1, 0.5 / 0.1, 1.0 / 0.1])
    assert centered_targets(logits, center, 0.1)[0].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_sinkhorn_targets__against_loops(rows: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(rows, 5, dtype=torch.float64)
    table = [[math.exp(value / 0.5) for value in row] for row in logits.tolist()]
    for _ in range(3):
        sums = [sum(table[i][k] for i in range(rows)) for k in range(5)]
        table = [[table[i][k] / sums[k] for k in range(5)] for i in range(rows)]  # prototypes equally used
        table = [[value / sum(row) for value in row] for row in table]  # images' probabilities
    actual = sinkhorn_targets(logits, 0.5)
    torch.testing.assert_close(actual, torch.tensor(table, dtype=torch.float64), rtol=1e-10, atol=0)
    if rows == 40:
        used = actual.sum(0) - 8  # of 40 images and 5 prototypes
        assert used.abs().max() < 0.8
        assert ((logits / 0.5).softmax(1).sum(0) - 8).abs().max() > 2
    torch.testing.assert_close(actual, sinkhorn_targets(logits + 1e3, 0.5), rtol=1e-9, atol=0)


def test_sinkhorn_targets__equals_lightlys_for_equal_numbers() -> None:
    logits = torch.randn(12, 7)
    torch.testing.assert_close(sinkhorn_targets(logits, 0.3), sinkhorn(logits, 3, 0.3))


def test_sinkhorn_targets__of_no_rows() -> None:
    assert sinkhorn_targets(torch.zeros(0, 5), 0.05).shape == (0, 5)


def test_targets__carry_no_gradient() -> None:
    logits = torch.randn(4, 5, requires_grad=True)
    assert not sinkhorn_targets(logits, 0.5).requires_grad
    assert not centered_targets(logits, torch.zeros(5), 0.5).requires_grad
