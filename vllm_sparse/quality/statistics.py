"""Means of paired differences, with intervals and p-values that take documents, not prompts, as independent."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

RESAMPLES = 4000
CONFIDENCE = 0.95
SIGNIFICANT = 0.05
LEAST_DOCUMENTS = 6
"""Of fewer not even all on one side would be significant at 5 %, so they get no interval and no p-value."""
MOST_EXACT_DOCUMENTS = 14
"""Up to so many all 2^n signs are tried; of more, `SIGNS` random ones."""
SIGNS = 2**14
_SEED = 0
# Sums of scores in another order differ by rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Value:
    """One paired difference.

    Attributes:
        document: values of one document are drawn together.
        stratum: each stratum weighs equally in the mean, however many values it has, such as a task's kind.
        value: the difference.
    """

    document: Hashable
    stratum: str
    value: float


@dataclass(frozen=True)
class Estimate:
    """A mean and what is known of its error.

    Attributes:
        pairs: values that it is the mean of.
        documents: that they belong to.
        mean: over strata of each stratum's mean; None without values.
        interval: lower and upper end of the 95 % interval; None with fewer than `LEAST_DOCUMENTS` documents.
        p: two-sided, of the hypothesis that the mean is zero; None where there is no interval.
    """

    pairs: int
    documents: int
    mean: float | None
    interval: tuple[float, float] | None
    p: float | None


def estimate(values: Iterable[Value]) -> Estimate:
    """Mean of paired differences, its interval by drawing documents again, its p-value by flipping their signs.

    The interval is a percentile bootstrap over documents, widened for their small number as Student's t is (Hesterberg,
    "What Teachers Should Know About the Bootstrap", 2015, section 4.3). The p-value is that of a sign-flip test of
    documents: exact up to `MOST_EXACT_DOCUMENTS`, else by random signs. Both repeat exactly.
    """
    found = list(values)
    if not found:
        return Estimate(0, 0, None, None, None)
    documents = {document: row for row, document in enumerate(dict.fromkeys(one.document for one in found))}
    strata = {stratum: column for column, stratum in enumerate(dict.fromkeys(one.stratum for one in found))}
    sums = np.zeros((len(documents), len(strata)))
    counts = np.zeros_like(sums)
    for one in found:
        place = documents[one.document], strata[one.stratum]
        sums[place] += one.value
        counts[place] += 1
    # What each document adds to the mean.
    parts: Array = (sums / counts.sum(axis=0)).mean(axis=1)
    mean = float(parts.sum())
    if len(documents) < LEAST_DOCUMENTS:
        return Estimate(len(found), len(documents), mean, None, None)
    return Estimate(len(found), len(documents), mean, _interval(sums, counts), _sign_flip_p(parts))


def _interval(sums: Array, counts: Array) -> tuple[float, float]:
    draws = _draws(len(sums))
    drawn_counts = draws @ counts
    # A stratum that a draw misses has no mean in it; the others stand for it.
    means = np.divide(draws @ sums, drawn_counts, out=np.full_like(drawn_counts, np.nan), where=drawn_counts > 0)
    low, high = np.quantile(np.nanmean(means, axis=1), _tails(len(sums)))
    return float(low), float(high)


@functools.lru_cache(maxsize=8)
def _draws(documents: int) -> Array:
    """How often each resample holds each document: ``[RESAMPLES, documents]``."""
    shares = np.full(documents, 1 / documents)
    return np.random.default_rng(_SEED).multinomial(documents, shares, size=RESAMPLES).astype(np.float64)


@functools.cache
def _tails(documents: int) -> tuple[float, float]:
    """The quantiles of the resampled means at which the interval ends."""
    normal = NormalDist()
    z, freedom = normal.inv_cdf((1 + CONFIDENCE) / 2), documents - 1
    # Student's t by its Cornish-Fisher series: within 0.003 from five degrees of freedom on.
    t = (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
    tail = normal.cdf(-math.sqrt(documents / freedom) * t)
    return tail, 1 - tail


def _sign_flip_p(parts: Array) -> float:
    exact = len(parts) <= MOST_EXACT_DOCUMENTS
    sums = np.abs(_signs(len(parts)) @ parts)
    extreme = int(np.count_nonzero(sums >= abs(parts.sum()) - _ROUNDING))
    # Of random signs the observed ones count once more, so that no p-value is zero.
    return extreme / len(sums) if exact else (extreme + 1) / (len(sums) + 1)


@functools.lru_cache(maxsize=8)
def _signs(documents: int) -> Array:
    if documents <= MOST_EXACT_DOCUMENTS:
        return np.array(list(itertools.product((1.0, -1.0), repeat=documents)))
    return np.random.default_rng(_SEED).choice((1.0, -1.0), size=(SIGNS, documents))


def least_p(documents: int) -> float | None:
    """The smallest p-value that so many documents can give; None where they give none."""
    if documents < LEAST_DOCUMENTS:
        return None
    return 2.0 ** (1 - documents) if documents <= MOST_EXACT_DOCUMENTS else 1 / (SIGNS + 1)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjustment of the p-values of one table; those that are None stay so and do not count.

    Below 5 % is significant with the chance of any false one in the table at 5 %.
    """
    known = sorted((p, number) for number, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    most = 0.0
    for rank, (p, number) in enumerate(known):
        most = max(most, min(1.0, (len(known) - rank) * p))
        adjusted[number] = most
    return adjusted
