"""Prometheus rules and the Grafana dashboard, as far as they can be checked without a server."""

from __future__ import annotations

import json
import re
import subprocess

from tests.prometheus import DASHBOARD, RULE_TESTS, RULES, metric_names, panel_targets, rule_expressions
from tests.tools import tool


def test_rules_are_valid_and_do_what_their_tests_say() -> None:
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(RULE_TESTS)]):
        ended = subprocess.run([tool("promtool"), *command], capture_output=True, text=True, check=False, timeout=60)
        assert ended.returncode == 0, ended.stdout + ended.stderr


def test_every_alert_is_tested() -> None:
    tests = RULE_TESTS.read_text()
    alerts = [name for name in rule_expressions() if not name.startswith("vllm_sparse:")]
    assert len(alerts) >= 5
    for alert in alerts:
        assert tests.count(f"alertname: {alert}") >= 1, f"{alert} has no test"
        assert metric_names(rule_expressions()[alert])


def test_dashboard_fits_any_grafana() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["id"] is None
    assert dashboard["uid"] == "vllm-sparse"
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "model", "instance"]
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(panels), "panels lie over each other"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in panels:
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert target["legendFormat"]
            assert '$instance"' in target["expr"]
            for name in metric_names(target["expr"]):
                metric = re.sub("_(bucket|sum|count)$", "", name)
                assert metric in panel["description"], f"{panel['title']} does not say that it shows {metric}"
    assert len(panel_targets()) >= len(panels)
