"""Write the dashboard, vllm-sparse.json: every panel alike in its legend, its thresholds and its labels.

No query sums over servers: a line is one pod's, and its legend says of which model. Thresholds are those of the alerts
(``../prometheus/rules.yaml``), which a test compares.

Usage, in the repository's root: python deploy/grafana/generate.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parent / "vllm-sparse.json"
DATA_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
SERVER = "namespace, pod, model_name"
CHOSEN = 'namespace=~"$namespace",model_name=~"$model",pod=~"$pod"'
# Of every legend.
WHOSE = "{{model_name}} {{pod}}"
COLUMNS, WIDTH, HEIGHT = 3, 8, 8

GREEN, RED = "green", "red"


@dataclass(frozen=True)
class Query:
    """One query of a panel.

    Attributes:
        expression: PromQL with the dashboard's variables.
        legend: what follows model and pod in the legend.
    """

    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: of the panel.
        text: what it shows, with the names of its metrics.
        unit: Grafana's name of the unit.
        queries: its lines or bars.
        threshold: value at which an alert begins, drawn as a line; None for no line.
        bad_above: whether values above the threshold are the bad ones.
        now: bars of the chosen time range as a whole, instead of lines over time.
        most: end of the scale; None to let Grafana choose.
        harmless: regular expression of legends whose values are no fault however large, and stay grey.
    """

    title: str
    text: str
    unit: str
    queries: Sequence[Query]
    threshold: float | None = None
    bad_above: bool = True
    now: bool = False
    most: float | None = None
    harmless: str = ""


@dataclass(frozen=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: Sequence[Panel] = field(default_factory=tuple)


def chosen(metric: str, *selectors: str) -> str:
    """Series of a metric of the chosen servers."""
    return f"{metric}{{{','.join((CHOSEN, *selectors))}}}"


def rate(metric: str, *by: str, over: str = "$__rate_interval", selectors: Sequence[str] = ()) -> str:
    """Increase of a counter a second, by server and these labels."""
    return f"sum by ({', '.join((SERVER, *by))}) (rate({chosen(metric, *selectors)}[{over}]))"


def mean(metric: str, *by: str, over: str = "$__rate_interval", selectors: Sequence[str] = ()) -> str:
    """Mean of what a histogram or summary observed."""
    parts = (rate(f"{metric}_{part}", *by, over=over, selectors=selectors) for part in ("sum", "count"))
    return " / ".join(parts)


def quantile(share: float, metric: str, *by: str) -> str:
    """Quantile of what a histogram observed."""
    return f"histogram_quantile({share}, {rate(f'{metric}_bucket', 'le', *by)})"


def quantiles(metric: str, *by: str) -> list[Query]:
    """Median and 95th percentile."""
    legend = " ".join(f"{{{{{label}}}}}" for label in by)
    shares = ((0.5, "median"), (0.95, "p95"))
    return [Query(quantile(share, metric, *by), f"{legend} {name}".strip()) for share, name in shares]


def speed_up(metric: str, phase: str) -> str:
    """How many times as long dense requests took as those of a method, at one length of prompt and on one server."""
    labels = ("prompt_tokens", phase)
    dense = mean(metric, *labels, over="$__range", selectors=[f'{phase}="dense"'])
    sparse = mean(metric, *labels, over="$__range", selectors=[f'{phase}!="dense"'])
    return f"({dense}) / on ({SERVER}, prompt_tokens) group_right () ({sparse})"


def fallback_share(over: str) -> str:
    """Share of the chunks and steps that asked for a method and ran dense, by reason."""
    dense = rate("vllm_sparse_fallbacks_total", "phase", "method", over=over)
    sparse = rate("vllm_sparse_density_ratio_count", "phase", "method", over=over)
    by_reason = rate("vllm_sparse_fallbacks_total", "phase", "method", "reason", over=over)
    return f"{by_reason} / on ({SERVER}, phase, method) group_left () ({dense} + ({sparse} or 0 * {dense}))"


def saved_share() -> str:
    """Share of the KV-cache bytes in reach that were not read."""
    saved, read = (rate(f"vllm_sparse_kv_{what}_bytes_total", "phase", "method") for what in ("saved", "read"))
    return f"{saved} / ({saved} + {read})"


def guard_share(over: str) -> str:
    """Share of the checked layers that the guard sent dense."""
    layers, checks = (rate(f"vllm_sparse_guard_{what}_total", "phase", "method", over=over) for what in LAYERS)
    return f"{layers} / {checks}"


LAYERS = ("layers", "checks")
METHOD = "{{phase}} {{method}}"
BESIDE_CACHE = f"({chosen('vllm_sparse_decode_buffer_bytes')} + {chosen('vllm_sparse_side_data_bytes')})"

ROWS = (
    Row(
        "At a glance, over the chosen time",
        (
            Panel(
                "Is it helping: prompts",
                "How many times as long dense requests waited for their first token as sparse ones with prompts of the "
                "same class of lengths, on the same server; below 1 sparse is slower. Empty without dense requests of "
                "that length. From vllm_sparse_time_to_first_token_by_length_seconds.",
                "suffix:x",
                [
                    Query(
                        speed_up("vllm_sparse_time_to_first_token_by_length_seconds", "prefill"),
                        "{{prefill}} {{prompt_tokens}}",
                    )
                ],
                threshold=1 / 1.2,
                bad_above=False,
                now=True,
            ),
            Panel(
                "Is it helping: generation",
                "As beside, of the time between tokens. From vllm_sparse_inter_token_latency_by_length_seconds.",
                "suffix:x",
                [
                    Query(
                        speed_up("vllm_sparse_inter_token_latency_by_length_seconds", "decode"),
                        "{{decode}} {{prompt_tokens}}",
                    )
                ],
                threshold=1 / 1.2,
                bad_above=False,
                now=True,
            ),
            Panel(
                "Is quality at risk: recall against its floor",
                "Mean attention mass that the lists keep, of sampled queries. From vllm_sparse_recall_ratio.",
                "percentunit",
                [Query(mean("vllm_sparse_recall_ratio", "phase", "method", over="$__range"), METHOD)],
                threshold=0.7,
                bad_above=False,
                now=True,
                most=1,
            ),
            Panel(
                "Is quality at risk: layers that the guard sent dense",
                "Share of the layers whose recall was compared with sparse_min_recall; empty where no request sets it. "
                "From vllm_sparse_guard_layers_total and vllm_sparse_guard_checks_total.",
                "percentunit",
                [Query(guard_share("$__range"), METHOD)],
                threshold=0.1,
                now=True,
                most=1,
            ),
            Panel(
                "What falls back, and why",
                "Share of the chunks and decode steps that asked for a method and ran dense. short_context and "
                "unprofitable are no fault, and low_recall is the guard's. From vllm_sparse_fallbacks_total and "
                "vllm_sparse_density_ratio_count.",
                "percentunit",
                [Query(fallback_share("$__range"), f"{METHOD}: {{{{reason}}}}")],
                threshold=0.1,
                now=True,
                most=1,
                harmless="short_context|unprofitable|low_recall",
            ),
            Panel(
                "Memory beside the KV cache, against what is free",
                "Of each engine and rank. From vllm_sparse_decode_buffer_bytes, vllm_sparse_side_data_bytes and "
                "vllm_sparse_device_memory_free_bytes.",
                "percentunit",
                [
                    Query(
                        f"{BESIDE_CACHE} / {chosen('vllm_sparse_device_memory_free_bytes')}",
                        "{{engine}}.{{rank}}",
                    )
                ],
                threshold=2,
                now=True,
            ),
        ),
    ),
    Row(
        "Load",
        (
            Panel(
                "Requests running and waiting",
                "From vllm:num_requests_running and vllm:num_requests_waiting.",
                "short",
                [
                    Query(chosen("vllm:num_requests_running"), "engine {{engine}} running"),
                    Query(chosen("vllm:num_requests_waiting"), "engine {{engine}} waiting"),
                ],
            ),
            Panel(
                "Time in the queue",
                "Before the first step. From vllm:request_queue_time_seconds.",
                "s",
                quantiles("vllm:request_queue_time_seconds"),
            ),
            Panel(
                "Preemptions",
                "In 15 minutes: requests that lost their KV cache to others and are computed again. From "
                "vllm:num_preemptions_total.",
                "short",
                [Query(f"sum by ({SERVER}) (increase({chosen('vllm:num_preemptions_total')}[15m]))", "")],
                threshold=5,
            ),
            Panel(
                "KV cache in use",
                "By running requests. From vllm:kv_cache_usage_perc.",
                "percentunit",
                [Query(chosen("vllm:kv_cache_usage_perc"), "engine {{engine}}")],
                threshold=0.95,
                most=1,
            ),
            Panel(
                "Prefix-cache hits",
                "Share of the prompt tokens that were found in the cache. Sparse requests share blocks with those of "
                "equal settings only. From vllm:prefix_cache_hits_total and vllm:prefix_cache_queries_total.",
                "percentunit",
                [Query(f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}", "")],
                most=1,
            ),
            Panel(
                "KV-cache memory in use",
                "Of one rank of each engine. From vllm_sparse_kv_cache_used_bytes.",
                "bytes",
                [Query(chosen("vllm_sparse_kv_cache_used_bytes"), "engine {{engine}}")],
            ),
            *(
                Panel(
                    f"Requests by method of the {name}",
                    "Admitted. From vllm_sparse_requests_total.",
                    "reqps",
                    [Query(rate("vllm_sparse_requests_total", "method", selectors=[f'phase="{phase}"']), "{{method}}")],
                )
                for phase, name in (("prefill", "prompt"), ("decode", "generation"))
            ),
            Panel(
                "Requests by preset",
                "For which a preset picks the methods. From vllm_sparse_presets_total.",
                "reqps",
                [Query(rate("vllm_sparse_presets_total", "preset"), "{{preset}}")],
            ),
            *(
                Panel(
                    title,
                    f"{text} From vllm_sparse_tokens_total.",
                    "short",
                    [Query(rate("vllm_sparse_tokens_total", "method", selectors=[f'phase="{phase}"']), "{{method}}")],
                )
                for phase, title, text in (
                    (
                        "prefill",
                        "Prompt tokens",
                        "Computed per second, by the method asked for; those from the prefix cache do not count.",
                    ),
                    ("decode", "Generated tokens", "Per second, by the method asked for."),
                )
            ),
        ),
    ),
    Row(
        "Does it help",
        (
            Panel(
                "Time to first token",
                "Of requests by the method of their prompt; dense lies beside the sparse ones. Prompts of different "
                "lengths are not comparable. From vllm_sparse_time_to_first_token_seconds.",
                "s",
                quantiles("vllm_sparse_time_to_first_token_seconds", "prefill"),
            ),
            Panel(
                "Time between tokens",
                "By the method of the generation. From vllm_sparse_inter_token_latency_seconds.",
                "s",
                quantiles("vllm_sparse_inter_token_latency_seconds", "decode"),
            ),
            Panel(
                "Request latency, p95",
                "From arrival to the last token, by the methods of prompt and generation. From "
                "vllm_sparse_e2e_request_latency_seconds.",
                "s",
                [
                    Query(
                        quantile(0.95, "vllm_sparse_e2e_request_latency_seconds", "prefill", "decode"),
                        "{{prefill}} / {{decode}}",
                    )
                ],
            ),
            *(
                Panel(
                    f"{title}, by length of the prompt",
                    f"Mean, by the class of the prompt's length in tokens. From {metric}.",
                    "s",
                    [Query(mean(metric, phase, "prompt_tokens"), f"{{{{{phase}}}}} {{{{prompt_tokens}}}}")],
                )
                for title, metric, phase in (
                    ("Time to first token", "vllm_sparse_time_to_first_token_by_length_seconds", "prefill"),
                    ("Time between tokens", "vllm_sparse_inter_token_latency_by_length_seconds", "decode"),
                )
            ),
            Panel(
                "Share of KV-cache bytes saved",
                "Of the bytes in reach of sparse chunks and steps, dense layers included. From "
                "vllm_sparse_kv_saved_bytes_total and vllm_sparse_kv_read_bytes_total.",
                "percentunit",
                [Query(saved_share(), METHOD)],
                most=1,
            ),
        ),
    ),
    Row(
        "What is kept",
        (
            Panel(
                "Density",
                "KV tokens read over KV tokens in reach, in sparse layers: mean and 90th percentile of chunks and "
                "decode steps. From vllm_sparse_density_ratio.",
                "percentunit",
                [
                    Query(mean("vllm_sparse_density_ratio", "phase", "method"), f"{METHOD} mean"),
                    Query(quantile(0.9, "vllm_sparse_density_ratio", "phase", "method"), f"{METHOD} p90"),
                ],
                most=1,
            ),
            Panel(
                "Recall",
                "Attention mass that the lists keep, of sampled queries: mean and 10th percentile of heads. From "
                "vllm_sparse_recall_ratio.",
                "percentunit",
                [
                    Query(mean("vllm_sparse_recall_ratio", "phase", "method"), f"{METHOD} mean"),
                    Query(quantile(0.1, "vllm_sparse_recall_ratio", "phase", "method"), f"{METHOD} p10"),
                ],
                threshold=0.7,
                bad_above=False,
                most=1,
            ),
            Panel(
                "Recall measurements",
                "Heads measured per second: where there are none, recall is not known. From "
                "vllm_sparse_recall_ratio_count.",
                "cps",
                [Query(rate("vllm_sparse_recall_ratio_count", "phase", "method"), METHOD)],
            ),
        ),
    ),
    Row(
        "Why dense",
        (
            Panel(
                "Fallbacks",
                "Chunks and decode steps per second that asked for a sparse method and ran dense, by reason. From "
                "vllm_sparse_fallbacks_total.",
                "cps",
                [Query(rate("vllm_sparse_fallbacks_total", "phase", "method", "reason"), f"{METHOD}: {{{{reason}}}}")],
            ),
            Panel(
                "Share of fallbacks",
                "Of the chunks and steps that asked for a sparse method, by reason. From vllm_sparse_fallbacks_total "
                "and vllm_sparse_density_ratio_count.",
                "percentunit",
                [Query(fallback_share("$__rate_interval"), f"{METHOD}: {{{{reason}}}}")],
                threshold=0.1,
                most=1,
            ),
            Panel(
                "Layers that the guard sent dense",
                "Layers of requests whose lists kept less attention mass than sparse_min_recall, as a share of the "
                "layers that were checked. From vllm_sparse_guard_layers_total and vllm_sparse_guard_checks_total.",
                "percentunit",
                [Query(guard_share("$__rate_interval"), METHOD)],
                threshold=0.1,
                most=1,
            ),
        ),
    ),
    Row(
        "What it costs",
        (
            Panel(
                "Selection, share of the attention's time",
                "In sampled steps, layers that are sparse. From vllm_sparse_selection_seconds_total and "
                "vllm_sparse_attention_total_seconds_total.",
                "percentunit",
                [
                    Query(
                        f"{rate('vllm_sparse_selection_seconds_total', 'phase', 'method')} / "
                        f"{rate('vllm_sparse_attention_total_seconds_total', 'phase', 'method')}",
                        METHOD,
                    )
                ],
                threshold=0.5,
                most=1,
            ),
            Panel(
                "Attention time of a chunk or decode step",
                "Selection and attention over the lists, all sparse layers of one request's chunk or step. From "
                "vllm_sparse_selection_seconds_total, vllm_sparse_attention_seconds_total and "
                "vllm_sparse_timed_rows_total.",
                "s",
                [
                    Query(
                        f"{rate(f'vllm_sparse_{part}_seconds_total', 'phase', 'method')} / "
                        f"{rate('vllm_sparse_timed_rows_total', 'phase', 'method')}",
                        f"{METHOD} {part}",
                    )
                    for part in ("selection", "attention")
                ],
            ),
            Panel(
                "Kept beside the KV cache",
                "Buffers of decode steps and page summaries, which vLLM's memory settings do not count. From "
                "vllm_sparse_decode_buffer_bytes and vllm_sparse_side_data_bytes.",
                "bytes",
                [
                    Query(chosen("vllm_sparse_decode_buffer_bytes"), "{{engine}}.{{rank}} decode buffers"),
                    Query(chosen("vllm_sparse_side_data_bytes"), "{{engine}}.{{rank}} page summaries"),
                ],
            ),
            Panel(
                "Device memory",
                "Of each engine and rank; on a CPU build the worker's resident memory and what the machine has free. "
                "From vllm_sparse_device_memory_allocated_bytes, vllm_sparse_device_memory_reserved_bytes and "
                "vllm_sparse_device_memory_free_bytes.",
                "bytes",
                [
                    Query(chosen(f"vllm_sparse_device_memory_{what}_bytes"), f"{{{{engine}}}}.{{{{rank}}}} {what}")
                    for what in ("allocated", "reserved", "free")
                ],
            ),
            Panel(
                "KV-cache bytes saved",
                "Not read by sparse chunks and steps although in reach, of one rank. From "
                "vllm_sparse_kv_saved_bytes_total.",
                "Bps",
                [Query(rate("vllm_sparse_kv_saved_bytes_total", "phase", "method"), METHOD)],
            ),
        ),
    ),
)


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    """A choice among a label's values, all by default; series without the label are among all."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATA_SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "sort": 1,
        "current": {"text": "All", "value": "$__all"},
    }


def variables() -> list[dict[str, Any]]:
    """The dashboard's variables: each offers what the ones before it leave."""
    running, selectors = "vllm:num_requests_running", ""
    found: list[dict[str, Any]] = [
        {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
            "current": {},
            "hide": 0,
        }
    ]
    for name, label, text in (
        ("namespace", "namespace", "Namespace"),
        ("model", "model_name", "Model"),
        ("pod", "pod", "Pod"),
    ):
        found.append(variable(name, text, f"label_values({running}{selectors and f'{{{selectors}}}'}, {label})"))
        selectors = ",".join(filter(None, (selectors, f'{label}=~"${name}"')))
    return found


def thresholds(panel: Panel) -> dict[str, Any]:
    """Colours of values, as Grafana's thresholds; the first step begins below everything."""
    steps: list[dict[str, Any]] = [{"color": GREEN, "value": None}]
    if panel.threshold is not None:
        below, above = (GREEN, RED) if panel.bad_above else (RED, GREEN)
        steps = [{"color": below, "value": None}, {"color": above, "value": panel.threshold}]
    return {"mode": "absolute", "steps": steps}


def overrides(panel: Panel) -> list[dict[str, Any]]:
    """Grafana's exceptions from a panel's settings."""
    if not panel.harmless:
        return []
    grey = {"id": "color", "value": {"mode": "fixed", "fixedColor": "text"}}
    return [{"matcher": {"id": "byRegexp", "options": f"/{panel.harmless}/"}, "properties": [grey]}]


def bars(panel: Panel, query: Query) -> str:
    """The worst bars first; what had no traffic, whose ratio is no number, has none."""
    return f"{'sort_desc' if panel.bad_above else 'sort'}({query.expression} >= 0)"


def as_grafana(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    """A panel in Grafana's words."""
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "noValue": "No traffic",
        "thresholds": thresholds(panel),
    }
    if panel.most is not None:
        defaults["max"] = panel.most
    if panel.now:
        options: dict[str, Any] = {
            "displayMode": "basic",
            "orientation": "horizontal",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "showUnfilled": True,
            # Names above bars this high: beside them they would have 0.4 of the width, and end before the method.
            "sizing": "manual",
            "minVizHeight": 42,
            "maxVizHeight": 60,
            "text": {"titleSize": 12, "valueSize": 14},
        }
        defaults["color"] = {"mode": "thresholds"}
    else:
        options = {
            "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
        defaults["color"] = {"mode": "palette-classic"}
        defaults["custom"] = {
            "drawStyle": "line",
            "fillOpacity": 0,
            "lineWidth": 1,
            "showPoints": "auto",
            "spanNulls": False,
            "stacking": {"mode": "none"},
            "thresholdsStyle": {"mode": "off" if panel.threshold is None else "line"},
        }
    return {
        "id": number,
        "type": "bargauge" if panel.now else "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": DATA_SOURCE,
        "gridPos": {"h": HEIGHT, "w": WIDTH, "x": x, "y": y},
        "fieldConfig": {"defaults": defaults, "overrides": overrides(panel)},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": DATA_SOURCE,
                "expr": bars(panel, query) if panel.now else query.expression,
                "legendFormat": f"{WHOSE} {query.legend}".strip(),
                **({"instant": True, "range": False} if panel.now else {}),
            }
            for place, query in enumerate(panel.queries)
        ],
    }


def dashboard() -> dict[str, Any]:
    """The whole dashboard."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row in ROWS:
        place = {"h": 1, "w": COLUMNS * WIDTH, "x": 0, "y": y}
        panels.append({"id": len(panels) + 1, "type": "row", "title": row.title, "gridPos": place, "collapsed": False})
        panels[-1]["panels"] = []
        for index, panel in enumerate(row.panels):
            x, down = index % COLUMNS * WIDTH, index // COLUMNS * HEIGHT
            panels.append(as_grafana(panel, len(panels) + 1, x, y + 1 + down))
        y += 1 + -(-len(row.panels) // COLUMNS) * HEIGHT
    return {
        "id": None,
        "uid": "vllm-sparse",
        "title": "vLLM sparse attention",
        "tags": ["vllm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "",
        "graphTooltip": 1,
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": variables()},
        "panels": panels,
    }


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    DASHBOARD.write_text(text())
