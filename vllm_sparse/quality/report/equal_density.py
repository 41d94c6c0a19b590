"""Variants against baselines that read as much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_sparse.quality.records import DENSE, DecodingRecord, LanguageRecord, TaskRecord
from vllm_sparse.quality.report.pairs import Key, Place, Values, lengths_of, numbers, value_of
from vllm_sparse.quality.report.results import (
    BASELINES,
    PHASES,
    EqualDensity,
    Measure,
    Phase,
    Speed,
    density_of,
    is_sparse,
)
from vllm_sparse.quality.statistics import Estimate, estimate
from vllm_sparse.quality.variants import Variant


def at_equal_density(
    tasks: Mapping[Place, Mapping[Key, TaskRecord]],
    language: Mapping[Place, Mapping[Key, LanguageRecord]],
    decoding: Mapping[Place, Mapping[Key, DecodingRecord]],
    variants: Sequence[Variant],
    speed: Mapping[Place, Speed],
) -> list[EqualDensity]:
    """Each method against each baseline, measure by measure and phase by phase.

    The baseline's value at the method's density is interpolated, prompt by prompt, between its two nearest settings;
    dense is its upper end. Only settings count that are sparse in that phase alone.
    """
    # Higher is better in all three.
    scores = numbers(tasks, lambda one: one.score)
    gains = numbers(language, lambda one: -one.mean_loss)
    nearness = numbers(decoding, lambda one: -one.mean_divergence)
    # Dense is at no distance from itself, and is not measured.
    for length in lengths_of(nearness):
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
        for length in lengths_of(values)
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
        value_of(measure, key, value - (1 - share) * first[key] - share * second[key])
        for key, value in own.items()
        if key in first and key in second
    ]
    return found(low_name, high_name, below_lowest, estimate(advantages), "" if advantages else "no prompt in common")
