"""What records say, in numbers: cells with paired intervals, and each variant against baselines of equal density."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

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
from vllm_sparse.quality.statistics import (
    LEAST_DOCUMENTS,
    SIGNIFICANT,
    Array,
    Estimate,
    Value,
    estimate,
    holm,
    least_p,
)
from vllm_sparse.quality.variants import Variant

ALL_KINDS = ""
LEAST_DENSE_SCORE = 0.1
"""A kind that dense answers worse than this at a length has nothing to lose there."""
DEPTHS = 5
WORST_PROMPTS = 5
"""Shown of each variant."""
WORST_HEADS = 10

Measure = Literal["tasks", "language", "decoding"]
Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
BASELINES = ("random", "streaming", "oracle")


@dataclass(frozen=True)
class Cell:
    """A variant against dense, over prompts that both answered.

    Attributes:
        variant, length_tokens: as of the records.
        measure: ``tasks`` (score, 0 to 1) or ``language`` (mean -log p of the last half, nats).
        kind: of task or text; `ALL_KINDS` for all together, where each kind of task and each text weighs equally.
        kinds: how many kinds it holds.
        dense_mean, variant_mean: over the paired prompts.
        difference: variant minus dense.
        holm_p: p adjusted over the table: cells of the same measure, all of one kind each or all of all kinds, methods
            and baselines apart.
        dense_too_low: dense scores below `LEAST_DENSE_SCORE`, so that the cell cannot show a loss.
        prefill_density, decode_density: tokens read over tokens in reach; None if not measured or not sparse.
    """

    variant: str
    length_tokens: int
    measure: Measure
    kind: str
    kinds: int
    dense_mean: float | None
    variant_mean: float | None
    difference: Estimate
    dense_too_low: bool
    prefill_density: float | None
    decode_density: float | None
    holm_p: float | None = None

    @property
    def significant(self) -> bool | None:
        """Whether the adjusted p-value is below 5 %; None where there is none."""
        return None if self.holm_p is None else self.holm_p < SIGNIFICANT


@dataclass(frozen=True)
class EqualDensity:
    """A variant against a baseline that reads as much, prompt by prompt.

    Attributes:
        variant, length_tokens, measure: as of `Cell`.
        phase: whose density is equal.
        baseline: its kind.
        density: of the variant in that phase; None if not measured.
        lower, upper: the settings of the baseline between which its value is interpolated; equal if only one is used.
        below_lowest: the variant reads less than any setting of the baseline, whose lowest is used as it is.
        advantage: how much better the variant is: score minus the baseline's, or the baseline's loss or divergence
            minus the variant's.
        missing: why there is no comparison, or "".
    """

    variant: str
    length_tokens: int
    measure: Measure
    phase: Phase
    baseline: str
    density: float | None
    lower: str
    upper: str
    below_lowest: bool
    advantage: Estimate
    missing: str

    @property
    def shown(self) -> bool:
        """The variant is better than the baseline, and the interval says so."""
        return self.advantage.interval is not None and self.advantage.interval[0] > 0

    @property
    def verdict(self) -> str:
        """In words; an oracle is a bound, which nobody has to beat."""
        if self.baseline == "oracle" and not self.missing:
            return ""
        if self.missing:
            return self.missing
        if self.advantage.interval is None:
            return f"not shown to be better than {self.baseline} (fewer than {LEAST_DOCUMENTS} documents)"
        return f"{'' if self.shown else 'not shown to be '}better than {self.baseline}"


@dataclass(frozen=True)
class Depth:
    """Score minus dense of the questions whose answer stands in one part of the text.

    Attributes:
        part: of `DEPTHS` equal parts, 0 at the beginning.
        pairs: prompts; difference is None without any.
    """

    variant: str
    length_tokens: int
    part: int
    pairs: int
    difference: float | None


@dataclass(frozen=True)
class Positions:
    """Loss minus dense along the texts of a length, nats; the mean over texts at each sixteenth."""

    variant: str
    length_tokens: int
    texts: int
    difference: tuple[float, ...]


@dataclass(frozen=True)
class Decoding:
    """Told the dense history.

    Attributes:
        texts: measured.
        least_tokens: positions of the shortest.
        divergence: mean KL to dense, nats, with the interval over texts.
        same_first: share of positions with the same most likely token.
        divergence_by_position: mean of each eighth.
    """

    variant: str
    length_tokens: int
    texts: int
    least_tokens: int
    divergence: Estimate
    same_first: float
    divergence_by_position: tuple[float, ...]


@dataclass(frozen=True)
class Generation:
    """Free generations.

    Attributes:
        kind: what was asked for.
        median_tokens, median_prefix_tokens: generated, and before the first that differs from dense.
        difference: of the whole score, against dense.
        difference_by_part: of each quarter of what was asked for.
    """

    variant: str
    length_tokens: int
    kind: str
    median_tokens: float
    median_prefix_tokens: float
    difference: Estimate
    difference_by_part: tuple[float, ...]


@dataclass(frozen=True)
class Head:
    """A query head, its recall and that of the best list of equal length."""

    layer: int
    head: int
    recall: float
    best: float


@dataclass(frozen=True)
class Recall:
    """Attention mass kept, mean over texts.

    Attributes:
        texts: measured.
        recall, best: of each layer, of each query head.
        density: of each layer.
        mean, best_mean: over layers and heads.
        worst: the heads that keep least, worst first.
    """

    variant: str
    length_tokens: int
    phase: Phase
    texts: int
    recall: tuple[tuple[float, ...], ...]
    best: tuple[tuple[float, ...], ...]
    density: tuple[float, ...]
    mean: float
    best_mean: float
    worst: tuple[Head, ...]


@dataclass(frozen=True)
class Speed:
    """Requests alone on the server.

    Attributes:
        repeats: measured, of the variant.
        ttft_s, tpot_s: medians.
        ttft_ratio, tpot_ratio: median over repeats of the variant's time over dense's of the same repeat; below 1 is
            faster; None without dense.
        prefill_density, decode_density: means.
    """

    variant: str
    length_tokens: int
    repeats: int
    ttft_s: float
    tpot_s: float
    ttft_ratio: float | None
    tpot_ratio: float | None
    prefill_density: float | None
    decode_density: float | None


@dataclass(frozen=True)
class WorstPrompt:
    """A question on which a variant lost against dense."""

    variant: str
    length_tokens: int
    kind: str
    document: int
    prompt: int
    depth: float | None
    question: str
    answers: tuple[str, ...]
    dense_score: float
    score: float
    dense_text: str
    text: str


@dataclass(frozen=True)
class Summary:
    """All that a report says.

    Attributes:
        facts: of the run, such as the model and the seed.
        variants: compared, without dense.
        notes: what a reader has to know to read the numbers.
        not_measured: measures without any record.
    """

    facts: Mapping[str, str]
    variants: tuple[Variant, ...]
    cells: tuple[Cell, ...]
    equal_density: tuple[EqualDensity, ...]
    depths: tuple[Depth, ...]
    positions: tuple[Positions, ...]
    decoding: tuple[Decoding, ...]
    generations: tuple[Generation, ...]
    recall: tuple[Recall, ...]
    speed: tuple[Speed, ...]
    worst: tuple[WorstPrompt, ...]
    notes: tuple[str, ...]
    not_measured: tuple[str, ...]


Place = tuple[str, int]  # variant, length in tokens
Key = tuple[str, int, int]  # kind, document, prompt
AnyRecord = TypeVar("AnyRecord", bound=Record)
Values = Mapping[Place, Mapping[Key, float]]


def summarise(records: Sequence[Record], variants: Sequence[Variant], facts: Mapping[str, str]) -> Summary:
    """Everything that a report says about records.

    Raises:
        ValueError: a record is of a variant that is not among `variants`.
    """
    compared = tuple(one for one in variants if one.name != DENSE)
    unknown = {one.variant for one in records} - {one.name for one in compared} - {DENSE}
    if unknown:
        raise ValueError(
            f"records of variants {sorted(unknown)}, but only {sorted(one.name for one in compared)} were described: "
            "give every variant that was measured"
        )
    notes: list[str] = []
    tasks = _by_place(_of(records, TaskRecord), _prompt_key, notes)
    language = _by_place(_of(records, LanguageRecord), _text_key, notes)
    decoding = _by_place(_of(records, DecodingRecord), _text_key, notes)
    generations = _by_place(_of(records, GenerationRecord), _text_key, notes)
    speed = _speed(_of(records, SpeedRecord), compared)
    cells = _adjusted(
        [
            *_cells("tasks", _numbers(tasks, lambda one: one.score), compared, speed),
            *_cells("language", _numbers(language, lambda one: one.mean_loss), compared, speed),
        ],
        compared,
    )
    equal_density = _at_equal_density(tasks, language, decoding, compared, speed)
    found = {one.measure for one in records}
    return Summary(
        facts=dict(facts),
        variants=compared,
        cells=tuple(cells),
        equal_density=tuple(equal_density),
        depths=tuple(_depths(tasks, compared)),
        positions=tuple(_positions(language, compared)),
        decoding=tuple(_decoding(decoding)),
        generations=tuple(_generations(generations, compared)),
        recall=tuple(_recall(_of(records, RecallRecord))),
        speed=tuple(speed.values()),
        worst=tuple(_worst(tasks, compared)),
        notes=(*notes, *_unpaired(tasks, compared), *_cautions(cells), *_both_phases(compared)),
        not_measured=tuple(
            name for name in ("task", "language", "decoding", "generation", "recall", "speed") if name not in found
        ),
    )


def _of(records: Iterable[Record], kind: type[AnyRecord]) -> list[AnyRecord]:
    return [one for one in records if isinstance(one, kind)]


def _prompt_key(record: TaskRecord) -> Key:
    return record.kind, record.document, record.prompt


def _text_key(record: LanguageRecord | DecodingRecord | GenerationRecord) -> Key:
    return record.kind, record.document, 0


def _by_place(
    records: Sequence[AnyRecord], key: Callable[[AnyRecord], Key], notes: list[str]
) -> dict[Place, dict[Key, AnyRecord]]:
    found: defaultdict[Place, dict[Key, AnyRecord]] = defaultdict(dict)
    for record in records:
        found[record.variant, record.length_tokens][key(record)] = record
    repeated = len(records) - sum(map(len, found.values()))
    if repeated:
        notes.append(f"{repeated} {records[0].measure} records repeat an earlier one; the last of each counts.")
    return dict(found)


def _numbers(
    found: Mapping[Place, Mapping[Key, AnyRecord]], number: Callable[[AnyRecord], float]
) -> dict[Place, dict[Key, float]]:
    return {place: {key: number(one) for key, one in some.items()} for place, some in found.items()}


def _paired(first: Mapping[Key, AnyRecord], second: Mapping[Key, AnyRecord]) -> list[tuple[Key, AnyRecord, AnyRecord]]:
    return [(key, first[key], one) for key, one in second.items() if key in first]


def _lengths(found: Mapping[Place, object]) -> list[int]:
    return sorted({length for _, length in found})


def _value(measure: Measure, key: Key, value: float) -> Value:
    """Kinds of task weigh equally and share documents; texts weigh equally, and each is a document of its own."""
    kind, document, _ = key
    return Value(document, kind, value) if measure == "tasks" else Value((kind, document), "", value)


def _mean(measure: Measure, values: Mapping[Key, float]) -> float | None:
    if not values:
        return None
    if measure != "tasks":
        return float(np.mean(list(values.values())))
    kinds = defaultdict(list)
    for (kind, *_), value in values.items():
        kinds[kind].append(value)
    return float(np.mean([np.mean(some) for some in kinds.values()]))


def _cells(
    measure: Literal["tasks", "language"], values: Values, variants: Sequence[Variant], speed: Mapping[Place, Speed]
) -> list[Cell]:
    cells = []
    for length in _lengths(values):
        dense = values.get((DENSE, length), {})
        for variant in variants:
            other = values.get((variant.name, length), {})
            if not other:
                continue
            density = speed.get((variant.name, length))
            shared = {key: value - dense[key] for key, value in other.items() if key in dense}
            for kind in [ALL_KINDS, *dict.fromkeys(kind for kind, *_ in other)]:
                keys = [key for key in shared if kind in (ALL_KINDS, key[0])]
                dense_mean = _mean(measure, {key: dense[key] for key in keys})
                cells.append(
                    Cell(
                        variant=variant.name,
                        length_tokens=length,
                        measure=measure,
                        kind=kind,
                        kinds=len({key[0] for key in keys}),
                        dense_mean=dense_mean,
                        variant_mean=_mean(measure, {key: other[key] for key in keys}),
                        difference=estimate(_value(measure, key, shared[key]) for key in keys),
                        dense_too_low=measure == "tasks" and dense_mean is not None and dense_mean < LEAST_DENSE_SCORE,
                        prefill_density=density.prefill_density if density else None,
                        decode_density=density.decode_density if density else None,
                    )
                )
    return cells


def _adjusted(cells: Sequence[Cell], variants: Sequence[Variant]) -> list[Cell]:
    """The cells with Holm's p-values, table by table."""
    baselines = {one.name for one in variants if one.baseline}
    tables: defaultdict[tuple[str, bool, bool], list[int]] = defaultdict(list)
    for number, cell in enumerate(cells):
        tables[cell.measure, cell.kind == ALL_KINDS, cell.variant in baselines].append(number)
    adjusted = list(cells)
    for numbers in tables.values():
        for number, p in zip(numbers, holm([cells[number].difference.p for number in numbers]), strict=True):
            adjusted[number] = replace(cells[number], holm_p=p)
    return adjusted


def density_of(speed: Speed | None, phase: Phase) -> float | None:
    """Tokens read over tokens in reach, in a phase; None if not measured."""
    return None if speed is None else speed.prefill_density if phase == "prefill" else speed.decode_density


def is_sparse(variant: Variant, phase: Phase) -> bool:
    """Whether the phase of a request with these settings is sparse."""
    return variant.sparse_prefill if phase == "prefill" else variant.sparse_decode


def _at_equal_density(
    tasks: Mapping[Place, Mapping[Key, TaskRecord]],
    language: Mapping[Place, Mapping[Key, LanguageRecord]],
    decoding: Mapping[Place, Mapping[Key, DecodingRecord]],
    variants: Sequence[Variant],
    speed: Mapping[Place, Speed],
) -> list[EqualDensity]:
    # Higher is better in all three.
    scores = _numbers(tasks, lambda one: one.score)
    gains = _numbers(language, lambda one: -one.mean_loss)
    nearness = _numbers(decoding, lambda one: -one.mean_divergence)
    # Dense is at no distance from itself, and is not measured.
    for length in _lengths(nearness):
        texts = {key for (_, where), some in nearness.items() if where == length for key in some}
        nearness[DENSE, length] = dict.fromkeys(texts, 0.0)
    measures: tuple[tuple[Measure, tuple[Phase, ...], Values], ...] = (
        ("tasks", PHASES, scores),
        ("language", ("prefill",), gains),
        ("decoding", ("decode",), nearness),
    )
    return [
        _against(variant, length, measure, phase, baseline, values, variants, speed)
        for measure, phases, values in measures
        for length in _lengths(values)
        for variant in variants
        if not variant.baseline and (variant.name, length) in values
        for phase in phases
        if is_sparse(variant, phase)
        for baseline in BASELINES
    ]


def _against(
    variant: Variant,
    length: int,
    measure: Measure,
    phase: Phase,
    baseline: str,
    values: Values,
    variants: Sequence[Variant],
    speed: Mapping[Place, Speed],
) -> EqualDensity:
    density = density_of(speed.get((variant.name, length)), phase)
    settings = [(1.0, DENSE)] if (DENSE, length) in values else []
    for one in variants:
        alone = [other for other in PHASES if is_sparse(one, other)] == [phase]
        known = density_of(speed.get((one.name, length)), phase)
        if one.baseline == baseline and alone and known is not None and (one.name, length) in values:
            settings.append((known, one.name))
    settings.sort()

    def found(lower: str, upper: str, below_lowest: bool, advantage: Estimate, missing: str) -> EqualDensity:
        place = (variant.name, length, measure, phase, baseline, density)
        return EqualDensity(*place, lower, upper, below_lowest, advantage, missing)

    if density is None:
        return found("", "", False, estimate([]), f"density of {variant.name} not measured")
    if all(name == DENSE for _, name in settings):
        return found("", "", False, estimate([]), f"{baseline} not measured")
    above = [number for number, (known, _) in enumerate(settings) if known >= density]
    if not above and (DENSE, length) not in values:
        return found("", "", False, estimate([]), f"no setting of {baseline} reads as much, and dense was not measured")
    upper = above[0] if above else len(settings) - 1
    below_lowest = upper == 0 and settings[0][0] > density
    exact = upper == 0 or not above
    (low, low_name), (high, high_name) = settings[upper if exact else upper - 1], settings[upper]
    share = 0.0 if exact else (density - low) / (high - low)
    first, second, own = (values[name, length] for name in (low_name, high_name, variant.name))
    advantages = [
        _value(measure, key, value - (1 - share) * first[key] - share * second[key])
        for key, value in own.items()
        if key in first and key in second
    ]
    return found(low_name, high_name, below_lowest, estimate(advantages), "" if advantages else "no prompt in common")


def _depths(tasks: Mapping[Place, Mapping[Key, TaskRecord]], variants: Sequence[Variant]) -> list[Depth]:
    found = []
    for variant in variants:
        for length in _lengths(tasks):
            parts: list[list[float]] = [[] for _ in range(DEPTHS)]
            pairs = _paired(tasks.get((DENSE, length), {}), tasks.get((variant.name, length), {}))
            for _, dense, one in pairs:
                if one.depth is not None:
                    parts[min(int(one.depth * DEPTHS), DEPTHS - 1)].append(one.score - dense.score)
            if any(parts):
                found += [
                    Depth(variant.name, length, number, len(part), float(np.mean(part)) if part else None)
                    for number, part in enumerate(parts)
                ]
    return found


def _column_means(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The mean of each column; columns that not every row has are left out."""
    columns = min(map(len, rows), default=0)
    return tuple(float(mean) for mean in np.array([row[:columns] for row in rows]).reshape(-1, columns).mean(axis=0))


def _differences(dense: Sequence[float], other: Sequence[float]) -> list[float]:
    return [after - before for before, after in zip(dense, other, strict=False)]


def _positions(language: Mapping[Place, Mapping[Key, LanguageRecord]], variants: Sequence[Variant]) -> list[Positions]:
    found = []
    for variant in variants:
        for length in _lengths(language):
            pairs = _paired(language.get((DENSE, length), {}), language.get((variant.name, length), {}))
            rows = [_differences(dense.loss_by_position, one.loss_by_position) for _, dense, one in pairs]
            if rows:
                found.append(Positions(variant.name, length, len(rows), _column_means(rows)))
    return found


def _decoding(decoding: Mapping[Place, Mapping[Key, DecodingRecord]]) -> list[Decoding]:
    return [
        Decoding(
            variant=variant,
            length_tokens=length,
            texts=len(some),
            least_tokens=min(one.tokens for one in some.values()),
            divergence=estimate(_value("decoding", key, one.mean_divergence) for key, one in some.items()),
            same_first=float(np.mean([one.same_first for one in some.values()])),
            divergence_by_position=_column_means([one.divergence_by_position for one in some.values()]),
        )
        for (variant, length), some in sorted(decoding.items(), key=lambda item: item[0][1])
        if variant != DENSE
    ]


def _generations(
    generations: Mapping[Place, Mapping[Key, GenerationRecord]], variants: Sequence[Variant]
) -> list[Generation]:
    found = []
    for length in _lengths(generations):
        for variant in variants:
            pairs = _paired(generations.get((DENSE, length), {}), generations.get((variant.name, length), {}))
            for kind in dict.fromkeys(key[0] for key, *_ in pairs):
                some = [(dense, one) for (name, *_), dense, one in pairs if name == kind]
                found.append(
                    Generation(
                        variant=variant.name,
                        length_tokens=length,
                        kind=kind,
                        median_tokens=float(np.median([one.tokens for _, one in some])),
                        median_prefix_tokens=float(np.median([one.common_prefix_tokens for _, one in some])),
                        difference=estimate(Value(one.document, "", one.score - dense.score) for dense, one in some),
                        difference_by_part=_column_means(
                            [_differences(dense.score_by_part, one.score_by_part) for dense, one in some]
                        ),
                    )
                )
    return found


def _recall(records: Sequence[RecallRecord]) -> list[Recall]:
    places: defaultdict[tuple[str, int, Phase], list[RecallRecord]] = defaultdict(list)
    for record in records:
        if record.variant != DENSE:
            places[record.variant, record.length_tokens, record.phase].append(record)
    found = []
    for (variant, length, phase), some in sorted(places.items(), key=lambda item: item[0][1:]):
        recall: Array = np.mean([one.recall for one in some], axis=0)
        best: Array = np.mean([one.best for one in some], axis=0)
        heads = [
            Head(layer, head, float(recall[layer, head]), float(best[layer, head]))
            for layer, head in np.ndindex(*recall.shape)
        ]
        found.append(
            Recall(
                variant=variant,
                length_tokens=length,
                phase=phase,
                texts=len(some),
                recall=_nested(recall),
                best=_nested(best),
                density=_column_means([one.density for one in some]),
                mean=float(recall.mean()),
                best_mean=float(best.mean()),
                worst=tuple(sorted(heads, key=lambda one: one.recall)[:WORST_HEADS]),
            )
        )
    return found


def _nested(matrix: Array) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in matrix)


def _speed(records: Sequence[SpeedRecord], variants: Sequence[Variant]) -> dict[Place, Speed]:
    places: defaultdict[Place, dict[int, SpeedRecord]] = defaultdict(dict)
    for record in records:
        places[record.variant, record.length_tokens][record.repeat] = record
    found = {}
    for length in _lengths(places):
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
            for length in _lengths(tasks)
            for _, dense, one in _paired(tasks.get((DENSE, length), {}), tasks.get((variant.name, length), {}))
            if one.score < dense.score
        ]
        for _, dense, one in sorted(lost, key=lambda item: item[0])[:WORST_PROMPTS]:
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


def _unpaired(tasks: Mapping[Place, Mapping[Key, TaskRecord]], variants: Sequence[Variant]) -> list[str]:
    notes = []
    for variant in variants:
        for length in _lengths(tasks):
            own, dense = (set(tasks.get((name, length), {})) for name in (variant.name, DENSE))
            if own and own != dense:
                notes.append(
                    f"{variant.name} at {length} tokens: {len(own - dense)} answers have no dense one and "
                    f"{len(dense - own)} dense answers have none of its; they are left out."
                )
    return notes


def _cautions(cells: Sequence[Cell]) -> list[str]:
    low = sorted({(one.length_tokens, one.kind) for one in cells if one.dense_too_low and one.kind})
    notes = [
        f"{kind} at {length} tokens: dense scores below {LEAST_DENSE_SCORE}, so this kind cannot show a loss. It stays "
        "in the means over all kinds, which it draws towards zero, and does not count as a kind in the gate."
        for length, kind in low
    ]
    few = sorted({one.difference.documents for one in cells if 0 < one.difference.documents < LEAST_DOCUMENTS})
    if few:
        notes.append(
            f"Cells of {' and '.join(map(str, few))} documents have no interval and no p-value: "
            f"at least {LEAST_DOCUMENTS} documents are needed."
        )
    for measure in ("tasks", "language"):
        table = [one for one in cells if one.measure == measure and one.kind and one.difference.p is not None]
        best = min((p for one in table if (p := least_p(one.difference.documents)) is not None), default=None)
        if best is not None and best * len(table) >= SIGNIFICANT:
            notes.append(
                f"The table of {measure} by kind has {len(table)} comparisons; with so few documents none of them can "
                "be significant after Holm's adjustment. Look at the intervals, and at all kinds together."
            )
    return notes


def _both_phases(variants: Sequence[Variant]) -> list[str]:
    both = [one for one in variants if one.sparse_prefill and one.sparse_decode]
    methods = [one.name for one in both if not one.baseline]
    unused = [one.name for one in both if one.baseline]
    notes = []
    if methods:
        notes.append(
            f"{', '.join(methods)}: sparse in both phases. A baseline of equal density is sparse in one phase alone, "
            "so what the other phase loses counts against the method."
        )
    if unused:
        notes.append(f"{', '.join(unused)}: sparse in both phases, so that no method is compared with it.")
    return notes
