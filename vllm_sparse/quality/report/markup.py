"""Pieces of the page, and the order of what stands in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_sparse.quality.report.escape import escaped
from vllm_sparse.quality.report.results import Cell, Speed, Summary
from vllm_sparse.quality.report.words import DASH, densities, difference, variant_of
from vllm_sparse.quality.statistics import Estimate
from vllm_sparse.quality.variants import Variant


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]], baselines: Iterable[bool] = ()) -> str:
    """A table of cells that are HTML already; the first of a row names it. `baselines`: rows that are one."""
    found = list(rows)
    soft = [*baselines, *(False for _ in found)]
    top = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(
        ("<tr class='baseline'>" if grey else "<tr>") + f"<th>{row[0]}</th>{''.join(map(_cell, row[1:]))}</tr>"
        for row, grey in zip(found, soft, strict=False)
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(content: str) -> str:
    return content if content.startswith("<td") else f"<td>{content}</td>"


def words_cell(content: str, kind: str = "text") -> str:
    """A cell of words, which stand at its left."""
    return f'<td class="{kind}">{content}</td>'


def section(title: str, *parts: str) -> str:
    """A section with its heading; the parts are HTML."""
    return f"<section><h2>{escaped(title)}</h2>{''.join(parts)}</section>"


def note_below(text: str) -> str:
    """What explains a table or charts."""
    return f'<p class="note">{escaped(text)}</p>'


def figures(charts: Sequence[str]) -> str:
    """Charts side by side, as many as fit."""
    return f'<div class="figures">{"".join(charts)}</div>'


def estimate_cell(found: Estimate, form: str = "{:+.3f}") -> str:
    """The mean, below it the interval."""
    mean, _, interval = difference(found, form).partition(" ")
    return f"{mean}<small>{interval}</small>" if interval else mean


def methods_of(summary: Summary) -> list[Variant]:
    """Variants that are judged."""
    return [one for one in summary.variants if not one.baseline]


def methods_first(summary: Summary) -> list[Variant]:
    """Methods, then what they are judged by."""
    return sorted(summary.variants, key=lambda one: bool(one.baseline))


def is_method(summary: Summary, name: str) -> bool:
    """Whether a variant is judged, not one that others are judged by."""
    return not variant_of(summary, name).baseline


def ascending(found: Iterable[int]) -> list[int]:
    """Lengths in tokens, each once."""
    return sorted(set(found))


def density_cell(variant: Variant, speed: Speed | None) -> str:
    """Densities of the phases that are sparse, a line each."""
    known = (speed.prefill_density, speed.decode_density) if speed else (None, None)
    return escaped(densities(variant, *known)).replace(", ", "<br>")


def along_the_text(values: Sequence[float]) -> list[tuple[float, float]]:
    """Values of equal parts as points in the middle of each, 0 to 1."""
    return [((part + 0.5) / len(values), value) for part, value in enumerate(values)]


def score_cell(cell: Cell | None, form: str = "{:+.3f}") -> str:
    """A difference with its interval, marked where it is significant."""
    if cell is None:
        return DASH
    return ("* " if cell.significant else "") + estimate_cell(cell.difference, form)
