"""Variants against dense, by length and kind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from vllm_sparse.quality.records import DENSE
from vllm_sparse.quality.report.pairs import Place, Values, lengths_of, mean_of, value_of
from vllm_sparse.quality.report.results import ALL_KINDS, LEAST_DENSE_SCORE, Cell, Speed
from vllm_sparse.quality.statistics import estimate, holm
from vllm_sparse.quality.variants import Variant


def cells_of(
    measure: Literal["tasks", "language"], values: Values, variants: Sequence[Variant], speed: Mapping[Place, Speed]
) -> list[Cell]:
    """Every variant that was measured, at each length: of all kinds, then of each."""
    cells = []
    for length in lengths_of(values):
        dense = values.get((DENSE, length), {})
        for variant in variants:
            other = values.get((variant.name, length), {})
            if not other:
                continue
            density = speed.get((variant.name, length))
            shared = {key: value - dense[key] for key, value in other.items() if key in dense}
            for kind in [ALL_KINDS, *dict.fromkeys(kind for kind, *_ in other)]:
                keys = [key for key in shared if kind in (ALL_KINDS, key[0])]
                dense_mean = mean_of(measure, {key: dense[key] for key in keys})
                cells.append(
                    Cell(
                        variant=variant.name,
                        length_tokens=length,
                        measure=measure,
                        kind=kind,
                        kinds=len({key[0] for key in keys}),
                        dense_mean=dense_mean,
                        variant_mean=mean_of(measure, {key: other[key] for key in keys}),
                        difference=estimate(value_of(measure, key, shared[key]) for key in keys),
                        dense_too_low=measure == "tasks" and dense_mean is not None and dense_mean < LEAST_DENSE_SCORE,
                        prefill_density=density.prefill_density if density else None,
                        decode_density=density.decode_density if density else None,
                    )
                )
    return cells


def adjusted(cells: Sequence[Cell], variants: Sequence[Variant]) -> list[Cell]:
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
