"""Pieces of HTML that the pages share. A page needs nothing else: its style is inside."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

_STYLE = Path(__file__).with_name("style.css")


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page of sections that are HTML already; empty ones are left out."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>\n{_STYLE.read_text(encoding='utf-8')}</style></head>\n<body>\n"
        + "\n".join(filter(None, sections))
        + "\n</body></html>\n"
    )


def text(value: object) -> str:
    """Plain text as HTML."""
    return html.escape(str(value))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already; the first of a row names it. Columns without a value are left out."""
    shown = [
        column for column in range(len(header)) if not column or any(row[column].strip("- ") != "" for row in rows)
    ]
    top = "".join(f"<th>{header[column]}</th>" for column in shown)
    body = "".join(f"<tr><th>{row[0]}</th>{''.join(_cell(row[column]) for column in shown[1:])}</tr>" for row in rows)
    # Whoever has no pointer scrolls it by keys.
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(content: str) -> str:
    return content if content.startswith("<td") else f"<td>{content}</td>"


def with_small(value: str) -> str:
    """A value with its interval, such as ``0.31 [0.29, 0.34]``, the interval small and below."""
    value, bracket, interval = value.partition(" [")
    return f"{value}<small>[{interval}</small>" if bracket else value


def section(title: str, *parts: str) -> str:
    """A section with its heading; nothing of no parts."""
    return f"<section><h2>{text(title)}</h2>{''.join(parts)}</section>" if any(parts) else ""


def note(content: str) -> str:
    """What explains a table or a chart."""
    return f'<p class="note">{text(content)}</p>'


def figures(*charts: str) -> str:
    """Charts beside one another."""
    return f'<div class="figures">{"".join(charts)}</div>'


def folded(summary: str, content: str) -> str:
    """What is shown when it is asked for."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def warnings(lines: Sequence[str]) -> str:
    """What to be careful about; nothing if there is nothing."""
    if not lines:
        return ""
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f'<div class="warnings"><p>Read with care</p><ul>{items}</ul></div>'
