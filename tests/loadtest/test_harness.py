"""The whole command against a simulated server with known times, answers and faults."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from loadtest.load.http import Server
from loadtest.load.journal import KILLED, Journal, read_journal
from loadtest.load.plan import Session, Stage
from loadtest.load.run import run
from loadtest.load.scenario import Scenario
from loadtest.load.workloads.prompt import Prompt, Turn
from tests.loadtest.conftest import LoadTest, Simulated, scenario_of

OPEN: dict[str, Any] = {"loop": "open", "rates": [20], "requests": 40}
CLOSED: dict[str, Any] = {"loop": "closed", "concurrency": [8], "requests": 40}


def test_times_tokens_and_answers_are_the_servers(load_test: LoadTest, tmp_path: Path) -> None:
    methods = {
        "plain": {"ttft_seconds": 0.3, "tpot_seconds": 0.03},
        "quick": {"ttft_seconds": 0.1, "tpot_seconds": 0.01},
        "wrong": {"ttft_seconds": 0.3, "tpot_seconds": 0.03, "right": False},
    }
    finished = load_test(scenario_of(tmp_path, methods, {**OPEN, "requests": 90}))
    assert finished.code == 0, finished.output
    (stage,) = finished.report["summary"]["stages"]
    for name, behaviour in methods.items():
        one = stage["methods"][name]
        assert one["succeeded"] == one["requests"] == 30
        # Never quicker than the server; a machine that others use makes it slower.
        assert 0.99 < one["ttft_seconds"]["p50"] / behaviour["ttft_seconds"] < 2
        assert 0.99 < one["tpot_seconds"]["p50"] / behaviour["tpot_seconds"] < 2
        assert one["ttft_seconds"]["p99"] is None, "30 requests tell no p99"
    assert [stage["methods"][name]["score"]["mean"] for name in methods] == [1, 1, 0]
    assert {request["output_tokens"] for request in finished.requests} == {20}
    quick, wrong = finished.report["summary"]["comparisons"]
    assert quick["ttft_ratio"]["value"] == pytest.approx(1 / 3, abs=0.2)
    assert quick["ttft_ratio"]["interval"][1] < 0.7
    assert quick["score_difference"]["value"] == 0
    assert quick["same_text_share"] == 1
    assert (wrong["only_first_right"], wrong["only_second_right"], wrong["same_text_share"]) == (30, 0, 0)
    assert wrong["mcnemar_p"] < 1e-6
    for name in methods:
        assert name in finished.output
        assert name in finished.page


def test_pairs_differ_in_nothing_but_the_method(load_test: LoadTest, simulated: Simulated, tmp_path: Path) -> None:
    methods: dict[str, Any] = {"a": {}, "b": {"tpot_seconds": 0.001}, "c": {"tpot_seconds": 0.002}}
    finished = load_test(scenario_of(tmp_path, methods, {**OPEN, "requests": 60}, warm_up_rounds=0))
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for body in simulated.bodies:
        groups[body["messages"][0]["content"]].append(body)
    assert len(groups) == 20
    orders: Counter[tuple[str, ...]] = Counter()
    for bodies in groups.values():
        assert len({body.pop("cache_salt") for body in bodies}) == 3
        extras = [json.dumps(body.pop("vllm_xargs", {})) for body in bodies]
        assert len(set(extras)) == 3
        assert all(body == bodies[0] for body in bodies)
        orders[tuple(extras)] += 1
    assert len(orders) >= 3, "the order within a pair is drawn"
    salts = [entry["pair"] for entry in finished.report["stages"][0]["schedule"]]
    assert Counter(salts).most_common(1)[0][1] == 3


def test_an_open_loop_does_not_wait_for_a_slow_server(load_test: LoadTest, tmp_path: Path) -> None:
    """Latency counts from the intended time, and requests leave when they are due, whatever is still running."""
    finished = load_test(scenario_of(tmp_path, {"slow": {"ttft_seconds": 1.5}}, OPEN, warm_up_rounds=0))
    (stage,) = finished.report["stages"]
    lags = [request["sent_seconds"] - request["intended_seconds"] for request in stage["requests"]]
    assert statistics.median(lags) < 0.05
    spans = [request["intended_seconds"] for request in stage["requests"]]
    assert max(spans) - min(spans) == pytest.approx(2, abs=0.3)
    assert stage["client"]["peak_requests"] > 20
    due = sorted(entry["arrival_seconds"] for entry in stage["schedule"])
    assert [round(span - stage["start_seconds"], 1) for span in sorted(spans)] == pytest.approx(due, abs=0.15)


def test_the_rate_is_what_the_server_sustains(load_test: LoadTest, tmp_path: Path) -> None:
    """A share of the capacity: whatever the server's speed, it is neither idle nor overloaded, and the stage ends."""
    methods = {
        "quick": {"ttft_seconds": 0.1, "tpot_seconds": 0.01, "in_turn": True},
        "slow": {"ttft_seconds": 0.5, "tpot_seconds": 0.06, "in_turn": True},
    }
    load = {"loop": "open", "capacity_shares": [0.5], "requests": 60, "duration_seconds": 8}
    finished = load_test(scenario_of(tmp_path, methods, load, warm_up_rounds=2))
    assert finished.code == 0, finished.output
    stage = finished.report["stages"][-1]
    # Alone they take 0.1 + 19 x 0.01 and 0.5 + 19 x 0.06 seconds; on a busy machine more.
    rate = 0.5 / ((0.29 + 1.64) / 2)
    assert stage["level"] == 0.5
    assert stage["name"].startswith("0.5 of capacity (0.")
    arrivals = [entry["arrival_seconds"] for entry in stage["schedule"]]
    assert 0.4 < len(arrivals) / arrivals[-1] / rate < 1.5
    assert 2 <= len(arrivals) < 20, "it ends by its duration"
    pairs = Counter(entry["pair"] for entry in stage["schedule"])
    assert set(pairs.values()) == {2}, "no pair is torn apart"
    assert "by the warm-up: 0.5 of capacity" in finished.output


def test_a_closed_loop_keeps_so_many_running(load_test: LoadTest, tmp_path: Path) -> None:
    finished = load_test(scenario_of(tmp_path, {"plain": {}}, {**CLOSED, "concurrency": [5]}, warm_up_rounds=0))
    (stage,) = finished.report["stages"]
    assert stage["client"]["peak_requests"] == 5
    assert len(stage["requests"]) == 40


def test_a_sweep_ends_where_the_slo_breaks(load_test: LoadTest, tmp_path: Path) -> None:
    """Each method apart: one holds every level, one none."""
    load = {"loop": "closed", "concurrency": [1, 2, 3], "requests": 12, "methods_apart": True}
    methods = {"quick": {"ttft_seconds": 0.01}, "slow": {"ttft_seconds": 1.5}}
    settings = {"slo": {"ttft_seconds": 1.0, "tpot_seconds": 1}, "warm_up_rounds": 0}
    finished = load_test(scenario_of(tmp_path, methods, load, **settings))
    names = [stage["name"] for stage in finished.report["stages"]]
    assert names == ["quick, 1 at once", "quick, 2 at once", "quick, 3 at once", "slow, 1 at once"]
    assert finished.report["summary"]["kept_slo"] == {"quick": 3, "slow": None}
    (row,) = finished.report["summary"]["comparisons"]
    assert row["pairs"] == 12, "methods that run apart still get the same prompts"


FAULTS = {
    "http_429": {"fault": "429"},
    "http_500": {"fault": "500"},
    "garbage": {"fault": "garbage"},
    "stream_error": {"fault": "error"},
    "disconnected": {"fault": "cut"},
    "truncated": {"fault": "truncate"},
    "empty": {"fault": "empty", "fault_after": 0},
    "timeout_stream": {"fault": "stall"},
    "timeout_first_token": {"fault": "stall", "fault_after": 0},
}


def test_every_fault_is_told_apart(load_test: LoadTest, tmp_path: Path) -> None:
    methods = {"plain": {}, **FAULTS, "page": {"fault": "html"}}
    load = {**OPEN, "rates": [50], "requests": 44}
    finished = load_test(scenario_of(tmp_path, methods, load, request_timeout_seconds=3, warm_up_rounds=0))
    assert finished.code == 1, finished.output
    assert "40 requests failed" in finished.output
    (stage,) = finished.report["summary"]["stages"]
    assert stage["methods"].pop("plain")["failures"] == {}
    assert stage["methods"].pop("page")["failures"] == {"garbage": 4}
    assert {name: one["failures"] for name, one in stage["methods"].items()} == {name: {name: 4} for name in FAULTS}
    assert sum(finished.report["summary"]["failures"].values()) == 40
    for name in FAULTS:
        assert name.replace("_", " ") in finished.page
    assert "not now" in finished.page, "what the server said"
    assert "40 of 44 requests failed" in finished.output


def test_a_server_that_dies_in_the_middle(load_test: LoadTest, tmp_path: Path) -> None:
    workloads = [
        {"name": "first", "kind": "text", "methods": {"plain": 1}, "input_tokens": 10, "output_tokens": 5},
        {
            "name": "deadly",
            "kind": "text",
            "weight": 0.03,
            "methods": {"dies": 1},
            "input_tokens": 10,
            "output_tokens": 9,
        },
    ]
    methods = {"plain": {}, "dies": {"fault": "die"}}
    settings = {"workloads": workloads, "warm_up_rounds": 0, "seed": 3}
    finished = load_test(scenario_of(tmp_path, methods, {**OPEN, "requests": 150, "rates": [50]}, **settings))
    assert finished.code == 1, finished.output
    failures = finished.report["summary"]["failures"]
    assert failures["refused"] > 10
    assert failures["disconnected"] >= 1
    assert finished.report["summary"]["stages"][0]["methods"]["plain"]["succeeded"] > 3
    assert sum("error" in reading for reading in finished.report["metrics"]) > 0
    assert "refused" in finished.output
    assert "nobody listens there" in finished.page


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_reports_what_ran(load_test: LoadTest, tmp_path: Path, how: int) -> None:
    methods = {"plain": {}, "slow": {"ttft_seconds": 30}}
    load = {**OPEN, "requests": 2000}
    scenario = scenario_of(tmp_path, methods, load, warm_up_rounds=0)
    finished = load_test(scenario, interrupt_after_seconds=2, how=how)
    assert finished.code == 1, finished.output
    (stage,) = finished.report["stages"]
    statuses = Counter((request["method"], request["status"]) for request in stage["requests"])
    assert statuses["plain", "ok"] > 5
    assert statuses["slow", "interrupted"] > 5
    assert len(stage["schedule"]) == 2000
    assert finished.report["end"]["interrupted"]
    assert "The run was interrupted" in finished.output
    assert "The run was interrupted" in finished.page
    summary = finished.report["summary"]["stages"][0]
    assert summary["together"]["failures"] == {}, "an interruption is no failure of the server's"
    assert summary["left_out"] == statuses["slow", "interrupted"] + statuses["plain", "interrupted"]


def test_a_killed_run_leaves_its_journal(load_test: LoadTest, tmp_path: Path) -> None:
    scenario = scenario_of(tmp_path, {"plain": {}}, {**OPEN, "requests": 2000}, warm_up_rounds=0)
    finished = load_test(scenario, interrupt_after_seconds=1, how=signal.SIGKILL)
    assert not (finished.folder / "report.json").exists()
    journal = finished.folder / "journal.jsonl"
    journal.write_text(journal.read_text() + '{"kind": "requ')
    run = read_journal(journal)
    assert len(run["stages"][0]["requests"]) > 5
    assert run["end"] == KILLED


def test_metrics_come_along_and_missing_ones_are_named(load_test: LoadTest, tmp_path: Path) -> None:
    methods: dict[str, Any] = {"plain": {}, "sparse": {"sparse_prefill": "flexprefill"}}
    finished = load_test(scenario_of(tmp_path, methods, OPEN))
    (stage,) = finished.report["summary"]["stages"]
    assert stage["density"] == {"prefill/flexprefill": pytest.approx(0.25)}
    assert stage["fallback_share"] == {"prefill/flexprefill": pytest.approx(0.75)}
    assert "75% of the steps that asked for prefill/flexprefill ran dense" in finished.output
    assert "Missing from /metrics: Requests waiting, KV cache used" in finished.page
    assert "short context" in finished.page


def test_outputs_that_nobody_counted_have_no_tpot(load_test: LoadTest, tmp_path: Path) -> None:
    finished = load_test(scenario_of(tmp_path, {"plain": {"usage": False}}, OPEN))
    (stage,) = finished.report["summary"]["stages"]
    assert stage["methods"]["plain"]["tpot_seconds"]["count"] == 0
    assert "counted no output tokens" in finished.output


def test_a_thousand_streams(load_test: LoadTest, tmp_path: Path) -> None:
    """The client keeps up with 1,000 streams; what it costs is in the report."""
    load = {"loop": "closed", "concurrency": [1000], "requests": 1000, "ramp_seconds": 0.0}
    methods = {"plain": {"ttft_seconds": 8.0, "tpot_seconds": 0.5}}
    finished = load_test(scenario_of(tmp_path, methods, load, tokens=8, warm_up_rounds=0))
    assert finished.code == 0, finished.output
    (stage,) = finished.report["summary"]["stages"]
    assert stage["client"]["peak_requests"] == 1000
    assert stage["together"]["succeeded"] == 1000
    assert 0.49 < stage["together"]["tpot_seconds"]["p50"] < 1.5
    assert 0 < stage["client"]["cpu_share"] < 1.01
    assert "1000 requests at once" in finished.output


def test_nothing_follows_a_warm_up_that_failed(load_test: LoadTest, tmp_path: Path) -> None:
    finished = load_test(scenario_of(tmp_path, {"refused": {"fault": "500"}}, OPEN))
    assert finished.code == 1
    assert [stage["name"] for stage in finished.report["stages"]] == ["warm-up"]
    assert "Every request of the warm-up failed" in finished.output
    assert "not now" in finished.output


def test_turns_of_a_conversation_follow_one_another(load_test: LoadTest, simulated: Simulated, tmp_path: Path) -> None:
    workload = {"name": "talks", "kind": "documents", "input_tokens": 900, "turns": 3, "sessions_per_document": 2}
    settings = {"workloads": [{**workload, "think_seconds": 0.1, "distinct_prompts": 2}], "warm_up_rounds": 0}
    finished = load_test(scenario_of(tmp_path, {"plain": {}}, {**OPEN, "requests": 2}, **settings))
    bodies = sorted(simulated.bodies, key=lambda body: len(body["messages"]))
    assert [len(body["messages"]) for body in bodies] == [1, 1, 3, 3, 5, 5]
    assert len({body["cache_salt"] for body in bodies}) == 1, "sessions about one document share its blocks"
    first, other = (body["messages"][0]["content"].rpartition("\n\n") for body in bodies[:2])
    assert first[0] == other[0]
    assert first[2] != other[2]
    for body in bodies[4:]:
        assert [message["role"] for message in body["messages"]] == ["user", "assistant"] * 2 + ["user"]
        assert body["messages"][1]["content"].startswith("wrong")
    by_turn = sorted((request["session"], request["turn"], request) for request in finished.requests)
    for (_, _, before), (_, turn, after) in itertools.pairwise(by_turn):
        if turn:
            assert after["intended_seconds"] - before["end_seconds"] == pytest.approx(0.1, abs=0.02)


def test_an_error_of_the_harness_is_no_quiet_server(simulated: Simulated, tmp_path: Path) -> None:
    def broken(text: str) -> float:
        raise RuntimeError("the harness is wrong")

    scenario = Scenario.model_validate(scenario_of(tmp_path, {"plain": {}}, OPEN))
    prompt = Prompt("p", (Turn("hello", 3, score=broken),), 1)
    sessions = tuple(Session(prompt, "asked", "plain", f"p, time {number}", "salt") for number in range(20))
    stage = Stage("20/s", 20, ("plain",), sessions, tuple(0.05 * number for number in range(20)))
    nothing = Stage("warm-up", 1, ("plain",), (), None)
    wrong = pytest.raises(RuntimeError, match="the harness is wrong")
    with Server(simulated.url, {}) as server, Journal(tmp_path) as journal, wrong:
        asyncio.run(run(scenario, nothing, nothing, [[stage]], [], server, "simulated", journal))
