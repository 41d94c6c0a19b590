"""Tables that the page of a run and the comparison of runs share: methods x levels, ratios, and the load that holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from loadtest.load.report.markup import folded, table, text, with_small
from loadtest.load.report.statistics import PERCENTILES
from loadtest.load.report.words import (
    count_or_dash,
    density_of,
    few_pairs,
    interval_in_words,
    milliseconds,
    percent,
    rate,
    score_in_words,
    seconds,
    with_interval,
)

Group = Mapping[str, Any]
"""What `loadtest.load.report.summary.describe` says of some requests."""

LATENCIES: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("TTFT s", "ttft_seconds", seconds),
    ("TPOT ms", "tpot_seconds", milliseconds),
    ("gap ms", "gap_seconds", milliseconds),
    ("end to end s", "latency_seconds", seconds),
)
# Of each latency; the rest is folded.
SHOWN = {"ttft_seconds": (50, 95), "tpot_seconds": (50, 95), "gap_seconds": (99,), "latency_seconds": (50, 95)}

THROUGHPUT = {
    "requests_per_second": "requests",
    "output_tokens_per_second": "output tokens",
    "goodput_per_second": "goodput",
    "right_goodput_per_second": "right goodput",
}


def measured(rows: Sequence[tuple[str, Group, Mapping[str, Any], Mapping[str, Any]]]) -> str:
    """What was measured, with all percentiles folded below.

    Args:
        rows: the row's name as HTML; what is known of its requests; its stage; the method's request extras.
    """
    header = ["", "succeeded", "score"]
    header += [f"{label}<small>p{one:g}</small>" for label, key, _ in LATENCIES for one in SHOWN[key]]
    header += ["within SLO", *(f"{name}<small>a second</small>" for name in THROUGHPUT.values()), "density"]
    cells = [
        [
            name,
            f"{one['succeeded']}<small>of {one['requests']}</small>",
            with_small(score_in_words(one["score"])),
            *(with_small(with_interval(one[key], f"p{p:g}", form)) for _, key, form in LATENCIES for p in SHOWN[key]),
            percent(one["good_share"]),
            *_throughput(one, stage),
            text(density_of(stage["density"], extras)).replace(", ", "<br>"),
        ]
        for name, one, stage, extras in rows
    ]
    return table(header, cells) + folded("All percentiles and means", _percentiles([row[:2] for row in rows]))


def _throughput(one: Group, stage: Mapping[str, Any]) -> list[str]:
    """Where a method had the server for itself; methods that mix share one throughput."""
    return [rate(one[key]) if stage["alone"] else "-" for key in THROUGHPUT]


def _percentiles(rows: Iterable[tuple[str, Group]]) -> str:
    header = ["", "measure", "mean", *(f"p{one:g}" for one in PERCENTILES)]
    cells = [
        [
            name,
            label,
            form(one[key]["mean"]),
            *(with_small(with_interval(one[key], f"p{percentile:g}", form)) for percentile in PERCENTILES),
        ]
        for name, one in rows
        for label, key, form in LATENCIES
    ]
    return table(header, cells)


def ratios(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Ratios and differences; those of few pairs are grey and in parentheses.

    Args:
        rows: the row's name as HTML, and the comparison.
    """
    header = ["", "pairs", "TTFT", "TPOT", "end to end", "score", "only first right", "only second", "McNemar p"]
    cells = [
        [
            name,
            "not paired" if row.get("paired") is False else str(row["pairs"]),
            *(ratio_cell(row[key], row, "{:.2f}x") for key in ("ttft_ratio", "tpot_ratio", "latency_ratio")),
            ratio_cell(row["score_difference"], row, "{:+.3f}"),
            *(_count(row[key]) for key in ("only_first_right", "only_second_right")),
            "-" if row["mcnemar_p"] is None else f"{row['mcnemar_p']:.3f}",
            percent(row["same_text_share"]),
        ]
        for name, row in rows
    ]
    return table([*header, "same text"], cells)


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def percentile_of(key: str, percentile: str, unit_seconds: float = 1.0) -> Callable[[Group], float | None]:
    """Reads a percentile of a latency, such as ``p50`` of ``ttft_seconds``, in units of so many seconds."""

    def read(one: Group) -> float | None:
        value = one[key][percentile]
        return None if value is None else float(value) / unit_seconds

    return read


def ratio_cell(found: Mapping[str, Any], row: Mapping[str, Any], form: str) -> str:
    """A ratio or difference with its interval; of few pairs it is grey and in parentheses.

    Args:
        found: the ratio.
        row: the comparison that it belongs to.
        form: of its numbers, such as ``{:.2f}x``.
    """
    cell = with_small(interval_in_words(found, form))
    return f'<td class="few">({cell})</td>' if few_pairs(found, row) else cell


def holding(rows: Sequence[tuple[str, Mapping[str, Any], float | None]], unit: str) -> str:
    """Up to which load the SLO held.

    Args:
        rows: the row's name as HTML, its `saturation`, and the requests a second that it sustained.
        unit: of the load.
    """
    rates = [f"{name}<small>a second</small>" for name in ("requests", "goodput", "output tokens", "most goodput")]
    header = ["", f"holds the SLO<small>{unit}</small>", "breaks it", *rates]
    cells = [
        [
            name,
            "<b>none</b>" if one["level"] is None else count_or_dash(one["level"]),
            count_or_dash(one["breaks"]),
            rate(sustained),
            rate(one["goodput_per_second"]),
            rate(one["output_tokens_per_second"]),
            f"{rate(one['peak_goodput'])}<small>at {count_or_dash(one['knee'])}</small>",
        ]
        for name, one, sustained in rows
    ]
    return table(header, cells)
