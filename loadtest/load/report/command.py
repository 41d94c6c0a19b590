"""Reports from the command line: JSON, HTML and a table of one run, and the comparison of several."""

from __future__ import annotations

import argparse
import json
import string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest.load.journal import NAME, read_journal
from loadtest.load.report import compare, compare_page, export, html, terminal
from loadtest.load.report.summary import summarise

NAMES = string.ascii_uppercase
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


def write_report(folder: Path, with_parquet: bool = False) -> bool:
    """Write report.json, report.html and requests.csv of a run into its folder, and print its table.

    Args:
        folder: holds the journal.
        with_parquet: write requests.parquet too.

    Returns:
        Whether the run passed.
    """
    report = _report(folder)
    (folder / REPORT_JSON).write_text(json.dumps(report, allow_nan=False), encoding="utf-8")
    (folder / REPORT_HTML).write_text(html.page(report), encoding="utf-8")
    written = [folder / REPORT_HTML, folder / REPORT_JSON, export.write_csv(report, folder)]
    if with_parquet:
        written.append(export.write_parquet(report, folder))
    print(terminal.table(report, sys.stdout.isatty()))
    print("\n" + "\n".join(map(str, written)))
    passed: bool = report["summary"]["verdict"]["passed"]
    return passed


def compare_runs(arguments: Sequence[str]) -> None:
    """Print how runs differ from a first one, and write a page of it if asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.load compare",
        description="How runs differ from the first one, method by method, with 95 % intervals.",
    )
    parser.add_argument("first", type=Path, metavar="A", help="folder of a run")
    parser.add_argument("others", type=Path, nargs="+", metavar="B", help="folders of others")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write an HTML page of the comparison too")
    given = parser.parse_args(arguments)
    runs = [given.first, *given.others]
    if len(runs) > len(NAMES):
        parser.error(f"{len(runs)} runs are too many: {len(NAMES)} at most")
    reports = dict(zip(NAMES, map(_report, runs), strict=False))
    found = compare.compare(reports)
    named = [f"{name}: {folder}" for name, folder in zip(reports, runs, strict=True)]
    if given.page is not None:
        places = {name: str(folder) for name, folder in zip(reports, runs, strict=True)}
        try:
            given.page.write_text(compare_page.page(reports, places, found), encoding="utf-8")
        except OSError as error:
            parser.error(f"--page {given.page} cannot be written: {error.strerror}")
    print("\n".join([*named, "", terminal.comparison(found, sys.stdout.isatty())]))
