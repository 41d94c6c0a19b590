"""Statistics against brute force."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loadtest.load.report.statistics import (
    confidence_of_each,
    corrected,
    dependence,
    difference,
    independent_difference,
    independent_ratio,
    interval_of_mean,
    interval_of_median,
    interval_of_percentile,
    mcnemar,
    percentiles,
    ratio,
    samples_needed,
)


def percentile_by_hand(values: list[float], percentile: float) -> float:
    ordered = sorted(values)
    place = (len(ordered) - 1) * percentile / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=700))
def test_percentiles_are_those_of_the_sorted_values(values: list[float]) -> None:
    found = percentiles(values)
    assert found["count"] == len(values)
    for percentile in (50, 90, 95, 99, 99.9):
        value = found[f"p{percentile:g}"]
        if len(values) * (100 - percentile) / 100 < 5 - 1e-9:
            assert value is None, "fewer than five values lie beyond it"
        else:
            assert value == pytest.approx(percentile_by_hand(values, percentile), rel=1e-9, abs=1e-9)


def test_percentiles_need_samples_beyond_them() -> None:
    assert [samples_needed(percentile) for percentile in (50, 90, 95, 99, 99.9)] == [10, 50, 100, 500, 5000]
    nothing = dict.fromkeys(("p50", "p90", "p95", "p99", "p99.9"))
    assert percentiles([]) == {"count": 0, "mean": None, **nothing, "intervals": nothing}
    assert percentiles([1.0] * 499)["p99"] is None
    assert percentiles([1.0] * 500)["p99"] == 1


@given(st.integers(0, 9), st.integers(0, 9))
def test_mcnemar_counts_all_ways_to_split(first: int, second: int) -> None:
    total = first + second
    ways = [sum(split) for split in itertools.product((0, 1), repeat=min(total, 18))]
    extreme = abs(first - second)
    expected = sum(abs(total - 2 * way) >= extreme for way in ways) / len(ways)
    assert mcnemar(first, second) == pytest.approx(expected)


def test_an_interval_covers_the_truth_as_often_as_it_says(generator: torch.Generator) -> None:
    """With clusters of equal values: drawn one by one they would seem four times as many."""
    rng = random.Random(int(torch.randint(1 << 30, (1,), generator=generator)))
    covered = 0
    for _ in range(200):
        clusters = [[rng.gauss(3, 1)] * 4 for _ in range(40)]
        interval = interval_of_mean(clusters)
        assert interval is not None
        covered += interval[0] <= 3 <= interval[1]
    assert 170 <= covered <= 200


def test_there_is_no_interval_without_enough_prompts_or_without_spread() -> None:
    assert interval_of_mean([[0.0], [1.0]] * 3) is not None
    assert interval_of_mean([[0.0], [1.0], [0.0], [1.0], [0.0]]) is None
    assert interval_of_mean([[0.1, 0.2]] * 40) is None
    first = {str(number): [0.1] for number in range(40)}
    assert difference(first, first)["interval"] is None
    assert independent_difference(first, first)["interval"] is None


def test_pairs_are_compared_prompt_by_prompt(generator: torch.Generator) -> None:
    rng = random.Random(int(torch.randint(1 << 30, (1,), generator=generator)))
    first = {f"{number}": [math.exp(rng.gauss(0, 2))] for number in range(50)}
    second = {name: [0.5 * values[0] * math.exp(rng.gauss(0, 0.01))] for name, values in first.items()}
    found = ratio(first, second)
    assert found["pairs"] == 50
    assert found["value"] == pytest.approx(0.5, rel=0.02)
    low, high = found["interval"]
    assert 0.49 < low < high < 0.51
    apart = independent_ratio(first, second)
    assert apart["value"] == pytest.approx(found["value"])
    assert apart["interval"][0] < 0.4 < 0.6 < apart["interval"][1], "the prompts differ far more than the methods"


def test_differences_leave_out_what_has_no_partner() -> None:
    first = {"a": [1.0, 0.0], "b": [1.0], "c": [1.0]}
    second = {"a": [0.0, 0.0], "b": [1.0, 1.0], "d": [1.0]}
    assert difference(first, second) == {"pairs": 2, "value": -0.5, "interval": None}
    assert difference(first, {}) == {"pairs": 0, "value": None, "interval": None}
    assert independent_difference(first, {})["value"] is None
    assert independent_difference(first, second)["value"] == pytest.approx(0.6 - 0.75)


@pytest.mark.parametrize("count", [*range(6, 40), 200])
def test_the_interval_of_a_median_is_the_narrowest_that_holds_it_in_95_of_100_cases(count: int) -> None:
    values = [float(value) for value in random.sample(range(1000), count)]
    found = interval_of_median(values)
    assert found is not None
    low, high = map(sorted(values).index, found)
    assert low == count - 1 - high, "as many values below as above"

    def held(low: int) -> float:
        # The true median has `below` values below it, each with probability one half.
        return sum(math.comb(count, below) / 2.0**count for below in range(low + 1, count - low))

    assert held(low) >= 0.95
    assert held(low + 1) < 0.95


def test_too_few_values_have_no_interval_of_their_median() -> None:
    assert [interval_of_median([1.0] * count) for count in range(6)] == [None] * 6


def queue(rng: random.Random, count: int, memory: float) -> list[float]:
    """Normal values of deviation 1, of which each keeps `memory` of the one before."""
    values = [rng.gauss(0, 1)]
    while len(values) < count:
        values.append(memory * values[-1] + math.sqrt(1 - memory**2) * rng.gauss(0, 1))
    return values


@pytest.mark.parametrize("memory", [0.0, 0.8])
@pytest.mark.parametrize(("percentile", "truth"), [(50, 0.0), (95, 1.6449)])
def test_the_interval_of_a_percentile_covers_it_in_a_queue_too(
    generator: torch.Generator, memory: float, percentile: float, truth: float
) -> None:
    rng = random.Random(int(torch.randint(1 << 30, (1,), generator=generator)))
    covered, widths = 0, []
    for _ in range(200):
        # Where values depend so much on one another that they do not reach so far, there is none.
        interval = interval_of_percentile(queue(rng, 600, memory), percentile)
        if interval is not None:
            covered += interval[0] <= truth <= interval[1]
            widths.append(interval[1] - interval[0])
    assert len(widths) >= 180
    assert covered >= 0.86 * len(widths)
    # The standard error of the median is 1.25 / sqrt(n), of p95 2.11 / sqrt(n), and an interval has four of them.
    factor = math.sqrt((1 + memory) / (1 - memory))
    expected = 4 * (1.25 if percentile == 50 else 2.11) / math.sqrt(600)
    assert sum(widths) / len(widths) < 1.4 * factor * expected


def test_the_interval_of_a_mean_covers_it_in_a_queue_too(generator: torch.Generator) -> None:
    """Prompt by prompt it would cover six times in ten."""
    rng = random.Random(int(torch.randint(1 << 30, (1,), generator=generator)))
    covered = known = 0
    for _ in range(100):
        interval = interval_of_mean([[value] for value in queue(rng, 300, 0.7)])
        known += interval is not None
        covered += interval is not None and interval[0] <= 0 <= interval[1]
    assert known >= 60
    assert covered >= 0.76 * known
    assert interval_of_mean([[float(value)] for value in range(40)]) is None, "one slope is no six blocks"


def test_an_interval_that_the_values_do_not_reach_is_none() -> None:
    assert interval_of_percentile([float(value) for value in range(100)], 99) is None
    assert interval_of_percentile([1.0] * 5, 50) is None


def test_dependence_is_the_time_of_correlation(generator: torch.Generator) -> None:
    rng = random.Random(int(torch.randint(1 << 30, (1,), generator=generator)))
    assert dependence(queue(rng, 5000, 0.0)) < 1.2
    assert dependence(queue(rng, 20000, 0.8)) == pytest.approx(9, rel=0.3)
    assert dependence([1.0] * 20) == dependence([]) == 1


def test_many_comparisons_are_corrected() -> None:
    rng = random.Random(1)
    assert corrected([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06)]
    assert corrected([0.9, 0.8]) == [1.0, 1.0]
    assert confidence_of_each(1) == pytest.approx(0.95)
    assert confidence_of_each(5) == pytest.approx(0.99)
    clusters = [[rng.random()] for _ in range(30)]
    one, many = (interval_of_mean(clusters, confidence_of_each(count)) for count in (1, 20))
    assert one is not None
    assert many is not None
    assert many[0] < one[0] < one[1] < many[1]
