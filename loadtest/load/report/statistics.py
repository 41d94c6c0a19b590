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
RESAMPLES = 5000
CONFIDENCE = 0.95
# Of fewer pairs not even all on one side would be significant at 5 %, whatever drawing them again says.
LEAST_CLUSTERS = 6
# Less is rounding.
LEAST_SPREAD = 1e-9


def samples_needed(percentile: float) -> int:
    """Samples without which a percentile (0 to 100) is refused: 10 for the median, 500 for p99, 5000 for p99.9."""
    return math.ceil(round(BEYOND / (1 - percentile / 100), 6))


def percentiles(values: Sequence[float]) -> dict[str, Any]:
    """``p50`` to ``p99.9``, with ``mean``, ``count`` and ``intervals``; a percentile of too few samples is none.

    Interpolated linearly between neighbours, as numpy and `vllm bench serve` do.

    Args:
        values: in the order in which they were measured, which tells how much neighbours depend on one another.
    """
    found: dict[str, Any] = {"count": len(values), "mean": float(np.mean(values)) if values else None}
    intervals = {}
    for percentile in PERCENTILES:
        name = f"p{percentile:g}"
        enough = len(values) >= samples_needed(percentile)
        found[name] = float(np.percentile(values, percentile)) if enough else None
        intervals[name] = interval_of_percentile(values, percentile) if enough else None
    return {**found, "intervals": intervals}


def interval_of_percentile(values: Sequence[float], percentile: float) -> tuple[float, float] | None:
    """The 95 % interval of a percentile (0 to 100), whatever the distribution, by the order of the values.

    Of `n` values so many lie below the true percentile as a binomial distribution says. Values that depend on their
    neighbours, as latencies in a queue do, count as fewer: `n` over the `dependence` of which of them lie below it.

    Args:
        values: in the order in which they were measured.

    Returns:
        Lower and upper end, which are among the values; none where they do not reach so far.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    share = percentile / 100
    below = (np.asarray(values) <= np.percentile(ordered, percentile)).astype(np.float64)
    count = max(1, int(len(ordered) / dependence(below)))
    tail = (1 - CONFIDENCE) / 2
    cumulative = np.cumsum(_binomial(count, share))
    low = int(np.searchsorted(cumulative, tail, side="right"))
    high = int(np.searchsorted(cumulative, 1 - tail)) + 1
    # With counts 0 and `count` the interval would have no end on that side.
    if low < 1 or high > count:
        return None
    scale = len(ordered) / count
    first = math.floor((low - 1) * scale)
    last = min(len(ordered) - 1, math.ceil(high * scale) - 1)
    return float(ordered[first]), float(ordered[last])


def _binomial(count: int, share: float) -> Array:
    """The probability of each number of successes from 0 to `count`."""
    numbers = np.arange(count + 1, dtype=np.float64)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(numbers[1:]))])
    ways = factorials[-1] - factorials - factorials[::-1]
    found: Array = np.exp(ways + numbers * math.log(share) + (count - numbers) * math.log1p(-share))
    return found


def dependence(values: Sequence[float] | Array) -> float:
    """How many neighbours tell as much as one independent value: the time over which a series is correlated.

    The sum of its autocorrelations up to the first that chance explains (two standard errors), at least 1.
    """
    series = np.asarray(values, dtype=np.float64)
    count = len(series)
    centred = series - series.mean() if count else series
    power = float(centred @ centred)
    if power <= 0:
        return 1.0
    # All lags at once, by Fourier's way; the zeros keep the end from meeting the beginning.
    products = np.fft.irfft(np.abs(np.fft.rfft(centred, 2 * count)) ** 2)[1 : max(2, count // 3)] / power
    chance = products < 2 / math.sqrt(count)
    correlated = products[: int(np.argmax(chance)) if chance.any() else len(products)]
    return 1.0 + 2.0 * float(correlated.sum())


def interval_of_mean(clusters: Sequence[Sequence[float]], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """The bootstrap interval of a mean, by drawing blocks of clusters with replacement.

    Args:
        clusters: values that belong together, such as the repetitions of one prompt; in the order in which they were
            measured. Blocks are up to three times as long as neighbours depend on one another: of one cluster where
            they do not.
        confidence: of the interval.

    Returns:
        Lower and upper end; none with fewer clusters than `LEAST_CLUSTERS`, counted as fewer where they depend on one
        another, or where all have one mean: drawing them again shows no spread, which is not to say that there is none.
    """
    draws = _resampled_means(clusters, 0)
    return None if draws is None else _ends(draws, confidence)


def corrected(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values as they are to be read where several are looked at: Holm's correction; none stays none."""
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    found: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for number, (p, place) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - number)))
        found[place] = highest
    return found


def confidence_of_each(comparisons: int) -> float:
    """What each of several intervals needs so that 95 of 100 times all of them hold (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / max(1, comparisons)


def interval_of_median(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a median, whatever the distribution: the medians that a sign test does not rule out.

    Returns:
        Lower and upper end, which are among the values; none with too few of them for any such interval.
    """
    ordered = sorted(values)
    count = len(ordered)
    beyond = [below for below in range(count // 2) if mcnemar(below, count - below) <= 1 - CONFIDENCE]
    return (ordered[beyond[-1]], ordered[-1 - beyond[-1]]) if beyond else None


def _ends(draws: Array, confidence: float) -> tuple[float, float] | None:
    if np.ptp(draws) < LEAST_SPREAD:
        return None
    low, high = np.percentile(draws, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)


def _resampled_means(clusters: Sequence[Sequence[float]], seed: int) -> Array | None:
    """Means of blocks of clusters drawn again; none of too few blocks."""
    rng = np.random.default_rng(seed)
    sums = np.array([np.sum(cluster) for cluster in clusters], dtype=np.float64)
    sizes = np.array([len(cluster) for cluster in clusters], dtype=np.float64)
    count = len(clusters)
    alike = dependence(sums / sizes)
    if count < LEAST_CLUSTERS * alike:
        return None
    # Shorter ones would cut too much of the dependence off at their ends.
    length = min(math.ceil(1 + 3 * (alike - 1)), count // LEAST_CLUSTERS)
    # Blocks go round the end, so that every cluster is as likely.
    starts = rng.integers(count, size=(RESAMPLES, math.ceil(count / length)))
    draws = ((starts[:, :, None] + np.arange(length)) % count).reshape(RESAMPLES, -1)[:, :count]
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


def difference(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]], confidence: float = CONFIDENCE
) -> dict[str, Any]:
    """The mean difference second - first of values that come in pairs.

    Args:
        first, second: values by cluster, in the order measured; clusters that both have, in equal numbers, are
            compared.
        confidence: of the interval.

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
    return {"pairs": len(values), "value": value, "interval": interval_of_mean(clusters, confidence)}


def ratio(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]], confidence: float = CONFIDENCE
) -> dict[str, Any]:
    """The geometric mean of second / first of positive values that come in pairs, as `difference` has it."""
    return _exponential(difference(_logarithms(first), _logarithms(second), confidence))


def independent_difference(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]], confidence: float = CONFIDENCE
) -> dict[str, Any]:
    """The difference second - first of the means of values that are not paired, by cluster; ``pairs`` is 0."""
    if not first or not second:
        return {"pairs": 0, "value": None, "interval": None}
    value = float(np.concatenate(list(second.values())).mean() - np.concatenate(list(first.values())).mean())
    draws = _resampled_means(list(second.values()), 1), _resampled_means(list(first.values()), 0)
    known = None if draws[0] is None or draws[1] is None else _ends(draws[0] - draws[1], confidence)
    return {"pairs": 0, "value": value, "interval": known}


def independent_ratio(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]], confidence: float = CONFIDENCE
) -> dict[str, Any]:
    """The ratio second / first of the geometric means of positive values that are not paired, by cluster."""
    return _exponential(independent_difference(_logarithms(first), _logarithms(second), confidence))


def _logarithms(values: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {cluster: [math.log(value) for value in some] for cluster, some in values.items()}


def _exponential(found: Mapping[str, Any]) -> dict[str, Any]:
    value, interval = found["value"], found["interval"]
    return {
        **found,
        "value": None if value is None else math.exp(value),
        "interval": None if interval is None else (math.exp(interval[0]), math.exp(interval[1])),
    }
