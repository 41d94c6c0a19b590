"""A run, and the comparison of two, as Markdown tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loadtest.load.report.summary import Report
from loadtest.load.report.words import (
    count_or_dash,
    counting_in_words,
    density_of,
    failures_in_words,
    few_pairs,
    interval_in_words,
    load_unit_of,
    milliseconds,
    percent,
    rate,
    score_in_words,
    seconds,
    with_interval,
)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


RED, GREEN, GREY, PLAIN = "\x1b[1;31m", "\x1b[32m", "\x1b[2m", "\x1b[0m"


def _verdict(found: Mapping[str, Any], colours: bool) -> str:
    """What the run comes to; the words say it without colours too."""
    red, green, plain = (RED, GREEN, PLAIN) if colours else ("", "", "")
    lines = [f"{red}OVERLOADED: {text}.{plain}" for text in found["overloaded"]]
    lines += [f"{red}FAILED: {text}.{plain}" for text in found["failed"]]
    if found["overloaded"]:
        lines.append("Latencies of an overloaded server are of its queue, not of its methods.")
    return "\n".join(lines or [f"{green}PASSED{plain}"])


def table(report: Report, colours: bool = False) -> str:
    """The summary of a run.

    Args:
        report: of the run.
        colours: of a terminal.
    """
    summary = report["summary"]
    methods = report["run"]["scenario"]["methods"]
    rows = [
        [
            stage["name"],
            name,
            f"{one['succeeded']}/{one['requests']}",
            score_in_words(one["score"]),
            with_interval(one["ttft_seconds"], "p50", seconds),
            with_interval(one["ttft_seconds"], "p95", seconds),
            with_interval(one["tpot_seconds"], "p50", milliseconds),
            milliseconds(one["gap_seconds"]["p99"]),
            seconds(one["latency_seconds"]["p50"]),
            percent(one["good_share"]),
            density_of(stage["density"], methods[name]),
        ]
        for stage in summary["stages"]
        for name, one in stage["methods"].items()
    ]
    header = ["load", "method", "succeeded", "score", "TTFT p50 s", "p95 s", "TPOT p50 ms", "gap p99 ms"]
    header += ["end to end p50 s", "good", "density"]
    parts = [_verdict(summary["verdict"], colours), _table(header, rows) if rows else "No request was counted."]
    parts += [_throughput(stage) for stage in summary["stages"] if stage["together"]["requests"]]
    if len(summary["stages"]) > 1 and summary["saturation"]:
        parts.append(_saturation(summary, load_unit_of(report)))
    if summary["comparisons"]:
        against = [(f"{row['method']} against {row['baseline']}", row) for row in summary["comparisons"]]
        parts.append(_comparison_table(against, colours))
    shown = sum(one["requests"] for stage in summary["stages"] for one in stage["methods"].values())
    others = sum(stage["together"]["requests"] for stage in summary["stages"]) - shown
    if others:
        parts.append(f"Paired prompts only; the page also shows the {others} requests of other workloads.")
    if summary["cancelled"]:
        parts.append(f"{summary['cancelled']} requests were broken off, as the scenario asks; they are not counted.")
    if summary["failures"]:
        parts.append(f"Failures: {failures_in_words(summary['failures'])}.")
    parts.append(f"Tokens counted by {counting_in_words(summary['counted_by'])}.")
    parts += [_client(stage) for stage in summary["stages"] if stage["client"]]
    if summary["warnings"]:
        parts.append("\n".join(f"! {warning}" for warning in summary["warnings"]))
    return "\n\n".join(parts)


def _saturation(summary: Mapping[str, Any], unit: str) -> str:
    rows = [
        [
            name,
            count_or_dash(one["level"]),
            count_or_dash(one["breaks"]),
            rate(summary["sustained"][name]),
            rate(one["goodput_per_second"]),
            rate(one["output_tokens_per_second"]),
            f"{count_or_dash(one['knee'])} ({rate(one['peak_goodput'])}/s)",
        ]
        for name, one in summary["saturation"].items()
    ]
    header = [f"load:{unit}", "holds the SLO", "breaks it", "requests/s there", "goodput/s", "output tokens/s"]
    return _table([*header, "most goodput at"], rows)


def _throughput(stage: Mapping[str, Any]) -> str:
    """Of a whole stage: methods that share a server share its throughput."""
    one = stage["together"]
    offered = stage["offered_per_second"]
    due = "" if offered is None else f" of {rate(offered)} due"
    return (
        f"Throughput, {stage['name']}: {rate(one['requests_per_second'])} requests/s{due}, "
        f"{one['output_tokens_per_second']:.1f} output tokens/s, goodput {rate(one['goodput_per_second'])}/s"
        + ("." if stage["alone"] else ", all methods together.")
    )


def _client(stage: Mapping[str, Any]) -> str:
    client = stage["client"]
    text = (
        f"Client, {stage['name']}: {percent(client['cpu_share'])} of a core"
        + (f" by the busiest of {client['processes']} processes" if client["processes"] > 1 else "")
        + f", {client['peak_requests']} requests at once, "
        f"event loop {milliseconds(client['loop_lag_seconds']['most'])} ms late at most"
    )
    lag = client["lag_seconds"]
    if lag is None:
        return f"{text}."
    return f"{text}, requests sent {milliseconds(lag['mean'])} ms late on average, {milliseconds(lag['most'])} at most."


def _comparison_table(rows: Sequence[tuple[str, Mapping[str, Any]]], colours: bool) -> str:
    """Rows of too few pairs to say anything are grey, and their ratios in parentheses."""
    header = [
        "load",
        "compared",
        "pairs",
        "TTFT ratio",
        "TPOT ratio",
        "end to end ratio",
        "score difference",
        "McNemar p, corrected",
        "same text",
    ]
    cells = [
        [
            count_or_dash(row["level"]),
            name,
            "not paired" if row.get("paired") is False else str(row["pairs"]),
            *(_ratio(row[key], row) for key in ("ttft_ratio", "tpot_ratio", "latency_ratio")),
            interval_in_words(row["score_difference"], "{:+.3f}"),
            "-" if row["mcnemar_p"] is None else f"{row['mcnemar_p']:.3f}",
            percent(row["same_text_share"]),
        ]
        for name, row in rows
    ]
    lines = _table(header, cells).split("\n")
    grey = [False, False, *(few_pairs(row["ttft_ratio"], row) for _, row in rows)]
    return "\n".join(f"{GREY}{line}{PLAIN}" if dim and colours else line for line, dim in zip(lines, grey, strict=True))


def _ratio(found: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    text = interval_in_words(found, "{:.2f}x")
    return f"({text})" if few_pairs(found, row) else text


def comparison(found: Mapping[str, Any], colours: bool = False) -> str:
    """The comparison of runs.

    Args:
        found: by `loadtest.load.report.compare`.
        colours: of a terminal.
    """
    if not found["rows"]:
        return "The runs have no load and method in common."
    rows = [(f"{row['method']}: {row['second']} against {row['first']}", row) for row in found["rows"]]
    return "\n\n".join([_comparison_table(rows, colours), *found["remarks"]])
