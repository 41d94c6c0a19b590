"""Arrivals: the patterns are what they are called, and the mean rate is met exactly."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loadtest.load.arrivals import Process, arrivals, count_in, replay


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in zip([0.0, *times], times, strict=False)]


def rng_of(generator: torch.Generator) -> random.Random:
    return random.Random(int(torch.randint(1 << 30, (1,), generator=generator)))


@pytest.mark.parametrize(
    ("process", "burstiness"), [("poisson", 1.0), ("gamma", 0.25), ("gamma", 4.0), ("constant", 1.0)]
)
def test_intervals_vary_as_they_should(process: Process, burstiness: float, generator: torch.Generator) -> None:
    times = arrivals(process, 5.0, 20_000, rng_of(generator), burstiness=burstiness)
    assert times[-1] == pytest.approx(20_000 / 5)
    found = gaps(times)
    variation = statistics.pstdev(found) / statistics.mean(found)
    expected = 0 if process == "constant" else burstiness**-0.5
    assert variation == pytest.approx(expected, abs=0.05 * max(1, expected))


def test_poisson_intervals_are_exponential(generator: torch.Generator) -> None:
    """Kolmogorov-Smirnov: the distribution is nowhere further off than chance allows (1 in a million)."""
    found = sorted(gaps(arrivals("poisson", 2.0, 5000, rng_of(generator))))
    off = max(abs((number + 1) / len(found) - (1 - math.exp(-2 * gap))) for number, gap in enumerate(found))
    assert off < math.sqrt(math.log(2e6) / 2 / len(found))


def test_counts_of_poisson_windows_vary_as_their_mean(generator: torch.Generator) -> None:
    counts = [0] * 2000
    for time in arrivals("poisson", 10.0, 20_000, rng_of(generator)):
        counts[min(int(time), 1999)] += 1
    assert statistics.pvariance(counts) / statistics.mean(counts) == pytest.approx(1, abs=0.2)


@given(
    rate=st.floats(0.1, 100),
    count=st.integers(1, 300),
    ramp=st.floats(0, 30),
    process=st.sampled_from(["poisson", "gamma", "constant"]),
)
def test_a_ramp_grows_evenly(rate: float, count: int, ramp: float, process: Process) -> None:
    times = arrivals(process, rate, count, random.Random(1), burstiness=0.5, ramp_seconds=ramp)
    assert times == sorted(times)
    assert times[0] >= 0
    # Where the integral of the rate reaches the number of requests.
    end = times[-1]
    expected = rate * end * end / 2 / ramp if end < ramp else rate * (end - ramp / 2)
    assert expected == pytest.approx(count, rel=1e-6)


@given(rate=st.floats(0.1, 100), duration=st.floats(1, 500), ramp=st.floats(0, 600))
def test_a_duration_holds_its_arrivals(rate: float, duration: float, ramp: float) -> None:
    count = count_in(rate, duration, ramp)
    last = arrivals("constant", rate, count, random.Random(0), ramp_seconds=ramp)[-1]
    if count > 1:
        assert last <= duration + 1 / rate + 1e-6 or last <= ramp
        later = arrivals("constant", rate, count + 1, random.Random(0), ramp_seconds=ramp)[-1]
        assert later > duration - 1e-6


def test_a_trace_keeps_its_pace() -> None:
    assert replay([105.0, 100.0, 100.5]) == [0.0, 0.5, 5.0]
    with pytest.raises(ValueError, match="needs timestamps"):
        replay([])
    with pytest.raises(ValueError, match="finite"):
        replay([1.0, math.nan])
