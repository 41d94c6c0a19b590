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
# In a graph; about the layers of a model. A method that searches anew only every few steps does so several times.
GRAPH_CALLS = 32
# More than the L2 cache of any GPU holds so far.
EVICTED_BYTES = 1 << 28


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


def mean_seconds(call: Callable[[], object], calls: int) -> float:
    """Mean time of consecutive calls after a first one, the host's part included; calls need not do the same."""
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / calls


def graph_seconds(call: Callable[[], object], repeats: int) -> float:
    """Device time of a call inside a CUDA graph, mean over consecutive calls, median over replays.

    Before each call the graph reads a large buffer, since in a model the weights between two attention layers leave
    nothing of the cache's data in L2; the time of the same graph without the calls is taken off.

    Args:
        call: what to measure; it must be capturable.
        repeats: measured replays.
    """
    buffer = torch.ones(EVICTED_BYTES // 4, device="cuda")
    both = median_seconds(capture([buffer.sum, call]).replay, repeats)
    alone = median_seconds(capture([buffer.sum]).replay, repeats)
    return (both - alone) / GRAPH_CALLS


def capture(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph that does the calls one after the other, `GRAPH_CALLS` times."""
    # Kernels compile and libraries allocate outside the capture.
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            for call in calls:
                call()
    return graph
