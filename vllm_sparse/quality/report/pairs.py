"""Records by place and prompt, and the pairs among them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from vllm_sparse.quality.records import DecodingRecord, GenerationRecord, LanguageRecord, Record, TaskRecord
from vllm_sparse.quality.report.results import Measure
from vllm_sparse.quality.statistics import Value

Place = tuple[str, int]  # variant, length in tokens
Key = tuple[str, int, int]  # kind, document, prompt
AnyRecord = TypeVar("AnyRecord", bound=Record)
Values = Mapping[Place, Mapping[Key, float]]


def prompt_key(record: TaskRecord) -> Key:
    """What records of one prompt share."""
    return record.kind, record.document, record.prompt


def text_key(record: LanguageRecord | DecodingRecord | GenerationRecord) -> Key:
    """What records of one text share."""
    return record.kind, record.document, 0


def by_place(
    records: Sequence[AnyRecord], key: Callable[[AnyRecord], Key], notes: list[str]
) -> dict[Place, dict[Key, AnyRecord]]:
    """Records by variant and length; of records of one prompt the last counts, and `notes` says so."""
    found: defaultdict[Place, dict[Key, AnyRecord]] = defaultdict(dict)
    for record in records:
        found[record.variant, record.length_tokens][key(record)] = record
    repeated = len(records) - sum(map(len, found.values()))
    if repeated:
        notes.append(f"{repeated} {records[0].measure} records repeat an earlier one; the last of each counts.")
    return dict(found)


def numbers(
    found: Mapping[Place, Mapping[Key, AnyRecord]], number: Callable[[AnyRecord], float]
) -> dict[Place, dict[Key, float]]:
    """One number of each record."""
    return {place: {key: number(one) for key, one in some.items()} for place, some in found.items()}


def paired(first: Mapping[Key, AnyRecord], second: Mapping[Key, AnyRecord]) -> list[tuple[Key, AnyRecord, AnyRecord]]:
    """Records of the prompts that both have."""
    return [(key, first[key], one) for key, one in second.items() if key in first]


def lengths_of(found: Mapping[Place, object]) -> list[int]:
    """Lengths in tokens, ascending."""
    return sorted({length for _, length in found})


def value_of(measure: Measure, key: Key, value: float) -> Value:
    """Kinds of task weigh equally and share documents; texts weigh equally, and each is a document of its own."""
    kind, document, _ = key
    return Value(document, kind, value) if measure == "tasks" else Value((kind, document), "", value)


def mean_of(measure: Measure, values: Mapping[Key, float]) -> float | None:
    """The mean as `value_of` weighs it; None of nothing."""
    if not values:
        return None
    if measure != "tasks":
        return float(np.mean(list(values.values())))
    kinds = defaultdict(list)
    for (kind, *_), value in values.items():
        kinds[kind].append(value)
    return float(np.mean([np.mean(some) for some in kinds.values()]))


def column_means(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The mean of each column; columns that not every row has are left out."""
    if not rows:
        return ()
    columns = min(map(len, rows))
    return tuple(float(mean) for mean in np.array([row[:columns] for row in rows]).mean(axis=0))


def differences(dense: Sequence[float], other: Sequence[float]) -> list[float]:
    """Each value minus dense's, as far as both go."""
    return [after - before for before, after in zip(dense, other, strict=False)]
