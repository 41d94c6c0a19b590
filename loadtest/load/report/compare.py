"""Runs side by side: paired where they sent the same prompts, independent where they did not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loadtest.load.measures import Request, counted, latency_seconds, tpot_seconds, ttft_seconds
from loadtest.load.plan import WARM_UPS
from loadtest.load.report.statistics import (
    confidence_of_each,
    corrected,
    independent_difference,
    independent_ratio,
)
from loadtest.load.report.summary import Report, by_prompt, compare_methods


def compare(reports: Mapping[str, Report]) -> dict[str, Any]:
    """How runs differ from the first of them.

    Args:
        reports: by the runs' names.

    Returns:
        ``rows``, one for each level and method of the first run and each other run that has them, as `compare_methods`
        returns them and with `paired`, `first` and `second`, which name the runs; intervals and p-values are corrected
        for the number of rows; ``remarks``: what else differs between the runs.
    """
    (base, first), *others = reports.items()
    requests = {name: _requests(report) for name, report in reports.items()}
    together = [
        (name, key, some, requests[name][key])
        for key, some in requests[base].items()
        for name, _ in others
        if key in requests[name]
    ]
    confidence = confidence_of_each(len(together))
    rows = []
    for name, (level, method), some, theirs in together:
        same_prompts = {key: one for key, one in some.items() if key in theirs}
        row = (
            compare_methods(list(same_prompts.values()), [theirs[key] for key in same_prompts], confidence)
            if same_prompts
            else _independent(list(some.values()), list(theirs.values()), confidence)
        )
        about = {"level": level, "method": method, "first": base, "second": name, "paired": bool(same_prompts)}
        rows.append({**about, **row})
    ps = corrected([row["mcnemar_p"] for row in rows])
    rows = [{**row, "mcnemar_p": p} for row, p in zip(rows, ps, strict=True)]
    remarks = [remark for name, report in others for remark in _differences(base, first, name, report)]
    remarks += [f"{name}: {warning}" for name, report in reports.items() for warning in report["summary"]["warnings"]]
    return {"rows": rows, "remarks": remarks}


def _requests(report: Report) -> dict[tuple[Any, str], dict[tuple[str, str, int], Request]]:
    """Counted requests by level and method; there by pair, digest of the prompt, and turn."""
    found: dict[tuple[Any, str], dict[tuple[str, str, int], Request]] = {}
    for stage in report["stages"]:
        for request in counted(stage["requests"]) if stage["name"] not in WARM_UPS else ():
            digest = stage["schedule"][request["session"]]["prompt_digest"]
            group = found.setdefault((stage["level"], request["method"]), {})
            group[request["pair"], digest, request["turn"]] = request
    return found


def _independent(first: list[Request], second: list[Request], confidence: float) -> dict[str, Any]:
    first, second = ([one for one in some if one["status"] == "ok"] for some in (first, second))
    return {
        "pairs": 0,
        "ttft_ratio": independent_ratio(by_prompt(first, ttft_seconds), by_prompt(second, ttft_seconds), confidence),
        "tpot_ratio": independent_ratio(by_prompt(first, _pace), by_prompt(second, _pace), confidence),
        "latency_ratio": independent_ratio(
            by_prompt(first, latency_seconds), by_prompt(second, latency_seconds), confidence
        ),
        "score_difference": independent_difference(
            by_prompt(first, lambda one: one["score"]), by_prompt(second, lambda one: one["score"]), confidence
        ),
        "only_first_right": None,
        "only_second_right": None,
        "mcnemar_p": None,
        "same_text_share": None,
    }


def _pace(request: Request) -> float | None:
    """The time per token, unless all came at once."""
    return tpot_seconds(request) or None


def _differences(base: str, first: Report, name: str, second: Report) -> list[str]:
    a, b = first["run"], second["run"]
    found = [
        f"{what} of {base} and {name} differ: {a[key]} and {b[key]}."
        for key, what in (("model", "Models"), ("server_version", "The servers' versions"), ("url", "URLs"))
        if a[key] != b[key]
    ]
    settings = [key for key in a["scenario"] if a["scenario"][key] != b["scenario"].get(key)]
    if settings:
        found.append(f"The scenarios of {base} and {name} differ in: {', '.join(settings)}.")
    return found
