"""Numbers of a report in the form that people read; what is not known is a dash."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loadtest.load.reply import FAILURES
from loadtest.load.report.statistics import LEAST_CLUSTERS

DASH = "-"
COUNTS = {
    "usage": "the usage that the server sends with every event",
    "token_ids": "the token ids that the server sends",
    "events": "events with text, since the server says nothing better",
}
"""What tells tokens from other events, by `loadtest.load.reply.Reply.counted_by`."""


def seconds(value: float | None) -> str:
    """Seconds with three digits that count."""
    return DASH if value is None else f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def rate(value_per_second: float | None) -> str:
    """Something a second, with three digits that count."""
    return seconds(value_per_second)


def milliseconds(value_seconds: float | None) -> str:
    """Seconds, shown in milliseconds."""
    if value_seconds is None:
        return DASH
    value = value_seconds * 1e3
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def with_interval(found: Mapping[str, Any], percentile: str, form: Callable[[float | None], str]) -> str:
    """A percentile with its interval, such as ``0.31 [0.29, 0.34]``."""
    interval = found["intervals"][percentile]
    value = form(found[percentile])
    return value if interval is None else f"{value} [{form(interval[0])}, {form(interval[1])}]"


def percent(share: float | None) -> str:
    """A share of one."""
    return DASH if share is None else f"{share:.0%}"


def load_unit_of(report: Mapping[str, Any]) -> str:
    """What a stage's level counts."""
    load = report["run"]["scenario"]["load"]
    if load["loop"] == "closed":
        return " sessions at once"
    return " of capacity" if load.get("capacity_shares") else " sessions/s"


def count_or_dash(value: float | None) -> str:
    """A level of load."""
    return DASH if value is None else f"{value:g}"


def score_in_words(score: Mapping[str, Any]) -> str:
    """A mean score with its interval."""
    if score["mean"] is None:
        return DASH
    interval = score["interval"]
    return f"{score['mean']:.3f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def few_pairs(found: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether a ratio is of so few pairs that it says nothing, whatever it is."""
    return row.get("paired") is not False and found["value"] is not None and found["pairs"] < LEAST_CLUSTERS


def interval_in_words(found: Mapping[str, Any], form: str) -> str:
    """A value with its interval, such as ``0.71x [0.68, 0.75]``."""
    if found["value"] is None:
        return DASH
    text = form.format(found["value"])
    if found["interval"] is None:
        return text
    low, high = (form.format(end).removesuffix("x") for end in found["interval"])
    return f"{text} [{low}, {high}]"


def density_of(density: Mapping[str, float], extras: Mapping[str, Any]) -> str:
    """What the server measured for the methods that a request's extras name: prefill, then decode."""
    named = [(phase, extras.get(f"sparse_{phase}", "dense")) for phase in ("prefill", "decode")]
    if all(method == "dense" for _, method in named):
        return "1"
    known = [f"{phase} {density[f'{phase}/{method}']:.2f}" for phase, method in named if f"{phase}/{method}" in density]
    return ", ".join(known) or "missing"


def counting_in_words(counted_by: Mapping[str, int]) -> str:
    """How it is known which events hold tokens, with the number of answers."""
    return "; ".join(f"{COUNTS[way]} ({count} answers)" for way, count in counted_by.items()) or "no token came"


def failures_in_words(failures: Mapping[str, int]) -> str:
    """Kinds of failure with their counts, the most frequent first."""
    ordered = sorted(failures.items(), key=lambda item: -item[1])
    return "; ".join(f"{count} {status.replace('_', ' ')}{_meaning(status)}" for status, count in ordered)


def _meaning(status: str) -> str:
    return f" ({FAILURES[status]})" if status in FAILURES else ""


def slo_in_words(slo: Mapping[str, Any]) -> str:
    """When a request is good, when a level holds, and which request rate is wanted."""
    by_length = slo["ttft_seconds_per_1000_tokens"]
    limits = [
        f"TTFT within {slo['ttft_seconds']:g} s"
        + (f" and {by_length:g} s for each 1000 input tokens" if by_length else ""),
        f"TPOT within {slo['tpot_seconds'] * 1e3:g} ms",
    ]
    if slo.get("gap_p99_seconds") is not None:
        limits.append(f"99 % of the gaps between tokens within {slo['gap_p99_seconds'] * 1e3:g} ms")
    if slo.get("latency_seconds") is not None:
        limits.append(f"the last token within {slo['latency_seconds']:g} s")
    wanted = slo.get("requests_per_second")
    return f"Good: {', '.join(limits)}. A level holds the SLO while {slo['share']:.0%} of its requests are good." + (
        f" Wanted: {wanted:g} requests a second." if wanted is not None else ""
    )
