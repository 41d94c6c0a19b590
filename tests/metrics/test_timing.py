"""Shares of a step's time, by a clock that the test moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_sparse.metrics import timing
from vllm_sparse.metrics.timing import ASIDE, ATTENTION, NO_TIMER, SELECTION, StepTimer
from vllm_sparse.step.launch import Executor, Launch

LAUNCH = Launch(torch.zeros(1), 1, torch.zeros(1), torch.zeros(1), 1)


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Slow(Executor):
    """An executor that takes three seconds."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def run(self, launch: Launch, query: Any, output: Any, kv_cache: Any, scale: float) -> None:
        self.clock.now += 3


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    moved = Clock()
    monkeypatch.setattr(timing, "time", moved)
    return moved


def test_parts_and_shares(clock: Clock) -> None:
    timer = StepTimer(False, [("prefill", "dhsa"), ("decode", "tidal"), ("decode", "tidal"), ("decode", "hip")])
    nothing = torch.zeros(1)
    with timer.serving("prefill", ["dhsa"]):
        clock.now += 2
        timer.executor(Slow(clock)).run(LAUNCH, nothing, nothing, nothing, 1.0)
        clock.now += 0.5
    clock.now += 100

    mark = timer.marks(3, ["tidal", "tidal", "hip"])
    for part, passed in ((ASIDE, 100), (SELECTION, 4), (ASIDE, 50), (SELECTION, 1.5), (ATTENTION, 3), (SELECTION, 0.5)):
        clock.now += passed
        mark(part)
    seconds = timer.seconds()
    assert seconds["prefill", "dhsa"] == pytest.approx((2.5, 3))
    assert seconds["decode", "tidal"] == pytest.approx((4, 2))
    assert seconds["decode", "hip"] == pytest.approx((2, 1))
    assert timer.rows["decode", "tidal"] == 2


def test_steps_that_are_not_sampled_are_left_alone(clock: Clock) -> None:
    executor = Slow(clock)
    assert NO_TIMER.executor(executor) is executor
    with NO_TIMER.serving("prefill", ["dhsa"]):
        clock.now += 1
    assert not NO_TIMER.seconds()
