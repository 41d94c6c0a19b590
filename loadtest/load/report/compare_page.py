"""The page of a comparison: any number of runs beside one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import yaml

from loadtest.load.report.chart import Series, chart
from loadtest.load.report.markup import document, figures, folded, note, section, table, text, warnings
from loadtest.load.report.statistics import LEAST_CLUSTERS
from loadtest.load.report.summary import Report
from loadtest.load.report.tables import Group, holding, measured, percentile_of, ratios
from loadtest.load.report.words import load_unit_of, slo_in_words

TITLE = "Load tests compared"


def page(reports: Mapping[str, Report], places: Mapping[str, str], found: Mapping[str, Any]) -> str:
    """The page.

    Args:
        reports: runs with their `summary`, by name.
        places: where each run lies, by its name.
        found: by `loadtest.load.report.compare`.
    """
    return document(
        TITLE,
        [
            f"<h1>{TITLE}</h1>",
            _runs(reports, places),
            warnings(found["remarks"]),
            _ratios(reports, found),
            _saturation(reports),
            _measured(reports),
            _charts(reports),
            _settings(reports),
        ],
    )


def _runs(reports: Mapping[str, Report], places: Mapping[str, str]) -> str:
    rows = []
    for name, report in reports.items():
        run, verdict = report["run"], report["summary"]["verdict"]
        state = "passed" if verdict["passed"] else "failed"
        rows.append(
            [
                f"<b>{name}</b>",
                f'<td class="text">{text(places[name])}</td>',
                f'<td class="{state}">{state}{", overloaded" if verdict["overloaded"] else ""}</td>',
                text(run["scenario_name"]),
                text(run["model"]),
                text(run["server_version"] or "-"),
                text(run["started"]),
            ]
        )
    return table(["", "run", "verdict", "scenario", "model", "server", "started"], rows)


def _ratios(reports: Mapping[str, Report], found: Mapping[str, Any]) -> str:
    if not found["rows"]:
        return section("Ratios", "<p>The runs have no load and method in common.</p>")
    base = next(iter(reports.values()))
    rows = [
        (_name(base, f"{row['second']} : {row['first']}, {row['method']}", row["level"]), row)
        for row in sorted(found["rows"], key=lambda row: (row["method"], row["level"] or 0))
    ]
    said = (
        "Below 1x the first-named run is faster. Brackets are 95 % intervals for all rows together; McNemar's p is "
        "Holm's. Runs that sent the same prompts are compared in pairs; in grey and parentheses: fewer than "
        f"{LEAST_CLUSTERS} pairs, which say nothing."
    )
    return section("Ratios", ratios(rows), note(said))


def _name(report: Report, name: str, level: float | None) -> str:
    return text(name) if level is None else f"{text(name)}<small>{level:g}{load_unit_of(report)}</small>"


def _saturation(reports: Mapping[str, Report]) -> str:
    """Of runs that have several loads."""
    by_unit: dict[str, list[tuple[str, Mapping[str, Any], float | None]]] = {}
    for name, report in reports.items():
        summary = report["summary"]
        for method, one in summary["saturation"].items():
            if len({stage["level"] for stage in summary["stages"]}) > 1:
                row = (text(f"{name}, {method}"), one, summary["sustained"][method])
                by_unit.setdefault(load_unit_of(report), []).append(row)
    limits = {name: slo_in_words(report["run"]["scenario"]["slo"]) for name, report in reports.items()}
    said = " ".join(f"{name}: {words}" for name, words in limits.items())
    parts = [holding(rows, unit) for unit, rows in by_unit.items()]
    return section("Load within the SLO", *parts, note(said)) if parts else ""


def _measured(reports: Mapping[str, Report]) -> str:
    rows = [
        (_name(report, f"{name}, {method}", stage["level"]), one, stage, report["run"]["scenario"]["methods"][method])
        for name, report in reports.items()
        for stage in report["summary"]["stages"]
        for method, one in stage["methods"].items()
    ]
    # What is to be compared stands together.
    rows.sort(key=lambda row: (row[2]["level"] or 0, row[0].partition(", ")[2]))
    return section("Runs side by side", measured(rows)) if rows else ""


def _charts(reports: Mapping[str, Report]) -> str:
    """Over the load, if all count it alike and there are several."""
    units = {load_unit_of(report) for report in reports.values()}
    levels = {stage["level"] for report in reports.values() for stage in report["summary"]["stages"]} - {None}
    if len(units) > 1 or len(levels) < 2:
        return ""
    (unit,) = units
    return section(
        "Over the load",
        figures(
            _over_load(reports, unit, "TTFT at the median", "TTFT p50, s", percentile_of("ttft_seconds", "p50")),
            _over_load(reports, unit, "TPOT at the median", "TPOT p50, ms", percentile_of("tpot_seconds", "p50", 1e-3)),
            _over_load(reports, unit, "Gaps at p99", "gap p99, ms", percentile_of("gap_seconds", "p99", 1e-3)),
            _over_load(reports, unit, "End to end", "p50, s", percentile_of("latency_seconds", "p50")),
            _over_load(reports, unit, "Goodput", "good requests a second", lambda one: one["goodput_per_second"]),
            _over_load(reports, unit, "Share of good requests", "share", lambda one: one["good_share"]),
        ),
    )


def _over_load(
    reports: Mapping[str, Report], unit: str, title: str, label: str, value: Callable[[Group], float | None]
) -> str:
    points: dict[str, list[tuple[float, float]]] = {}
    for name, report in reports.items():
        for stage in report["summary"]["stages"]:
            for method, one in stage["methods"].items():
                place = points.setdefault(f"{name}, {method}", [])
                if stage["level"] is not None and (found := value(one)) is not None:
                    place.append((stage["level"], found))
    series = [Series(name, sorted(some), number) for number, (name, some) in enumerate(points.items())]
    return chart(title, series, f"load,{unit}", label)


def _settings(reports: Mapping[str, Report]) -> str:
    scenarios = {
        name: yaml.safe_dump(report["run"]["scenario"], sort_keys=False, allow_unicode=True, width=100)
        for name, report in reports.items()
    }
    return section(
        "Settings", *(folded(f"Scenario of {name}", f"<pre>{text(said)}</pre>") for name, said in scenarios.items())
    )
