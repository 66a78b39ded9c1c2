"""Charts as PNG: bars with intervals and lines with labels, drawn by hand with Pillow.

Drawn twice as large as asked for and scaled down, so that lines are smooth.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SCALE = 2
WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 50, 66
INK, QUIET, GRID, PAPER = (32, 33, 36), (95, 99, 104), (226, 228, 232), (255, 255, 255)
PALETTE = (
    (31, 98, 184), (217, 95, 2), (27, 138, 90), (146, 76, 160), (190, 150, 20), (110, 110, 110),
)  # fmt: skip

Point = tuple[float, float]
Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar; `low` and `high` are its interval, if it has one."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    """Written over the bar."""
    tone: int = 0
    """Which of the palette's colours."""


@dataclass(frozen=True, slots=True)
class Bars:
    """Bars from zero; `marks` are labelled horizontal lines (a floor, a chance level)."""

    title: str
    bars: Sequence[Bar]
    top: float | None = 1.0
    marks: Sequence[tuple[str, float]] = ()
    legend: Sequence[str] = ()
    """Names of the tones, where bars have several."""
    together: int = 1
    """So many bars stand side by side over one label, the first one's."""


@dataclass(frozen=True, slots=True)
class Line:
    """One curve; points whose value is not finite are gaps."""

    label: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Lines:
    """Curves over one axis; without `top` and `bottom` the values decide."""

    title: str
    lines: Sequence[Line]
    x_label: str = ""
    bottom: float | None = None
    top: float | None = None
    marks: Sequence[tuple[str, float]] = ()
    by_rank: bool = False
    """Place the x values at equal distances, whatever they are."""


Panel = Bars | Lines


def draw(title: str, subtitle: str, panels: Sequence[Panel]) -> bytes:
    """One PNG of all panels, two in a row, under a title."""
    columns = 1 if len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    size = (columns * WIDTH * SCALE, (rows * HEIGHT + 54) * SCALE)
    image = Image.new("RGB", size, PAPER)
    pen = _Pen(ImageDraw.Draw(image), 0, 0)
    pen.text((20, 12), title, 19, INK)
    pen.text((20, 36), subtitle, 11, QUIET)
    for place, panel in enumerate(panels):
        x, y = place % columns * WIDTH, 54 + place // columns * HEIGHT
        inside = _Pen(pen.draw, x, y)
        inside.text((20, 10), panel.title, 14, INK)
        if isinstance(panel, Bars):
            _bars(inside, panel)
        else:
            _lines(inside, panel)
    out = io.BytesIO()
    image.reduce(SCALE).save(out, "PNG", optimize=True)
    return out.getvalue()


@dataclass(frozen=True, slots=True)
class _Pen:
    """Draws in the panel's own pixels."""

    draw: ImageDraw.ImageDraw
    x: float
    y: float

    def _at(self, point: Point) -> Point:
        return (self.x + point[0]) * SCALE, (self.y + point[1]) * SCALE

    def text(self, point: Point, words: str, size: int, colour: Colour, anchor: str = "la") -> None:
        font = ImageFont.load_default(size * SCALE)
        self.draw.text(self._at(point), words, fill=colour, font=font, anchor=anchor)

    def width(self, words: str, size: int) -> float:
        return ImageFont.load_default(size * SCALE).getlength(words) / SCALE

    def line(self, points: Sequence[Point], colour: Colour, width: float = 1.0) -> None:
        moved = [self._at(p) for p in points]
        self.draw.line(moved, fill=colour, width=round(width * SCALE), joint="curve")

    def box(self, low: Point, high: Point, colour: Colour) -> None:
        self.draw.rectangle((self._at(low), self._at(high)), fill=colour)

    def dot(self, point: Point, radius: float, colour: Colour) -> None:
        x, y = self._at(point)
        r = radius * SCALE
        self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)


@dataclass(frozen=True, slots=True)
class _Axis:
    """Values to pixels, upwards."""

    bottom: float
    top: float
    step: float

    def y(self, value: float) -> float:
        share = (value - self.bottom) / (self.top - self.bottom)
        return HEIGHT - BOTTOM - min(1.0, max(0.0, share)) * (HEIGHT - BOTTOM - TOP)

    def ticks(self) -> list[float]:
        count = round((self.top - self.bottom) / self.step)
        return [self.bottom + n * self.step for n in range(count + 1)]


def axis(values: Sequence[float], bottom: float | None, top: float | None) -> _Axis:
    """An axis of round steps that holds all values; given ends stay where they are."""
    known = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low = min(known) if bottom is None else bottom
    high = max(known) if top is None else top
    if high - low < 1e-9 * max(1.0, abs(high)):
        high = low + max(abs(low) * 0.1, 1e-3)
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.999)
    low = math.floor(low / step + 1e-9) * step if bottom is None else low
    return _Axis(low, low + math.ceil((high - low) / step - 1e-9) * step, step)


def _frame(pen: _Pen, scale: _Axis, marks: Sequence[tuple[str, float]]) -> None:
    for value in scale.ticks():
        y = scale.y(value)
        pen.line([(LEFT, y), (WIDTH - RIGHT, y)], GRID)
        pen.text((LEFT - 6, y), number(value), 10, QUIET, "rm")
    for label, value in marks:
        y = scale.y(value)
        _dashes(pen, y)
        pen.text((WIDTH - RIGHT, y - 2), label, 10, QUIET, "rs")


def _dashes(pen: _Pen, y: float) -> None:
    x: float = LEFT
    while x < WIDTH - RIGHT:
        pen.line([(x, y), (min(x + 6, WIDTH - RIGHT), y)], QUIET, 1.2)
        x += 11


def _bars(pen: _Pen, panel: Bars) -> None:
    bars = panel.bars
    ends = [b.high if b.high is not None else b.value for b in bars]
    scale = axis([0.0, *ends, *(v for _, v in panel.marks)], 0.0, panel.top)
    _frame(pen, scale, ())
    for _, value in panel.marks:
        _dashes(pen, scale.y(value))
    beside = panel.together
    space = (WIDTH - LEFT - RIGHT) / max(1, -(-len(bars) // beside))
    half = min(26.0, 0.32 * space / beside)
    for place, bar in enumerate(bars):
        centre = LEFT + (place // beside + 0.5) * space
        middle = centre + (place % beside - (beside - 1) / 2) * 2.2 * half
        _bar(pen, scale, bar, middle, half)
        if place % beside == 0:
            _label(pen, centre, bar.label, space)
    for label, value in panel.marks:
        x, y = WIDTH - RIGHT, scale.y(value) - 3
        pen.box((x - pen.width(label, 10) - 2, y - 9), (x, y + 1), PAPER)
        pen.text((x, y), label, 10, QUIET, "rs")
    _legend(pen, panel.legend)


def _bar(pen: _Pen, scale: _Axis, bar: Bar, middle: float, half: float) -> None:
    top, note = 0.0, bar.note or "none"
    if math.isfinite(bar.value):
        top, note = bar.value, bar.note or number(bar.value)
        colour = PALETTE[bar.tone % len(PALETTE)]
        pen.box((middle - half, scale.y(bar.value)), (middle + half, scale.y(0)), colour)
        if bar.low is not None and bar.high is not None:
            top = bar.high
            _whisker(pen, middle, scale.y(bar.low), scale.y(bar.high))
    y, wide = max(TOP - 8, scale.y(top) - 3), pen.width(note, 10) / 2 + 2
    pen.box((middle - wide, y - 9), (middle + wide, y + 1), PAPER)
    pen.text((middle, y), note, 10, INK, "ms")


def _whisker(pen: _Pen, x: float, low: float, high: float) -> None:
    pen.line([(x, low), (x, high)], INK, 1.3)
    for y in (low, high):
        pen.line([(x - 4, y), (x + 4, y)], INK, 1.3)


def _label(pen: _Pen, middle: float, label: str, space: float) -> None:
    """Words below a bar, broken into lines that fit its share of the axis."""
    lines = broken(label, lambda words: pen.width(words, 10) <= space - 4)
    for row, words in enumerate(lines[:4]):
        pen.text((middle, HEIGHT - BOTTOM + 6 + 13 * row), words, 10, INK, "ma")


def broken(label: str, fits: Callable[[str], bool]) -> list[str]:
    """A label in lines that fit, broken between words, and in them after "_" and "-"."""
    lines = [""]
    for piece in re.findall(r"\s*(?:[^\s_-]+[_-]*|[_-]+)", label):
        longer = (lines[-1] + piece).strip()
        if lines[-1] and not fits(longer):
            lines.append(piece.strip())
        else:
            lines[-1] = longer
    return lines


def _lines(pen: _Pen, panel: Lines) -> None:
    ys = [y for line in panel.lines for _, y in line.points]
    scale = axis([*ys, *(v for _, v in panel.marks)], panel.bottom, panel.top)
    xs = sorted({x for line in panel.lines for x, _ in line.points}) or [0.0]
    _frame(pen, scale, panel.marks)
    span = (xs[-1] - xs[0]) or 1.0

    def across(x: float) -> float:
        share = xs.index(x) / max(1, len(xs) - 1) if panel.by_rank else (x - xs[0]) / span
        return LEFT + 8 + share * (WIDTH - LEFT - RIGHT - 16)

    for x in xs if panel.by_rank else _round_ticks(xs):
        pen.text((across(x), HEIGHT - BOTTOM + 6), number(x), 10, QUIET, "ma")
    pen.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 20), panel.x_label, 10, QUIET, "ma")
    for place, line in enumerate(panel.lines):
        colour = PALETTE[place % len(PALETTE)]
        for run in _runs(line.points):
            points = [(across(x), scale.y(y)) for x, y in run]
            if len(points) > 1:
                # Thinner from line to line, so that equal ones do not hide each other.
                pen.line(points, colour, max(1.0, 3.2 - 0.6 * place))
            if len(points) <= 24:
                for point in points:
                    pen.dot(point, 2.8, colour)
    _legend(pen, [line.label for line in panel.lines])


def _round_ticks(xs: Sequence[float]) -> list[float]:
    if xs[-1] == xs[0]:
        return [xs[0]]
    return [t for t in axis(xs, None, None).ticks() if xs[0] <= t <= xs[-1]]


def _runs(points: Sequence[Point]) -> list[list[Point]]:
    """The points cut where a value is missing."""
    runs: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _legend(pen: _Pen, labels: Sequence[str]) -> None:
    x, y = float(LEFT), HEIGHT - BOTTOM + 42
    for place, label in enumerate(labels):
        width = pen.width(label, 11) + 34
        if x + width > WIDTH - 4 and x > LEFT:
            x, y = float(LEFT), y + 14
        pen.line([(x, y), (x + 14, y)], PALETTE[place % len(PALETTE)], 3)
        pen.text((x + 19, y), label, 11, INK, "lm")
        x += width


def number(value: float) -> str:
    """A value for a label: short, no trailing zeros."""
    if not math.isfinite(value):
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return "0" if float(text) == 0 else f"{float(text):g}"
