"""The report as one HTML page that needs nothing else: style and charts are inside."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from loadtest.load.measures import Request, counted, failed, tpot_seconds, ttft_seconds
from loadtest.load.plan import WARM_UPS
from loadtest.load.reply import FAILURES
from loadtest.load.report.chart import Series, chart, distribution
from loadtest.load.report.server_metrics import density_series, fallbacks, series_of, time_series
from loadtest.load.report.statistics import LEAST_CLUSTERS, PERCENTILES, samples_needed
from loadtest.load.report.summary import Report, compared
from loadtest.load.report.words import (
    count_or_dash,
    counting_in_words,
    density_of,
    few_pairs,
    interval_in_words,
    load_unit_of,
    milliseconds,
    percent,
    score_in_words,
    seconds,
    with_interval,
)
from loadtest.load.scenario import Scenario

# Of a table: a method, what is known of it, and its stage.
Column = tuple[str, Mapping[str, Any], Mapping[str, Any]]

_STYLE = Path(__file__).with_name("style.css")
# More points than a line this wide can show.
MOST_POINTS = 400
SINCE_START = "seconds from the start"


def page(report: Report) -> str:
    """The page of a run with its `summary`."""
    run = report["run"]
    title = f"Load test: {run['scenario_name']}"
    sections = [
        _verdict(report["summary"]["verdict"]),
        _head(report, title),
        _warnings(report["summary"]["warnings"]),
        _findings(report),
        _side_by_side(report),
        _together(report),
        _workloads(report),
        _latency(report),
        _goodput(report),
        _quality(report),
        _lengths(report),
        _server(report),
        _failures(report),
        _client(report),
        _settings(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>\n{_STYLE.read_text(encoding='utf-8')}</style></head>\n<body>\n"
        + "\n".join(filter(None, sections))
        + "\n</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already; the first of a row names it."""
    top = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(f"<tr><th>{row[0]}</th>{''.join(map(_cell, row[1:]))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(content: str) -> str:
    return content if content.startswith("<td") else f"<td>{content}</td>"


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{''.join(parts)}</section>"


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>'


def _figures(*charts: str) -> str:
    return f'<div class="figures">{"".join(charts)}</div>'


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
    return (
        f'<h1>{_text(title)}</h1><p>{_text(scenario["description"])}</p><p class="soft">{_text(" · ".join(facts))}</p>'
    )


def _verdict(found: Mapping[str, Any]) -> str:
    """The first line of the page."""
    if found["passed"] and not found["overloaded"]:
        return '<p class="verdict passed">Passed</p>'
    lines = [f"Overloaded: {text}" for text in found["overloaded"]] + [f"Failed: {text}" for text in found["failed"]]
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    note = "Latencies of an overloaded server are of its queue, not of its methods." if found["overloaded"] else ""
    return f'<div class="verdict failed"><ul>{items}</ul><span>{note}</span></div>'


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    items = "".join(f"<li>{_text(warning)}</li>" for warning in warnings)
    return f'<div class="warnings"><p>Read with care</p><ul>{items}</ul></div>'


def _findings(report: Report) -> str:
    comparisons = report["summary"]["comparisons"]
    kept = report["summary"]["kept_slo"]
    items = [_finding(row, len({one["level"] for one in comparisons}) > 1) for row in comparisons]
    for name, level in kept.items():
        if name and (level is not None or len(report["summary"]["stages"]) > 1):
            said = "held at no level that was run" if level is None else f"held up to {level:g}{load_unit_of(report)}"
            items.append(f"<b>{_text(name)}</b>: the SLO {said}{_knee(report, name)}.")
    if not items:
        return ""
    note = (
        "Ratios are paired, prompt by prompt; below 1x is faster. Brackets are bootstrap intervals over blocks of "
        f"prompts, as wide as it takes for all {len(comparisons)} comparisons to hold at 95 %; McNemar's p is Holm's. "
        f"Fewer than {LEAST_CLUSTERS} prompts, or prompts that all agree, have none."
    )
    return _section("In short", f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>", _note(note))


def _knee(report: Report, name: str) -> str:
    found = report["summary"]["saturation"].get(name)
    if found is None or found["goodput_per_second"] is None:
        return ""
    return (
        f", with a goodput of {found['goodput_per_second']:.3g}/s; the most, {found['peak_goodput']:.3g}/s, was at "
        f"{found['knee']:g}{load_unit_of(report)}"
    )


def _finding(row: Mapping[str, Any], name_level: bool) -> str:
    name = f"<b>{_text(row['method'])}</b> against {_text(row['baseline'])}"
    if name_level:
        name += f" at {count_or_dash(row['level'])}"
    if not row["pairs"]:
        return f"{name}: no pair of requests succeeded."
    parts = [
        f"time to the first token {_ratio(row['ttft_ratio'])}",
        f"time per token {_ratio(row['tpot_ratio'])}",
    ]
    if row["score_difference"]["value"] is not None:
        parts.append(
            f"score {interval_in_words(row['score_difference'], '{:+.3f}')} "
            f"(only {_text(row['baseline'])} right: {row['only_first_right']}, only {_text(row['method'])}: "
            f"{row['only_second_right']}; McNemar p = {row['mcnemar_p']:.3f})"
        )
    parts.append(f"same text in {percent(row['same_text_share'])} of {row['pairs']} pairs")
    return f"{name}: {'; '.join(parts)}."


def _ratio(found: Mapping[str, Any]) -> str:
    text = interval_in_words(found, "{:.2f}x")
    return f'<span class="few">({text}: {found["pairs"]} pairs say nothing)</span>' if few_pairs(found, {}) else text


def _side_by_side(report: Report) -> str:
    levels: dict[float | None, list[Column]] = {}
    for stage in report["summary"]["stages"]:
        columns = [(method, one, stage) for method, one in stage["methods"].items()]
        levels.setdefault(stage["level"], []).extend(columns)
    if not levels:
        return ""
    tables = []
    for level, columns in levels.items():
        title = f"<h3>{level:g}{load_unit_of(report)}</h3>" if level is not None and len(levels) > 1 else ""
        tables.append(f"<div>{title}{_columns(report, columns)}</div>")
    needed = ", ".join(f"p{one:g} {samples_needed(one)}" for one in PERCENTILES)
    note = (
        "Paired prompts only, the same ones for every method, where the scenario has any. "
        f"Latency counts from the intended time of a request. Percentiles need enough requests ({needed}); with fewer "
        "they are not shown; brackets are 95 % intervals, in which requests of a queue, which depend on one another, "
        "count as fewer. Goodput: requests a second that met every limit; right goodput: those of them that were "
        "answered right. Density: keys read of those in reach, from the server's metrics."
    )
    return _section("Methods side by side", f'<div class="tables">{"".join(tables)}</div>', _note(note))


def _columns(report: Report, columns: Sequence[Column]) -> str:
    extras = report["run"]["scenario"]["methods"]
    if not columns:
        return '<p class="missing">no request was counted</p>'

    def row(name: str, cell: Callable[[Mapping[str, Any]], str]) -> list[str]:
        return [name, *(cell(one) for _, one, _ in columns)]

    rows = [
        row("succeeded", lambda one: f"{one['succeeded']}<small>of {one['requests']}</small>"),
        row("score", _score),
        *(
            row(f"{label} p{one:g}", _percentile(key, one, form))
            for label, key, form in (
                ("TTFT s", "ttft_seconds", seconds),
                ("TPOT ms", "tpot_seconds", milliseconds),
                ("gap between tokens ms", "gap_seconds", milliseconds),
                ("end to end s", "latency_seconds", seconds),
            )
            for one in PERCENTILES
            if any(found[key][f"p{one:g}"] is not None for _, found, _ in columns)
        ),
        row("TTFT s, mean", lambda one: seconds(one["ttft_seconds"]["mean"])),
        row("TPOT ms, mean", lambda one: milliseconds(one["tpot_seconds"]["mean"])),
        row("within the SLO", lambda one: percent(one["good_share"])),
        *(_throughput(row) if all(stage["alone"] for _, _, stage in columns) else []),
        ["density", *(_density(stage["density"], extras[method]) for method, _, stage in columns)],
    ]
    return _table(["", *(_text(method) for method, _, _ in columns)], rows)


def _throughput(row: Callable[[str, Callable[[Mapping[str, Any]], str]], list[str]]) -> list[list[str]]:
    """Where a method had the server for itself; methods that mix share one throughput."""
    return [
        row("requests/s", lambda one: f"{one['requests_per_second']:.3f}"),
        row("output tokens/s", lambda one: f"{one['output_tokens_per_second']:.1f}"),
        row("goodput, 1/s", lambda one: f"{one['goodput_per_second']:.3f}"),
        row("right goodput, 1/s", lambda one: f"{one['right_goodput_per_second']:.3f}"),
    ]


def _together(report: Report) -> str:
    """Throughput of each stage."""
    rows = [
        [
            _text(stage["name"]),
            f"{stage['duration_seconds']:.0f}",
            f"{one['requests_per_second']:.3f}",
            f"{one['input_tokens_per_second']:.0f}",
            f"{one['output_tokens_per_second']:.1f}",
            f"{one['goodput_per_second']:.3f}",
            percent(one["good_share"]),
        ]
        for stage in report["summary"]["stages"]
        for one in [stage["together"]]
    ]
    header = ["load", "seconds", "requests/s", "input tokens/s", "output tokens/s", "goodput, 1/s", "within SLO"]
    note = "Of everything that ran at a load, whichever its method: methods that mix share the server's throughput."
    return _section("Throughput", _table(header, rows), _note(note)) if rows else ""


def _density(density: Mapping[str, float], extras: Mapping[str, Any]) -> str:
    return _text(density_of(density, extras)).replace(", ", "<br>")


def _score(one: Mapping[str, Any]) -> str:
    value, bracket, interval = score_in_words(one["score"]).partition(" [")
    return f"{value}<small>[{interval}</small>" if bracket else value


def _percentile(key: str, percentile: float, form: Callable[[float | None], str]) -> Callable[[Mapping[str, Any]], str]:
    def cell(one: Mapping[str, Any]) -> str:
        value, bracket, interval = with_interval(one[key], f"p{percentile:g}", form).partition(" [")
        return f"{value}<small>[{interval}</small>" if bracket else value

    return cell


def _workloads(report: Report) -> str:
    """All that was sent, background too; nothing new where there is one workload."""
    stages = report["summary"]["stages"]
    if len(report["run"]["scenario"]["workloads"]) < 2:
        return ""
    rows = [
        [
            _text(name if len(stages) < 2 else f"{name}, {stage['name']}"),
            f"{one['succeeded']}<small>of {one['requests']}</small>",
            seconds(one["ttft_seconds"]["p50"]),
            milliseconds(one["tpot_seconds"]["p50"]),
            percent(one["good_share"]),
        ]
        for stage in stages
        for name, one in stage["workloads"].items()
    ]
    return _section("By workload", _table(["", "succeeded", "TTFT p50 s", "TPOT p50 ms", "within SLO"], rows))


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
    charts = [
        chart("Time to the first token", _measured(report, ttft_seconds, 1), "TTFT, s", "share of requests", (0, 1)),
        chart("Time per token", _measured(report, tpot_seconds, 1e-3), "TPOT, ms", "share of requests", (0, 1)),
    ]
    if _levels(report) > 1:
        charts += [
            _over_level(report, "TTFT at the median", "TTFT p50, s", lambda one: one["ttft_seconds"]["p50"]),
            _over_level(report, "TPOT at the median", "TPOT p50, ms", _tpot_milliseconds),
        ]
    return _section("Latency", _figures(*charts))


def _tpot_milliseconds(one: Mapping[str, Any]) -> float | None:
    value = one["tpot_seconds"]["p50"]
    return None if value is None else value * 1e3


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
    slo = report["run"]["scenario"]["slo"]
    by_length = slo["ttft_seconds_per_1000_tokens"]
    limits = (
        f"Good: TTFT within {slo['ttft_seconds']:g} s"
        + (f" and {by_length:g} s for each 1000 input tokens" if by_length else "")
        + f", TPOT within {slo['tpot_seconds'] * 1e3:g} ms. A level holds while {slo['share']:.0%} of its requests are."
    )
    charts = [
        _over_level(report, "Goodput", "good requests a second", lambda one: one["goodput_per_second"]),
        _over_level(report, "Share of good requests", "share", lambda one: one["good_share"]),
    ]
    return _section("Goodput against load", _figures(*charts), _note(limits))


def _quality(report: Report) -> str:
    charts = [
        _pareto(report, "Quality against TTFT", "ttft_seconds", "TTFT p50, s", 1),
        _pareto(report, "Quality against TPOT", "tpot_seconds", "TPOT p50, ms", 1e-3),
    ]
    note = "Up and to the left is better. A point for each method and level; bars are 95 % intervals of the score."
    scored = any(one["score"]["count"] for stage in report["summary"]["stages"] for one in stage["methods"].values())
    return _section("Quality against speed", _figures(*charts), _note(note)) if scored else ""


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
                    f"{_text(comparison['method'])}{level}",
                    f"{label}<small>{one['pairs']} pairs</small>",
                    _with_interval(one["ttft_ratio"], "{:.2f}x"),
                    _with_interval(one["tpot_ratio"], "{:.2f}x"),
                    _with_interval(one["score_difference"], "{:+.3f}"),
                ]
            )
    header = ["method", "input tokens", "TTFT", "TPOT", "score"]
    note = (
        "Against the same prompts dense: where TTFT falls below 1x, the method begins to pay. In grey and parentheses: "
        f"fewer than {LEAST_CLUSTERS} pairs, which say nothing."
    )
    return _section("By length of the prompt", _table(header, rows), _note(note)) if rows else ""


def _with_interval(found: Mapping[str, Any], form: str) -> str:
    """Of few pairs it is grey and in parentheses."""
    value, bracket, interval = interval_in_words(found, form).partition(" [")
    text = f"{value}<small>[{interval}</small>" if bracket else value
    return f'<td class="few">({text})</td>' if few_pairs(found, {}) else text


def _server(report: Report) -> str:
    metrics = report["metrics"]
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
        )
    ]
    missing = []
    for number, (name, points) in enumerate(time_series(metrics).items()):
        if points is None:
            missing.append(name)
        else:
            charts.append(chart(name, [Series(name, points, number, marked=False)], SINCE_START, ""))
    parts = [_figures(*charts)]
    if missing:
        parts.append(_note(f"Missing from /metrics: {', '.join(missing)}."))
    failed = sum("error" in reading for reading in metrics)
    if failed:
        parts.append(_note(f"{failed} of {len(metrics)} readings of /metrics failed."))
    return _section("The server meanwhile", *parts, _fallbacks(report))


def _fallbacks(report: Report) -> str:
    readings = series_of(report["metrics"], 0, float("inf"))
    rows = [
        [_text(one["method"]), _text(one["phase"]), _text(one["reason"].replace("_", " ")), f"{one['count']:.0f}"]
        for one in fallbacks(readings)
    ]
    note = "Chunks and decode steps that asked for a method and ran dense, warm-up included."
    return f"<h3>Fallbacks</h3>{_table(['method', 'phase', 'reason', 'steps'], rows)}{_note(note)}" if rows else ""


def _failures(report: Report) -> str:
    found: dict[tuple[str, str], list[Request]] = {}
    for stage in report["stages"]:
        for request in stage["requests"]:
            if failed(request):
                found.setdefault((request["status"], request["method"]), []).append(request)
    if not found:
        return _section("Failures", "<p>None.</p>")
    rows = [
        [
            _text(status.replace("_", " ")),
            _text(method),
            str(len(some)),
            f"{some[0]['end_seconds']:.1f} to {some[-1]['end_seconds']:.1f}",
            _what_it_means(status, some[0]),
        ]
        for (status, method), some in sorted(found.items(), key=lambda item: -len(item[1]))
    ]
    header = ["failure", "method", "requests", "from - to, s", "meaning, and what the first one said"]
    return _section("Failures", _table(header, rows), _note("Warm-up included. Nothing was sent again."))


def _what_it_means(status: str, request: Request) -> str:
    said = f'<span class="soft">{_text(request["detail"])}</span>'
    return f'<td class="text">{_text(FAILURES.get(status, ""))} {said}</td>'


def _client(report: Report) -> str:
    rows = []
    for stage in report["summary"]["stages"]:
        client = stage["client"]
        if client is None:
            continue
        lag = client["lag_seconds"]
        rows.append(
            [
                _text(stage["name"]),
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
    note = "A client that is busy or late measures itself. Sessions of several turns send several requests."
    return _section("The client itself", _table(header, rows), _note(note)) if rows else ""


def _settings(report: Report) -> str:
    shown = {key: value for key, value in report["run"]["scenario"].items() if key != "description"}
    scenario = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=100)
    note = (
        f"Tokens are counted by {counting_in_words(report['summary']['counted_by'])}. "
        "report.json holds every request and the whole schedule; journal.jsonl is what it was made from."
    )
    return _section(
        "Settings", f"<details><summary>Scenario</summary><pre>{_text(scenario)}</pre></details>", _note(note)
    )
