"""Seconds from stamps that every replay of a graph takes in some of its layers."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from tests import oracle
from tests.cuda_graph import captured
from tests.kernels.hopper import compile_for_hopper
from vllm_sparse.metrics import graph_timing
from vllm_sparse.metrics.graph_timing import GraphTimer
from vllm_sparse.metrics.timing import ASIDE, ATTENTION, SELECTION, ignore
from vllm_sparse.step.launch import LayerLaunches

DENSE = LayerLaunches(dense=True, writing_ahead=(), writing_here=(), reading=False)
SELECT = LayerLaunches(dense=True, writing_ahead=(0,), writing_here=(), reading=False)
READ = LayerLaunches(dense=False, writing_ahead=(), writing_here=(), reading=True)
MERGE = LayerLaunches(dense=True, writing_ahead=(), writing_here=(1,), reading=True)
# What is marked of each kind, and the milliseconds of each part.
PARTS: dict[LayerLaunches, list[tuple[str, float]]] = {
    DENSE: [(ASIDE, 70)],
    SELECT: [(ASIDE, 80), (SELECTION, 5)],
    READ: [(ASIDE, 30), (ATTENTION, 3)],
    MERGE: [(ASIDE, 90), (SELECTION, 7), (ATTENTION, 11), (SELECTION, 0.5)],
}
REPEATS = 5
LAYERS = [DENSE, DENSE, SELECT, READ, READ, SELECT, READ, MERGE]
ROWS = Counter({("decode", "tidal"): 3, ("decode", "blocktopk"): 1})


class Clock:
    """Nanoseconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1 << 60

    def perf_counter_ns(self) -> int:
        return self.now


def test_a_layer_counts_for_all_that_launch_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(graph_timing, "time", clock)
    timer = GraphTimer(dict(enumerate(LAYERS)), torch.device("cpu"))
    timed = []
    # Graphs of other sizes are captured before.
    for slower in (2, 1):
        for layer, kind in enumerate(LAYERS):
            mark = timer.marks(layer, [])
            if mark is not ignore:
                timed.append(kind)
            for part, milliseconds in PARTS[kind]:
                clock.now += int(milliseconds * 1e6 * slower)
                mark(part)
    assert Counter(timed) == {SELECT: 2, READ: 2, MERGE: 2}
    seconds = timer.seconds_by_rows(timer.stamps.numpy(), ROWS)
    selection, attention = (2 * 5 + 7.5) / 1e3, (3 * 3 + 11) / 1e3
    assert seconds["decode", "tidal"] == pytest.approx((selection * 0.75, attention * 0.75))
    assert seconds["decode", "blocktopk"] == pytest.approx((selection * 0.25, attention * 0.25))


def test_the_first_layer_has_room_for_all_its_marks() -> None:
    timer = GraphTimer({0: MERGE}, torch.device("cpu"))
    mark = timer.marks(0, [])
    for part in (ASIDE, SELECTION, ASIDE, SELECTION, ATTENTION, SELECTION):
        mark(part)
    assert (np.diff(timer.stamps.numpy()[0]) > 0).all()


def test_the_stamp_compiles_for_hopper() -> None:
    """And reads the clock anew whenever it runs."""
    pytest.importorskip("triton")
    from vllm_sparse.kernels.device_clock.triton import stamp_kernel

    compiled = compile_for_hopper(stamp_kernel, {"time_pointer": "*i64"}, {"CLOCK": "nvidia"}, num_warps=1)
    assert re.search(r"mov\.u64 \S+, %globaltimer;", compiled.asm["ptx"])


@oracle.needs_cuda
def test_stamps_of_replays_are_device_time() -> None:
    """Kernels of known lengths, timed by events outside of a graph; others on the device can only make them longer."""
    short_cycles, long_cycles = 400_000, 1_200_000
    sleep: Any = torch.cuda._sleep

    def event_seconds(cycles: int) -> float:
        seconds = []
        for _ in range(REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            sleep(cycles)
            end.record()
            end.synchronize()
            seconds.append(float(begin.elapsed_time(end)) / 1e3)
        return min(seconds)

    timer = GraphTimer(dict(enumerate((READ, SELECT, READ))), torch.device("cuda"))

    def step() -> None:
        for layer in range(3):
            mark = timer.marks(layer, [])
            mark(ASIDE)
            sleep(short_cycles if layer == 1 else long_cycles)
            mark(SELECTION if layer == 1 else ATTENTION)

    replay = captured(step)
    before = timer.stamps.cpu()
    found = []
    for _ in range(REPEATS):
        replay()
        stamps = timer.stamps.cpu()
        assert bool((stamps[:, :2] > before[:, :2]).all()), "each replay takes stamps"
        assert not bool(stamps[:, 2:].any())
        before = stamps
        found.append(timer.seconds_by_rows(stamps.numpy(), Counter({("decode", "tidal"): 2}))["decode", "tidal"])
    selection, attention = (min(seconds) for seconds in zip(*found, strict=True))
    assert selection == pytest.approx(event_seconds(short_cycles), rel=0.05)
    assert attention == pytest.approx(2 * event_seconds(long_cycles), rel=0.05)
