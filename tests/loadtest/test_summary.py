"""What requests add up to, against a count by hand."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from loadtest.load.journal import KILLED
from loadtest.load.measures import counted, good_share
from loadtest.load.report.chart import ticks
from loadtest.load.report.summary import (
    by_length,
    compare_methods,
    describe,
    length_label,
    summarise,
)
from loadtest.load.scenario import Scenario, Slo

SLO = Slo(ttft_seconds=0.5, ttft_seconds_per_1000_tokens=0.1, tpot_seconds=0.05)


def request(**changes: Any) -> dict[str, Any]:
    """A good request."""
    content: dict[str, Any] = {
        "stage": "1/s",
        "session": 0,
        "turn": 0,
        "workload": "w",
        "method": "dense",
        "pair": "w/0, time 0",
        "intended_seconds": 1.0,
        "ramp": False,
        "planned_input_tokens": 1000,
        "score": 1.0,
        "sent_seconds": 1.1,
        "status": "ok",
        "detail": "",
        "first_token_seconds": 1.5,
        "last_token_seconds": 1.9,
        "end_seconds": 2.0,
        "first_tokens": 1,
        "counted_by": "usage",
        "gaps_milliseconds": [40.0] * 10,
        "input_tokens": 1000,
        "output_tokens": 11,
        "cached_tokens": 0,
        "text": "yes",
        "finish_reason": "stop",
    }
    assert changes.keys() <= content.keys()
    return content | changes


def test_times_count_from_the_intended_time() -> None:
    one = describe([request()] * 10, SLO, 2.0)
    assert one["ttft_seconds"]["p50"] == pytest.approx(0.5)
    assert one["ttft_from_send_seconds"]["p50"] == pytest.approx(0.4)
    assert one["tpot_seconds"]["p50"] == pytest.approx(0.04)
    assert one["latency_seconds"]["p50"] == pytest.approx(0.9)
    assert one["gap_seconds"]["p50"] == pytest.approx(0.04)
    assert one["output_tokens_per_second"] == pytest.approx(55)
    assert one["input_tokens_per_second"] == pytest.approx(5000)
    assert one["goodput_per_second"] == pytest.approx(5)
    assert one["goodput_tokens_per_second"] == pytest.approx(55)


@pytest.mark.parametrize(
    ("changes", "good"),
    [
        ({}, True),
        ({"first_token_seconds": 1.59, "last_token_seconds": 1.9}, True),
        ({"first_token_seconds": 1.61, "last_token_seconds": 1.9}, False),
        ({"first_token_seconds": 1.61, "input_tokens": 2000}, True),
        ({"first_token_seconds": 1.61, "input_tokens": None, "planned_input_tokens": 2000}, True),
        ({"last_token_seconds": 2.01}, False),
        ({"last_token_seconds": 2.01, "output_tokens": 12}, True),
        ({"last_token_seconds": 9.0, "output_tokens": 1}, True),
        ({"intended_seconds": 0.8}, False),
        ({"gaps_milliseconds": [40.0] * 9 + [61.0]}, False),
        ({"gaps_milliseconds": [40.0] * 199 + [61.0]}, True),
        ({"first_token_seconds": 1.2, "last_token_seconds": 1.2}, True),
        ({"last_token_seconds": 2.25, "output_tokens": 99}, False),
        ({"status": "truncated"}, False),
        ({"status": "http_429", "first_token_seconds": None, "last_token_seconds": None}, False),
    ],
)
def test_a_request_is_good_within_both_limits(changes: dict[str, Any], good: bool) -> None:
    limits = SLO.model_copy(update={"gap_p99_seconds": 0.06, "latency_seconds": 1.2})
    if changes.get("last_token_seconds") == 9.0:
        limits = SLO
    assert good_share([request(**changes)], limits) == good


def test_goodput_by_hand(generator: torch.Generator) -> None:
    rng = random.Random(int(torch.randint(1 << 30, (1,), generator=generator)))
    requests = []
    for _ in range(300):
        first = 1 + rng.random()
        last = first + rng.random()
        status = rng.choice(["ok", "ok", "ok", "http_500"])
        changes = {"input_tokens": rng.randint(1, 4000), "output_tokens": rng.randint(1, 20), "status": status}
        requests.append(
            request(
                first_token_seconds=first, last_token_seconds=last, score=rng.choice([0.0, 0.5, 1.0, None]), **changes
            )
        )
    good = []
    for one in requests:
        limit = 0.5 + 0.0001 * one["input_tokens"]
        pace = (one["last_token_seconds"] - one["first_token_seconds"]) / max(1, one["output_tokens"] - 1)
        in_time = one["first_token_seconds"] - 1 <= limit and (one["output_tokens"] < 2 or pace <= 0.05)
        if one["status"] == "ok" and in_time:
            good.append(one)
    found = describe(requests, SLO, 7.0)
    assert 0 < len(good) < 300
    assert found["goodput_per_second"] == pytest.approx(len(good) / 7)
    assert found["good_share"] == pytest.approx(len(good) / 300)
    assert found["right_goodput_per_second"] == pytest.approx(sum(one["score"] == 1 for one in good) / 7)
    assert found["failures"] == {"http_500": sum(one["status"] != "ok" for one in requests)}


def test_tokens_that_come_at_once_tell_no_pace_to_compare() -> None:
    at_once = request(last_token_seconds=1.5, gaps_milliseconds=[])
    assert describe([at_once], SLO, 1.0)["tpot_seconds"]["mean"] == 0
    assert good_share([at_once], SLO) == 1
    assert compare_methods([at_once], [request()])["tpot_ratio"]["value"] is None


def test_ramp_and_interruptions_do_not_count() -> None:
    requests = [request(), request(ramp=True), request(status="interrupted"), request(status="refused")]
    assert [one["status"] for one in counted(requests)] == ["ok", "refused"]


def test_repetitions_of_a_prompt_are_one_cluster() -> None:
    first = [request(pair=f"w/{prompt}, time {time}") for prompt in range(6) for time in range(5)]
    second = [
        one | {"score": float(one["pair"][2] != "0"), "text": one["pair"], "first_token_seconds": 1.25} for one in first
    ]
    found = compare_methods(first, second)
    assert found["pairs"] == 30
    assert found["score_difference"]["value"] == pytest.approx(-1 / 6)
    assert found["score_difference"]["interval"] == pytest.approx((-0.5, 0)), "six prompts, not thirty"
    assert found["ttft_ratio"]["value"] == pytest.approx(0.5)
    assert (found["only_first_right"], found["only_second_right"]) == (5, 0)
    assert found["same_text_share"] == 0
    assert compare_methods(first, [*second[:4], second[4] | {"status": "empty"}])["pairs"] == 4


def test_lengths_are_doublings() -> None:
    assert [length_label(tokens) for tokens in (1, 700, 4096, 4097, 8192)] == [
        "1-2",
        "512-1K",
        "2K-4K",
        "4K-8K",
        "4K-8K",
    ]
    found = by_length([request(input_tokens=tokens) for tokens in (9000, 100, 120)])
    assert [(label, len(some)) for label, some in found.items()] == [("64-128", 2), ("8K-16K", 1)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 0, [0, 0.2]), (0, 87, [0, 20, 40, 60, 80, 100]), (3, 3, [2, 4])],
)
def test_ticks_cover_the_range(low: float, high: float, expected: list[float]) -> None:
    found = ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert len(found) >= 2
    if (low, high) in ((0, 1), (0, 87)):
        assert found == pytest.approx(expected)


def drift_of(ttfts: list[float]) -> float | None:
    """The drift of requests one second apart, half of them of another length."""
    scenario = Scenario.model_validate(
        {
            "description": "test",
            "methods": {"dense": {}},
            "workloads": [{"name": "w", "kind": "needle", "input_tokens": 1000}],
            "load": {"loop": "open", "rates": [1], "requests": len(ttfts)},
            "slo": {"ttft_seconds": 1, "tpot_seconds": 1},
        }
    )
    requests = [
        request(
            intended_seconds=float(number),
            sent_seconds=float(number),
            first_token_seconds=number + ttft,
            last_token_seconds=number + ttft + 1,
            end_seconds=number + ttft + 1,
            input_tokens=1000 * (1 + (number >= len(ttfts) / 2)),
            pair=f"w/{number}, time 0",
        )
        for number, ttft in enumerate(ttfts)
    ]
    stage = {
        "name": "1/s",
        "level": 1.0,
        "methods": ["dense"],
        "start_seconds": 0.0,
        "schedule": [{"arrival_seconds": float(number), "turns": 1} for number in range(len(ttfts))],
        "requests": requests,
        "client": None,
        "stopped": None,
    }
    run = {
        "run": {"scenario": scenario.model_dump(mode="json")},
        "stages": [stage],
        "refused": [],
        "metrics": [],
        "end": KILLED,
    }
    drift: float | None = summarise(run)["stages"][0]["drift"]
    return drift


def test_a_run_that_slows_down_is_no_steady_state() -> None:
    assert drift_of([0.1] * 20 + [0.4] * 20) == pytest.approx(1), "other lengths are no drift"
    assert drift_of([0.1] * 10 + [0.2] * 10 + [0.4] * 10 + [0.8] * 10) == pytest.approx(2, rel=0.01)
    assert drift_of([0.1] * 20) is None, "too few"
