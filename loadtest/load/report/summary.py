"""What a run's requests add up to: latency, throughput, goodput, quality and pairs, by stage and method."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from loadtest.load.measures import (
    Request,
    counted,
    failed,
    good_share,
    input_tokens,
    is_good,
    latency_seconds,
    sent_ttft_seconds,
    tpot_seconds,
    ttft_seconds,
)
from loadtest.load.plan import WARM_UPS
from loadtest.load.reply import CANCELLED
from loadtest.load.report.server_metrics import density, fallback_share, series_of
from loadtest.load.report.statistics import (
    CONFIDENCE,
    confidence_of_each,
    corrected,
    difference,
    interval_of_mean,
    mcnemar,
    percentiles,
    ratio,
)
from loadtest.load.report.verdict import MOST_DRIFT, overload, verdict
from loadtest.load.scenario import OpenLoad, Scenario, Slo

Report = Mapping[str, Any]
"""A run, as `loadtest.load.journal.read_journal` returns it, with its `summary`."""

# A client later or busier than this measures itself: the run says so.
MOST_LAG_SECONDS = 0.010
MOST_TAIL_LAG_SECONDS = 0.050
MOST_CPU_SHARE = 0.9
LEAST_SENT_SHARE = 0.95
MOST_FALLBACK_SHARE = 0.2
LEAST_DRIFT_REQUESTS = 10
NO_ADAPTER = "no adapter"


def _known(requests: Iterable[Request], measure: Callable[[Request], float | None]) -> list[float]:
    return [value for request in requests if (value := measure(request)) is not None]


def _sum(requests: Iterable[Request], key: str) -> int:
    return sum(request[key] or 0 for request in requests)


def describe(requests: Sequence[Request], slo: Slo, duration_seconds: float) -> dict[str, Any]:
    """Latency, throughput, goodput, quality and failures of requests.

    Args:
        requests: counted ones.
        slo: the limits.
        duration_seconds: of the time in which they ran.
    """
    ok = sorted((one for one in requests if one["status"] == "ok"), key=lambda one: one["intended_seconds"])
    good = [request for request in requests if is_good(request, slo)]
    scored = [request for request in ok if request["score"] is not None]
    duration = max(duration_seconds, 1e-9)
    return {
        "requests": len(requests),
        "succeeded": len(ok),
        "failures": dict(Counter(request["status"] for request in requests if request["status"] != "ok")),
        "ttft_seconds": percentiles(_known(ok, ttft_seconds)),
        "ttft_from_send_seconds": percentiles(_known(ok, sent_ttft_seconds)),
        "tpot_seconds": percentiles(_known(ok, tpot_seconds)),
        "latency_seconds": percentiles(_known(ok, latency_seconds)),
        "gap_seconds": percentiles([gap / 1e3 for request in ok for gap in request["gaps_milliseconds"]]),
        "requests_per_second": len(ok) / duration,
        "input_tokens_per_second": _sum(ok, "input_tokens") / duration,
        "output_tokens_per_second": _sum(ok, "output_tokens") / duration,
        "counted_by": dict(Counter(request["counted_by"] for request in ok)),
        "uncounted_outputs": sum(request["output_tokens"] is None for request in ok),
        "good_share": len(good) / len(requests) if requests else None,
        "goodput_per_second": len(good) / duration,
        "goodput_tokens_per_second": _sum(good, "output_tokens") / duration,
        "right_goodput_per_second": sum(request["score"] == 1 for request in good) / duration,
        "score": quality(scored),
    }


def quality(scored: Sequence[Request]) -> dict[str, Any]:
    """Mean score of scored requests, with its interval."""
    clusters = list(by_prompt(scored, lambda request: request["score"]).values())
    values = [score for cluster in clusters for score in cluster]
    return {
        "count": len(values),
        "mean": sum(values) / len(values) if values else None,
        "interval": interval_of_mean(clusters),
    }


def prompt_of(request: Request) -> str:
    """The prompt's name, whichever repetition."""
    return str(request["pair"].rpartition(", ")[0])


def by_prompt(requests: Iterable[Request], measure: Callable[[Request], float | None]) -> dict[str, list[float]]:
    """Values by prompt: prompts by when they were first sent, a prompt's repetitions and turns in a fixed order."""
    found: dict[str, list[float]] = defaultdict(list)
    sent: dict[str, float] = {}
    for request in sorted(requests, key=lambda request: (request["pair"], request["turn"])):
        value = measure(request)
        if value is not None:
            prompt = prompt_of(request)
            found[prompt].append(value)
            sent[prompt] = min(request["intended_seconds"], sent.get(prompt, float("inf")))
    return {prompt: found[prompt] for prompt in sorted(found, key=lambda prompt: sent[prompt])}


def compare_methods(
    first: Sequence[Request], second: Sequence[Request], confidence: float = CONFIDENCE
) -> dict[str, Any]:
    """Paired comparison of two methods that got the same prompts.

    Args:
        first, second: counted requests of each, with `pair` and `turn` that match.
        confidence: of each interval.

    Returns:
        ``ttft_ratio``, ``tpot_ratio`` and ``latency_ratio`` (second over first), ``score_difference``,
        ``only_first_right``, ``only_second_right``, ``mcnemar_p`` and ``same_text_share``.
    """
    pairs = _pairs(first, second)
    firsts, seconds = [a for a, _ in pairs], [b for _, b in pairs]
    # Tokens that all came at once tell no pace.
    paced = [(a, b) for a, b in pairs if tpot_seconds(a) and tpot_seconds(b)]
    scored = [(a, b) for a, b in pairs if a["score"] is not None and b["score"] is not None]
    only_first = sum(a["score"] == 1 and b["score"] < 1 for a, b in scored)
    only_second = sum(b["score"] == 1 and a["score"] < 1 for a, b in scored)
    return {
        "pairs": len(pairs),
        "ttft_ratio": ratio(by_prompt(firsts, ttft_seconds), by_prompt(seconds, ttft_seconds), confidence),
        "tpot_ratio": ratio(
            by_prompt((a for a, _ in paced), tpot_seconds), by_prompt((b for _, b in paced), tpot_seconds), confidence
        ),
        "latency_ratio": ratio(by_prompt(firsts, latency_seconds), by_prompt(seconds, latency_seconds), confidence),
        "score_difference": difference(_scores(a for a, _ in scored), _scores(b for _, b in scored), confidence),
        "only_first_right": only_first,
        "only_second_right": only_second,
        "mcnemar_p": mcnemar(only_first, only_second) if scored else None,
        "same_text_share": sum(a["text"] == b["text"] for a, b in pairs) / len(pairs) if pairs else None,
    }


def _scores(requests: Iterable[Request]) -> dict[str, list[float]]:
    return by_prompt(requests, lambda request: request["score"])


def _pairs(first: Iterable[Request], second: Iterable[Request]) -> list[tuple[Request, Request]]:
    """Requests of both that succeeded, matched."""
    found = {(one["pair"], one["turn"]): one for one in second if one["status"] == "ok"}
    matches = [(one, found.get((one["pair"], one["turn"]))) for one in first if one["status"] == "ok"]
    return [(one, other) for one, other in matches if other is not None]


def length_label(tokens: int) -> str:
    """The doubling of the length in which a prompt falls, such as ``4K-8K``."""
    low = 1 << max(tokens - 1, 0).bit_length() - 1 if tokens > 1 else 1
    return f"{_kilo(low)}-{_kilo(2 * low)}"


def _kilo(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 else str(tokens)


def by_length(requests: Sequence[Request]) -> dict[str, list[Request]]:
    """Requests by the doubling of their length, shortest first."""
    found: dict[str, list[Request]] = defaultdict(list)
    for request in sorted(requests, key=input_tokens):
        found[length_label(input_tokens(request))].append(request)
    return found


def summarise(run: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a run as `loadtest.load.journal.read_journal` returns it."""
    scenario = Scenario.model_validate(run["run"]["scenario"])
    stages = [_stage(stage, run["metrics"], scenario) for stage in run["stages"] if stage["name"] not in WARM_UPS]
    everything = [request for stage in run["stages"] for request in stage["requests"]]
    comparisons = _comparisons(run, scenario)
    saturation = _saturation(stages, scenario)
    sustained = _sustained(stages, scenario)
    return {
        "verdict": verdict(stages, comparisons, sustained, run, scenario),
        "stages": stages,
        "comparisons": comparisons,
        "kept_slo": _kept_slo(stages, scenario),
        "saturation": saturation,
        "sustained": sustained,
        "failures": dict(Counter(request["status"] for request in everything if failed(request))),
        "cancelled": sum(request["status"] == CANCELLED for request in everything),
        "counted_by": dict(Counter(request["counted_by"] for request in everything if request["counted_by"])),
        "warm_up_requests": sum(len(one["requests"]) for one in run["stages"] if one["name"] in WARM_UPS),
        "warnings": _warnings(run, stages) + _unfinished_searches(saturation, scenario),
    }


def span_seconds(requests: Sequence[Request]) -> float:
    """From the first send to the last end."""
    if not requests:
        return 0.0
    ends: float = max(request["end_seconds"] for request in requests)
    starts: float = min(request["sent_seconds"] for request in requests)
    return ends - starts


def _stage(stage: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], scenario: Scenario) -> dict[str, Any]:
    requests = counted(stage["requests"])
    duration = span_seconds(requests)
    shown = compared(requests, scenario)
    by_method = {
        method: chosen
        for method in scenario.methods
        if (chosen := [request for request in shown if request["method"] == method])
    }
    ends = [request["end_seconds"] for request in stage["requests"]]
    within = series_of(metrics, stage["start_seconds"], max(ends, default=stage["start_seconds"]))
    found = {
        "name": stage["name"],
        "level": stage["level"],
        "stopped": stage["stopped"],
        "alone": len(stage["methods"]) == 1,
        "scheduled": len(stage["schedule"]),
        "sent": len(stage["requests"]),
        "left_out": len(stage["requests"]) - len(requests),
        "duration_seconds": duration,
        "offered_per_second": _offered(stage, scenario.load.ramp_seconds),
        "holds_slo": stage["stopped"] is None and good_share(requests, scenario.slo) >= scenario.slo.share,
        "together": describe(requests, scenario.slo, duration),
        "methods": {name: describe(chosen, scenario.slo, duration) for name, chosen in by_method.items()},
        "lengths": {
            name: {label: describe(some, scenario.slo, duration) for label, some in by_length(chosen).items()}
            for name, chosen in by_method.items()
        },
        "workloads": {
            workload.name: describe(chosen, scenario.slo, duration)
            for workload in scenario.workloads
            if (chosen := [request for request in requests if request["workload"] == workload.name])
        },
        "adapters": {name: describe(chosen, scenario.slo, duration) for name, chosen in _by_adapter(requests).items()},
        "density": density(within),
        "fallback_share": fallback_share(within),
        "client": _client(stage),
        "drift": _drift(requests),
        "backlog": _backlog(stage),
        "all_by_method": {
            method: describe(chosen, scenario.slo, duration)
            for method in scenario.methods
            if (chosen := [request for request in requests if request["method"] == method])
        },
    }
    return {**found, "overload": overload(found)}


def _by_adapter(requests: Sequence[Request]) -> dict[str, list[Request]]:
    """Requests by the LoRA adapter that they asked, those of the model itself first; nothing without adapters."""
    found: dict[str, list[Request]] = defaultdict(list)
    for request in sorted(requests, key=lambda request: request.get("adapter") or ""):
        found[request.get("adapter") or NO_ADAPTER].append(request)
    return found if found.keys() - {NO_ADAPTER} else {}


def _offered(stage: Mapping[str, Any], ramp_seconds: float) -> float | None:
    """Requests a second that were due after the ramp, those of later turns included; none in a closed loop."""
    due = [(one["arrival_seconds"], one["turns"]) for one in stage["schedule"] if one["arrival_seconds"] is not None]
    last = max((arrival for arrival, _ in due), default=0.0) - ramp_seconds
    return float(sum(turns for arrival, turns in due if arrival >= ramp_seconds) / last) if last > 0 else None


def _backlog(stage: Mapping[str, Any]) -> float | None:
    """Share of an open loop's requests that were unanswered when the last one arrived; none in a closed loop."""
    requests = stage["requests"]
    if not requests or stage["schedule"][0]["arrival_seconds"] is None:
        return None
    last = max(request["intended_seconds"] for request in requests)
    return float(sum(request["end_seconds"] > last for request in requests) / len(requests))


def _client(stage: Mapping[str, Any]) -> dict[str, Any] | None:
    """The client's own cost, with how late it sent what had a time to be sent at."""
    if stage["client"] is None:
        return None
    lags = [request["sent_seconds"] - request["intended_seconds"] for request in stage["requests"]]
    timed = [entry["arrival_seconds"] for entry in stage["schedule"] if entry["arrival_seconds"] is not None]
    about = {key: value for key, value in stage["client"].items() if key != "kind"}
    if not timed:
        return {**about, "lag_seconds": None, "requested_rate": None, "sent_rate": None}
    first_turns = [request["sent_seconds"] for request in stage["requests"] if request["turn"] == 0]
    span = max(first_turns, default=0.0) - stage["start_seconds"]
    return {
        **about,
        "lag_seconds": {**percentiles(lags), "most": max(lags, default=0.0)},
        "requested_rate": len(timed) / timed[-1] if timed[-1] else None,
        "sent_rate": len(first_turns) / span if span > 0 else None,
    }


def _drift(requests: Sequence[Request]) -> float | None:
    """How TTFT changed from the first to the last third of the requests: 1 in a steady state.

    Each TTFT is taken relative to the median of its like, so that another mixture is no drift.
    """
    ordered = sorted((one for one in requests if one["status"] == "ok"), key=lambda one: one["intended_seconds"])
    third = len(ordered) // 3
    if third < LEAST_DRIFT_REQUESTS:
        return None
    alike: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for one in ordered:
        alike[_kind(one)].append(ttft_seconds(one) or 0.0)
    relative = [(ttft_seconds(one) or 0.0) / statistics.median(alike[_kind(one)]) for one in ordered]
    return statistics.median(relative[-third:]) / statistics.median(relative[:third])


def _kind(request: Request) -> tuple[Any, ...]:
    return request["workload"], request["method"], request["turn"], length_label(input_tokens(request))


def compared(requests: Sequence[Request], scenario: Scenario) -> list[Request]:
    """Requests by which methods are compared: of the paired workloads, so that every method has the same prompts.

    Where no workload is paired, all of them.
    """
    paired = {workload.name for workload in scenario.workloads if workload.paired}
    return [request for request in requests if not paired or request["workload"] in paired]


def _comparisons(run: Mapping[str, Any], scenario: Scenario) -> list[dict[str, Any]]:
    """Each method with the baseline, at each level, with the requests of the paired workloads."""
    if not any(workload.paired for workload in scenario.workloads):
        return []
    by_level: dict[Any, dict[str, list[Request]]] = defaultdict(lambda: defaultdict(list))
    for stage in run["stages"]:
        for request in compared(counted(stage["requests"]), scenario) if stage["name"] not in WARM_UPS else ():
            by_level[stage["level"]][request["method"]].append(request)
    compared_methods = [
        (level, method, methods[scenario.baseline], methods[method])
        for level, methods in by_level.items()
        for method in scenario.methods
        if method != scenario.baseline and method in methods and scenario.baseline in methods
    ]
    # Whoever looks at many intervals finds one that misses: all of them hold together.
    confidence = confidence_of_each(len(compared_methods))
    lengths = {place: by_length(first) for place, (_, _, first, _) in enumerate(compared_methods)}
    confidence_of_lengths = confidence_of_each(sum(map(len, lengths.values())))
    found = []
    for place, (level, method, first, second) in enumerate(compared_methods):
        others = by_length(second)
        found.append(
            {
                "level": level,
                "method": method,
                "baseline": scenario.baseline,
                **compare_methods(first, second, confidence),
                "lengths": {
                    label: compare_methods(some, others.get(label, []), confidence_of_lengths)
                    for label, some in lengths[place].items()
                },
            }
        )
    ps = corrected([one["mcnemar_p"] for one in found])
    return [{**one, "mcnemar_p": p, "comparisons": len(found)} for one, p in zip(found, ps, strict=True)]


def _sweeps(stages: Sequence[Mapping[str, Any]], scenario: Scenario) -> dict[str, list[Mapping[str, Any]]]:
    """The stages of each method that ran apart, or of all together."""
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for stage in stages:
        name = next(iter(stage["methods"]), "") if scenario.load.methods_apart else "all methods together"
        found[name].append(stage)
    return found


def _kept_slo(stages: Sequence[Mapping[str, Any]], scenario: Scenario) -> dict[str, float | None]:
    """The highest level that held the SLO, of each sweep."""
    return {
        name: max((one["level"] for one in some if one["holds_slo"] and one["level"] is not None), default=None)
        for name, some in _sweeps(stages, scenario).items()
    }


def _sustained(stages: Sequence[Mapping[str, Any]], scenario: Scenario) -> dict[str, float | None]:
    """Requests a second of each sweep's best stage that held the SLO: due ones, or in a closed loop answered ones."""
    return {
        name: max((_rate(one) for one in some if one["holds_slo"] and one["together"]["requests"]), default=None)
        for name, some in _sweeps(stages, scenario).items()
    }


def _rate(stage: Mapping[str, Any]) -> float:
    offered: float | None = stage["offered_per_second"]
    return float(stage["together"]["requests_per_second"]) if offered is None else offered


def _saturation(stages: Sequence[Mapping[str, Any]], scenario: Scenario) -> dict[str, dict[str, float | None]]:
    """Of each sweep, over rising load.

    Returns:
        ``level``: the highest that held the SLO, with ``goodput_per_second`` and ``output_tokens_per_second`` there;
        ``breaks``: the lowest above it that did not; ``knee``: the level with the greatest goodput, ``peak_goodput``.
    """
    found: dict[str, dict[str, float | None]] = {}
    measured = [stage for stage in stages if stage["level"] is not None and stage["together"]["requests"]]
    for name, some in _sweeps(measured, scenario).items():
        held = max((one for one in some if one["holds_slo"]), key=lambda one: one["level"], default=None)
        level = held["level"] if held else 0.0
        peak = max(some, key=lambda one: one["together"]["goodput_per_second"])
        found[name] = {
            "level": held["level"] if held else None,
            "goodput_per_second": held["together"]["goodput_per_second"] if held else None,
            "output_tokens_per_second": held["together"]["output_tokens_per_second"] if held else None,
            "breaks": min(
                (one["level"] for one in some if not one["holds_slo"] and one["level"] > level), default=None
            ),
            "knee": peak["level"],
            "peak_goodput": peak["together"]["goodput_per_second"],
        }
    return found


def _warnings(run: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why the numbers may not mean what they seem to."""
    found = []
    if run["end"]["interrupted"]:
        found.append("The run was interrupted: this is what had been measured until then.")
    if run["end"]["warm_up_failed"]:
        found.append(f"Every request of the warm-up failed, so nothing else was sent. The first: {_first_failure(run)}")
    by_text: dict[str, list[str]] = defaultdict(list)
    for stage in stages:
        for text in _stage_warnings(stage):
            by_text[text].append(stage["name"])
    found += [f"{'; '.join(names)}: {text}" for text, names in by_text.items()]
    if not any("samples" in reading for reading in run["metrics"]):
        found.append("The server's metrics could not be read: density, fallbacks, memory and queue are unknown.")
    return found


def _unfinished_searches(saturation: Mapping[str, Mapping[str, float | None]], scenario: Scenario) -> list[str]:
    if not isinstance(scenario.load, OpenLoad) or scenario.load.search is None:
        return []
    return [
        f"{name}: the search ended with {one['level']:g} sessions/s, where the SLO still held: it sustains more."
        for name, one in saturation.items()
        if one["breaks"] is None and one["level"] is not None
    ]


def _first_failure(run: Mapping[str, Any]) -> str:
    failed = next(one for stage in run["stages"] for one in stage["requests"] if one["status"] != "ok")
    return f"{failed['status']} {failed['detail']}"


def _stage_warnings(stage: Mapping[str, Any]) -> list[str]:
    client, together = stage["client"], stage["together"]
    found = []
    if stage["sent"] and together["succeeded"] == 0:
        found.append("no request succeeded.")
    failed = together["requests"] - together["succeeded"]
    if failed and together["succeeded"]:
        found.append(f"{failed} of {together['requests']} requests failed; latencies are of those that succeeded.")
    if client is not None:
        lag = client["lag_seconds"]
        loop = client["loop_lag_seconds"]
        if loop["mean"] > MOST_LAG_SECONDS or loop["p99"] > MOST_TAIL_LAG_SECONDS:
            found.append(
                f"the client's event loop woke {loop['mean'] * 1e3:.0f} ms late on average, {loop['p99'] * 1e3:.0f} ms "
                "at p99: times of tokens are off by as much."
            )
        if lag is not None and (lag["mean"] or 0.0) > MOST_LAG_SECONDS:
            found.append(f"requests were sent {lag['mean'] * 1e3:.0f} ms late on average: the client was too slow.")
        if client["sent_rate"] and client["sent_rate"] < LEAST_SENT_SHARE * client["requested_rate"]:
            found.append(
                f"{client['sent_rate']:.3g}/s were sent where {client['requested_rate']:.3g}/s were asked for."
            )
        if client["cpu_share"] > MOST_CPU_SHARE:
            found.append(
                f"the client used {client['cpu_share']:.0%} of a core: it may have been the bottleneck (--clients)."
            )
    for method, share in stage["fallback_share"].items():
        if share > MOST_FALLBACK_SHARE:
            found.append(
                f"{share:.0%} of the steps that asked for {method} ran dense, and its numbers are partly dense's."
            )
    if stage["drift"] is not None and not 1 / MOST_DRIFT <= stage["drift"] <= MOST_DRIFT:
        found.append(f"TTFT changed by {stage['drift']:.2f}x from the first to the last third: not a steady state.")
    if by_events := together["counted_by"].get("events"):
        found.append(
            f"the server did not say which events hold tokens in {by_events} answers: events with text were taken for "
            "tokens, and gaps between tokens are gaps between those."
        )
    if together["uncounted_outputs"]:
        found.append("the server counted no output tokens for some requests: they have no TPOT.")
    return found
