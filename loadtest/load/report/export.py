"""A row for each request, as CSV and, if asked for, as Parquet: for whoever goes on with tools of their own."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loadtest.load.measures import gap_seconds, is_good, latency_seconds, tpot_seconds, ttft_seconds
from loadtest.load.plan import WARM_UPS
from loadtest.load.report.summary import Report
from loadtest.load.scenario import Scenario

CSV_NAME = "requests.csv"
PARQUET_NAME = "requests.parquet"
# As the journal has them; texts and single gaps stay in report.json.
KEPT: dict[str, type] = {
    "stage": str,
    "session": int,
    "turn": int,
    "workload": str,
    "method": str,
    "pair": str,
    "status": str,
    "detail": str,
    "intended_seconds": float,
    "sent_seconds": float,
    "first_token_seconds": float,
    "last_token_seconds": float,
    "end_seconds": float,
    "planned_input_tokens": int,
    "input_tokens": int,
    "cached_tokens": int,
    "output_tokens": int,
    "counted_by": str,
    "finish_reason": str,
    "adapter": str,
    "score": float,
}
MEASURED: dict[str, type] = {
    "counts": bool,
    "good": bool,
    "ttft_seconds": float,
    "tpot_seconds": float,
    "gap_p99_seconds": float,
    "latency_seconds": float,
}
COLUMNS = {"level": float} | KEPT | MEASURED


class ExportError(Exception):
    """A format that cannot be written, worded for the user."""


def check_parquet() -> None:
    """Whether Parquet can be written.

    Raises:
        ExportError: pyarrow is not installed.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ExportError("--parquet needs pyarrow, which vLLM does not bring along: pip install pyarrow")


def rows(report: Report) -> Iterator[dict[str, Any]]:
    """Every request with its measures; ``counts`` is false for warm-up, ramp, and what was broken off."""
    scenario = Scenario.model_validate(report["run"]["scenario"])
    for stage in report["stages"]:
        for request in stage["requests"]:
            counts = stage["name"] not in WARM_UPS and not request["ramp"]
            yield {
                "level": stage["level"],
                # Journals of an earlier version know no adapters.
                **{name: request.get(name) for name in KEPT},
                "counts": counts and request["status"] not in ("interrupted", "cancelled"),
                "good": is_good(request, scenario.slo),
                "ttft_seconds": ttft_seconds(request),
                "tpot_seconds": tpot_seconds(request),
                "gap_p99_seconds": gap_seconds(request),
                "latency_seconds": latency_seconds(request),
            }


def write_csv(report: Report, folder: Path) -> Path:
    """Write requests.csv; what is not known is empty."""
    path = folder / CSV_NAME
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS))
        writer.writeheader()
        writer.writerows(_plain(row) for row in rows(report))
    return path


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: str(value).lower() if isinstance(value, bool) else value for name, value in row.items()}


def write_parquet(report: Report, folder: Path) -> Path:
    """Write requests.parquet; what is not known is null.

    Raises:
        ExportError: pyarrow is not installed.
    """
    check_parquet()
    import pyarrow
    from pyarrow import parquet

    types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in COLUMNS.items()])
    path = folder / PARQUET_NAME
    parquet.write_table(pyarrow.Table.from_pylist(list(rows(report)), schema=schema), path)
    return path
