"""Two runs side by side: paired where they sent the same prompts, independent where they did not."""

from __future__ import annotations

from typing import Any

from loadtest.load.measures import Request, counted, tpot_seconds, ttft_seconds
from loadtest.load.plan import WARM_UPS
from loadtest.load.report.statistics import independent_difference, independent_ratio
from loadtest.load.report.summary import Report, by_prompt, compare_methods


def compare(first: Report, second: Report) -> dict[str, Any]:
    """How the second run differs from the first.

    Returns:
        ``rows``, one for each level and method that both have, as `compare_methods` returns them and with `paired`;
        ``remarks``: what else differs between the runs.
    """
    rows = []
    firsts, seconds = _requests(first), _requests(second)
    for (level, method), some in firsts.items():
        others = seconds.get((level, method))
        if others is None:
            continue
        same_prompts = {key: one for key, one in some.items() if key in others}
        row = (
            compare_methods(list(same_prompts.values()), [others[key] for key in same_prompts])
            if same_prompts
            else _independent(list(some.values()), list(others.values()))
        )
        rows.append({"level": level, "method": method, "paired": bool(same_prompts), **row})
    return {"rows": rows, "remarks": _remarks(first, second)}


def _requests(report: Report) -> dict[tuple[Any, str], dict[tuple[str, str, int], Request]]:
    """Counted requests by level and method; there by pair, digest of the prompt, and turn."""
    found: dict[tuple[Any, str], dict[tuple[str, str, int], Request]] = {}
    for stage in report["stages"]:
        for request in counted(stage["requests"]) if stage["name"] not in WARM_UPS else ():
            digest = stage["schedule"][request["session"]]["prompt_digest"]
            group = found.setdefault((stage["level"], request["method"]), {})
            group[request["pair"], digest, request["turn"]] = request
    return found


def _independent(first: list[Request], second: list[Request]) -> dict[str, Any]:
    first, second = ([one for one in some if one["status"] == "ok"] for some in (first, second))
    return {
        "pairs": 0,
        "ttft_ratio": independent_ratio(by_prompt(first, ttft_seconds), by_prompt(second, ttft_seconds)),
        "tpot_ratio": independent_ratio(by_prompt(first, _pace), by_prompt(second, _pace)),
        "score_difference": independent_difference(
            by_prompt(first, lambda one: one["score"]), by_prompt(second, lambda one: one["score"])
        ),
        "only_first_right": None,
        "only_second_right": None,
        "mcnemar_p": None,
        "same_text_share": None,
    }


def _pace(request: Request) -> float | None:
    """The time per token, unless all came at once."""
    return tpot_seconds(request) or None


def _remarks(first: Report, second: Report) -> list[str]:
    a, b = first["run"], second["run"]
    found = [
        f"{what} differ: {a[key]} and {b[key]}."
        for key, what in (("model", "Models"), ("server_version", "The servers' versions"), ("url", "URLs"))
        if a[key] != b[key]
    ]
    settings = [key for key in a["scenario"] if a["scenario"][key] != b["scenario"].get(key)]
    if settings:
        found.append(f"The scenarios differ in: {', '.join(settings)}.")
    for name, report in (("A", first), ("B", second)):
        found += [f"{name}: {warning}" for warning in report["summary"]["warnings"]]
    return found
