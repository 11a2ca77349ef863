"""Small charts: bars, lines and dots over two axes, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw

from common.sheets import BACKGROUND, INK, Font, font_for

Color = tuple[int, int, int]
Points = Sequence[tuple[float, float]]

BLUE, ORANGE, GREEN = (66, 118, 179), (208, 84, 0), (20, 125, 62)
PALE_BLUE = (128, 168, 210)
GRID, FAINT, PLOT = (226, 226, 226), (95, 95, 95), (255, 255, 255)

SHARPNESS = 3
"""What is not text is drawn so many times larger and then scaled down, for smooth edges."""
TITLE_SIZE, TEXT_SIZE, NOTE_SIZE = 18, 14, 12
MARGIN, GAP, SWATCH = 16, 6, 14
PIXELS_PER_TICK = 90, 55
"""Across and up: ticks stand about as far apart."""
HEADROOM = 1.06
LEFT = 88
"""Where the plotting area begins unless long numbers need more, so that stacked charts line up."""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Columns that stand on the lower edge."""

    label: str
    edges: Sequence[float]
    """n + 1 rising x values."""
    heights: Sequence[float]
    """n; one that is not finite leaves a gap."""
    notes: Sequence[str] = ()
    """n short texts above the columns, or none."""
    color: Color = BLUE

    @property
    def points(self) -> Points:
        corners = zip(pairwise(self.edges), self.heights, strict=True)
        return [(x, height) for ends, height in corners for x in ends]

    def draw(self, pen: ImageDraw.ImageDraw, frame: _Frame) -> None:
        for (left, right), height in zip(pairwise(self.edges), self.heights, strict=True):
            if math.isfinite(height):
                (x0, y), (x1, _) = frame.place(left, height), frame.place(right, height)
                gap = min(SHARPNESS, (x1 - x0) / 4)
                pen.rectangle((x0 + gap, y, max(x1 - gap, x0 + gap), frame.height), fill=self.color)


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points in order, joined."""

    label: str
    points: Points
    color: Color = ORANGE
    width: float = 2

    def draw(self, pen: ImageDraw.ImageDraw, frame: _Frame) -> None:
        places = [frame.place(x, y) for x, y in _finite(self.points)]
        width = round(self.width * SHARPNESS)
        if len(places) > 1:
            pen.line(places, fill=self.color, width=width, joint="curve")
        for place in places[:1]:  # a line from one point to nowhere would not be seen
            _dot(pen, place, width / 2, self.color)


@dataclass(frozen=True, kw_only=True)
class Dots:
    """Points that stand alone."""

    label: str
    points: Points
    color: Color = PALE_BLUE
    radius: float = 1.5

    def draw(self, pen: ImageDraw.ImageDraw, frame: _Frame) -> None:
        for x, y in _finite(self.points):
            _dot(pen, frame.place(x, y), self.radius * SHARPNESS, self.color)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What is drawn, the first layer at the bottom."""

    title: str
    x_label: str
    y_label: str
    layers: Sequence[Bars | Line | Dots]
    x_range: tuple[float, float] | None = None
    """None is from the first to the last point."""
    y_max: float | None = None
    """What is higher is cut off; None shows everything. The lower edge is 0, or below it if a point is."""
    is_logarithmic: bool = False
    """Powers of ten on the y axis; the lower edge is the power below the lowest point. `y_max` is not used."""
    caption: str = ""
    """A remark below."""


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Where values are on the sharp picture of the plotting area."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    is_logarithmic: bool
    width: int
    height: int

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels from the upper left corner."""
        across = _share(x, *self.x_range)
        if self.is_logarithmic:
            up = _share(math.log10(y), *map(math.log10, self.y_range)) if y > 0 else -1.0
        else:
            up = _share(y, *self.y_range)
        return across * self.width, (1 - up) * self.height


def draw_chart(chart: Chart, *, size: tuple[int, int] = (900, 500)) -> Image.Image:
    """The chart as an RGB picture of (width, height) pixels."""
    canvas = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    texts = _Texts(chart)
    x_range, y_range = _ranges(chart)
    top = MARGIN + texts.line(TITLE_SIZE) + GAP + texts.line(TEXT_SIZE) + GAP
    bottom = size[1] - MARGIN - texts.line(TEXT_SIZE) * (3 if chart.caption else 2) - 2 * GAP
    y_ticks = _y_ticks(y_range, chart.is_logarithmic, (bottom - top) / PIXELS_PER_TICK[1])
    left = max(LEFT, MARGIN + GAP + max(math.ceil(texts.small.getlength(text)) for _, text in y_ticks))
    right = size[0] - 2 * MARGIN
    x_ticks = _ticks(*x_range, (right - left) / PIXELS_PER_TICK[0])
    frame = _Frame(
        x_range=x_range,
        y_range=y_range,
        is_logarithmic=chart.is_logarithmic,
        width=(right - left) * SHARPNESS,
        height=(bottom - top) * SHARPNESS,
    )
    canvas.paste(_plot(chart, frame, x_ticks, y_ticks), (left, top))
    texts.draw(pen, (left, top, right, bottom), size)
    for value, text in y_ticks:
        pen.text((left - GAP, top + frame.place(0, value)[1] / SHARPNESS), text, INK, texts.small, anchor="rm")
    for value, text in x_ticks:
        across = frame.place(value, y_range[1])[0] / SHARPNESS
        pen.text((left + across, bottom + GAP), text, INK, texts.small, anchor="mt")
    _write_notes(chart, pen, frame, (left, top), texts.note)
    return canvas


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """One below the other."""
    whole = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), BACKGROUND)
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    return whole


class _Texts:
    """What is written around the plotting area."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        labels = "".join(layer.label for layer in chart.layers)
        written = f"{chart.title}{chart.x_label}{chart.y_label}{chart.caption}{labels}0123456789.,-"
        self.title, self.small = font_for(written, TITLE_SIZE), font_for(written, TEXT_SIZE)
        self.note = font_for(written, NOTE_SIZE)

    def line(self, size: int) -> int:
        """Height of a line of text."""
        return math.ceil(size * 1.35)

    def draw(self, pen: ImageDraw.ImageDraw, area: tuple[int, int, int, int], size: tuple[int, int]) -> None:
        chart, (left, top, right, bottom) = self.chart, area
        room = size[0] - 2 * MARGIN
        pen.text((MARGIN, MARGIN), _fitting(chart.title, self.title, room), INK, self.title)
        above = top - GAP - self.line(TEXT_SIZE) / 2
        pen.text((MARGIN, above), chart.y_label, FAINT, self.small, anchor="lm")
        self._legend(pen, right, above)
        below = bottom + GAP + self.line(TEXT_SIZE)
        pen.text(((left + right) / 2, below), chart.x_label, FAINT, self.small, anchor="mt")
        caption = _fitting(chart.caption, self.note, room)
        pen.text((MARGIN, below + self.line(TEXT_SIZE) + GAP), caption, FAINT, self.note, anchor="lt")

    def _legend(self, pen: ImageDraw.ImageDraw, right: float, middle: float) -> None:
        """From right to left; a single layer without a label needs none."""
        for layer in reversed([layer for layer in self.chart.layers if layer.label]):
            pen.text((right, middle), layer.label, INK, self.small, anchor="rm")
            right -= self.small.getlength(layer.label) + GAP
            half = 3 if isinstance(layer, Dots) else SWATCH / 2
            box = (right - SWATCH / 2 - half, middle - 3, right - SWATCH / 2 + half, middle + 3)
            (pen.ellipse if isinstance(layer, Dots) else pen.rectangle)(box, fill=layer.color)
            right -= SWATCH + 2 * GAP


def _plot(chart: Chart, frame: _Frame, x_ticks: Ticks, y_ticks: Ticks) -> Image.Image:
    """The area between the axes."""
    sharp = Image.new("RGB", (frame.width, frame.height), PLOT)
    pen = ImageDraw.Draw(sharp)
    for value, _ in x_ticks:
        across = frame.place(value, frame.y_range[1])[0]
        pen.line((across, 0, across, frame.height), fill=GRID, width=SHARPNESS)
    for value, _ in y_ticks:
        down = frame.place(0, value)[1]
        pen.line((0, down, frame.width, down), fill=GRID, width=SHARPNESS)
    for layer in chart.layers:
        layer.draw(pen, frame)
    if not any(list(_finite(layer.points)) for layer in chart.layers):
        font = font_for("no data", TITLE_SIZE * SHARPNESS)
        pen.text((frame.width / 2, frame.height / 2), "no data", FAINT, font, anchor="mm")
    edge = SHARPNESS // 2
    pen.line((edge, 0, edge, frame.height), fill=FAINT, width=SHARPNESS)
    pen.line((0, frame.height - 1 - edge, frame.width, frame.height - 1 - edge), fill=FAINT, width=SHARPNESS)
    return sharp.reduce(SHARPNESS)


def _write_notes(chart: Chart, pen: ImageDraw.ImageDraw, frame: _Frame, corner: tuple[int, int], font: Font) -> None:
    for layer in chart.layers:
        if not isinstance(layer, Bars):
            continue
        for (left, right), height, note in zip(pairwise(layer.edges), layer.heights, layer.notes, strict=False):
            across, down = frame.place((left + right) / 2, height if math.isfinite(height) else 0)
            place = corner[0] + across / SHARPNESS, corner[1] + max(down / SHARPNESS, NOTE_SIZE + GAP) - 2
            pen.text(place, note, FAINT, font, anchor="mb")


Ticks = list[tuple[float, str]]


def _ranges(chart: Chart) -> tuple[tuple[float, float], tuple[float, float]]:
    points = [point for layer in chart.layers for point in _finite(layer.points)]
    xs = chart.x_range or (min((x for x, _ in points), default=0), max((x for x, _ in points), default=1))
    if xs[0] == xs[1]:
        xs = xs[0] - 0.5, xs[1] + 0.5
    ys = [y for _, y in points]
    if chart.is_logarithmic:
        positive = [y for y in ys if y > 0] or [1.0]
        low = math.floor(math.log10(min(positive)))
        return xs, (10.0**low, 10.0 ** max(low + 1, math.ceil(math.log10(max(positive)) + 0.01)))
    low, high = min(0, *ys, 0), max(0, *ys, 0) if chart.y_max is None else chart.y_max
    return xs, (low * HEADROOM, high * HEADROOM if high > low else low + 1)


def _ticks(low: float, high: float, wanted: float) -> Ticks:
    """Round values from `low` to `high`, about as many as wanted."""
    rough = (high - low) / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next((round_ for round_ in (1, 2, 5) if round_ * power >= rough), 10)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(number * step, _written(number * step, digits)) for number in range(first, last + 1)]


def _y_ticks(y_range: tuple[float, float], is_logarithmic: bool, wanted: float) -> Ticks:
    if not is_logarithmic:
        return _ticks(*y_range, wanted)
    low, high = (round(math.log10(end)) for end in y_range)
    every = max(1, math.ceil((high - low) / wanted))
    return [(10.0**power, _written(10.0**power, max(0, -power))) for power in range(low, high + 1, every)]


def _written(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if abs(value) >= 10_000 else f"{value:.{digits}f}"


def _finite(points: Points) -> Points:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low)


def _dot(pen: ImageDraw.ImageDraw, place: tuple[float, float], radius: float, color: Color) -> None:
    pen.ellipse((place[0] - radius, place[1] - radius, place[0] + radius, place[1] + radius), fill=color)


def _fitting(text: str, font: Font, width: float) -> str:
    """`text`, cut off where it would leave `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
