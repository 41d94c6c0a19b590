"""Scenarios: those that come with the harness are valid, wrong ones are refused with what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from loadtest.load.scenario import Scenario, load_scenario, scenario_names
from loadtest.load.settings import ScenarioError

VALID: dict[str, Any] = {
    "description": "test",
    "methods": {"dense": {}, "sparse": {"sparse_prefill": "flexprefill"}},
    "workloads": [{"name": "needles", "kind": "needle", "input_tokens": 2000}],
    "load": {"loop": "open", "rates": [1], "requests": 10},
    "slo": {"ttft_seconds": 1, "tpot_seconds": 0.1},
}


def load(tmp_path: Path, content: Any, *settings: str) -> Scenario:
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_scenario(str(path), settings)


def test_the_scenarios_that_come_along() -> None:
    assert scenario_names() == ["capacity", "long-context", "long-needles", "mixed-tenants", "smoke", "soak"]
    for name in scenario_names():
        scenario = load_scenario(name)
        assert scenario.baseline == "dense"
        assert scenario.methods["dense"] == {}
        assert len(scenario.methods) >= 3


def test_a_setting_is_replaced(tmp_path: Path) -> None:
    scenario = load(tmp_path, VALID, "load.rates=[1, 2]", "workloads.0.needles=7", "methods.extra={a: 1}", "seed=9")
    assert scenario.load.loop == "open"
    assert scenario.load.rates == (1, 2)
    assert scenario.workloads[0].kind == "needle"
    assert scenario.workloads[0].needles == 7
    assert scenario.methods["extra"] == {"a": 1}
    assert scenario.seed == 9


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["load.rates=[0]"], "load.open.rates.0: Input should be greater than 0"),
        (["load.rates=[1, 2, 2]"], "levels of load must rise: [1.0, 2.0, 2.0]"),
        (["load.arrivals=gamma"], "burstiness belongs to arrivals: gamma"),
        (["load.arrivals=trace"], "trace names the file"),
        (["load.capacity_shares=[0.5]"], "exactly one of rates, capacity_shares, search and arrivals: trace"),
        (["load={loop: open, capacity_shares: [0.5], requests: 9}"], "need both requests and duration_seconds"),
        (
            ["load={loop: open, capacity_shares: [0.5], requests: 9, duration_seconds: 9, ramp_seconds: 2}"],
            "take no ramp_seconds",
        ),
        (
            ["load={loop: open, capacity_shares: [0.5], requests: 9, duration_seconds: 9}", "warm_up_rounds=0"],
            "need warm_up_rounds of at least 1",
        ),
        (["load={loop: open, search: {}, duration_seconds: 9}"], "search needs requests"),
        (["load={loop: open, search: {factor: 1}, requests: 9}"], "load.open.search.factor"),
        (["load={loop: open, search: {}, requests: 9}", "warm_up_rounds=0"], "need warm_up_rounds of at least 1"),
        (["load.duration_seconds=3"], "exactly one of requests and duration_seconds"),
        (["load={loop: closed, concurrency: [], requests: 3}"], "load.closed.concurrency"),
        (["load.burst=3"], "load.open.burst: Extra inputs are not permitted"),
        (["workloads.0.methods={spares: 1}"], "no such methods: ['spares']; there are ['dense', 'sparse']"),
        (["workloads.0.kind=needles"], "workloads.0"),
        (
            ["workloads.0={name: a, kind: ruler, input_tokens: 9, tasks: [niah]}"],
            "['niah'] are not known; allowed: ['niah_s",
        ),
        (["workloads.0={name: a, kind: documents, input_tokens: 9}", "endpoint=completions"], "need endpoint: chat"),
        (["workloads.0.input_tokens={uniform: [9, 3]}"], "first number must not exceed"),
        (["workloads=[]"], "workloads"),
        (["methods={}"], "methods"),
        (["slo.share=2"], "slo.share"),
        (["seed"], "PATH=VALUE is wanted"),
        (["description.a=1"], "'description' holds no settings of its own"),
        (["workloads.7.name=a"], "'7' is no place of that list, which has 0 to 0"),
        (["seed=[1"], "not YAML"),
        (["slo.ttft_seconds=.inf"], "slo.ttft_seconds: Input should be a finite number"),
        (["load.rates=[.nan]"], "load.open.rates.0"),
        (["description=2026-01-02"], "description: Input should be a valid string"),
        (["request={seed: .inf}"], "request.seed"),
        (["request={seed: 2026-01-02}"], "request"),
        (["methods.sparse={sparse_prefill: 2026-01-02}"], "methods.sparse.sparse_prefill"),
        (["methods.sparse.flexprefill_gamma=.nan"], "methods.sparse"),
        (["methods={on: {}}"], "methods.1.[key]: Input should be a valid string"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, settings: list[str], said: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        load(tmp_path, VALID, *settings)
    assert said in str(caught.value)


def test_names_that_repeat_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="names must differ"):
        load(tmp_path, {**VALID, "workloads": VALID["workloads"] * 2})


def test_a_scenario_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="one of capacity, long-context"):
        load_scenario("smokey")
    with pytest.raises(ScenarioError, match="no mapping"):
        load(tmp_path, ["a"])
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ScenarioError, match="is not YAML"):
        load_scenario(str(tmp_path / "bad.yaml"))


def test_the_line_of_what_is_wrong_is_said(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    text = yaml.safe_dump(VALID, sort_keys=False)
    path.write_text(text.replace("tpot_seconds: 0.1", "tpot_seconds: .inf"))
    number = next(number for number, line in enumerate(text.split("\n"), 1) if "tpot_seconds" in line)
    with pytest.raises(ScenarioError, match=rf"slo.tpot_seconds: Input should be a finite number \(line {number}\)"):
        load_scenario(str(path))
    path.write_text(f"{text}seed: 1\nseed: 2\n")
    with pytest.raises(ScenarioError, match=r"line \d+: 'seed' stands there twice"):
        load_scenario(str(path))
    path.write_bytes(text.encode() + b"# caf\xe9\n")
    with pytest.raises(ScenarioError, match=rf"line {text.count(chr(10)) + 1}, is no UTF-8 \(byte 0xe9\)"):
        load_scenario(str(path))
