"""The search for the highest load, stages that are broken off, and what is seen meanwhile."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from loadtest.load import command
from loadtest.load.progress import Progress
from loadtest.load.search import Search
from tests.loadtest.conftest import LoadTest, Simulated, scenario_of, tables_of

OPEN: dict[str, Any] = {"loop": "open", "rates": [40], "requests": 60}


@given(
    truth=st.floats(0.01, 1000),
    first=st.floats(0.05, 50),
    factor=st.floats(1.2, 3),
    refinements=st.integers(0, 6),
)
def test_the_search_closes_in_on_the_highest_rate(truth: float, first: float, factor: float, refinements: int) -> None:
    search = Search(first, factor, refinements, most=200)
    tried = []
    while (rate := search.next_rate()) is not None:
        tried.append(rate)
        search.tell(rate, rate <= truth)
    assert search.holds is not None
    assert search.breaks is not None
    assert search.holds <= truth < search.breaks
    assert search.breaks / search.holds <= factor ** (1 / 2**refinements) * (1 + 1e-9)
    assert len(tried) <= 2 + abs(math.log(truth / first, factor)) + refinements + 1


def test_the_search_ends_with_its_last_stage() -> None:
    search = Search(1.0, 2.0, 5, most=3)
    for expected in (1.0, 2.0, 4.0):
        assert search.next_rate() == expected
        search.tell(expected, held=True)
    assert search.next_rate() is None
    assert search.breaks is None


def test_each_methods_highest_rate_is_found(load_test: LoadTest, tmp_path: Path) -> None:
    """A server that does one thing at a time sustains the inverse of how long that takes."""
    methods = {
        "quick": {"ttft_seconds": 0.05, "tpot_seconds": 0.0, "in_turn": True},
        "slow": {"ttft_seconds": 0.15, "tpot_seconds": 0.0, "in_turn": True},
    }
    load = {"loop": "open", "arrivals": "constant", "requests": 40, "methods_apart": True}
    load["search"] = {"first_share": 0.6, "factor": 1.8, "refinements": 1, "most_stages": 6, "stage_seconds": 2}
    settings = {"slo": {"ttft_seconds": 0.4, "tpot_seconds": 1}, "tokens": 3, "warm_up_rounds": 2}
    finished = load_test(scenario_of(tmp_path, methods, load, **settings))
    assert finished.code == 0, finished.output
    found = finished.report["summary"]["saturation"]
    for name, one in found.items():
        sustained = 1 / methods[name]["ttft_seconds"]
        assert 0.3 * sustained < one["level"] < 1.2 * sustained
        assert one["level"] < one["breaks"] < 2.5 * sustained
        assert one["goodput_per_second"] == pytest.approx(one["level"], rel=0.35)
        assert one["peak_goodput"] >= one["goodput_per_second"]
    assert found["quick"]["level"] > 1.5 * found["slow"]["level"]
    assert "holds the SLO" in finished.output
    (held,) = [table for table in tables_of(finished.page) if table[0][1].startswith("holds the SLO")]
    sustained = finished.report["summary"]["sustained"]
    for row, (name, one) in zip(held[1:], found.items(), strict=True):
        assert row[:3] == [name, f"{one['level']:g}", f"{one['breaks']:g}"]
        assert sustained[name] == pytest.approx(one["level"], rel=1e-3), "what was due a second"


def test_a_rate_lasts_long_enough_for_a_queue(load_test: LoadTest, tmp_path: Path) -> None:
    load = {"loop": "open", "requests": 4, "search": {"first_share": 1, "most_stages": 1, "stage_seconds": 1.5}}
    finished = load_test(scenario_of(tmp_path, {"one": {"ttft_seconds": 0.1}}, load, tokens=2))
    assert finished.code == 0, finished.output
    stage = finished.report["stages"][-1]
    assert len(stage["schedule"]) == pytest.approx(1.5 * stage["level"], abs=1)
    assert len({entry["prompt_digest"] for entry in stage["schedule"]}) == 4, "prompts repeat"
    assert "where the SLO still held: it sustains more" in finished.output


@pytest.mark.parametrize(
    ("behaviour", "stop", "said"),
    [
        ({"fault": "500"}, {"after_requests": 10}, "10 of the first 10 requests failed"),
        ({"ttft_seconds": 60}, {"in_flight": 7}, "8 requests were in flight"),
    ],
)
def test_a_useless_stage_is_broken_off(
    load_test: LoadTest, tmp_path: Path, behaviour: dict[str, Any], stop: dict[str, Any], said: str
) -> None:
    load = {**OPEN, "rates": [20, 21], "requests": 400}
    finished = load_test(scenario_of(tmp_path, {"one": behaviour}, load, stop=stop, warm_up_rounds=0, fail_on=[]))
    assert finished.code == 1
    assert f"FAILED: 20/s was stopped: {said}." in finished.output
    (stage,) = finished.report["stages"]
    assert len(stage["requests"]) < 60
    assert not finished.report["end"]["interrupted"]


def test_progress_tells_what_runs() -> None:
    now = [0.0]
    out = io.StringIO()
    progress = Progress(lambda: now[0], out)
    progress.begin("2/s", 30)
    for _ in range(12):
        progress.sent()
    for number in range(9):
        now[0] += 0.5
        progress.ended(failed=number == 3)
    assert progress.line() == "2/s: 9 requests ended, 1 failed (30 sessions), 3 in flight, 2.2/s"
    now[0] += 60
    assert progress.line().endswith("3 in flight"), "nothing ended lately"
    progress.end()
    assert out.getvalue() == "2/s: 9 requests ended, 1 failed (30 sessions)\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar() -> None:
    progress = Progress(lambda: 0.0, Terminal())
    progress.begin("2/s", 8)
    for ended in range(8):
        bar = progress.line().partition(" ")[0]
        assert bar == "[" + "#" * (20 * ended // 8) + "." * (20 - 20 * ended // 8) + "]"
        progress.session_ended()
    progress.begin("4/s", 8)
    assert progress.line().startswith("[....................] 4/s: 0 requests ended"), "each stage has its own"


def test_sessions_that_fail_end_too(simulated: Simulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    monkeypatch.setattr(Progress, "session_ended", lambda self: ended.append(self.in_flight))
    mine = tmp_path / "mine.yaml"
    methods: dict[str, Any] = {"one": {}, "other": {"fault": "500"}}
    settings = {"warm_up_rounds": 0, "fail_on": []}
    mine.write_text(yaml.safe_dump(scenario_of(tmp_path, methods, {**OPEN, "requests": 6}, **settings)))
    command.main([str(mine), "--url", simulated.url, "--out", str(tmp_path / "run")])
    assert len(ended) == 6
