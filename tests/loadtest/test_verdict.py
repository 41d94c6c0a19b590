"""Whether a run passes: exit status, first lines of table and page, and rates that no server keeps up with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from loadtest.load.scenario import Scenario
from loadtest.load.thresholds import parse_threshold
from tests.loadtest.conftest import LoadTest, scenario_of

OPEN: dict[str, Any] = {"loop": "open", "rates": [40], "requests": 40}
PLAIN_AND_FAILING = {"plain": {}, "failing": {"fault": "500"}}


@pytest.mark.parametrize(
    ("fail_on", "said"),
    [
        ([], None),
        (["failures > 0"], "FAILED: failures > 0: 20 requests failed, of 40 with the warm-up."),
        (["failed_share > 0.5"], None),
        (["failed_share >= 0.5"], "FAILED: failed_share >= 0.5: 0.5, 40/s."),
        (["plain: failed_share > 0"], None),
        (["failing: failures > 0"], "FAILED: failing: failures > 0: 20, failing at 40/s."),
        (["plain: ttft_seconds.p50 < 10"], "FAILED: plain: ttft_seconds.p50 < 10: 0.0"),
        (["plain: ttft_seconds.p99 > 10"], "FAILED: plain: ttft_seconds.p99 > 10: not known for plain at 40/s"),
        (["plain: score < 1", "plain: goodput_per_second < 0.001"], None),
    ],
)
def test_the_exit_status_follows_the_conditions(
    load_test: LoadTest, tmp_path: Path, fail_on: list[str], said: str | None
) -> None:
    finished = load_test(scenario_of(tmp_path, PLAIN_AND_FAILING, OPEN, warm_up_rounds=0, fail_on=fail_on, tokens=3))
    table = finished.output.partition("(40 sessions)\n")[2]
    if said is None:
        assert finished.code == 0, finished.output
        assert table.startswith("PASSED\n")
        assert finished.page.partition("<body>\n")[2].startswith('<p class="verdict passed">')
    else:
        assert finished.code == 1
        assert table.startswith(said)
        assert finished.page.partition("<body>\n")[2].startswith('<div class="verdict failed"><ul><li>Failed: ')


def test_an_overloaded_run_says_so_first(load_test: LoadTest, tmp_path: Path) -> None:
    """One that answers nothing in time, and is not refused since nothing is measured before."""
    scenario = scenario_of(tmp_path, {"slow": {"ttft_seconds": 30}}, OPEN, warm_up_rounds=0)
    finished = load_test({**scenario, "request_timeout_seconds": 1, "fail_on": ["overloaded"]})
    assert finished.code == 1
    table = finished.output.partition("(40 sessions)\n")[2]
    assert table.startswith(
        "OVERLOADED: 40/s: 40 of 40 requests timed out or were turned away.\nFAILED: overloaded: 40/s"
    )
    assert "<li>Overloaded: 40/s" in finished.page.partition("<h1>")[0]


def test_a_hopeless_rate_is_not_run(load_test: LoadTest, tmp_path: Path) -> None:
    scenario = scenario_of(tmp_path, {"plain": {"ttft_seconds": 0.5}}, {**OPEN, "rates": [4, 4000]}, tokens=3)
    finished = load_test({**scenario, "load": {**OPEN, "rates": [4, 4000], "requests": 4}})
    assert finished.code == 1
    assert [stage["name"] for stage in finished.report["stages"]] == ["warm-up", "warm-up at once", "4/s"]
    assert "FAILED: 4000/s was not run: 4000 sessions/s are" in finished.output
    assert finished.report["stages"][1]["client"]["peak_requests"] == 32


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ttft > 1", "no measure 'ttft'; there are failures, "),
        ("ttft_seconds > 1", "one of mean, p50, p90, p95, p99, p99.9 belongs to ttft_seconds"),
        ("score.p50 > 1", "belongs to ttft_seconds"),
        ("failures", r"'\[METHOD:\] MEASURE < or > NUMBER' is wanted"),
        ("failures > many", "the limit 'many' is no finite number"),
        ("failures > .inf", "no finite number"),
    ],
)
def test_wrong_conditions_are_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_threshold(text)


def test_conditions_name_methods_that_there_are(tmp_path: Path) -> None:
    scenario = scenario_of(tmp_path, {"plain": {}}, OPEN, fail_on=["dense: failures > 0"])
    with pytest.raises(ValidationError, match="no method 'dense'; there are \\['plain'\\]"):
        Scenario.model_validate(scenario)
