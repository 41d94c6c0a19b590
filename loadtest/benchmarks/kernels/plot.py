"""Draw the table of `python -m loadtest.benchmarks.kernels.prefill`: recall over density, one line a method.

    python -m loadtest.benchmarks.kernels.prefill --heads recorded > table.md
    python -m loadtest.benchmarks.kernels.plot table.md --output loadtest/recall.svg

Points are told apart by their method alone, so the table is of one length and kind of heads.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 60, 130, 20, 50
# Told apart in grey too.
STYLES = [("#1b6ca8", ""), ("#c0392b", "8 3"), ("#1e8449", "2 3"), ("#7d3c98", "8 3 2 3"), ("#555555", "")]


class TableError(ValueError):
    """The file is no table of the benchmark."""


def recalls(table: str) -> dict[str, list[tuple[float, float]]]:
    """Density and recall of each method's lines, ascending.

    Args:
        table: what the benchmark printed; other lines are passed over.

    Raises:
        TableError: there is no such table in it, or it has no lines.
    """
    rows = [[cell.strip() for cell in text.strip("|\n ").split("|")] for text in table.splitlines() if "|" in text]
    header = next((row for row in rows if {"method", "density", "recall"} <= set(row)), None)
    if header is None:
        raise TableError("no line names the columns method, density and recall; give the benchmark's output")
    method, density, recall = (header.index(name) for name in ("method", "density", "recall"))
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows[rows.index(header) + 1 :]:
        if len(row) == len(header) and not set(row[0]) <= {"-"}:
            found.setdefault(row[method], []).append((float(row[density]), float(row[recall])))
    if not found:
        raise TableError("the table has no lines")
    return {name: sorted(points) for name, points in found.items()}


def draw(lines: dict[str, list[tuple[float, float]]]) -> str:
    """The plot as SVG."""
    right = max(density for points in lines.values() for density, _ in points) * 1.05

    def x(density: float) -> float:
        return LEFT + density / right * (WIDTH - LEFT - RIGHT)

    def y(recall: float) -> float:
        return HEIGHT - BOTTOM - recall * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for tenth in range(0, 11, 2):
        recall = tenth / 10
        parts.append(f'<path d="M{LEFT} {y(recall):.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(recall) + 4:.1f}" text-anchor="end">{recall:.1f}</text>')
    for step in range(5):
        density = right * step / 4
        parts.append(f'<text x="{x(density):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{density:.2f}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">density: keys read of those in reach</text>'
    )
    parts.append(
        f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">attention mass kept</text>'
    )
    for index, (name, points) in enumerate(lines.items()):
        colour, dashes = STYLES[index % len(STYLES)]
        stroke = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"'
        path = " ".join(f"{x(density):.1f},{y(recall):.1f}" for density, recall in points)
        parts.append(f'<polyline points="{path}" fill="none" {stroke}/>')
        legend = WIDTH - RIGHT + 12, TOP + 12 + 22 * index
        parts.append(f'<path d="M{legend[0]} {legend[1]}h28" {stroke}/>')
        parts.append(f'<text x="{legend[0] + 34}" y="{legend[1] + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="output of python -m loadtest.benchmarks.kernels.prefill")
    parser.add_argument("--output", type=Path, default=Path("recall.svg"))
    arguments = parser.parse_args()
    try:
        lines = recalls(arguments.table.read_text())
    except (OSError, TableError) as error:
        parser.error(f"{arguments.table}: {error}")
    arguments.output.write_text(draw(lines))


if __name__ == "__main__":
    main()
