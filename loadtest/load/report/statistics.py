"""Percentiles that have enough samples, and intervals for paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
# Samples beyond a percentile without which it says nothing.
BEYOND = 5
RESAMPLES = 2000
CONFIDENCE = 0.95
# Of fewer pairs not even all on one side would be significant at 5 %, whatever drawing them again says.
LEAST_CLUSTERS = 6
# Less is rounding.
LEAST_SPREAD = 1e-9


def samples_needed(percentile: float) -> int:
    """Samples without which a percentile (0 to 100) is refused: 10 for the median, 500 for p99, 5000 for p99.9."""
    return math.ceil(round(BEYOND / (1 - percentile / 100), 6))


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """``p50`` to ``p99.9``, with ``mean`` and ``count``; a percentile of too few samples is none.

    Interpolated linearly between neighbours, as numpy and `vllm bench serve` do.
    """
    found: dict[str, float | None] = {"count": len(values), "mean": float(np.mean(values)) if values else None}
    for percentile in PERCENTILES:
        enough = len(values) >= samples_needed(percentile)
        found[f"p{percentile:g}"] = float(np.percentile(values, percentile)) if enough else None
    return found


def interval_of_mean(clusters: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """The 95 % bootstrap interval of a mean, by drawing clusters with replacement.

    Args:
        clusters: values that belong together, such as the repetitions of one prompt.

    Returns:
        Lower and upper end; none with fewer than `LEAST_CLUSTERS` clusters, or where all have one mean: drawing them
        again shows no spread, which is not to say that there is none.
    """
    return _ends(_resampled_means(clusters, 0)) if len(clusters) >= LEAST_CLUSTERS else None


def interval_of_median(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a median, whatever the distribution: the medians that a sign test does not rule out.

    Returns:
        Lower and upper end, which are among the values; none with too few of them for any such interval.
    """
    ordered = sorted(values)
    count = len(ordered)
    beyond = [below for below in range(count // 2) if mcnemar(below, count - below) <= 1 - CONFIDENCE]
    return (ordered[beyond[-1]], ordered[-1 - beyond[-1]]) if beyond else None


def _ends(draws: Array) -> tuple[float, float] | None:
    if np.ptp(draws) < LEAST_SPREAD:
        return None
    low, high = np.percentile(draws, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return float(low), float(high)


def _resampled_means(clusters: Sequence[Sequence[float]], seed: int) -> Array:
    rng = np.random.default_rng(seed)
    sums = np.array([np.sum(cluster) for cluster in clusters], dtype=np.float64)
    sizes = np.array([len(cluster) for cluster in clusters], dtype=np.float64)
    draws = rng.integers(len(clusters), size=(RESAMPLES, len(clusters)))
    means: Array = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    return means


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test.

    Args:
        only_first: pairs that only the first got right.
        only_second: pairs that only the second got right.

    Returns:
        The probability of a split at least as uneven if both were equally good.
    """
    total = only_first + only_second
    tail = sum(math.comb(total, k) for k in range(min(only_first, only_second) + 1)) / 2**total
    return float(min(1.0, 2 * tail))


def difference(first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The mean difference second - first of values that come in pairs.

    Args:
        first, second: values by cluster; clusters that both have, in equal numbers, are compared.

    Returns:
        ``pairs``, ``value`` and ``interval``.
    """
    clusters: list[Any] = [
        np.subtract(second[cluster], values)
        for cluster, values in first.items()
        if len(second.get(cluster, ())) == len(values)
    ]
    values = np.concatenate(clusters) if clusters else np.empty(0)
    value = float(values.mean()) if len(values) else None
    return {"pairs": len(values), "value": value, "interval": interval_of_mean(clusters)}


def ratio(first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The geometric mean of second / first of positive values that come in pairs, as `difference` has it."""
    return _exponential(difference(_logarithms(first), _logarithms(second)))


def independent_difference(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """The difference second - first of the means of values that are not paired, by cluster; ``pairs`` is 0."""
    if not first or not second:
        return {"pairs": 0, "value": None, "interval": None}
    value = float(np.concatenate(list(second.values())).mean() - np.concatenate(list(first.values())).mean())
    if min(len(first), len(second)) < LEAST_CLUSTERS:
        return {"pairs": 0, "value": value, "interval": None}
    draws = _resampled_means(list(second.values()), 1) - _resampled_means(list(first.values()), 0)
    return {"pairs": 0, "value": value, "interval": _ends(draws)}


def independent_ratio(first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The ratio second / first of the geometric means of positive values that are not paired, by cluster."""
    return _exponential(independent_difference(_logarithms(first), _logarithms(second)))


def _logarithms(values: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {cluster: [math.log(value) for value in some] for cluster, some in values.items()}


def _exponential(found: Mapping[str, Any]) -> dict[str, Any]:
    value, interval = found["value"], found["interval"]
    return {
        **found,
        "value": None if value is None else math.exp(value),
        "interval": None if interval is None else (math.exp(interval[0]), math.exp(interval[1])),
    }
