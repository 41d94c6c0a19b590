"""What records say, in numbers: cells with paired intervals, and each variant against baselines of equal density."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from vllm_sparse.quality.records import (
    DENSE,
    DecodingRecord,
    GenerationRecord,
    LanguageRecord,
    RecallRecord,
    Record,
    SpeedRecord,
    TaskRecord,
)
from vllm_sparse.quality.report.cells import adjusted, cells_of
from vllm_sparse.quality.report.equal_density import at_equal_density
from vllm_sparse.quality.report.notes import both_phases, cautions, unpaired
from vllm_sparse.quality.report.pairs import (
    AnyRecord,
    Key,
    Place,
    by_place,
    column_means,
    differences,
    lengths_of,
    numbers,
    paired,
    prompt_key,
    text_key,
    value_of,
)
from vllm_sparse.quality.report.results import (
    DEPTHS,
    PHASES,
    Decoding,
    Depth,
    Generation,
    Head,
    Phase,
    Positions,
    Recall,
    Speed,
    Summary,
    WorstPrompt,
)
from vllm_sparse.quality.statistics import Array, Estimate, Value, estimate
from vllm_sparse.quality.variants import Variant

WORST_PROMPTS = 5
"""Shown of each variant."""
WORST_HEADS = 10


def summarise(records: Sequence[Record], variants: Sequence[Variant], facts: Mapping[str, str]) -> Summary:
    """Everything that a report says about records.

    Raises:
        ValueError: a record is of a variant that is not among `variants`, or holds a number that is not finite.
    """
    compared = tuple(one for one in variants if one.name != DENSE)
    unknown = {one.variant for one in records} - {one.name for one in compared} - {DENSE}
    if unknown:
        raise ValueError(
            f"records of variants {sorted(unknown)}, but only {sorted(one.name for one in compared)} were described: "
            "give every variant that was measured"
        )
    for one in records:
        if not all(math.isfinite(number) for number in _numbers_of(one)):
            raise ValueError(f"a number of this record is not finite, so that no mean can be taken: {one}")
    notes: list[str] = []
    tasks = by_place(_of(records, TaskRecord), prompt_key, notes)
    language = by_place(_of(records, LanguageRecord), text_key, notes)
    decoding = by_place(_of(records, DecodingRecord), text_key, notes)
    generations = by_place(_of(records, GenerationRecord), text_key, notes)
    speed = _speed(_of(records, SpeedRecord), compared)
    cells = adjusted(
        [
            *cells_of("tasks", numbers(tasks, lambda one: one.score), compared, speed),
            *cells_of("language", numbers(language, lambda one: one.mean_loss), compared, speed),
        ],
        compared,
    )
    equal_density = at_equal_density(tasks, language, decoding, compared, speed)
    found = {one.measure for one in records}
    return Summary(
        facts=dict(facts),
        variants=compared,
        cells=tuple(cells),
        equal_density=tuple(equal_density),
        depths=tuple(_depths(tasks, compared)),
        positions=tuple(_positions(language, compared)),
        decoding=tuple(_decoding(decoding, compared)),
        generations=tuple(_generations(generations, compared)),
        recall=tuple(_recall(_of(records, RecallRecord), compared)),
        speed=tuple(speed.values()),
        worst=tuple(_worst(tasks, compared)),
        notes=(*notes, *unpaired(tasks, compared), *cautions(cells, compared), *both_phases(compared)),
        not_measured=tuple(
            name for name in ("task", "language", "decoding", "generation", "recall", "speed") if name not in found
        ),
    )


def _numbers_of(record: Record) -> tuple[float, ...]:
    match record:
        case TaskRecord():
            return (record.score,)
        case GenerationRecord():
            return record.score, record.agreement or 0.0, record.mean_loss or 0.0
        case LanguageRecord():
            return record.mean_loss, *record.loss_by_position
        case DecodingRecord():
            return record.mean_divergence, record.same_first, *record.divergence_by_position
        case RecallRecord():
            return *record.density, *(value for row in (*record.recall, *record.best) for value in row)
        case SpeedRecord():
            return record.ttft_s, record.tpot_s


def _of(records: Iterable[Record], kind: type[AnyRecord]) -> list[AnyRecord]:
    return [one for one in records if isinstance(one, kind)]


def _depths(tasks: Mapping[Place, Mapping[Key, TaskRecord]], variants: Sequence[Variant]) -> list[Depth]:
    found = []
    for variant in variants:
        for length in lengths_of(tasks):
            parts: list[list[float]] = [[] for _ in range(DEPTHS)]
            pairs = paired(tasks.get((DENSE, length), {}), tasks.get((variant.name, length), {}))
            for _, dense, one in pairs:
                if one.depth is not None:
                    parts[min(int(one.depth * DEPTHS), DEPTHS - 1)].append(one.score - dense.score)
            if any(parts):
                found += [
                    Depth(variant.name, length, number, len(part), float(np.mean(part)) if part else None)
                    for number, part in enumerate(parts)
                ]
    return found


def _positions(language: Mapping[Place, Mapping[Key, LanguageRecord]], variants: Sequence[Variant]) -> list[Positions]:
    found = []
    for variant in variants:
        for length in lengths_of(language):
            pairs = paired(language.get((DENSE, length), {}), language.get((variant.name, length), {}))
            rows = [differences(dense.loss_by_position, one.loss_by_position) for _, dense, one in pairs]
            if rows:
                found.append(Positions(variant.name, length, len(rows), column_means(rows)))
    return found


def _decoding(decoding: Mapping[Place, Mapping[Key, DecodingRecord]], variants: Sequence[Variant]) -> list[Decoding]:
    return [
        Decoding(
            variant=variant.name,
            length_tokens=length,
            texts=len(some),
            least_tokens=min(one.tokens for one in some.values()),
            divergence=estimate(value_of("decoding", key, one.mean_divergence) for key, one in some.items()),
            same_first=float(np.mean([one.same_first for one in some.values()])),
            divergence_by_position=column_means([one.divergence_by_position for one in some.values()]),
        )
        for length in lengths_of(decoding)
        for variant in variants
        if (some := decoding.get((variant.name, length)))
    ]


def _generations(
    generations: Mapping[Place, Mapping[Key, GenerationRecord]], variants: Sequence[Variant]
) -> list[Generation]:
    found = []
    for length in lengths_of(generations):
        for variant in variants:
            pairs = paired(generations.get((DENSE, length), {}), generations.get((variant.name, length), {}))
            for kind in dict.fromkeys(key[0] for key, *_ in pairs):
                some = [(dense, one) for (name, *_), dense, one in pairs if name == kind]
                parts = [both for both in some if all(one.agreement_by_part for one in both)]
                found.append(
                    Generation(
                        variant=variant.name,
                        length_tokens=length,
                        kind=kind,
                        median_tokens=float(np.median([one.tokens for _, one in some])),
                        median_prefix_tokens=float(np.median([one.common_prefix_tokens for _, one in some])),
                        dense_score=float(np.mean([dense.score for dense, _ in some])),
                        score=float(np.mean([one.score for _, one in some])),
                        difference=_estimate(some, lambda one: one.score),
                        difference_by_part=column_means(
                            [differences(dense.score_by_part, one.score_by_part) for dense, one in some]
                        ),
                        agreement=_estimate(some, lambda one: one.agreement),
                        agreement_by_part=column_means(
                            [differences(dense.agreement_by_part, one.agreement_by_part) for dense, one in parts]
                        ),
                        loss=_estimate(some, lambda one: one.mean_loss),
                        dense_repeated=_mean(dense.repeated for dense, _ in some),
                        repeated=_mean(one.repeated for _, one in some),
                    )
                )
    return found


def _estimate(
    pairs: Sequence[tuple[GenerationRecord, GenerationRecord]], number: Callable[[GenerationRecord], float | None]
) -> Estimate:
    """Of a number's differences, over the pairs that both have it."""
    known = [(one.document, number(dense), number(one)) for dense, one in pairs]
    return estimate(
        Value(document, "", own - of_dense)
        for document, of_dense, own in known
        if own is not None and of_dense is not None
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _recall(records: Sequence[RecallRecord], variants: Sequence[Variant]) -> list[Recall]:
    places: defaultdict[tuple[int, Phase, str], list[RecallRecord]] = defaultdict(list)
    for record in records:
        places[record.length_tokens, record.phase, record.variant].append(record)
    return [
        _mean_recall(some)
        for length in sorted({length for length, *_ in places})
        for phase in PHASES
        for variant in variants
        if (some := places.get((length, phase, variant.name)))
    ]


def _mean_recall(records: Sequence[RecallRecord]) -> Recall:
    recall: Array = np.mean([one.recall for one in records], axis=0)
    best: Array = np.mean([one.best for one in records], axis=0)
    heads = [
        Head(layer, head, float(recall[layer, head]), float(best[layer, head]))
        for layer, head in np.ndindex(*recall.shape)
    ]
    return Recall(
        variant=records[0].variant,
        length_tokens=records[0].length_tokens,
        phase=records[0].phase,
        texts=len(records),
        recall=_nested(recall),
        best=_nested(best),
        density=column_means([one.density for one in records]),
        mean=float(recall.mean()),
        best_mean=float(best.mean()),
        worst=tuple(sorted(heads, key=lambda one: one.recall)[:WORST_HEADS]),
    )


def _nested(matrix: Array) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in matrix)


def _speed(records: Sequence[SpeedRecord], variants: Sequence[Variant]) -> dict[Place, Speed]:
    places: defaultdict[Place, dict[int, SpeedRecord]] = defaultdict(dict)
    for record in records:
        places[record.variant, record.length_tokens][record.repeat] = record
    found = {}
    for length in lengths_of(places):
        dense = places.get((DENSE, length), {})
        for name in (DENSE, *(one.name for one in variants)):
            own = places.get((name, length), {})
            if not own:
                continue
            pairs = [(dense[repeat], one) for repeat, one in own.items() if repeat in dense]
            found[name, length] = Speed(
                variant=name,
                length_tokens=length,
                repeats=len(own),
                ttft_s=float(np.median([one.ttft_s for one in own.values()])),
                tpot_s=float(np.median([one.tpot_s for one in own.values()])),
                ttft_ratio=_median_ratio([(before.ttft_s, one.ttft_s) for before, one in pairs]),
                tpot_ratio=_median_ratio([(before.tpot_s, one.tpot_s) for before, one in pairs]),
                prefill_density=_known_mean([one.prefill_density for one in own.values()]),
                decode_density=_known_mean([one.decode_density for one in own.values()]),
            )
    return found


def _median_ratio(pairs: Iterable[tuple[float, float]]) -> float | None:
    # An answer of one token has no time between tokens.
    ratios = [after / before for before, after in pairs if before > 0]
    return float(np.median(ratios)) if ratios else None


def _known_mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _worst(tasks: Mapping[Place, Mapping[Key, TaskRecord]], variants: Sequence[Variant]) -> list[WorstPrompt]:
    found = []
    for variant in variants:
        if variant.baseline:
            continue
        lost = [
            (one.score - dense.score, dense, one)
            for length in lengths_of(tasks)
            for _, dense, one in paired(tasks.get((DENSE, length), {}), tasks.get((variant.name, length), {}))
            if one.score < dense.score
        ]
        lost.sort(key=lambda item: item[0])
        # The worst of each kind and length before the second worst of any, so that one kind does not fill the page.
        places: Counter[tuple[str, int]] = Counter()
        turns = []
        for index, (_, _, one) in enumerate(lost):
            place = one.kind, one.length_tokens
            turns.append((places[place], index))
            places[place] += 1
        for _, index in sorted(turns)[:WORST_PROMPTS]:
            _, dense, one = lost[index]
            found.append(
                WorstPrompt(
                    variant=variant.name,
                    length_tokens=one.length_tokens,
                    kind=one.kind,
                    document=one.document,
                    prompt=one.prompt,
                    depth=one.depth,
                    question=one.question,
                    answers=one.answers,
                    dense_score=dense.score,
                    score=one.score,
                    dense_text=dense.text,
                    text=one.text,
                )
            )
    return found
