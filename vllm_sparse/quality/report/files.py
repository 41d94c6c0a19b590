"""A summary as files for other programs: JSON of everything, CSV of the cells."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_sparse.quality.gate import Gate
from vllm_sparse.quality.report.results import ALL_KINDS, Cell, Summary


def write_json(path: Path, summary: Summary, gate: Gate) -> None:
    """Everything that the page shows; numbers are not rounded."""
    found = {
        **asdict(summary),
        "variants": [
            {"name": one.name, "extras": dict(one.extras), "baseline": one.baseline} for one in summary.variants
        ],
        "cells": [{**asdict(one), "significant": one.significant} for one in summary.cells],
        "equal_density": [{**asdict(one), "verdict": one.verdict} for one in summary.equal_density],
        "gate": {
            "outcome": gate.outcome.value,
            "exit_status": gate.exit_status,
            "limits": asdict(gate.limits),
            "decisions": [{**asdict(one), "outcome": one.outcome.value} for one in gate.decisions],
        },
    }
    path.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")


def write_csv(path: Path, summary: Summary) -> None:
    """One line a cell."""
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        writer = csv.DictWriter(file, list(_COLUMNS))
        writer.writeheader()
        for cell in summary.cells:
            writer.writerow(_line(cell))


_COLUMNS = (
    "measure",
    "variant",
    "length_tokens",
    "kind",
    "pairs",
    "documents",
    "prefill_density",
    "decode_density",
    "dense_mean",
    "variant_mean",
    "difference",
    "interval_low",
    "interval_high",
    "p",
    "holm_p",
    "significant",
    "dense_too_low",
)


def _line(cell: Cell) -> Mapping[str, Any]:
    low, high = cell.difference.interval or (None, None)
    values: dict[str, Any] = {
        **{name: getattr(cell, name, None) for name in _COLUMNS},
        "kind": "all" if cell.kind == ALL_KINDS else cell.kind,
        "pairs": cell.difference.pairs,
        "documents": cell.difference.documents,
        "difference": cell.difference.mean,
        "interval_low": low,
        "interval_high": high,
        "p": cell.difference.p,
    }
    return {name: _harmless(value) for name, value in values.items()}


def _harmless(value: object) -> object:
    # A spreadsheet runs a text that begins so as a formula.
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value
