"""The page of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from loadtest.load.measures import (
    Request,
    counted,
    failed,
    gap_seconds,
    latency_seconds,
    tpot_seconds,
    ttft_seconds,
)
from loadtest.load.plan import WARM_UPS
from loadtest.load.reply import FAILURES
from loadtest.load.report.chart import Line, Series, chart, distribution
from loadtest.load.report.markup import document, figures, folded, note, section, table, text, warnings
from loadtest.load.report.over_time import in_flight, medians
from loadtest.load.report.server_metrics import density_series, fallbacks, series_of, time_series
from loadtest.load.report.statistics import LEAST_CLUSTERS, PERCENTILES, samples_needed
from loadtest.load.report.summary import Report, compared
from loadtest.load.report.tables import holding, measured, percentile_of, ratio_cell, ratios
from loadtest.load.report.words import (
    counting_in_words,
    load_unit_of,
    milliseconds,
    percent,
    rate,
    seconds,
    slo_in_words,
)
from loadtest.load.scenario import Scenario

# More points than a line this wide can show.
MOST_POINTS = 400
# Of a run, in each of which latencies have their median.
WINDOWS = 60
WORKLOAD_LATENCIES = (("TTFT s", "p50"), ("TPOT ms", "p50"), ("gap ms", "p99"), ("end to end s", "p50"))
SINCE_START = "seconds from the start"


def page(report: Report) -> str:
    """The page of a run with its `summary`."""
    run = report["run"]
    title = f"Load test: {run['scenario_name']}"
    sections = [
        _verdict(report["summary"]["verdict"]),
        _head(report, title),
        warnings(report["summary"]["warnings"]),
        _findings(report),
        _side_by_side(report),
        _together(report),
        _workloads(report),
        _latency(report),
        _over_time(report),
        _goodput(report),
        _quality(report),
        _lengths(report),
        _server(report),
        _failures(report),
        _client(report),
        _settings(report),
    ]
    return document(title, sections)


def _colours(report: Report) -> dict[str, int]:
    return {method: number for number, method in enumerate(report["run"]["scenario"]["methods"])}


def _head(report: Report, title: str) -> str:
    run = report["run"]
    scenario = run["scenario"]
    facts = [
        f"model {run['model']}",
        f"server {run['server_version'] or 'of unknown version'}",
        f"started {run['started']}",
        f"seed {scenario['seed']}",
        f"{report['summary']['warm_up_requests']} requests of warm-up are left out",
        *([f"{cancelled} were broken off"] if (cancelled := report["summary"]["cancelled"]) else []),
    ]
    if report["end"]["seconds"] is not None:
        facts.insert(3, f"{report['end']['seconds']:.0f} s")
    return f'<h1>{text(title)}</h1><p>{text(scenario["description"])}</p><p class="soft">{text(" · ".join(facts))}</p>'


def _verdict(found: Mapping[str, Any]) -> str:
    """The first line of the page."""
    if found["passed"] and not found["overloaded"]:
        return '<p class="verdict passed">Passed</p>'
    lines = [f"Overloaded: {text}" for text in found["overloaded"]] + [f"Failed: {text}" for text in found["failed"]]
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    meaning = "Latencies of an overloaded server are of its queue, not of its methods." if found["overloaded"] else ""
    return f'<div class="verdict failed"><ul>{items}</ul><span>{meaning}</span></div>'


def _findings(report: Report) -> str:
    """Methods x levels: ratios to the baseline, and the load that holds the SLO."""
    summary = report["summary"]
    comparisons = summary["comparisons"]
    several = _levels(report) > 1
    parts = []
    if comparisons:
        rows = [(_named(report, row["method"], row["level"]), row) for row in comparisons]
        said = (
            f"Against {comparisons[0]['baseline']}, the first, prompt by prompt; below 1x is faster. Brackets are "
            f"bootstrap intervals over blocks of prompts, as wide as it takes for all {len(comparisons)} comparisons "
            "to hold at 95 %; prompts that all agree have none. McNemar's p is Holm's. In grey and parentheses: fewer "
            f"than {LEAST_CLUSTERS} pairs, which say nothing."
        )
        parts += [ratios(rows), note(said)]
    if several and summary["saturation"]:
        held = [(text(name), one, summary["sustained"][name]) for name, one in summary["saturation"].items()]
        parts += [holding(held, load_unit_of(report)), note(slo_in_words(report["run"]["scenario"]["slo"]))]
    return section("In short", *parts)


def _named(report: Report, method: str, level: float | None) -> str:
    several = _levels(report) > 1 and level is not None
    return f"{text(method)}<small>{level:g}{load_unit_of(report)}</small>" if several else text(method)


def _side_by_side(report: Report) -> str:
    """Methods x levels, as one table."""
    extras = report["run"]["scenario"]["methods"]
    by_method = list(extras)
    searched = report["run"]["scenario"]["load"].get("search") is not None
    rows = [
        (
            stage["level"] or 0,
            by_method.index(method),
            (_named(report, method, stage["level"]), one, stage, extras[method]),
        )
        for stage in report["summary"]["stages"]
        for method, one in stage["methods"].items()
    ]
    if not rows:
        return section("Methods side by side", '<p class="missing">no request was counted</p>')
    # Searches have loads of their own; elsewhere the methods of a load stand together.
    rows.sort(key=lambda row: (row[1], row[0]) if searched else row[:2])
    needed = ", ".join(f"p{one:g} {samples_needed(one)}" for one in PERCENTILES)
    said = (
        "Paired prompts only, the same ones for every method, where the scenario has any. "
        f"Latency counts from the intended time of a request. Percentiles need enough requests ({needed}); with fewer "
        "they are not shown; brackets are 95 % intervals, in which requests of a queue, which depend on one another, "
        "count as fewer. Goodput: requests a second that met every limit; right goodput: those of them that were "
        "answered right. A method has a throughput of its own where it had the server for itself. Density: keys read "
        "of those in reach, from the server's metrics."
    )
    return section("Methods side by side", measured([row for *_, row in rows]), note(said))


def _together(report: Report) -> str:
    """Throughput of each stage."""
    rows = [
        [
            text(stage["name"]),
            f"{stage['duration_seconds']:.0f}",
            rate(stage["offered_per_second"]),
            rate(one["requests_per_second"]),
            f"{one['input_tokens_per_second']:.0f}",
            f"{one['output_tokens_per_second']:.1f}",
            rate(one["goodput_per_second"]),
            percent(one["good_share"]),
        ]
        for stage in report["summary"]["stages"]
        for one in [stage["together"]]
    ]
    rates = [
        f"{name}<small>a second</small>" for name in ("due", "answered", "input tokens", "output tokens", "goodput")
    ]
    header = ["load", "seconds", *rates]
    said = (
        "Of everything that ran at a load, whichever its method: methods that mix share the server's throughput. What "
        "is answered a second counts to the end of the last answer, and so is less than what was due in a short stage."
    )
    return section("Throughput", table([*header, "within SLO"], rows), note(said)) if rows else ""


def _workloads(report: Report) -> str:
    """All that was sent, background too; nothing new where there is one workload and no adapter."""
    several = len(report["run"]["scenario"]["workloads"]) > 1
    by_workload = _parts(report, "workloads") if several else ""
    return section("By workload", by_workload) + section("By LoRA adapter", _parts(report, "adapters"))


def _parts(report: Report, key: str) -> str:
    stages = report["summary"]["stages"]
    rows = [
        [
            text(name if len(stages) < 2 else f"{name}, {stage['name']}"),
            f"{one['succeeded']}<small>of {one['requests']}</small>",
            seconds(one["ttft_seconds"]["p50"]),
            milliseconds(one["tpot_seconds"]["p50"]),
            milliseconds(one["gap_seconds"]["p99"]),
            seconds(one["latency_seconds"]["p50"]),
            percent(one["good_share"]),
        ]
        for stage in stages
        for name, one in stage[key].items()
    ]
    header = [
        "",
        "succeeded",
        *(f"{one}<small>{part}</small>" for one, part in WORKLOAD_LATENCIES),
        "within SLO",
    ]
    return table(header, rows) if rows else ""


def _measured(report: Report, measure: Callable[[Request], float | None], unit: float) -> list[Series]:
    """The distribution of a measure by method, over all stages."""
    scenario = Scenario.model_validate(report["run"]["scenario"])
    values: dict[str, list[float]] = {method: [] for method in _colours(report)}
    for stage in report["stages"]:
        for request in compared(counted(stage["requests"]), scenario) if stage["name"] not in WARM_UPS else ():
            value = measure(request)
            if request["status"] == "ok" and value is not None:
                values[request["method"]].append(value / unit)
    return [
        Series(method, _thin(distribution(values[method])), colour, marked=False)
        for method, colour in _colours(report).items()
    ]


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    step = max(1, len(points) // MOST_POINTS)
    return [*points[::step], *points[-1:]]


def _latency(report: Report) -> str:
    share = "share of requests"
    charts = [
        chart("Time to the first token", _measured(report, ttft_seconds, 1), "TTFT, s", share, (0, 1)),
        chart("Time per token", _measured(report, tpot_seconds, 1e-3), "TPOT, ms", share, (0, 1)),
        chart("Gaps between tokens", _measured(report, gap_seconds, 1e-3), "p99 of a request, ms", share, (0, 1)),
        chart("End to end", _measured(report, latency_seconds, 1), "seconds to the last token", share, (0, 1)),
    ]
    if _levels(report) > 1:
        charts += [
            _over_level(report, "TTFT at the median", "TTFT p50, s", percentile_of("ttft_seconds", "p50")),
            _over_level(report, "TPOT at the median", "TPOT p50, ms", percentile_of("tpot_seconds", "p50", 1e-3)),
            _over_level(report, "Gaps at p99", "gap p99, ms", percentile_of("gap_seconds", "p99", 1e-3)),
            _over_level(report, "End to end at the median", "p50, s", percentile_of("latency_seconds", "p50")),
        ]
    return section("Latency", figures(*charts))


def _over_time(report: Report) -> str:
    """Latencies as the run went on, and what the client had in flight."""
    stages = [stage for stage in report["stages"] if stage["requests"]]
    requests = [request for stage in stages for request in stage["requests"]]
    if not requests:
        return ""
    measures: list[tuple[str, str, Callable[[Request], float | None], float]] = [
        ("Time to the first token", "TTFT, s", ttft_seconds, 1),
        ("Time per token", "TPOT, ms", tpot_seconds, 1e-3),
        ("End to end", "seconds to the last token", latency_seconds, 1),
    ]
    lines = _boundaries(report)
    times = [request["intended_seconds"] for request in requests]
    window_seconds = (max(times) - min(times)) / WINDOWS or 1.0
    charts = [
        chart(
            title,
            [
                Series(method, medians(some, measure, unit, min(times), window_seconds), colour, marked=False)
                for method, colour in _colours(report).items()
                # No line joins what different stages measured.
                for stage in stages
                for some in [[one for one in stage["requests"] if one["method"] == method]]
            ],
            SINCE_START,
            label,
            lines=lines,
        )
        for title, label, measure, unit in measures
    ]
    flight = Series("Requests in flight", _thin(in_flight(requests)), 0, marked=False)
    charts.append(chart("Requests in flight", [flight], SINCE_START, "requests", lines=lines))
    said = "Medians of windows of the whole run, warm-up included, by when a request was due. " + _named_lines(report)
    return section("Over time", figures(*charts), note(said))


def _boundaries(report: Report) -> list[Line]:
    """Where the stages begin."""
    return [
        Line(stage["start_seconds"], str(number), stage["name"]) for number, stage in enumerate(report["stages"], 1)
    ]


def _named_lines(report: Report) -> str:
    names = "; ".join(f"{number}: {stage['name']}" for number, stage in enumerate(report["stages"], 1))
    return f"Dashed: a stage begins. {names}."


def _levels(report: Report) -> int:
    return len({stage["level"] for stage in report["summary"]["stages"]})


def _over_level(report: Report, title: str, y_label: str, value: Callable[[Mapping[str, Any]], float | None]) -> str:
    series = []
    for method, colour in _colours(report).items():
        points = [
            (stage["level"], found)
            for stage in report["summary"]["stages"]
            if method in stage["methods"] and (found := value(stage["methods"][method])) is not None
        ]
        series.append(Series(method, sorted(points), colour))
    return chart(title, series, f"load,{load_unit_of(report)}", y_label)


def _goodput(report: Report) -> str:
    if _levels(report) < 2:
        return ""
    charts = [
        _over_level(report, "Goodput", "good requests a second", lambda one: one["goodput_per_second"]),
        _over_level(report, "Share of good requests", "share", lambda one: one["good_share"]),
    ]
    return section("Goodput against load", figures(*charts), note(slo_in_words(report["run"]["scenario"]["slo"])))


def _quality(report: Report) -> str:
    charts = [
        _pareto(report, "Quality against TTFT", "ttft_seconds", "TTFT p50, s", 1),
        _pareto(report, "Quality against TPOT", "tpot_seconds", "TPOT p50, ms", 1e-3),
    ]
    said = "Up and to the left is better. A point for each method and level; bars are 95 % intervals of the score."
    scored = any(one["score"]["count"] for stage in report["summary"]["stages"] for one in stage["methods"].values())
    return section("Quality against speed", figures(*charts), note(said)) if scored else ""


def _pareto(report: Report, title: str, key: str, label: str, unit: float) -> str:
    series = []
    for method, colour in _colours(report).items():
        found = [stage["methods"][method] for stage in report["summary"]["stages"] if method in stage["methods"]]
        known = [one for one in found if one["score"]["mean"] is not None and one[key]["p50"] is not None]
        points = [(one[key]["p50"] / unit, one["score"]["mean"]) for one in known]
        bars = [one["score"]["interval"] for one in known]
        series.append(Series(method, points, colour, bars, joined=False))
    return chart(title, series, label, "score", (0, 1))


def _lengths(report: Report) -> str:
    rows = []
    several = _levels(report) > 1
    for comparison in report["summary"]["comparisons"]:
        for label, one in comparison["lengths"].items():
            level = f", {comparison['level']:g}" if several else ""
            rows.append(
                [
                    f"{text(comparison['method'])}{level}",
                    f"{label}<small>{one['pairs']} pairs</small>",
                    *(ratio_cell(one[key], {}, "{:.2f}x") for key in ("ttft_ratio", "tpot_ratio", "latency_ratio")),
                    ratio_cell(one["score_difference"], {}, "{:+.3f}"),
                ]
            )
    header = ["method", "input tokens", "TTFT", "TPOT", "end to end", "score"]
    said = (
        "Against the same prompts dense: where TTFT falls below 1x, the method begins to pay. In grey and parentheses: "
        f"fewer than {LEAST_CLUSTERS} pairs, which say nothing."
    )
    return section("By length of the prompt", table(header, rows), note(said)) if rows else ""


def _server(report: Report) -> str:
    metrics = report["metrics"]
    lines = _boundaries(report)
    charts = [
        chart(
            "Density of what ran",
            [
                Series(name, points, number + 1, marked=False)
                for number, (name, points) in enumerate(density_series(metrics).items())
            ],
            SINCE_START,
            "keys read of those in reach",
            (0, 1),
            lines,
        )
    ]
    missing = []
    for number, (name, points) in enumerate(time_series(metrics).items()):
        if points is None:
            missing.append(name)
        else:
            charts.append(chart(name, [Series(name, points, number, marked=False)], SINCE_START, "", lines=lines))
    parts = [figures(*charts), note(_named_lines(report))]
    if missing:
        parts.append(note(f"Missing from /metrics: {', '.join(missing)}."))
    failed = sum("error" in reading for reading in metrics)
    if failed:
        parts.append(note(f"{failed} of {len(metrics)} readings of /metrics failed."))
    return section("The server meanwhile", *parts, _fallbacks(report))


def _fallbacks(report: Report) -> str:
    readings = series_of(report["metrics"], 0, float("inf"))
    rows = [
        [text(one["method"]), text(one["phase"]), text(one["reason"].replace("_", " ")), f"{one['count']:.0f}"]
        for one in fallbacks(readings)
    ]
    said = "Chunks and decode steps that asked for a method and ran dense, warm-up included."
    return f"<h3>Fallbacks</h3>{table(['method', 'phase', 'reason', 'steps'], rows)}{note(said)}" if rows else ""


def _failures(report: Report) -> str:
    found: dict[tuple[str, str], list[Request]] = {}
    for stage in report["stages"]:
        for request in stage["requests"]:
            if failed(request):
                found.setdefault((request["status"], request["method"]), []).append(request)
    if not found:
        return section("Failures", "<p>None.</p>")
    rows = [
        [
            text(status.replace("_", " ")),
            text(method),
            str(len(some)),
            f"{some[0]['end_seconds']:.1f} to {some[-1]['end_seconds']:.1f}",
            _what_it_means(status, some[0]),
        ]
        for (status, method), some in sorted(found.items(), key=lambda item: -len(item[1]))
    ]
    header = ["failure", "method", "requests", "from - to, s", "meaning, and what the first one said"]
    return section("Failures", table(header, rows), note("Warm-up included. Nothing was sent again."))


def _what_it_means(status: str, request: Request) -> str:
    said = f'<span class="soft">{text(request["detail"])}</span>'
    return f'<td class="text">{text(FAILURES.get(status, ""))} {said}</td>'


def _client(report: Report) -> str:
    rows = []
    for stage in report["summary"]["stages"]:
        client = stage["client"]
        if client is None:
            continue
        lag = client["lag_seconds"]
        rows.append(
            [
                text(stage["name"]),
                f"{stage['sent']} of {stage['scheduled']}",
                percent(client["cpu_share"]),
                str(client["peak_requests"]),
                milliseconds(client["loop_lag_seconds"]["most"]),
                "-"
                if lag is None
                else f"{milliseconds(lag['mean'])}<small>at most {milliseconds(lag['most'])}</small>",
            ]
        )
    header = ["load", "requests of sessions", "of a core", "at once", "event loop late, ms", "sent late, ms"]
    said = "A client that is busy or late measures itself. Sessions of several turns send several requests."
    return section("The client itself", table(header, rows), note(said)) if rows else ""


def _settings(report: Report) -> str:
    shown = {key: value for key, value in report["run"]["scenario"].items() if key != "description"}
    scenario = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=100)
    said = (
        f"Tokens are counted by {counting_in_words(report['summary']['counted_by'])}. "
        "report.json holds every request and the whole schedule; journal.jsonl is what it was made from."
    )
    return section("Settings", folded("Scenario", f"<pre>{text(scenario)}</pre>"), note(said))
