"""Medians of repeated calls, by the device's own clock where there is one.

On a GPU the host has a head start, as in a server, where it enqueues a layer while the device computes those before it.
A call that waits for the device loses it and is charged for its host time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

# About 5 ms, the time that an 8B model's linear layers take for 8192 tokens between two attention layers.
HEAD_START_CYCLES = 10_000_000


def median_seconds(call: Callable[[], object], repeats: int, warm_ups: int = 1) -> float:
    """Median time of a call.

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
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda._sleep(HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
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
