"""Scores and sliding windows against loops and torchmetrics."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from vil_lightning.dense import (
    IGNORED,
    Confusion,
    padded_to_multiple,
    pca_foreground,
    scores_of,
    slide,
    window_starts,
)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 13, 24, 31])
@pytest.mark.parametrize("stride", [1, 3, 5, 8])
def test_window_starts__every_pixel_is_seen_and_no_window_leaves_the_image(size: int, stride: int) -> None:
    window = 8
    starts = window_starts(size, window, stride)
    seen = {pixel for start in starts for pixel in range(start, min(start + window, size))}
    assert seen == set(range(size))
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert starts[-1] == max(size - window, 0)
    assert len(starts) == 1 + math.ceil(max(size - window, 0) / stride)


def test_slide__equals_the_whole_image_where_the_window_covers_it() -> None:
    images = torch.randn(2, 3, 13, 17)

    def network(x: Tensor) -> Tensor:  # looks at all pixels it is given
        return x.cumsum(-1) * x.mean((2, 3), keepdim=True)

    for window in (17, 40):
        torch.testing.assert_close(slide(network, images, window, 5), network(images))
    assert not torch.allclose(slide(network, images, 8, 5), network(images))


@pytest.mark.parametrize(("height", "width"), [(13, 17), (5, 21), (8, 8), (16, 11)])
def test_slide__averages_windows_like_a_loop_over_pixels(height: int, width: int) -> None:
    window, stride = 8, 5
    images = torch.randn(1, 3, height, width, dtype=torch.float64)

    def network(x: Tensor) -> Tensor:
        return x[:, :2] + x.sum((1, 2, 3), keepdim=True)

    got = slide(network, images, window, stride)
    assert got.shape == (1, 2, height, width)
    for y in range(height):
        for x in range(width):
            values = []
            for top in window_starts(height, window, stride):
                for left in window_starts(width, window, stride):
                    if top <= y < top + window and left <= x < left + window:
                        part = images[0, :, top : top + window, left : left + window]
                        values.append(images[0, :2, y, x] + part.sum())
            torch.testing.assert_close(got[0, :, y, x].double(), torch.stack(values).mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [0, 9])
def test_slide__stride_that_leaves_gaps_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match=f"stride={stride} must be between 1 and window=8"):
        slide(lambda x: x, torch.zeros(1, 3, 16, 16), 8, stride)


def test_padded_to_multiple__adds_zeros_at_the_end_only() -> None:
    images = torch.ones(1, 3, 5, 8)
    padded = padded_to_multiple(images, (4, 4))
    assert padded.shape == (1, 3, 8, 8)
    assert padded[..., :5, :].eq(1).all()
    assert padded[..., 5:, :].eq(0).all()
    assert padded_to_multiple(padded, (4, 8)) is not None
    assert padded_to_multiple(torch.ones(1, 3, 8, 8), (4, 4)).shape == (1, 3, 8, 8)


def counted(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    table = np.zeros((num_classes, num_classes), dtype=np.int64)
    for p, t in zip(predicted.ravel(), labels.ravel(), strict=True):
        if t != -1:
            table[t, p] += 1
    return table


def test_scores__equal_a_loop_and_torchmetrics_over_several_batches() -> None:
    generator = torch.Generator().manual_seed(3)
    metric, num_classes = Confusion(4), 4
    jaccard = MulticlassJaccardIndex(num_classes, average=None, ignore_index=IGNORED)
    micro = MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORED)
    macro = MulticlassAccuracy(num_classes, average="macro", ignore_index=IGNORED)
    table = np.zeros((4, 4), dtype=np.int64)
    for size in (9, 5):  # unequal batches: means of means would differ
        predicted = torch.randint(0, 4, (2, size, size), generator=generator)
        labels = torch.randint(-1, 4, (2, size, size), generator=generator, dtype=torch.int16)
        metric.update(predicted, labels)
        for reference in (jaccard, micro, macro):
            reference.update(predicted, labels.long())
        table += counted(predicted.numpy(), labels.numpy(), num_classes)
    assert torch.equal(metric.compute(), torch.from_numpy(table))
    scores = scores_of(metric.compute())
    ious = [table[c, c] / (table[c].sum() + table[:, c].sum() - table[c, c]) for c in range(4)]
    assert scores["iou"].tolist() == pytest.approx([100 * iou for iou in ious])
    assert float(scores["miou"]) == pytest.approx(100 * np.mean(ious))
    assert float(scores["miou"]) == pytest.approx(100 * float(jaccard.compute().mean()))
    assert float(scores["pixel_acc"]) == pytest.approx(100 * float(micro.compute()))
    assert float(scores["mean_acc"]) == pytest.approx(100 * float(macro.compute()))


def test_scores__classes_that_are_nowhere_do_not_count() -> None:
    # True: 6 pixels of class 0, 4 of class 1. Predicted: class 2 for one of them. Class 3 is nowhere.
    table = torch.tensor([[5, 0, 1, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    scores = scores_of(table)
    assert scores["iou"][:3].tolist() == pytest.approx([100 * 5 / 7, 100 * 3 / 4, 0.0])
    assert scores["iou"][3].isnan()
    assert float(scores["miou"]) == pytest.approx(100 * (5 / 7 + 3 / 4 + 0) / 3)
    assert float(scores["mean_acc"]) == pytest.approx(100 * (5 / 6 + 3 / 4) / 2)  # of the two that are there
    assert float(scores["pixel_acc"]) == pytest.approx(80.0)


# --- first principal component ----------------------------------------------------------------------------------------


def two_regions(scale: float) -> tuple[Tensor, Tensor]:
    """Features (4, 5, 6, 6), whose third entry says where the foreground is, and masks (4, 12, 12)."""
    generator = torch.Generator().manual_seed(0)
    foreground = torch.zeros(4, 6, 6, dtype=torch.bool)
    foreground[:, 1:4, 2:5] = True
    features = 0.1 * torch.randn(4, 5, 6, 6, generator=generator)
    features[:, 2] += scale * foreground
    masks = 3 * foreground.repeat_interleave(2, 1).repeat_interleave(2, 2).to(torch.int16)
    return features, masks


@pytest.mark.parametrize(("scale", "side"), [(1.0, "positive"), (-1.0, "negative")])
def test_pca_foreground__finds_what_varies_most(scale: float, side: str) -> None:
    features, masks = two_regions(scale)
    masks[:, 0] = IGNORED
    batches = [(features[:3], masks[:3]), (features[3:], masks[3:])]
    scores = pca_foreground(lambda x: x, lambda: batches, background=0)
    tokens = features.permute(0, 2, 3, 1).reshape(-1, 5).double().numpy()
    direction = np.linalg.svd(tokens - tokens.mean(0))[2][0]
    direction *= np.sign(direction[np.abs(direction).argmax()])
    maps = torch.from_numpy((tokens - tokens.mean(0)) @ direction).view(4, 1, 6, 6)
    values = torch.nn.functional.interpolate(maps, size=(12, 12), mode="bilinear")[:, 0].numpy()
    seen, wanted = masks.numpy() != -1, masks.numpy() > 0
    for name, chosen in (("positive", values > 0), ("negative", values < 0)):
        expected = 100 * (chosen & wanted & seen).sum() / ((chosen | wanted) & seen).sum()
        assert scores[name] == pytest.approx(expected)
    assert scores["best"] == scores[side] > 70
    assert scores["everything"] == pytest.approx(100 * (wanted & seen).sum() / seen.sum())
    assert scores["best"] > 2 * scores["everything"]


def test_pca_foreground__adds_up_over_processes() -> None:
    features, masks = two_regions(1.0)
    whole = pca_foreground(lambda x: x, lambda: [(features, masks)], background=0)
    # Two processes with equal images: every sum is twice as large, and nothing else changes.
    doubled = pca_foreground(lambda x: x, lambda: [(features, masks)], background=0, reduce=lambda total: 2 * total)
    assert doubled == pytest.approx(whole)
