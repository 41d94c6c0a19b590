"""What a run comes to: whether it passed, and whether its numbers are those of an overloaded server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from loadtest.load.reply import CANCELLED
from loadtest.load.scenario import OpenLoad, Scenario, Slo
from loadtest.load.thresholds import COMPARED, OVERLOADED, TIMED, Threshold, parse_threshold

# Requests that a server with room to spare would not have left so.
SIGNS_OF_OVERLOAD = ("timeout_first_token", "timeout_stream", "http_429", "http_503")
MOST_TURNED_AWAY = 0.05
MOST_BACKLOG = 0.25
MOST_DRIFT = 1.5
ROUNDING = 1e-3


def overload(stage: Mapping[str, Any]) -> str | None:
    """Why a stage's numbers are those of a queue, none if they are not."""
    together = stage["together"]
    turned_away = sum(together["failures"].get(status, 0) for status in SIGNS_OF_OVERLOAD)
    if turned_away > MOST_TURNED_AWAY * together["requests"]:
        return f"{turned_away} of {together['requests']} requests timed out or were turned away"
    backlog, drift = stage["backlog"], stage["drift"]
    if backlog is not None and backlog > MOST_BACKLOG and drift is not None and drift > MOST_DRIFT:
        return (
            f"when the last request arrived, {backlog:.0%} of all were unanswered, and the time to the first token had "
            f"grown {drift:.1f}-fold"
        )
    return None


def verdict(
    stages: Sequence[Mapping[str, Any]],
    comparisons: Sequence[Mapping[str, Any]],
    sustained: Mapping[str, float | None],
    run: Mapping[str, Any],
    scenario: Scenario,
) -> dict[str, Any]:
    """Whether a run passed.

    Args:
        stages, comparisons, sustained: of the summary.
        run: from the journal.
        scenario: whose `fail_on` holds the conditions.

    Returns:
        ``passed``; ``failed``: a sentence for each reason; ``overloaded``: a sentence for each such stage.
    """
    failed = [f"{one['name']} was not run: {one['reason']}" for one in run["refused"]]
    searched = isinstance(scenario.load, OpenLoad) and scenario.load.search is not None
    # A search stops where it has found what it looks for.
    failed += [f"{one['name']} was stopped: {one['stopped']}" for one in stages if one["stopped"] and not searched]
    if run["end"]["interrupted"]:
        failed.append("the run did not come to its end")
    if not any(stage["together"]["requests"] for stage in stages):
        failed.append("nothing was measured")
    failed += _missed_rate(sustained, scenario.slo)
    for text in scenario.fail_on:
        failed += _reasons(parse_threshold(text), stages, comparisons, run)
    overloaded = [f"{stage['name']}: {stage['overload']}" for stage in stages if stage["overload"]]
    return {"passed": not failed, "failed": failed, "overloaded": overloaded}


def _missed_rate(sustained: Mapping[str, float | None], slo: Slo) -> Iterator[str]:
    wanted = slo.requests_per_second
    if wanted is None:
        return
    for name, most in sustained.items():
        # The journal rounds times.
        if most is None or most < wanted * (1 - ROUNDING):
            said = "at no load that was run" if most is None else f"up to {most:.3g} requests/s"
            yield f"slo.requests_per_second {wanted:g}: {name} held the SLO {said}"


def _reasons(
    threshold: Threshold,
    stages: Sequence[Mapping[str, Any]],
    comparisons: Sequence[Mapping[str, Any]],
    run: Mapping[str, Any],
) -> Iterator[str]:
    if threshold.measure == "failures" and threshold.method is None:
        # Those of the warm-up too, of which nothing else is judged.
        statuses = [one["status"] for stage in run["stages"] for one in stage["requests"]]
        failures = sum(status not in ("ok", CANCELLED, "interrupted") for status in statuses)
        if threshold.holds(failures):
            yield f"{threshold.text}: {failures} requests failed, of {len(statuses)} with the warm-up"
        return
    if threshold.measure == OVERLOADED:
        yield from (f"{OVERLOADED}: {stage['name']}" for stage in stages if stage["overload"])
        return
    for where, value in _values(threshold, stages, comparisons):
        # What nobody knows has not passed.
        if value is None:
            yield f"{threshold.text}: not known for {where}, such as for want of requests"
        elif threshold.holds(value):
            yield f"{threshold.text}: {value:.4g}, {where}"


def _values(
    threshold: Threshold,
    stages: Sequence[Mapping[str, Any]],
    comparisons: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, float | None]]:
    method, measure = threshold.method, threshold.measure
    if measure in COMPARED:
        for row in comparisons:
            if method in (None, row["method"]):
                yield f"{row['method']} against {row['baseline']}", row[measure]["value"]
        return
    for stage in stages:
        where = stage["name"] if method is None else f"{method} at {stage['name']}"
        group = stage["together"] if method is None else stage["all_by_method"].get(method)
        if group is not None:
            yield where, _value(group, threshold)


def _value(group: Mapping[str, Any], threshold: Threshold) -> float | None:
    measure = threshold.measure
    failures = group["requests"] - group["succeeded"]
    if measure == "failures":
        return float(failures)
    if measure == "failed_share":
        return failures / group["requests"] if group["requests"] else None
    if measure in TIMED:
        return cast(float | None, group[measure][threshold.part])
    return cast(float | None, group[measure]["mean"] if measure == "score" else group[measure])
