"""Every query of the dashboard, asked of a real Prometheus that holds two pods of each of two models."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deploy.grafana.generate import DASHBOARD as GENERATED
from deploy.grafana.generate import text
from tests.prometheus import (
    DASHBOARD,
    RULES,
    Prometheus,
    filled_in,
    metric_names,
    panel_targets,
    rule_expressions,
    running,
)
from tests.serving.server import free_port
from tests.tools import tool

PODS = ("a-0", "a-1", "b-0", "b-1")
SERVERS = tuple({"namespace": "llm", "pod": pod, "model_name": pod[0]} for pod in PODS)
# Its counters stand still.
IDLE = {"namespace": "idle", "pod": "c-0", "model_name": "c"}
MINUTES = 40
BOUNDS = ("0.1", "0.5", "1.0", "+Inf")

PHASED = [{"phase": "prefill", "method": "sale"}, {"phase": "decode", "method": "tidal"}]
RANKED = [{"engine": "0", "rank": rank} for rank in ("0", "1")]
ENGINES = [{"engine": "0"}]
REASONS = ("no_room", "short_context")
METHODS = ("dense", "sale")
LENGTHS = ("4K-16K", "16K-64K")
BY_LENGTH = {
    label: [{label: method, "prompt_tokens": length} for method in METHODS for length in LENGTHS]
    for label in ("prefill", "decode")
}
LATENCIES = [{"prefill": method, "decode": method} for method in METHODS]
# Label sets of the samples of each server, by the metric's name; histograms and summaries without their suffixes.
COUNTERS: dict[str, list[dict[str, str]]] = {
    "vllm:num_preemptions_total": ENGINES,
    "vllm:prefix_cache_hits_total": ENGINES,
    "vllm:prefix_cache_queries_total": ENGINES,
    "vllm_sparse_fallbacks_total": [{**phased, "reason": reason} for phased in PHASED for reason in REASONS],
    "vllm_sparse_presets_total": [{"preset": "fast"}],
    **{
        f"vllm_sparse_{name}_total": PHASED
        for name in (
            *("guard_checks", "guard_layers", "kv_read_bytes", "kv_saved_bytes", "requests", "tokens", "timed_rows"),
            *("selection_seconds", "attention_seconds", "attention_total_seconds"),
        )
    },
}  # fmt: skip
GAUGES: dict[str, list[dict[str, str]]] = {
    **{f"vllm:{name}": ENGINES for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")},
    **{f"vllm_sparse_device_memory_{name}_bytes": RANKED for name in ("allocated", "reserved", "free")},
    "vllm_sparse_decode_buffer_bytes": RANKED,
    "vllm_sparse_side_data_bytes": RANKED,
    "vllm_sparse_kv_cache_used_bytes": ENGINES,
}
SUMMARIES: dict[str, list[dict[str, str]]] = {
    "vllm_sparse_time_to_first_token_by_length_seconds": BY_LENGTH["prefill"],
    "vllm_sparse_inter_token_latency_by_length_seconds": BY_LENGTH["decode"],
}
HISTOGRAMS: dict[str, list[dict[str, str]]] = {
    "vllm:request_queue_time_seconds": ENGINES,
    "vllm_sparse_density_ratio": PHASED,
    "vllm_sparse_recall_ratio": PHASED,
    **{
        f"vllm_sparse_{name}_seconds": LATENCIES
        for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency")
    },
}


def series() -> Iterator[tuple[str, dict[str, str], float, float]]:
    """Name, labels, value at first and increase a minute of each series of a server."""
    for number, (name, sets) in enumerate(COUNTERS.items()):
        for labels in sets:
            yield name, labels, 0, 60 + number
    for number, (name, sets) in enumerate(GAUGES.items()):
        for labels in sets:
            yield name, labels, 1 + number, 0
    for name, sets in {**SUMMARIES, **HISTOGRAMS}.items():
        for labels in sets:
            yield f"{name}_count", labels, 0, 60
            yield f"{name}_sum", labels, 0, 20
            if name in HISTOGRAMS:
                for place, bound in enumerate(BOUNDS):
                    yield f"{name}_bucket", {**labels, "le": bound}, 0, 15 * (place + 1)


def history(last_seconds: float) -> str:
    """What every server's series held minute by minute, as OpenMetrics."""
    lines = []
    for server, (name, labels, start, growth) in itertools.product((*SERVERS, IDLE), series()):
        told = ",".join(f'{label}="{value}"' for label, value in {**server, **labels}.items())
        for minute in range(MINUTES + 1):
            value = start + growth * minute * (server is not IDLE)
            lines.append(f"{name}{{{told}}} {value} {last_seconds + 60 * (minute - MINUTES)}\n")
    return "".join(lines) + "# EOF\n"


@pytest.fixture(scope="module")
def now_seconds() -> float:
    return float(int(time.time()) // 60 * 60 - 3600)


@pytest.fixture(scope="module")
def clusters(now_seconds: float, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    tool("prometheus")
    folder = tmp_path_factory.mktemp("history")
    (folder / "history.txt").write_text(history(now_seconds))
    blocks: list[str | Path] = [
        tool("promtool"),
        "tsdb",
        "create-blocks-from",
        "openmetrics",
        folder / "history.txt",
        folder / "data",
    ]
    subprocess.run(blocks, check=True, capture_output=True, timeout=60)
    with running({"scrape_configs": []}, free_port(), folder) as started:
        yield started


def told(legend: str, labels: dict[str, str]) -> str:
    """A legend as Grafana shows it."""
    return re.sub(r"\{\{(\w+)\}\}", lambda name: labels.get(name[1], ""), legend)


@pytest.mark.parametrize("title", list(dict.fromkeys(title for title, _, _ in panel_targets())))
def test_a_panel_tells_every_server_apart(clusters: Prometheus, now_seconds: float, title: str) -> None:
    legends = []
    for query, legend in [(query, legend) for name, query, legend in panel_targets() if name == title]:
        samples = clusters.query(filled_in(query.replace("$namespace", "llm"), "5m", "30m"), now_seconds)
        finite = [sample["metric"] for sample in samples if math.isfinite(float(sample["value"][1]))]
        for server in SERVERS:
            assert any(server.items() <= labels.items() for labels in finite), f"{query} shows nothing of {server}"
        assert len(finite) == len(samples)
        legends += [told(legend, labels) for labels in finite]
    assert len(set(legends)) == len(legends), f"{title}: {legends}"


def test_a_choice_leaves_the_other_servers_out(clusters: Prometheus, now_seconds: float) -> None:
    for title, query, _ in panel_targets():
        chosen = filled_in(query.replace("$model", "b").replace("$pod", "b-1"), "5m", "30m")
        samples = clusters.query(chosen, now_seconds)
        assert {(sample["metric"]["model_name"], sample["metric"]["pod"]) for sample in samples} == {("b", "b-1")}, (
            title
        )


def test_at_a_glance_what_had_no_traffic_is_left_out(clusters: Prometheus, now_seconds: float) -> None:
    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] == "bargauge"]
    assert len(panels) == 6
    for panel in panels:
        (target,) = panel["targets"]
        samples = clusters.query(filled_in(target["expr"].replace("$namespace", "idle"), "5m", "30m"), now_seconds)
        # Memory is taken without traffic too.
        assert len(samples) == (2 if panel["title"].startswith("Memory") else 0), panel["title"]


def test_bars_have_their_names_above_them() -> None:
    """Names of pods are long; beside a bar Grafana cuts them, with the method and the reason behind them."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        if panel["type"] == "bargauge":
            assert panel["options"]["minVizHeight"] > 40
            assert panel["options"]["sizing"] == "manual"


def test_the_file_is_what_its_script_writes() -> None:
    assert DASHBOARD == GENERATED
    assert DASHBOARD.read_text() == text(), "run: python deploy/grafana/generate.py"


def thresholds() -> dict[str, float]:
    """Thresholds that are drawn, by the panel's title."""
    drawn: dict[str, float] = {}
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"] if panel["type"] != "row" else []
        if len(steps) > 1:
            drawn[panel["title"]] = steps[1]["value"]
    return drawn


@pytest.mark.parametrize(
    ("alert", "panels"),
    [
        ("SparseFallbackSurge", {"What falls back, and why", "Share of fallbacks"}),
        ("SparseRecallLow", {"Is quality at risk: recall against its floor", "Recall"}),
        (
            "SparseGuardTrips",
            {"Is quality at risk: layers that the guard sent dense", "Layers that the guard sent dense"},
        ),
        ("SparseSelectionTimeHigh", {"Selection, share of the attention's time"}),
        ("ServerOutOfCache", {"KV cache in use"}),
        ("ServerPreempts", {"Preemptions"}),
    ],
)
def test_a_threshold_is_its_alerts(alert: str, panels: set[str]) -> None:
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    (expression,) = [rule["expr"] for rule in rules if rule.get("alert") == alert]
    found = re.search(r"[<>] ([\d.]+)", expression)
    assert found is not None
    assert {thresholds()[panel] for panel in panels} == {float(found[1])}


def test_every_metric_of_ours_that_the_rules_use_has_a_panel() -> None:
    used = set().union(*map(metric_names, rule_expressions().values()))
    shown = set().union(*(metric_names(query) for _, query, _ in panel_targets()))
    assert {name for name in used if name.startswith("vllm_sparse_")} <= shown
