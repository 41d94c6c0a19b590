"""``vllm-sparse quality report FOLDER ...``: the report of one journal, or of several on the same model."""

from __future__ import annotations

import argparse
from pathlib import Path

import vllm_sparse
from vllm_sparse.quality.gate import decide
from vllm_sparse.quality.journal import NAME, JournalError, Run, merge, read_journal
from vllm_sparse.quality.report.terminal import gate_table, tables
from vllm_sparse.quality.report.write import write_report


def main(arguments: list[str]) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vllm-sparse quality report", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="FOLDER", help="of a run, with its journal.jsonl")
    parser.add_argument("--output", type=Path, help="folder of the report (default: the first run's)")
    parser.add_argument("--gate", action="store_true", help="end with the status of the quality gate")
    given = parser.parse_args(arguments)
    try:
        run = merge([read_journal(folder / NAME) for folder in given.runs])
    except (OSError, JournalError) as error:
        parser.error(str(error))
    return report(run, given.output or given.runs[0], given.gate)


def report(run: Run, folder: Path, gate: bool) -> int:
    """Write the report and print its tables; returns the exit status."""
    facts = {name.replace("_", " "): str(value) for name, value in run.facts.items() if value != ""}
    facts["version of vllm_sparse"] = vllm_sparse.__version__
    summary = write_report(folder, run.records, list(run.variants.values()), facts)
    decided = decide(summary)
    print(tables(summary))
    print(gate_table(decided))
    print(f"page: {folder / 'report.html'}; tables: {folder / 'results.csv'}, {folder / 'results.json'}")
    return decided.exit_status if gate else 0
