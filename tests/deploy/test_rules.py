"""Prometheus rules and the Grafana dashboard, as far as they can be checked without a server."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable
from typing import Any

import pytest
import yaml

from tests.prometheus import (
    DASHBOARD,
    ROOT,
    RULE_TESTS,
    RULES,
    all_rules,
    metric_names,
    panel_targets,
    rule_expressions,
)
from tests.tools import tool


def test_rules_are_valid_and_do_what_their_tests_say() -> None:
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(RULE_TESTS)]):
        ended = subprocess.run([tool("promtool"), *command], capture_output=True, text=True, check=False, timeout=60)
        assert ended.returncode == 0, ended.stdout + ended.stderr


def untested(rules: Iterable[str], tests: dict[str, Any]) -> set[str]:
    """Rules that no test expects to hold something: alerts that are never seen firing, records never compared."""
    seen: set[str] = set()
    for test in tests["tests"]:
        seen |= {alert["alertname"] for alert in test.get("alert_rule_test", ()) if alert["exp_alerts"]}
        for query in test.get("promql_expr_test", ()):
            seen |= metric_names(query["expr"]) if query["exp_samples"] else set()
    return set(rules) - seen


def test_every_rule_is_tested() -> None:
    rules, tests = rule_expressions(), yaml.safe_load(RULE_TESTS.read_text())
    assert len(rules) > 20
    assert not untested(rules, tests)
    # The check itself: without its tests a rule is found.
    for group in tests["tests"]:
        group["alert_rule_test"] = [
            alert for alert in group["alert_rule_test"] if alert["alertname"] != "SparseRecallLow"
        ]
    assert untested(rules, tests) == {"SparseRecallLow"}


@pytest.mark.parametrize("name", list(rule_expressions()))
def test_a_rule_keeps_what_tells_servers_apart(name: str) -> None:
    """Nothing is summed but over labels of the metric itself."""
    grouped = re.findall(r"\b(by|without|on|ignoring) \(([^)]*)\)", rule_expressions()[name])
    assert {word for word, _ in grouped} <= {"without", "ignoring"}
    labels = {label.strip() for _, group in grouped for label in group.split(",")}
    assert not labels & {"job", "namespace", "pod", "instance", "model_name"}
    sums = re.findall(r"\b(?:sum|avg|min|max|count|histogram_quantile)\b(?! without)", rule_expressions()[name])
    assert not sums


@pytest.mark.parametrize("rule", [rule for rule in all_rules() if "alert" in rule], ids=lambda rule: rule["alert"])
def test_an_alert_says_where_and_what_to_do(rule: dict[str, Any]) -> None:
    annotations = rule["annotations"]
    for label in ("$labels.model_name", "or $labels.pod $labels.instance"):
        assert label in annotations["summary"]
    path, _, anchor = annotations["runbook_url"].partition("#")
    assert anchor == rule["alert"].lower()
    (section,) = re.findall(
        rf"^### {rule['alert']}\n(.*?)(?=^#|\Z)", (ROOT / path).read_text(), re.MULTILINE | re.DOTALL
    )
    assert len(section.split()) >= 30, f"{path} says too little of {rule['alert']}"


def test_dashboard_fits_any_grafana() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["id"] is None
    assert dashboard["uid"] == "vllm-sparse"
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == [
        "datasource",
        "namespace",
        "model",
        "pod",
    ]
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(panels), "panels lie over each other"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in panels:
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert target["legendFormat"].startswith("{{model_name}} {{pod}}")
            # Each selector, since a query may have several.
            assert target["expr"].count('pod=~"$pod"') == target["expr"].count("{") == target["expr"].count("}")
            for name in metric_names(target["expr"]):
                metric = re.sub("_(bucket|sum|count)$", "", name)
                assert metric in panel["description"], f"{panel['title']} does not say that it shows {metric}"
    assert len(panel_targets()) >= len(panels)
