"""Which patches are hidden: exactly as many as wanted, everywhere equally often, and the same again for the same seed."""

import itertools

import pytest
import torch
from torch import Tensor

from vil_lightning.masking import (
    MASK_KINDS,
    hidden_except,
    hidden_mask,
    num_hidden,
    uneven_block_mask,
    visible_positions,
)

DRAWS = 10_000


@pytest.mark.parametrize(
    ("kind", "grid", "ratio", "expected"),
    [
        ("random", (14, 14), 0.75, 147),  # 49 visible, as in MAE
        ("random", (14, 14), 0.6, 118),  # of 78.4 visible patches 78
        ("random", (7, 7), 0.6, 30),  # ceil(0.6 x 49), as in SimMIM
        ("random", (3, 5), 0.5, 8),
        ("random", (10, 10), 0.9, 90),  # 100 * (1 - 0.9) is 9.999999999999998
        ("random", (10, 10), 0.8, 80),
        ("random", (1, 10), 0.7, 7),  # 10 * (1 - 0.7) is 3.0000000000000004
        ("block", (14, 14), 0.75, 147),
        ("block", (3, 5), 0.4, 6),
        ("row", (14, 14), 0.75, 140),  # 10.5 rows: to the even one
        ("row", (4, 6), 0.75, 18),
        ("row", (3, 5), 0.5, 10),
    ],
)
def test_hidden_mask__count_is_exact(kind: str, grid: tuple[int, int], ratio: float, expected: int) -> None:
    assert num_hidden(kind, grid, ratio) == expected
    hidden = hidden_mask(kind, 50, grid, ratio)
    assert (hidden.shape, hidden.dtype) == ((50, grid[0] * grid[1]), torch.bool)
    assert hidden.sum(1).tolist() == [expected] * 50


def test_num_hidden__is_right_for_every_whole_percentage() -> None:
    """Against integers, which round nothing."""
    for side, percent in itertools.product(range(1, 33), range(1, 100)):
        total = side * side
        assert num_hidden("random", (side, side), percent / 100) == total - total * (100 - percent) // 100


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize(("ratio", "share"), [(0.0, 0), (1.0, 1)])
def test_hidden_mask__nothing_and_everything(kind: str, ratio: float, share: int) -> None:
    assert hidden_mask(kind, 3, (3, 4), ratio).sum(1).tolist() == [12 * share] * 3


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 1)])
def test_hidden_mask__grids_of_one_row_or_column(kind: str, grid: tuple[int, int]) -> None:
    hidden = hidden_mask(kind, 5, grid, 0.5)
    assert hidden.sum(1).tolist() == [num_hidden(kind, grid, 0.5)] * 5


def test_hidden_mask__unknown_kind() -> None:
    with pytest.raises(ValueError, match=r"'rows' is not known.*random, block, row"):
        hidden_mask("rows", 1, (2, 2), 0.5)


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_hidden_mask__same_seed_same_mask(kind: str) -> None:
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return hidden_mask(kind, 8, (6, 5), 0.5)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(1)
    first, second = hidden_mask(kind, 8, (6, 5), 0.5), hidden_mask(kind, 8, (6, 5), 0.5)
    assert not torch.equal(first, second)
    assert len({tuple(mask.tolist()) for mask in first}) > 1  # images of a batch differ, too


def within_four_sigma(shares: Tensor, probability: float) -> bool:
    return bool(((shares - probability).abs() <= 4 * (probability * (1 - probability) / DRAWS) ** 0.5).all())


def test_random__every_patch_equally_often_and_pairs_independently() -> None:
    hidden = hidden_mask("random", DRAWS, (4, 5), 0.75)
    assert within_four_sigma(hidden.double().mean(0), 0.75)
    both = (hidden[:, :, None] & hidden[:, None, :]).double().mean(0)
    apart = ~torch.eye(20, dtype=torch.bool)
    assert within_four_sigma(both[apart], 15 / 20 * 14 / 19)  # two of them without replacement


def test_row__whole_rows_equally_often() -> None:
    hidden = hidden_mask("row", DRAWS, (5, 3), 0.6).view(DRAWS, 5, 3)
    assert torch.equal(hidden, hidden[:, :, :1].expand_as(hidden))
    assert within_four_sigma(hidden[:, :, 0].double().mean(0), 0.6)
    both = (hidden[:, :, None, 0] & hidden[:, None, :, 0]).double().mean(0)
    assert within_four_sigma(both[~torch.eye(5, dtype=torch.bool)], 3 / 5 * 2 / 4)


def rectangle(mask: Tensor) -> tuple[int, int, int, int] | None:
    """Top, bottom, left, right of what is True, if that is a rectangle."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    return (top, bottom, left, right) if bool(mask[top:bottom, left:right].all()) else None


def test_block__is_a_union_of_rectangles() -> None:
    """Replays every rectangle from the same draws: size, shape and place, and that the last one alone is cut short."""
    grid, count = (8, 10), 40
    aspects, areas = [], []
    for seed in range(200):
        torch.manual_seed(seed)
        expected, left, rectangles = torch.zeros(grid, dtype=torch.bool), count, 0
        while left > 0:
            area, aspect, top, start = torch.rand(4).tolist()
            area, aspect = min(4, left) + area * max(left - 4, 0), 0.3 * (1 / 0.09) ** aspect
            height = min(8, max(1, round((area * aspect) ** 0.5)))
            width = min(10, max(1, round((area / aspect) ** 0.5)))
            top, start = int(top * (8 - height + 1)), int(start * (10 - width + 1))
            rectangles += 1
            aspects.append(height / width)
            areas.append(area)
            for i, j in itertools.product(range(top, top + height), range(start, start + width)):
                if not expected[i, j] and left:
                    expected[i, j], left = True, left - 1
        torch.manual_seed(seed)
        hidden = hidden_mask("block", 1, grid, 0.5)[0].view(grid)
        assert torch.equal(hidden, expected)
        assert rectangles > 1 or rectangle(hidden) is not None or int(hidden.sum()) == count
    assert max(areas) > 30
    assert min(aspects) < 0.4
    assert max(aspects) > 2.5


def neighbours(mask: Tensor) -> float:
    """Share of the pairs of neighbours of which both are hidden."""
    down, right = mask[:, 1:] & mask[:, :-1], mask[:, :, 1:] & mask[:, :, :-1]
    return float(down.double().mean() + right.double().mean()) / 2


def test_block__holds_together_and_reaches_everywhere() -> None:
    hidden = hidden_mask("block", 1000, (8, 8), 0.5).view(-1, 8, 8)
    alone = hidden_mask("random", 1000, (8, 8), 0.5).view(-1, 8, 8)
    assert neighbours(alone) == pytest.approx(0.5 * 31 / 63, abs=0.01)
    assert neighbours(hidden) > 0.36
    share = hidden.double().mean(0)
    assert share.min() > 0.15  # corners, which few rectangles reach
    # No side is preferred: turned and mirrored shares are the same (four sigma of a difference of two shares).
    bound = 4 * (2 * 0.25 / 1000) ** 0.5
    for other in (share.flip(1), share.T):
        assert (share - other).abs().max() <= bound


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_visible_positions__are_sorted_and_the_complement(kind: str) -> None:
    grid = (6, 7)
    hidden = hidden_mask(kind, 64, grid, 0.6)
    visible = visible_positions(hidden, 42 - num_hidden(kind, grid, 0.6))
    assert visible.dtype == torch.int64
    for mask, places in zip(hidden.tolist(), visible.tolist(), strict=True):
        assert places == [place for place in range(42) if not mask[place]]


def test_visible_positions__all_and_none() -> None:
    assert visible_positions(torch.zeros(2, 5, dtype=torch.bool), 5).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert visible_positions(torch.ones(2, 5, dtype=torch.bool), 0).shape == (2, 0)


# --- unequal shares ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid_size", [(14, 14), (6, 9), (4, 4)])
def test_uneven_block_mask__which_images_and_how_much(grid_size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    total, shares, masked_images = grid_size[0] * grid_size[1], [], torch.zeros(8)
    for _ in range(1250):  # 10,000 images
        hidden = uneven_block_mask(8, grid_size, 0.5, (0.1, 0.5))
        counts = hidden.sum(1)
        assert hidden.shape == (8, total)
        assert int((counts > 0).sum()) == 4
        masked_images += (counts > 0).float()
        of_masked = sorted((counts[counts > 0] / total).tolist())
        for i, share in enumerate(of_masked):  # one from each quarter of the range
            assert 0.1 + 0.1 * i - 0.51 / total <= share <= 0.1 + 0.1 * (i + 1) + 0.51 / total
        shares += of_masked
    assert sum(shares) / len(shares) == pytest.approx(0.3, abs=0.005)
    assert (masked_images / 1250 - 0.5).abs().max() < 0.06  # four deviations


def test_uneven_block_mask__hides_rectangles_and_at_least_one_patch() -> None:
    torch.manual_seed(0)
    hidden = uneven_block_mask(64, (14, 14), 1.0, (0.1, 0.5)).view(64, 14, 14)
    neighbours = (hidden[:, :, 1:] & hidden[:, :, :-1]).sum() + (hidden[:, 1:] & hidden[:, :-1]).sum()
    assert float(neighbours / hidden.sum()) > 1.2  # single patches drawn at random: twice their share, 0.6
    assert uneven_block_mask(3, (2, 2), 1.0, (0.01, 0.02)).sum(1).tolist() == [1, 1, 1]
    assert not uneven_block_mask(3, (4, 4), 0.0, (0.1, 0.5)).any()


def test_hidden_except__undoes_visible_positions() -> None:
    hidden = hidden_mask("random", 5, (3, 4), 0.5)
    assert torch.equal(hidden_except(visible_positions(hidden, 6), 12), hidden)
