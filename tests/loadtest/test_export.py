"""Requests as tables for other tools, and what the page and the terminal do with few pairs."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from loadtest.load.report.chart import Series, chart
from loadtest.load.report.command import write_report
from loadtest.load.report.export import COLUMNS, ExportError, check_parquet
from tests.loadtest.conftest import LoadTest, scenario_of

OPEN: dict[str, Any] = {"loop": "open", "rates": [40], "requests": 10}


def test_csv_and_parquet_hold_every_request(load_test: LoadTest, tmp_path: Path) -> None:
    methods: dict[str, Any] = {"plain": {}, "failing": {"fault": "500"}}
    finished = load_test(scenario_of(tmp_path, methods, OPEN, tokens=4))
    write_report(finished.folder, with_parquet=True)
    with (finished.folder / "requests.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    table = parquet.read_table(finished.folder / "requests.parquet").to_pylist()
    assert len(rows) == len(table) == len(finished.requests)
    assert list(rows[0]) == list(table[0]) == list(COLUMNS)
    for row, typed, request in zip(rows, table, finished.requests, strict=True):
        assert row["status"] == typed["status"] == request["status"]
        assert typed["good"] == (request["status"] == "ok") == (row["good"] == "true")
        assert typed["counts"] == (not request["stage"].startswith("warm-up")) == (row["counts"] == "true")
        if request["status"] == "ok":
            expected = request["first_token_seconds"] - request["intended_seconds"]
            assert float(row["ttft_seconds"]) == typed["ttft_seconds"] == pytest.approx(expected)
            assert int(row["output_tokens"]) == typed["output_tokens"] == 4
        else:
            assert (row["ttft_seconds"], typed["ttft_seconds"], row["score"]) == ("", None, "")


def test_parquet_is_refused_where_it_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match="pip install pyarrow"):
        check_parquet()


def test_ratios_of_few_pairs_are_grey_and_in_parentheses(load_test: LoadTest, tmp_path: Path) -> None:
    methods: dict[str, Any] = {"plain": {}, "other": {"ttft_seconds": 0.06}}
    finished = load_test(scenario_of(tmp_path, methods, OPEN, warm_up_rounds=0, tokens=4))
    assert finished.report["summary"]["comparisons"][0]["pairs"] == 5
    (row,) = [line for line in finished.output.splitlines() if "plain against other" in line]
    assert re.search(r"\| \(\d\.\d\dx\) +\| \(\d\.\d\dx\) +\|", row)
    assert '<td class="few">(' in finished.page
    assert "<details><summary>Scenario" in finished.page, "folded"


def test_lines_differ_by_more_than_colour() -> None:
    lines = [Series(f"s{number}", [(0, number), (1, number)], number, marked=False) for number in range(8)]
    drawn = chart("t", lines, "x", "y")
    dashes = [re.search(r'dasharray="([^"]+)"', line) for line in re.findall(r"<polyline[^>]*>", drawn)]
    assert len({found.group(1) if found else "" for found in dashes}) == 8
    keys = re.findall(r'<path class="line"[^>]*>', drawn)
    assert len(set(keys)) == 8
    assert json.dumps(drawn).count("<circle") == 0
