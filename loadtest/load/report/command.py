"""Reports from the command line: JSON, HTML and a table of one run, and the comparison of two."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest.load.journal import NAME, read_journal
from loadtest.load.report import compare, html, terminal
from loadtest.load.report.summary import summarise

REPORT_JSON = "report.json"
REPORT_HTML = "report.html"


def _report(folder: Path) -> dict[str, Any]:
    """A run with its summary, from its journal."""
    path = folder / NAME if folder.is_dir() else folder
    try:
        run = read_journal(path)
    except OSError as error:
        sys.exit(f"loadtest.load: {path} cannot be read: {error.strerror}")
    except ValueError as error:
        sys.exit(f"loadtest.load: {error}")
    return {**run, "summary": summarise(run)}


def write_report(folder: Path) -> bool:
    """Write report.json and report.html of a run into its folder, and print its table.

    Args:
        folder: holds the journal.

    Returns:
        Whether the run passed.
    """
    report = _report(folder)
    (folder / REPORT_JSON).write_text(json.dumps(report, allow_nan=False), encoding="utf-8")
    (folder / REPORT_HTML).write_text(html.page(report), encoding="utf-8")
    print(terminal.table(report, sys.stdout.isatty()))
    print(f"\n{folder / REPORT_HTML}\n{folder / REPORT_JSON}")
    passed: bool = report["summary"]["verdict"]["passed"]
    return passed


def compare_runs(arguments: Sequence[str]) -> None:
    """Print how a second run differs from a first one."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.load compare",
        description="How run B differs from run A, method by method, with 95 % intervals.",
    )
    parser.add_argument("first", type=Path, metavar="A", help="folder of a run")
    parser.add_argument("second", type=Path, metavar="B", help="folder of another one")
    given = parser.parse_args(arguments)
    print(terminal.comparison(compare.compare(_report(given.first), _report(given.second))))
