"""What the chart scales servers by, and what it scrapes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.chart import Manifest, Values, find, one_model, refusal, render
from tests.prometheus import RULES
from tests.tools import tool

PROMETHEUS = "http://prometheus.monitoring:9090"
BEARER = {"parameter": "bearerToken", "name": "prometheus-token", "key": "token"}


def keda(**settings: Any) -> Values:
    return one_model(autoscaling={"kind": "keda", "prometheus": PROMETHEUS, "timeToFirstTokenSeconds": 5, **settings})


def triggers(**settings: Any) -> list[Manifest]:
    found: list[Manifest] = find(render(keda(**settings)), "ScaledObject")["spec"]["triggers"]
    return found


class TestKeda:
    def test_scales_by_tokens_requests_cache_and_first_token(self) -> None:
        found = triggers()
        metadata = [trigger["metadata"] for trigger in found]
        assert [each["threshold"] for each in metadata] == ["32768", "5", "0.8", "5"]
        # Loads are shared by the servers; use and latency are not.
        assert [trigger["metricType"] for trigger in found] == ["AverageValue", "AverageValue", "Value", "Value"]
        assert {each["serverAddress"] for each in metadata} == {PROMETHEUS}

    @pytest.mark.parametrize("setting", ["waitingTokens", "waitingRequests", "kvCacheUsage", "timeToFirstTokenSeconds"])
    def test_0_leaves_a_measure_out(self, setting: str) -> None:
        every, some = triggers(), triggers(**{setting: 0})
        (left_out,) = [trigger for trigger in every if trigger not in some]
        assert len(some) == 3
        word = {
            "waitingTokens": "request_prompt_tokens_sum",
            "waitingRequests": "num_requests_waiting",
            "kvCacheUsage": "kv_cache_usage_perc",
            "timeToFirstTokenSeconds": "time_to_first_token_seconds",
        }[setting]
        assert word in left_out["metadata"]["query"]

    def test_authenticates_by_an_object_that_exists(self) -> None:
        manifests = render(
            keda(authentication={"modes": "bearer", "existing": "thanos", "kind": "ClusterTriggerAuthentication"})
        )
        assert not [each for each in manifests if each["kind"] == "TriggerAuthentication"]
        for trigger in find(manifests, "ScaledObject")["spec"]["triggers"]:
            assert trigger["authenticationRef"] == {"name": "thanos", "kind": "ClusterTriggerAuthentication"}
            assert trigger["metadata"]["authModes"] == "bearer"

    def test_authenticates_by_a_secret(self) -> None:
        manifests = render(keda(authentication={"modes": "bearer", "secretTargetRef": [BEARER]}))
        made = find(manifests, "TriggerAuthentication")
        assert made["spec"] == {"secretTargetRef": [BEARER]}
        for trigger in find(manifests, "ScaledObject")["spec"]["triggers"]:
            assert trigger["authenticationRef"] == {
                "name": made["metadata"]["name"],
                "kind": "TriggerAuthentication",
            }

    def test_sends_more_metadata(self) -> None:
        for trigger in triggers(triggerMetadata={"customHeaders": "X-Scope-OrgID=llm"}):
            assert trigger["metadata"]["customHeaders"] == "X-Scope-OrgID=llm"
            assert trigger["metadata"]["serverAddress"] == PROMETHEUS
            assert "authenticationRef" not in trigger


LABELS = 'namespace="llm",model_name="m"'
SERIES = {
    f'vllm:num_requests_waiting{{{LABELS},pod="a"}}': "4x30",
    f'vllm:num_requests_waiting{{{LABELS},pod="b"}}': "6x30",
    # Of another model, and of another namespace.
    'vllm:num_requests_waiting{namespace="llm",model_name="other",pod="c"}': "500x30",
    'vllm:num_requests_waiting{namespace="else",model_name="m",pod="d"}': "500x30",
    f'vllm:kv_cache_usage_perc{{{LABELS},pod="a"}}': "0.5x30",
    f'vllm:kv_cache_usage_perc{{{LABELS},pod="b"}}': "0.9x30",
}
# Each minute a request of 10000 tokens ends, whose first token took from 2 to 4 seconds.
TRAFFIC = {
    f'vllm:request_prompt_tokens_sum{{{LABELS},pod="a"}}': "0+10000x30",
    f'vllm:request_prompt_tokens_count{{{LABELS},pod="a"}}': "0+1x30",
    f'vllm:time_to_first_token_seconds_bucket{{{LABELS},pod="a",le="2"}}': "0x30",
    f'vllm:time_to_first_token_seconds_bucket{{{LABELS},pod="a",le="4"}}': "0+1x30",
    f'vllm:time_to_first_token_seconds_bucket{{{LABELS},pod="a",le="+Inf"}}': "0+1x30",
}
QUIET = dict.fromkeys(TRAFFIC, "5x30")


@pytest.mark.parametrize(
    ("series", "fewest", "expected"),
    [
        pytest.param(SERIES | TRAFFIC, 1, (100000, 10, 0.7, 3.9), id="traffic"),
        pytest.param(SERIES | QUIET, 1, (40960, 10, 0.7, 0), id="nothing ends"),
        pytest.param(SERIES, 1, (40960, 10, 0.7, 0), id="first requests"),
        pytest.param({}, 1, (None, None, None, None), id="nothing scraped"),
        pytest.param({}, 0, (0, 0, 0, 0), id="no servers"),
    ],
)
def test_queries_of_keda_answer(
    series: dict[str, str], fewest: int, expected: tuple[float | None, ...], tmp_path: Path
) -> None:
    found = triggers(minReplicas=fewest)
    # A missing value is no zero: KEDA then takes its fallback.
    assert all(trigger["metadata"]["ignoreNullValues"] == "false" for trigger in found)
    queries = [
        {
            "expr": f"round({trigger['metadata']['query']}, 0.001)",
            "eval_time": "25m",
            "exp_samples": [] if value is None else [{"labels": "{}", "value": value}],
        }
        for trigger, value in zip(found, expected, strict=True)
    ]
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    test = {"interval": "1m", "input_series": inputs, "promql_expr_test": queries}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"tests": [test]}))
    command = [tool("promtool"), "test", "rules", str(tmp_path / "test.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


class TestHpa:
    def test_scales_by_waiting_requests(self) -> None:
        (metric,) = find(render(one_model(autoscaling={"kind": "hpa"})), "HorizontalPodAutoscaler")["spec"]["metrics"]
        assert metric["pods"]["metric"]["name"] == "vllm_num_requests_waiting"
        assert metric["pods"]["target"]["averageValue"] == "5"

    def test_takes_any_metrics(self) -> None:
        metrics = [
            {
                "type": "External",
                "external": {"metric": {"name": "queue"}, "target": {"type": "Value", "value": "30"}},
            },
            {
                "type": "Pods",
                "pods": {"metric": {"name": "cache"}, "target": {"type": "AverageValue", "averageValue": "800m"}},
            },
        ]
        scaler = find(render(one_model(autoscaling={"kind": "hpa", "hpaMetrics": metrics})), "HorizontalPodAutoscaler")
        assert scaler["spec"]["metrics"] == metrics


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"authentication": {"modes": "bearer"}}, 'modes is "bearer" without credentials'),
        ({"authentication": {"existing": "thanos"}}, "credentials without modes"),
        ({"authentication": {"modes": "basic", "existing": "a", "secretTargetRef": [BEARER]}}, "keep one of them"),
        ({"authentication": {"modes": "password"}}, "modes"),
        ({"authentication": {"modes": "bearer", "secretTargetRef": [{"name": "a"}]}}, "secretTargetRef"),
        (
            dict.fromkeys(("waitingTokens", "waitingRequests", "kvCacheUsage", "timeToFirstTokenSeconds"), 0),
            "nothing to scale by",
        ),
    ],
)
def test_refuses_what_would_not_scale(settings: dict[str, Any], reason: str) -> None:
    message = refusal(keda(**settings))
    assert reason in message
    assert re.search(r"models.m.autoscaling|/models/m/autoscaling", message)


class TestMonitor:
    @pytest.mark.parametrize(
        ("kind", "field"), [("PodMonitor", "podMetricsEndpoints"), ("ServiceMonitor", "endpoints")]
    )
    def test_says_how_to_scrape(self, kind: str, field: str) -> None:
        relabelling = [{"sourceLabels": ["__meta_kubernetes_pod_node_name"], "targetLabel": "node"}]
        dropping = [{"sourceLabels": ["__name__"], "regex": ".*_created", "action": "drop"}]
        settings = {
            "create": "always",
            "kind": kind,
            "interval": "1m",
            "scrapeTimeout": "30s",
            "relabelings": relabelling,
            "metricRelabelings": dropping,
        }
        (endpoint,) = find(render(one_model() | {"monitoring": {"monitor": settings}}), kind)["spec"][field]
        assert endpoint["scrapeTimeout"] == "30s"
        assert endpoint["relabelings"] == relabelling
        assert endpoint["metricRelabelings"] == dropping

    @pytest.mark.parametrize(("interval", "timeout"), [("15s", "16s"), ("30s", "1m"), ("900ms", "1s")])
    def test_refuses_a_scrape_longer_than_the_interval(self, interval: str, timeout: str) -> None:
        settings = {"create": "always", "interval": interval, "scrapeTimeout": timeout}
        message = refusal(one_model() | {"monitoring": {"monitor": settings}})
        assert f"monitoring.monitor: scrapeTimeout is {timeout}, longer than interval {interval}" in message


def test_runbooks_are_where_the_values_say() -> None:
    settings = {"create": "always", "runbookBase": "https://git.example.com/vllm-sparse/"}
    spec = find(render(one_model() | {"monitoring": {"rules": settings}}), "PrometheusRule")["spec"]
    written = yaml.safe_load(RULES.read_text())
    alerts = [rule for group in spec["groups"] for rule in group["rules"] if "alert" in rule]
    assert len(alerts) == len([rule for group in written["groups"] for rule in group["rules"] if "alert" in rule])
    for alert in alerts:
        assert alert["annotations"]["runbook_url"].startswith("https://git.example.com/vllm-sparse/docs/operations.md#")
