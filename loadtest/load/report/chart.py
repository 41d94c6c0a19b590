"""Small charts as SVG text: lines, steps and points over two axes. Colours and fonts come from the page's style."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Point = tuple[float, float]

WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 44
# That the label of a line takes at most.
LABEL_WIDTH = 16
# Shapes of the marks tell series apart where colours do not.
_SHAPES: tuple[Callable[[float, float], str], ...] = (
    lambda x, y: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>',
    lambda x, y: f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>',
    lambda x, y: f'<path d="M{x:.1f} {y - 5.5:.1f}l5.5 10h-11z"/>',
    lambda x, y: f'<path d="M{x:.1f} {y - 6:.1f}l6 6-6 6-6-6z"/>',
)
COLOURS = 8
# Lines without marks are told apart by their dashes.
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 4", "1 4", "9 3 2 3 2 3")


@dataclass(frozen=True)
class Series:
    """One line or cloud of a chart.

    Attributes:
        name: in the legend.
        points: x and y, in the order drawn.
        colour: number of its colour; the same number is the same everywhere on the page.
        bars: for each point the ends of an interval of its y, if known.
        marked: draw a mark at each point.
        joined: draw lines between the points.
    """

    name: str
    points: Sequence[Point]
    colour: int
    bars: Sequence[tuple[float, float] | None] = ()
    marked: bool = True
    joined: bool = True


@dataclass(frozen=True)
class Line:
    """A vertical line, such as where a stage begins.

    Attributes:
        x: where.
        label: short, above it.
        meaning: what a pointer on it says.
    """

    x: float
    label: str
    meaning: str


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that cover a range: at most `most` steps of 1, 2 or 5 times a power of ten."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def distribution(values: Sequence[float]) -> list[Point]:
    """The cumulative distribution of values as the points of a step line, from 0 to 1."""
    ordered = sorted(values)
    points: list[Point] = []
    for number, value in enumerate(ordered):
        points += [(value, number / len(ordered)), (value, (number + 1) / len(ordered))]
    return points


def chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    lines: Sequence[Line] = (),
) -> str:
    """A figure with its legend.

    Args:
        title: stands above it, and is what a screen reader says.
        series: those without points are named in the legend as missing; equal names are one line with breaks.
        x_label, y_label: of the axes, with units.
        y_range: of the axis; default: from 0 (or the least value, if negative) to the greatest.
        lines: across it, from left to right.
    """
    drawn = [one for one in series if one.points]
    if not drawn:
        return _figure(title, '<p class="missing">nothing was measured</p>', series)
    xs = [x for one in drawn for x, _ in one.points] + [line.x for line in lines]
    ys = [y for one in drawn for _, y in one.points] + [end for one in drawn for bar in one.bars if bar for end in bar]
    x_ticks = ticks(min(0.0, *xs), max(xs))
    y_ticks = ticks(*y_range) if y_range else ticks(min(0.0, *ys), max(ys))
    place = _Place(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    parts = [*_axes(place, x_ticks, y_ticks, x_label, y_label), *_lines(place, lines)]
    parts += [_series(place, one) for one in drawn]
    label = html.escape(f"{title}: {y_label} over {x_label}", quote=True)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return _figure(title, svg, series)


@dataclass(frozen=True)
class _Place:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.y_low) / (self.y_high - self.y_low)


def _axes(place: _Place, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in y_ticks:
        y = place.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x = place.x(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(x_label)}</text>')
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>'
    )
    return parts


def _lines(place: _Place, lines: Sequence[Line]) -> list[str]:
    parts = []
    free = 0.0
    for line in lines:
        x = place.x(line.x)
        # Where lines are close to one another only the first one has its label.
        label = f'<text x="{x:.1f}" y="{TOP - 2}" text-anchor="middle">{html.escape(line.label)}</text>'
        parts.append(
            f'<g class="stage"><title>{html.escape(line.meaning)}</title>'
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>{label if x >= free else ""}</g>'
        )
        free = x + LABEL_WIDTH if x >= free else free
    return parts


def _series(place: _Place, one: Series) -> str:
    spots = [(place.x(x), place.y(y)) for x, y in one.points]
    parts = []
    for (x, _), bar in zip(spots, one.bars, strict=False):
        if bar:
            low, high = (place.y(end) for end in bar)
            parts.append(f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
    if one.joined and len(spots) > 1:
        dash = _dash(one.colour)
        parts.append(f'<polyline{dash} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in spots)}"/>')
    if one.marked or len(spots) == 1:
        parts += [_mark(one.colour, x, y) for x, y in spots]
    return f'<g class="s{one.colour % COLOURS}">{"".join(parts)}</g>'


def _dash(colour: int) -> str:
    pattern = _DASHES[(colour + colour // COLOURS) % len(_DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def _mark(colour: int, x: float, y: float) -> str:
    # Where colours come again, with another shape and another dash.
    return _SHAPES[(colour + colour // COLOURS) % len(_SHAPES)](x, y)


def _figure(title: str, body: str, series: Sequence[Series]) -> str:
    alone = len(series) == 1 and series[0].name == title
    named: dict[str, Series] = {}
    for one in series:
        if one.points or one.name not in named:
            named[one.name] = one
    keys = "" if alone else "".join(map(_key, named.values()))
    return f'<figure><figcaption>{html.escape(title)}</figcaption>{body}<div class="keys">{keys}</div></figure>'


def _key(one: Series) -> str:
    line = f'<path class="line" d="M1 7h26"{_dash(one.colour)}/>' if one.joined else ""
    mark = _mark(one.colour, 14, 7) if one.marked else ""
    mark = f'<svg viewBox="0 0 28 14" aria-hidden="true">{line}{mark}</svg>'
    missing = "" if one.points else " (missing)"
    return f'<span class="key s{one.colour % COLOURS}">{mark}{html.escape(one.name)}{missing}</span>'
