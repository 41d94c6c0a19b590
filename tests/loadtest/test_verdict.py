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


@pytest.mark.parametrize(("wanted", "missed"), [(40, False), (45, True)])
def test_a_rate_that_is_wanted_has_to_be_held(load_test: LoadTest, tmp_path: Path, wanted: float, missed: bool) -> None:
    """Of requests that were due, with those of later turns; a stage below the rate breaks nothing."""
    slo = {"ttft_seconds": 5, "tpot_seconds": 5, "requests_per_second": wanted}
    load = {**OPEN, "rates": [10, 40], "requests": 20}
    finished = load_test(scenario_of(tmp_path, {"plain": {}}, load, warm_up_rounds=0, tokens=3, slo=slo))
    assert finished.report["summary"]["sustained"] == {"all methods together": pytest.approx(40, rel=1e-3)}
    assert [one["holds_slo"] for one in finished.report["summary"]["stages"]] == [True, True]
    assert f"Wanted: {wanted:g} requests a second." in finished.page
    failed = f"slo.requests_per_second {wanted:g}: all methods together held the SLO up to 40 requests/s"
    assert finished.code == int(missed)
    assert (f"FAILED: {failed}." in finished.output) == (f"<li>Failed: {failed}</li>" in finished.page) == missed


def test_a_rate_is_wanted_of_each_method_that_runs_apart(load_test: LoadTest, tmp_path: Path) -> None:
    """In a closed loop the answered requests count."""
    methods = {"quick": {"ttft_seconds": 0.01, "tpot_seconds": 0}, "slow": {"ttft_seconds": 1.5}}
    load = {"loop": "closed", "concurrency": [4], "requests": 12, "methods_apart": True}
    slo = {"ttft_seconds": 1, "tpot_seconds": 1, "requests_per_second": 4}
    finished = load_test(scenario_of(tmp_path, methods, load, warm_up_rounds=0, tokens=3, slo=slo))
    assert finished.code == 1
    quick = finished.report["summary"]["stages"][0]["together"]["requests_per_second"]
    assert finished.report["summary"]["sustained"] == {"quick": quick, "slow": None}
    assert "FAILED: slo.requests_per_second 4: slow held the SLO at no load that was run." in finished.output
    assert "quick held" not in finished.output


def test_end_to_end_ratios_are_judged(load_test: LoadTest, tmp_path: Path) -> None:
    methods: dict[str, Any] = {"plain": {"ttft_seconds": 0.1}, "slow": {"ttft_seconds": 0.3}}
    conditions = ["slow: latency_ratio > 1.5", "slow: latency_ratio > 4"]
    finished = load_test(scenario_of(tmp_path, methods, OPEN, warm_up_rounds=0, tokens=3, fail_on=conditions))
    assert finished.code == 1
    assert "FAILED: slow: latency_ratio > 1.5: 2." in finished.output
    assert "FAILED: slow: latency_ratio > 4" not in finished.output
