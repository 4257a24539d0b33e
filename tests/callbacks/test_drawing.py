"""Colours whose order can be seen, and sheets in which everything is where it should be."""

import pytest
import torch
from torch import Tensor

from vil_lightning.callbacks.drawing import Tile, cell, diverging, enlarge, frame, heat, sheet

WHITE = [255, 255, 255]
GREEN = [40, 220, 90]


def luminance(picture: Tensor) -> Tensor:
    return (picture.float() * torch.tensor([0.2126, 0.7152, 0.0722])[:, None, None]).sum(0)


def pixel(picture: Tensor, row: int, column: int) -> list[int]:
    return picture[:, row, column].tolist()


def test_heat__from_dark_to_bright() -> None:
    picture = heat(torch.linspace(-3, 5, 201)[None], -3, 5)
    assert picture.shape == (3, 1, 201)
    assert picture.dtype == torch.uint8
    rising = luminance(picture)[0].diff()
    assert (rising > -1).all()  # rounding
    assert rising.sum() > 200


def test_heat__beyond_the_ends_and_unknown() -> None:
    picture = heat(torch.tensor([[0.0, -9.0, -torch.inf], [1.0, 9.0, torch.inf], [torch.nan] * 3]), 0, 1)
    for row in range(2):
        assert pixel(picture, row, 0) == pixel(picture, row, 1) == pixel(picture, row, 2)
    assert pixel(picture, 0, 0) != pixel(picture, 1, 0)
    red, green, blue = pixel(picture, 2, 0)
    assert red == green == blue  # in the scale, no colour is grey
    assert not (picture[0, :2] == picture[1, :2]).logical_and(picture[1, :2] == picture[2, :2]).any()


def test_colours__of_a_range_without_width_are_those_in_the_middle() -> None:
    values = torch.tensor([[2.0, 2.0, torch.nan]])
    for picture, middle in (
        (heat(values, 2, 2), heat(torch.tensor([[0.5]]), 0, 1)),
        (diverging(values, 0), diverging(torch.tensor([[0.0]]), 1)),
    ):
        assert pixel(picture, 0, 0) == pixel(picture, 0, 1) == pixel(middle, 0, 0)
        assert pixel(picture, 0, 2) == [170, 170, 170]


def test_diverging__white_in_the_middle_and_darker_to_both_sides() -> None:
    picture = diverging(torch.linspace(-2, 2, 201)[None], 2)
    light = luminance(picture)[0]
    assert min(pixel(picture, 0, 100)) > 240
    assert (light[:101].diff() > -1).all()
    assert (light[100:].diff() < 1).all()
    assert (picture[2, 0, :95] > picture[0, 0, :95]).all()  # blue
    assert (picture[0, 0, 106:] > picture[2, 0, 106:]).all()  # red
    assert abs(light[0] - light[-1]) < 20  # equal sizes look equally strong
    assert pixel(diverging(torch.tensor([[torch.nan]]), 2), 0, 0) == [170, 170, 170]


def test_colours__of_known_values() -> None:
    sides = diverging(torch.tensor([[-3.0, -1.5, 1.5, 3.0]]), 3)
    assert [pixel(sides, 0, i) for i in range(4)] == [[20, 50, 130], [85, 145, 205], [225, 120, 85], [140, 20, 40]]
    ends = heat(torch.tensor([[10.0, 12.0, 13.0, 20.0]]), 10, 20)
    assert [pixel(ends, 0, i) for i in (0, 1, 3)] == [[13, 8, 60], [70, 30, 135], [252, 250, 180]]
    assert pixel(ends, 0, 2) == [118, 38, 130]  # half way to (165, 45, 125); 117.5 and 37.5 are rounded to even


def test_enlarge__longer_side_without_smoothing() -> None:
    picture = torch.randint(0, 256, (3, 4, 6), dtype=torch.uint8)
    large = enlarge(picture, 48)
    assert torch.equal(large, picture.repeat_interleave(8, 1).repeat_interleave(8, 2))
    assert enlarge(torch.zeros(3, 224, 112, dtype=torch.uint8), 32).shape == (3, 32, 16)


def test_frame__around_a_cell() -> None:
    picture = torch.randint(0, 30, (3, 40, 60), dtype=torch.uint8)
    original = picture.clone()
    framed = frame(picture, 1, 2, (4, 6))  # rows 10 to 19, columns 20 to 29
    assert torch.equal(picture, original)
    green = (framed == torch.tensor(GREEN, dtype=torch.uint8)[:, None, None]).all(0)
    expected = torch.zeros(40, 60, dtype=torch.bool)
    expected[8:22, 18:32] = True
    expected[10:20, 20:30] = False
    assert torch.equal(green, expected)
    assert torch.equal(framed[:, ~expected], picture[:, ~expected])


@pytest.mark.parametrize("row, column", [(0, 0), (3, 5)])
def test_frame__at_the_edge_is_whole(row: int, column: int) -> None:
    framed = frame(torch.zeros(3, 40, 60, dtype=torch.uint8), row, column, (4, 6))
    rows, columns = (framed[1] == 220).nonzero(as_tuple=True)
    top, bottom, left, right = int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())
    assert (top, left) == ((0, 0) if row == 0 else (28, 48))
    assert (bottom, right) == ((11, 11) if row == 0 else (39, 59))
    green = framed[1] == 220
    for edge in (green[top, left:right], green[bottom, left:right], green[top:bottom, left], green[top:bottom, right]):
        assert edge.all()


@pytest.mark.parametrize("colour", [(10, 10, 60), (250, 250, 180)])
def test_cell__text_is_readable_on_any_colour(colour: tuple[int, int, int]) -> None:
    picture = cell("103", 44, 24, colour)
    assert picture.shape == (3, 24, 44)
    assert pixel(picture, 0, 0) == pixel(picture, 23, 43) == list(colour)
    difference = (luminance(picture) - luminance(picture)[0, 0]).abs()
    assert difference.max() > 180
    written = (difference > 100).nonzero()
    assert written[:, 1].float().mean() == pytest.approx(21.5, abs=4)  # amid it
    assert written[:, 0].float().mean() == pytest.approx(11.5, abs=4)


def ink(picture: Tensor) -> tuple[int, int, int, int]:
    """First and last row, first and last column of what is nearly black."""
    rows, columns = (luminance(picture) < 30).nonzero(as_tuple=True)
    return int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())


def test_arrow__points_where_it_says() -> None:
    weight = {}
    for arrow in ("right", "left", "down", "up"):
        black = luminance(cell("", 40, 40, arrow=arrow)) < 60
        first_row, last_row, first, last = ink(cell("", 40, 40, arrow=arrow))
        box = black[first_row : last_row + 1, first : last + 1]
        assert (box.shape[1] > box.shape[0]) == (arrow in ("right", "left"))
        half_rows, half_columns = box.shape[0] // 2, box.shape[1] // 2
        weight[arrow] = {  # the head has more ink than the tail
            "right": int(box[:, -half_columns:].sum()) - int(box[:, :half_columns].sum()),
            "down": int(box[-half_rows:].sum()) - int(box[:half_rows].sum()),
        }
    assert weight["right"]["right"] > 10
    assert weight["left"]["right"] < -10
    assert weight["down"]["down"] > 10
    assert weight["up"]["down"] < -10


def block(value: int, height: int = 20, width: int = 30) -> Tensor:
    """A picture of a colour that is nowhere else."""
    return torch.tensor([200, value, 77], dtype=torch.uint8)[:, None, None].expand(3, height, width).clone()


def place(picture: Tensor, value: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of such a picture in a sheet."""
    found = (picture == torch.tensor([200, value, 77], dtype=torch.uint8)[:, None, None]).all(0)
    rows, columns = found.nonzero(as_tuple=True)
    height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
    assert int(found.sum()) == height * width  # nothing is written over it
    return int(rows.min()), int(columns.min()), height, width


def test_sheet__aligned_and_without_overlap() -> None:
    rows = [
        [Tile(block(1)), Tile(block(2, 44, 10), "above", "a caption far wider than the picture"), Tile(block(3))],
        [Tile(block(4, 6, 80)), Tile(block(5), "two\nlines", arrow="left")],
    ]
    picture = sheet(rows, gap=8)
    places = {value: place(picture, value) for value in range(1, 6)}
    assert [places[value][2:] for value in range(1, 6)] == [(20, 30), (44, 10), (20, 30), (6, 80), (20, 30)]
    assert places[1][0] == places[2][0] == places[3][0]  # pictures of a row start at one height
    assert places[4][0] == places[5][0]
    assert places[1][1] == places[4][1] == 8
    assert places[2][1] == places[5][1] == 8 + 80 + 8  # the widest of the column
    assert places[3][1] > places[2][1] + 150  # the caption has its room
    assert places[2][0] == 8 + 16  # a line above
    assert places[4][0] >= places[2][0] + 44 + 14 + 8 + 28  # a caption, the gap, two lines
    assert pixel(picture, 0, 0) == WHITE
    assert picture.shape[2] == places[3][1] + 30 + 8


def test_sheet__title_is_above_and_widens_it() -> None:
    plain = sheet([[Tile(block(1))]])
    titled = sheet([[Tile(block(1))]], "What this picture shows, in words\nand a second line")
    assert place(plain, 1)[:2] == (8, 8)
    assert place(titled, 1)[:2] == (8 + 2 * 14 + 2 + 8, 8)
    assert titled.shape[2] > plain.shape[2]
    text = titled[:, : place(titled, 1)[0]]
    first, last, _, right = ink(text)
    assert first >= 8
    assert last < place(titled, 1)[0] - 4
    assert right < titled.shape[2] - 4  # not cut off


def test_sheet__above_and_below_are_where_they_should_be() -> None:
    picture = sheet([[Tile(block(1), above="up here")]])
    assert ink(picture)[1] < place(picture, 1)[0]
    picture = sheet([[Tile(block(1), below="down here")]])
    assert ink(picture)[0] >= place(picture, 1)[0] + 20
    arrow = ink(sheet([[Tile(block(1), above="", arrow="right")]]))
    both = ink(sheet([[Tile(block(1), above="x", arrow="right")]]))
    assert arrow[2] == both[2] >= 8
    assert arrow[3] < 8 + 16 < both[3]  # the text stands beside the arrow
