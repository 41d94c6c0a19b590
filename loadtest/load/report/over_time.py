"""How a run went on: medians of windows of time, and requests in flight."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

from loadtest.load.measures import Request
from loadtest.load.report.chart import Point


def medians(
    requests: Sequence[Request],
    measure: Callable[[Request], float | None],
    unit: float,
    origin_seconds: float,
    window_seconds: float,
) -> list[Point]:
    """The median of a measure in each window of time that has any, at the mean time of what it holds.

    Args:
        requests: in any order; those that failed do not count.
        measure: of a request, which belongs to the window of its intended time.
        unit: that the values are divided by.
        origin_seconds: where the first window begins.
        window_seconds: length of each.
    """
    found: dict[int, list[Point]] = defaultdict(list)
    for one in requests:
        if one["status"] == "ok" and (value := measure(one)) is not None:
            time = one["intended_seconds"]
            found[int((time - origin_seconds) // window_seconds)].append((time, value / unit))
    return [
        (statistics.fmean(time for time, _ in some), statistics.median(value for _, value in some))
        for _, some in sorted(found.items())
    ]


def in_flight(requests: Sequence[Request]) -> list[Point]:
    """Requests that ran, as the points of a step line over time."""
    changes = sorted([(one["sent_seconds"], 1) for one in requests] + [(one["end_seconds"], -1) for one in requests])
    points: list[Point] = []
    running = 0
    for time, change in changes:
        points += [(time, running), (time, running + change)]
        running += change
    return points
