"""When requests are to arrive, in seconds from the beginning of a stage: decided before it starts, never by replies."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Sequence
from typing import Literal

Process = Literal["poisson", "gamma", "constant"]


def arrivals(
    process: Process, rate: float, count: int, rng: random.Random, *, burstiness: float = 1.0, ramp_seconds: float = 0.0
) -> list[float]:
    """Arrival times of `count` requests.

    The intervals are scaled so that the mean rate is met exactly: two seeds differ in the pattern, not in the load.

    Args:
        process: ``poisson``, ``gamma`` or ``constant`` intervals.
        rate: arrivals a second, once the ramp has ended.
        count: how many.
        rng: the source of every choice.
        burstiness: shape of the gamma intervals, whose squared coefficient of variation is its inverse.
        ramp_seconds: the rate grows evenly from nothing during so long.

    Returns:
        Seconds, rising; the last one is where the mean rate puts it.
    """
    # In units of the mean interval.
    intervals = [_interval(process, burstiness, rng) for _ in range(count)]
    scale = count / sum(intervals)
    return [_ramped(scale * steps, rate, ramp_seconds) for steps in itertools.accumulate(intervals)]


def _interval(process: Process, burstiness: float, rng: random.Random) -> float:
    if process == "constant":
        return 1.0
    return rng.expovariate(1.0) if process == "poisson" else rng.gammavariate(burstiness, 1.0 / burstiness)


def _ramped(expected: float, rate: float, ramp_seconds: float) -> float:
    """The time until which so many arrivals are expected: the integral of the rate, inverted."""
    during_ramp = rate * ramp_seconds / 2
    if expected >= during_ramp:
        return ramp_seconds + (expected - during_ramp) / rate
    return math.sqrt(2 * expected * ramp_seconds / rate)


def count_in(rate: float, duration_seconds: float, ramp_seconds: float) -> int:
    """Arrivals that fit into a stage, at least one."""
    ramp = min(ramp_seconds, duration_seconds)
    share_of_ramp = ramp / ramp_seconds if ramp_seconds else 1.0
    return max(1, round(rate * (share_of_ramp * ramp / 2 + duration_seconds - ramp)))


def replay(timestamps_seconds: Iterable[float]) -> list[float]:
    """The arrivals of a trace, from its first one on.

    Raises:
        ValueError: there are none, or one is no finite number.
    """
    times: Sequence[float] = sorted(timestamps_seconds)
    if not times or not all(math.isfinite(time) for time in times):
        raise ValueError("a trace needs timestamps, all of them finite")
    return [time - times[0] for time in times]
