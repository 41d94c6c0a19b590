"""Everything that is made of a run's records, in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_sparse.quality.gate import Limits, decide
from vllm_sparse.quality.records import Record
from vllm_sparse.quality.report.files import write_csv, write_json
from vllm_sparse.quality.report.html import page
from vllm_sparse.quality.report.results import Summary
from vllm_sparse.quality.report.summary import summarise
from vllm_sparse.quality.variants import Variant


def write_report(
    folder: Path,
    records: Sequence[Record],
    variants: Sequence[Variant],
    run_facts: Mapping[str, str],
    limits: Limits | None = None,
) -> Summary:
    """Write ``results.json``, ``results.csv`` and ``report.html``.

    Args:
        folder: made if it does not exist.
        variants: of all records; dense may be among them.
        run_facts: of the run, by name, such as model, server, seed, command, date and commit.
        limits: of the gate; by default those that a method's defaults have to meet.

    Returns:
        What `terminal.tables` prints and `gate.decide` judges.

    Raises:
        ValueError: a record is of a variant that is not among `variants`, or holds a number that is not finite.
    """
    summary = summarise(records, variants, run_facts)
    gate = decide(summary, limits)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", summary, gate)
    write_csv(folder / "results.csv", summary)
    (folder / "report.html").write_text(page(summary, gate), encoding="utf-8")
    return summary
