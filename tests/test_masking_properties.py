"""Masks of any grid and share: how many patches, where, and the same again."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vil_lightning.masking import (
    MASK_KINDS,
    hidden_except,
    hidden_mask,
    num_hidden,
    uneven_block_mask,
    visible_positions,
)

GRIDS = st.tuples(st.integers(1, 13), st.integers(1, 13))
RATIOS = st.floats(0, 1)
SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=150)
@given(st.sampled_from(MASK_KINDS), st.integers(1, 5), GRIDS, RATIOS, SEEDS)
def test_hidden_mask__every_image_has_the_count_that_is_announced(
    kind: str, batch_size: int, grid: tuple[int, int], ratio: float, seed: int
) -> None:
    torch.manual_seed(seed)
    mask = hidden_mask(kind, batch_size, grid, ratio)
    assert (mask.shape, mask.dtype) == ((batch_size, grid[0] * grid[1]), torch.bool)
    assert mask.sum(dim=1).tolist() == [num_hidden(kind, grid, ratio)] * batch_size
    torch.manual_seed(seed)
    assert torch.equal(mask, hidden_mask(kind, batch_size, grid, ratio))
    if kind == "row":
        rows = mask.view(batch_size, *grid)
        assert torch.equal(rows.any(dim=2), rows.all(dim=2))


@settings(max_examples=200)
@given(st.sampled_from(MASK_KINDS), GRIDS, RATIOS, RATIOS)
def test_num_hidden__within_a_patch_or_row_of_the_share_and_monotone(
    kind: str, grid: tuple[int, int], first: float, second: float
) -> None:
    low, high = sorted((first, second))
    counts = [num_hidden(kind, grid, ratio) for ratio in (0, low, high, 1)]
    total = grid[0] * grid[1]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, total)
    # Visible patches are rounded down, rows to the nearest.
    assert -1e-6 <= counts[1] - low * total < 1 or (kind == "row" and abs(counts[1] - low * total) <= grid[1] / 2)


@settings(max_examples=100)
@given(st.integers(1, 9), GRIDS, st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), SEEDS)
def test_uneven_block_mask__images_and_counts_within_their_ranges(
    batch_size: int, grid: tuple[int, int], prob: float, first: float, second: float, seed: int
) -> None:
    low, high = sorted((first, second))
    torch.manual_seed(seed)
    mask = uneven_block_mask(batch_size, grid, prob, (low, high))
    counts, total = mask.sum(dim=1), grid[0] * grid[1]
    masked = counts[counts > 0]
    assert len(masked) == round(prob * batch_size)
    assert mask.shape == (batch_size, total)
    for count in masked.tolist():
        assert max(low * total - 0.5 - 1e-4, 1) <= count <= max(high * total + 0.5 + 1e-4, 1)
    torch.manual_seed(seed)
    assert torch.equal(mask, uneven_block_mask(batch_size, grid, prob, (low, high)))


@settings(max_examples=100)
@given(st.sampled_from(MASK_KINDS), st.integers(1, 4), GRIDS, RATIOS, SEEDS)
def test_visible_positions__increase_and_undo_the_mask(
    kind: str, batch_size: int, grid: tuple[int, int], ratio: float, seed: int
) -> None:
    total = grid[0] * grid[1]
    num_visible = total - num_hidden(kind, grid, ratio)
    assume(num_visible > 0)
    torch.manual_seed(seed)
    mask = hidden_mask(kind, batch_size, grid, ratio)
    positions = visible_positions(mask, num_visible)
    assert positions.shape == (batch_size, num_visible)
    assert bool((positions.diff(dim=1) > 0).all())
    assert torch.equal(hidden_except(positions, total), mask)


@given(st.text(max_size=8))
def test_hidden_mask__any_other_kind_is_refused(kind: str) -> None:
    assume(kind not in MASK_KINDS)
    with pytest.raises(ValueError, match="mask kind"):
        hidden_mask(kind, 1, (2, 2), 0.5)
