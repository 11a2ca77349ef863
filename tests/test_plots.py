"""Charts: what is drawn is where the axes say, and no data breaks them."""

import math
import warnings

import numpy as np
import pytest
from PIL import Image

from common.plots import BLUE, GRID, PLOT, Bars, Chart, Dots, Line, draw_chart, stacked

RED, LIME = (255, 0, 0), (0, 255, 0)


def chart(*layers, **options):
    return Chart(**{"title": "", "x_label": "", "y_label": "", "layers": layers} | options)


def mask(picture, color):
    """Where the picture is nearly that color."""
    return np.abs(np.asarray(picture).astype(int) - color).sum(axis=2) < 60


def box(picture, color):
    """(left, top, right, bottom) of everything of that color."""
    rows, columns = np.nonzero(mask(picture, color))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def white_area(picture):
    """The plotting area; what is around it is not quite white."""
    rows, columns = np.nonzero(np.all(np.asarray(picture) == PLOT, axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_columns_are_as_high_as_their_values():
    heights = [1.0, 4.0, 2.0]
    picture = draw_chart(chart(Bars(label="", edges=[0, 10, 20, 30], heights=heights, color=RED)))
    left, _, right, _ = white_area(picture)
    columns = mask(picture, RED)[:, left:right]
    filled = [columns[:, round((right - left) * (number + 0.5) / 3)].sum() for number in range(3)]
    assert np.array(filled) / filled[1] == pytest.approx(np.array(heights) / 4, abs=0.01)


def test_a_column_without_a_value_is_a_gap():
    picture = draw_chart(chart(Bars(label="", edges=[0, 1, 2, 3], heights=[1.0, math.nan, 1.0], color=RED)))
    left, _, right, _ = white_area(picture)
    assert not mask(picture, RED)[:, (left + right) // 2].any() and mask(picture, RED).any()


def test_points_stand_where_both_axes_say():
    corners = Dots(label="", points=[(100, 5.0), (300, 0.0)], color=LIME, radius=0)
    middle = Dots(label="", points=[(150, 2.5)], color=RED, radius=3)
    picture = draw_chart(chart(corners, middle, y_max=5.0 / 1.06))
    left, top, right, bottom = white_area(picture)
    x0, y0, x1, y1 = box(picture, RED)
    assert ((x0 + x1) / 2 - left) / (right - left) == pytest.approx(0.25, abs=0.01)
    assert ((y0 + y1) / 2 - top) / (bottom - top) == pytest.approx(0.5, abs=0.02)


def test_a_logarithmic_axis_gives_every_power_of_ten_the_same_height():
    dots = [Dots(label="", points=[(x, 10.0**x)], color=c, radius=2) for x, c in ((1, RED), (2, LIME), (3, BLUE))]
    picture = draw_chart(chart(*dots, is_logarithmic=True, x_range=(0, 4)))
    heights = [sum(box(picture, color)[1::2]) / 2 for color in (RED, LIME, BLUE)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=2) and heights[0] > heights[1] + 50


def test_what_is_above_the_chart_does_not_run_into_the_text():
    line = Line(label="", points=[(0, 0.5), (1, 100.0), (2, 0.5)], color=RED)
    picture = draw_chart(chart(line, Dots(label="", points=[(1, 50.0)], color=RED), y_max=1.0))
    _, top, _, bottom = white_area(picture)
    assert box(picture, RED)[1] >= top and box(picture, RED)[3] <= bottom


def test_values_below_zero_are_inside():
    low, high = (Dots(label="", points=[p], color=c, radius=3) for p, c in (((0, -3.0), RED), ((1, 2.0), LIME)))
    picture = draw_chart(chart(low, high, x_range=(-1, 2)))
    _, top, _, bottom = white_area(picture)
    assert top < box(picture, LIME)[1] < (top + bottom) / 2 < box(picture, RED)[3] < bottom


@pytest.mark.parametrize(
    "points",
    [[], [(1, 1.0)], [(1, 0.0)], [(0, math.nan), (1, math.inf)], [(5, 1e-12), (6, 3e-12)], [(0, 1e15), (1e9, 2e15)]],
    ids=["none", "one", "zero", "not finite", "tiny", "huge"],
)
@pytest.mark.parametrize("is_logarithmic", [False, True])
def test_any_data_can_be_drawn(points, is_logarithmic):
    layers = [Line(label="線", points=points), Dots(label="", points=points)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = draw_chart(chart(*layers, title="損失", caption="注" * 300, is_logarithmic=is_logarithmic))
    assert picture.size == (900, 500) and picture.mode == "RGB"


def test_an_empty_chart_says_so():
    full = chart(Bars(label="", edges=[0, 1], heights=[0.0]))
    empty = chart(Bars(label="", edges=[0, 1], heights=[math.nan]), x_range=(0, 1))
    written = [np.all(np.abs(np.asarray(draw_chart(c)).astype(int) - GRID) > 60, axis=2).sum() for c in (full, empty)]
    assert written[1] > written[0] + 100


def test_a_long_title_and_caption_stay_on_the_picture():
    """Text that is cut off must leave the margin clean."""
    picture = draw_chart(chart(title="very long " * 40, caption="very long " * 60))
    background = np.asarray(picture)[0, 0]
    assert np.all(np.asarray(picture)[:, -12:] == background)


@pytest.mark.parametrize("value", [1.0, 0.37, 123.0, 99_999.0, 1_000_000.0, 4e-6])
def test_axis_labels_are_round_and_few(value):
    from common.plots import _ticks

    ticks = _ticks(0, value, 6)
    numbers = [float(text.replace(",", "")) for _, text in ticks]
    assert numbers == pytest.approx([place for place, _ in ticks]) and 3 <= len(ticks) <= 8
    steps = np.diff(numbers)
    assert steps == pytest.approx(steps[0]) and f"{steps[0]:e}"[0] in "125"


def test_pictures_are_stacked_without_gaps_or_overlaps():
    whole = stacked([Image.new("RGB", (10, 4), RED), Image.new("RGB", (6, 3), LIME)])
    assert whole.size == (10, 7) and box(whole, RED) == (0, 0, 10, 4) and box(whole, LIME) == (0, 4, 6, 7)
