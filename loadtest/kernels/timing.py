"""Medians of repeated calls, by the device's own clock where there is one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def median_seconds(call: Callable[[], object], repeats: int, warm_ups: int = 1) -> float:
    """Median time of a call, host work and device work together.

    Args:
        call: what to measure.
        repeats: measured calls.
        warm_ups: calls before them, which compile kernels.
    """
    for _ in range(warm_ups):
        call()
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            # From an idle device on, so that host time which the device waits for is counted.
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(float(begin.elapsed_time(end)) / 1e3)
        else:
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    return statistics.median(times)
