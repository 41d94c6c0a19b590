"""What a reader has to know to read the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_sparse.quality.records import DENSE, TaskRecord
from vllm_sparse.quality.report.pairs import Key, Place, lengths_of
from vllm_sparse.quality.report.results import LEAST_DENSE_SCORE, Cell
from vllm_sparse.quality.statistics import LEAST_DOCUMENTS, SIGNIFICANT, least_p
from vllm_sparse.quality.variants import Variant


def unpaired(tasks: Mapping[Place, Mapping[Key, TaskRecord]], variants: Sequence[Variant]) -> list[str]:
    """Answers that take no part in a comparison."""
    notes = []
    for variant in variants:
        for length in lengths_of(tasks):
            own, dense = (set(tasks.get((name, length), {})) for name in (variant.name, DENSE))
            if own and own != dense:
                notes.append(
                    f"{variant.name} at {length} tokens: {len(own - dense)} answers have no dense one and "
                    f"{len(dense - own)} dense answers have none of its; they are left out."
                )
    return notes


def cautions(cells: Sequence[Cell], variants: Sequence[Variant]) -> list[str]:
    """Cells that can show less than they seem to."""
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
    methods = {one.name for one in variants if not one.baseline}
    for measure in ("tasks", "language"):
        table = [
            one
            for one in cells
            if one.measure == measure and one.kind and one.variant in methods and one.difference.p is not None
        ]
        best = min((p for one in table if (p := least_p(one.difference.documents)) is not None), default=None)
        if best is not None and best * len(table) >= SIGNIFICANT:
            notes.append(
                f"The table of {measure} by kind has {len(table)} comparisons of methods; with so few documents none "
                "of them can be significant after Holm's adjustment. Look at the intervals, and at all kinds together."
            )
    return notes


def both_phases(variants: Sequence[Variant]) -> list[str]:
    """Variants that no baseline fits."""
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
