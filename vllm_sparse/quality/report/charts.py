"""Small charts as SVG text: lines and points over two axes, and maps of cells. Colours come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_sparse.quality.report.escape import escaped

Point = tuple[float, float]

WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 12, 44
COLOURS = 8
# Shapes of the marks tell series apart where colours do not.
_SHAPES: tuple[Callable[[float, float], str], ...] = (
    lambda x, y: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>',
    lambda x, y: f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>',
    lambda x, y: f'<path d="M{x:.1f} {y - 5.5:.1f}l5.5 10h-11z"/>',
    lambda x, y: f'<path d="M{x:.1f} {y - 6:.1f}l6 6-6 6-6-6z"/>',
)
# Of a map of recall: steps of mass lost, the last of which holds all that is worse.
LOST_STEP, LOST_STEPS = 0.05, 10


@dataclass(frozen=True)
class Series:
    """One line or cloud of a chart.

    Attributes:
        name: in the legend.
        points: x and y, in the order drawn.
        number: of its colour and shape; the same number is the same everywhere on the page.
        bars: for each point the ends of an interval of its y, if known.
        marked: draw a mark at each point.
        joined: draw lines between the points.
        baseline: draw it dashed and in one of the colours that methods do not have.
    """

    name: str
    points: Sequence[Point]
    number: int
    bars: Sequence[tuple[float, float] | None] = ()
    marked: bool = True
    joined: bool = True
    baseline: bool = False

    @property
    def style(self) -> str:
        """Its class."""
        return f"b{self.number}" if self.baseline else f"s{self.number % COLOURS}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that cover a range: at most `most` steps of 1, 2 or 5 times a power of ten."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def chart(title: str, series: Sequence[Series], x_label: str, y_label: str) -> str:
    """A figure with its legend; both axes hold zero.

    Args:
        title: stands above it, and is what a screen reader says.
        series: those without points are left out.
        x_label, y_label: of the axes, with units.
    """
    drawn = [one for one in series if one.points]
    xs = [x for one in drawn for x, _ in one.points]
    ys = [y for one in drawn for _, y in one.points] + [end for one in drawn for bar in one.bars if bar for end in bar]
    x_ticks = ticks(min(0.0, *xs), max(0.0, *xs))
    # Where nothing differs from zero, zero stands in the middle.
    y_ticks = ticks(min(0.0, *ys), max(0.0, *ys)) if any(ys) else [-0.1, 0.0, 0.1]
    place = _Place(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    # What is judged is drawn over what it is judged by.
    ordered = sorted(drawn, key=lambda one: not one.baseline)
    parts = [*_axes(place, x_ticks, y_ticks, x_label, y_label), *(_series(place, one) for one in ordered)]
    keys = "" if len(drawn) == 1 and drawn[0].name == title else "".join(map(_key, drawn))
    body = _svg(HEIGHT, f"{title}: {y_label} over {x_label}", parts)
    return _figure(title, f'{body}<div class="keys">{keys}</div>')


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
        kind = "axis" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_label(LEFT - 6, y + 4, f"{tick:g}", "end"))
    for tick in x_ticks:
        x = place.x(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(_label(x, bottom + 17, f"{tick:g}"))
    parts.append(_label((LEFT + right) / 2, HEIGHT - 6, x_label))
    turned = f'transform="translate(12 {(TOP + bottom) / 2}) rotate(-90)"'
    parts.append(f'<text {turned} text-anchor="middle">{escaped(y_label)}</text>')
    return parts


def _series(place: _Place, one: Series) -> str:
    spots = [(place.x(x), place.y(y)) for x, y in one.points]
    parts = []
    for (x, _), bar in zip(spots, one.bars, strict=False):
        if bar:
            low, high = (place.y(end) for end in bar)
            parts.append(f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
    if one.joined and len(spots) > 1:
        parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in spots)}"/>')
    if one.marked or len(spots) == 1:
        parts += [_mark(one.number, x, y) for x, y in spots]
    return f'<g class="{one.style}">{"".join(parts)}</g>'


def _mark(number: int, x: float, y: float) -> str:
    # Past the last colour the shapes move on, so that no two of 32 series look the same.
    return _SHAPES[(number + number // COLOURS) % len(_SHAPES)](x, y)


def _key(one: Series) -> str:
    mark = _mark(one.number, 8, 7) if one.marked else '<line x1="0" x2="16" y1="7" y2="7" class="bar"/>'
    svg = f'<svg viewBox="0 0 16 14" aria-hidden="true">{mark}</svg>'
    return f'<span class="key {one.style}">{svg}{escaped(one.name)}</span>'


def _figure(title: str, body: str) -> str:
    return f"<figure><figcaption>{escaped(title)}</figcaption>{body}</figure>"


def _svg(height: float, label: str, parts: Sequence[str]) -> str:
    said = escaped(label)
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{said}">{"".join(parts)}</svg>'


def _label(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(text)}</text>'


def difference_map(
    title: str,
    rows: Sequence[tuple[str, Sequence[float | None]]],
    columns: Sequence[str],
    column_label: str,
    most: float,
) -> str:
    """Cells with their numbers, coloured by how far below or above zero they are.

    Args:
        rows: the name of each and a value for each column; None where there is none.
        most: the distance from zero that has the full colour.
    """
    height, width = 26, (WIDTH - LEFT - RIGHT) / len(columns)
    parts = []
    for row, (name, values) in enumerate(rows):
        top = TOP + row * height
        parts.append(_label(LEFT - 6, top + height / 2 + 4, name, "end"))
        for column, value in enumerate(values):
            left = LEFT + column * width
            kind = "none" if value is None else "gain" if value > 0 else "loss"
            shade = 0.0 if value is None else min(1.0, abs(value) / most) * 0.75
            parts.append(
                f'<rect class="{kind}" x="{left + 1:.1f}" y="{top + 1}" width="{width - 2:.1f}" '
                f'height="{height - 2}" fill-opacity="{shade:.2f}"/>'
            )
            text = "-" if value is None else f"{value + 0:+.2f}"
            parts.append(_label(left + width / 2, top + height / 2 + 4, text).replace("<text", '<text class="value"'))
    bottom = TOP + len(rows) * height
    parts += [_label(LEFT + (column + 0.5) * width, bottom + 15, name) for column, name in enumerate(columns)]
    parts.append(_label((LEFT + WIDTH - RIGHT) / 2, bottom + 34, column_label))
    return _figure(title, _svg(bottom + 42, title, parts))


def recall_map(title: str, recall: Sequence[Sequence[float]]) -> str:
    """Layers over heads, darker where more attention mass is lost; a head that loses nothing is blank."""
    layers, heads = len(recall), max(map(len, recall))
    height, width = max(4.0, min(10.0, 240 / layers)), (WIDTH - LEFT - RIGHT) / heads
    steps: list[list[str]] = [[] for _ in range(LOST_STEPS + 1)]
    for layer, row in enumerate(recall):
        for head, kept in enumerate(row):
            step = min(LOST_STEPS, math.ceil((1 - kept) / LOST_STEP - 1e-6))
            corner = f"M{LEFT + head * width:.1f} {TOP + layer * height:.1f}"
            steps[max(0, step)].append(f"{corner}h{width:.2f}v{height:.2f}h-{width:.2f}z")
    parts = [
        f'<path class="loss" fill-opacity="{step / LOST_STEPS:g}" d="{"".join(cells)}"/>'
        for step, cells in enumerate(steps)
        if step and cells
    ]
    bottom = TOP + layers * height
    parts.append(
        f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{bottom - TOP:.1f}"/>'
    )
    for layer in range(0, layers, max(1, round(16 / height))):
        parts.append(_label(LEFT - 6, TOP + (layer + 0.5) * height + 4, str(layer), "end"))
    for head in range(0, heads, max(1, round(24 / width))):
        parts.append(_label(LEFT + (head + 0.5) * width, bottom + 15, str(head)))
    parts.append(_label((LEFT + WIDTH - RIGHT) / 2, bottom + 34, "query head"))
    turned = f'transform="translate(12 {(TOP + bottom) / 2:.1f}) rotate(-90)"'
    parts.append(f'<text {turned} text-anchor="middle">layer</text>')
    return _figure(title, _svg(bottom + 42, f"{title}: mass kept by layer and head", parts))


def recall_key() -> str:
    """What the colours of `recall_map` mean."""
    swatches = [
        f'<span class="key"><svg viewBox="0 0 16 14" aria-hidden="true"><rect class="loss" width="16" height="14" '
        f'fill-opacity="{step / LOST_STEPS:g}"/><rect class="frame" width="16" height="14"/></svg>'
        f"{1 - step * LOST_STEP:.2f}{' or less' if step == LOST_STEPS else ''}</span>"
        for step in range(0, LOST_STEPS + 1, 2)
    ]
    return f'<div class="keys">mass kept, at least: {"".join(swatches)}</div>'
