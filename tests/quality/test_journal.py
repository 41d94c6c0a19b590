"""The journal: what is written is read again, a killed run is resumed, runs that do not belong together are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from vllm_sparse.quality.journal import NAME, Journal, JournalError, merge, read_journal
from vllm_sparse.quality.records import (
    DecodingRecord,
    GenerationRecord,
    LanguageRecord,
    RecallRecord,
    Record,
    SpeedRecord,
    TaskRecord,
)
from vllm_sparse.quality.variants import Variant

FACTS = {"model": "some", "seed": 1, "tokens": [1024]}
VARIANTS = [
    Variant("mine", {"sparse_prefill": "sale", "hip_query_stride": [1, 2]}),
    Variant("random prefill 0.1", {"sparse_prefill": "random"}, "random", 0.1),
]
# U+2028 ends a line for `str.splitlines`, and not in JSON.
TEXT = 'a "quoted"\u2028line\nand </script>'
RECORDS: list[Record] = [
    TaskRecord("mine", 1024, "one_needle", 3, 0, 0.5, TEXT, ("1", "2"), 1000, 0.25, "What?"),
    LanguageRecord("mine", 1024, "code", 1, 1.5, (1.0, 2.0)),
    DecodingRecord("mine", 1024, "prose", 1, 0.01, 0.99, (0.01, 0.02), 512),
    GenerationRecord("mine", 1024, "copy", 1, 100, 7, 0.5, (0.5, 0.5), TEXT, 0.9, (0.9, 0.9), 0.1, 0.0),
    GenerationRecord("mine", 1024, "copy", 2, 100, 7, 0.5, (0.5, 0.5), "as of an earlier version"),
    RecallRecord("mine", 1024, "code", 1, "decode", ((1.0, 0.5), (0.25, 0.125)), ((1.0, 1.0), (0.5, 0.5)), (1.0, 0.1)),
    SpeedRecord("mine", 1024, 2, 0.5, 0.01, None, 0.25),
]


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path, FACTS, VARIANTS)
    journal.add("one", RECORDS[:1])
    journal.add("two", RECORDS[1:])
    journal.close()
    run = read_journal(tmp_path / NAME)
    assert run.records == RECORDS
    assert list(run.variants.values()) == VARIANTS
    assert run.done == {"one", "two"}
    assert run.facts == FACTS


def test_a_killed_run_goes_on_behind_its_last_whole_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path, FACTS, VARIANTS)
    journal.add("one", RECORDS[:1])
    journal.add("two", RECORDS[1:])
    journal.close()
    content = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(content[:-20])

    resumed = Journal(tmp_path, FACTS, [*VARIANTS, Variant("third", {})])
    assert resumed.run.done == {"one"}
    resumed.add("two", RECORDS[1:])
    resumed.close()
    run = read_journal(tmp_path / NAME)
    assert run.records == RECORDS
    assert [*run.variants] == ["mine", "random prefill 0.1", "third"]


@pytest.mark.parametrize(
    ("facts", "variants", "named"),
    [
        ({**FACTS, "seed": 2}, VARIANTS, "seed"),
        (FACTS, [dataclasses.replace(VARIANTS[0], extras={"sparse_prefill": "dhsa"})], "mine"),
    ],
)
def test_a_journal_of_another_run_is_refused(
    tmp_path: Path, facts: dict[str, object], variants: list[Variant], named: str
) -> None:
    Journal(tmp_path, FACTS, VARIANTS).close()
    with pytest.raises(JournalError, match=named):
        Journal(tmp_path, facts, variants)


@pytest.mark.parametrize("content", ["", "{}\n{}\n", "no JSON\n{}\n", '{"run": {"model": "x"}, "format": 99}\n'])
def test_something_else_is_no_journal(tmp_path: Path, content: str) -> None:
    path = tmp_path / NAME
    path.write_text(content)
    with pytest.raises(JournalError, match=NAME):
        read_journal(path)


def test_merged_runs_keep_their_documents_apart(tmp_path: Path) -> None:
    for name in ("first", "second"):
        journal = Journal(tmp_path / name, FACTS, VARIANTS)
        journal.add("all", RECORDS)
        journal.close()
    runs = [read_journal(tmp_path / name / NAME) for name in ("first", "second")]
    merged = merge(runs)
    assert len(merged.records) == 2 * len(RECORDS)
    numbers = [record.document for record in merged.records if isinstance(record, TaskRecord)]
    assert len(set(numbers)) == 2

    runs[1].facts["model"] = "another"
    with pytest.raises(JournalError, match="another"):
        merge(runs)
