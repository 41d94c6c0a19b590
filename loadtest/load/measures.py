"""What one request's times say: TTFT, TPOT, latency, and whether it met the SLO."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from loadtest.load.reply import CANCELLED
from loadtest.load.scenario import Slo

Request = Mapping[str, Any]
"""A request, as the journal has it."""


def ttft_seconds(request: Request) -> float | None:
    """Time to the first token, from the intended time."""
    first = request["first_token_seconds"]
    return None if first is None else float(first - request["intended_seconds"])


def sent_ttft_seconds(request: Request) -> float | None:
    """Time to the first token, from the send: `vllm bench serve`'s definition."""
    first = request["first_token_seconds"]
    return None if first is None else float(first - request["sent_seconds"])


def tpot_seconds(request: Request) -> float | None:
    """Mean time per token after the first; none with one token or where the server does not count them.

    As in `vllm bench serve`: 0 if all tokens came at once.
    """
    tokens = request["output_tokens"]
    if not tokens or tokens < 2 or request["first_token_seconds"] is None:
        return None
    time: float = request["last_token_seconds"] - request["first_token_seconds"]
    return time / (int(tokens) - 1)


def latency_seconds(request: Request) -> float | None:
    """From the intended time to the last token."""
    last = request["last_token_seconds"]
    return None if last is None else last - request["intended_seconds"]


def gap_seconds(request: Request) -> float | None:
    """The 99th percentile of a request's own gaps between tokens; none with one arrival of tokens."""
    gaps = sorted(request["gaps_milliseconds"])
    return gaps[math.ceil(0.99 * len(gaps)) - 1] / 1e3 if gaps else None


def input_tokens(request: Request) -> int:
    """As the server counts, else as planned."""
    return int(request["input_tokens"] or request["planned_input_tokens"])


def is_good(request: Request, slo: Slo) -> bool:
    """Whether a request succeeded within the limits; without a second token there is no TPOT and no gap to exceed."""
    ttft = ttft_seconds(request)
    if request["status"] != "ok" or ttft is None or ttft > slo.ttft_limit_seconds(input_tokens(request)):
        return False
    if slo.gap_p99_seconds is not None and (gap_seconds(request) or 0.0) > slo.gap_p99_seconds:
        return False
    if slo.latency_seconds is not None and (latency_seconds(request) or 0.0) > slo.latency_seconds:
        return False
    return (tpot_seconds(request) or 0.0) <= slo.tpot_seconds


def counted(requests: Iterable[Request]) -> list[Request]:
    """Those that count: neither sent while the load grew nor ended by the scenario or whoever ran the test."""
    return [one for one in requests if not one["ramp"] and one["status"] not in ("interrupted", CANCELLED)]


def failed(request: Request) -> bool:
    """Whether a request has failed; one that was broken off on purpose has not."""
    return request["status"] not in ("ok", CANCELLED)


def good_share(requests: Iterable[Request], slo: Slo) -> float:
    """Share of the counted requests that are good; 1 if there are none."""
    chosen = counted(requests)
    return sum(is_good(request, slo) for request in chosen) / len(chosen) if chosen else 1.0
