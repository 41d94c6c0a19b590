"""The journal of a quality run: a line of JSON a record, written as it is measured, so that a run can be resumed.

Journals of several runs on one model, such as several seeds on several machines, are read together.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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

NAME = "journal.jsonl"
FORMAT = 1
_KINDS: dict[str, type[Any]] = {
    "task": TaskRecord,
    "language": LanguageRecord,
    "decoding": DecodingRecord,
    "generation": GenerationRecord,
    "recall": RecallRecord,
    "speed": SpeedRecord,
}


class JournalError(ValueError):
    """A journal cannot be read, or belongs to another run; the message says what differs."""


@dataclasses.dataclass
class Run:
    """What a journal holds.

    Attributes:
        facts: what the run depends on: model, seed, lengths and so on, as its first line has them.
        variants: by name.
        records: what was measured.
        done: keys of jobs that came to their end.
    """

    facts: dict[str, Any]
    variants: dict[str, Variant]
    records: list[Record]
    done: set[str]


class Journal:
    """Writes a run's journal, or goes on with it.

    Args:
        folder: of the run.
        facts: what the run depends on; a journal that is resumed must have the same.
        variants: compared.

    Raises:
        JournalError: the folder holds a journal of another run.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], variants: Sequence[Variant]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / NAME
        self.run = Run(dict(facts), {}, [], set())
        if path.exists():
            self.run = read_journal(path)
            for name, value in json.loads(json.dumps(facts)).items():
                if self.run.facts.get(name) != value:
                    raise JournalError(
                        f"{path} is of a run with {name} {self.run.facts.get(name)!r}, this one has {value!r}; "
                        "give another --output, or the same arguments to go on"
                    )
            _cut_broken_line(path)
        # Line by line, so that a killed run loses nothing but the line being written.
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._lock = threading.Lock()
        if not self.run.variants:
            self._write({"run": dict(facts), "format": FORMAT})
        for variant in variants:
            known = self.run.variants.get(variant.name)
            if known is None:
                self.run.variants[variant.name] = variant
                self._write({"variant": dataclasses.asdict(variant)})
            elif dataclasses.asdict(known) != json.loads(json.dumps(dataclasses.asdict(variant))):
                raise JournalError(f"{path} has a variant {variant.name!r} with other settings; give it another name")

    def add(self, job: str, records: Sequence[Record]) -> None:
        """A job came to its end: its key, and what it measured. Threads may call it at once."""
        with self._lock:
            self._file.write(
                json.dumps({"job": job, "records": [dataclasses.asdict(record) for record in records]}) + "\n"
            )
            self.run.records += records
            self.run.done.add(job)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")


def _cut_broken_line(path: Path) -> None:
    """Take away what a killed run did not write to its end, so that the next line does not continue it."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)


def read_journal(path: Path) -> Run:
    """Read a run.

    Raises:
        JournalError: that is no journal.
    """
    run = Run({}, {}, [], set())
    # JSON leaves U+2028 and its like inside of strings, where `splitlines` would cut.
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, text in enumerate(lines, 1):
        if not text:
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            if number == len(lines):
                break
            raise JournalError(f"{path}, line {number} is no JSON: {error}") from error
        if "run" in line:
            if line.get("format") != FORMAT:
                raise JournalError(f"{path} has format {line.get('format')!r}; this version reads {FORMAT}")
            run.facts = line["run"]
        elif "variant" in line:
            variant = Variant(**line["variant"])
            run.variants[variant.name] = variant
        elif "job" in line:
            run.records += [_record(fields) for fields in line["records"]]
            run.done.add(line["job"])
        else:
            raise JournalError(f"{path}, line {number} is no line of a quality run")
    if not run.facts:
        raise JournalError(f"{path} is no journal of a quality run")
    return run


def _record(fields: Mapping[str, Any]) -> Record:
    record: Record = _KINDS[fields["measure"]](**{name: _frozen(value) for name, value in fields.items()})
    return record


def _frozen(value: Any) -> Any:
    """Lists of JSON as the tuples that records hold."""
    return tuple(_frozen(part) for part in value) if isinstance(value, list) else value


def merge(runs: Sequence[Run]) -> Run:
    """Several runs as one, documents numbered apart.

    Raises:
        JournalError: they are of different models, or a variant has different settings.
    """
    merged = Run(dict(runs[0].facts), {}, [], set())
    first_document = 0
    for run in runs:
        if run.facts.get("model") != merged.facts.get("model"):
            raise JournalError(
                f"journals of {merged.facts.get('model')!r} and {run.facts.get('model')!r} cannot be read together"
            )
        for name, variant in run.variants.items():
            if merged.variants.setdefault(name, variant) != variant:
                raise JournalError(f"the variant {name!r} has different settings in the journals")
        for record in run.records:
            moved = {"repeat" if isinstance(record, SpeedRecord) else "document": _number(record) + first_document}
            merged.records.append(dataclasses.replace(record, **moved))  # type: ignore[arg-type]
        first_document += 1 + max((_number(record) for record in run.records), default=-1)
    return merged


def _number(record: Record) -> int:
    return record.repeat if isinstance(record, SpeedRecord) else record.document
