"""Rates relative to what a server sustains: the warm-up tells how long each kind of session takes alone."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loadtest.load.measures import latency_seconds
from loadtest.load.plan import Session, Stage
from loadtest.load.settings import ScenarioError

Kind = tuple[str, str, int]
"""Workload, method, and the doubling of the prompt's length."""


class Capacity:
    """Seconds that a session takes while no other runs, by kind: the quickest of the warm-up's rounds.

    A server that computes several sessions at once sustains more than one after the other, never less.

    Args:
        requests: those of the warm-up, as the journal has them; one that failed tells nothing.

    Raises:
        ScenarioError: no session succeeded as a whole.
    """

    def __init__(self, requests: Sequence[Mapping[str, Any]]) -> None:
        sessions: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
        for request in requests:
            sessions[request["session"]].append(request)
        self._seconds: dict[Kind, float] = {}
        for turns in sessions.values():
            latencies = [latency_seconds(turn) for turn in turns if turn["status"] == "ok"]
            known = [seconds for seconds in latencies if seconds is not None]
            if len(known) == len(turns):
                first = turns[0]
                kind = first["workload"], first["method"], first["planned_input_tokens"].bit_length()
                self._seconds[kind] = min(sum(known), self._seconds.get(kind, float("inf")))
        if not self._seconds:
            raise ScenarioError("no session of the warm-up succeeded, so there is no rate that the server sustains")

    def seconds(self, session: Session) -> float:
        """How long a session takes alone; of a kind that the warm-up does not know, the slowest that it knows."""
        kind = session.workload, session.method, session.prompt.input_tokens.bit_length()
        return self._seconds.get(kind, max(self._seconds.values()))

    def sessions_per_second(self, sessions: Sequence[Session]) -> float:
        """Rate at which the server ends sessions of this mixture, one after the other."""
        return 1.0 / statistics.fmean(self.seconds(session) for session in sessions)


def paced(stage: Stage, capacity: Capacity, duration_seconds: float) -> Stage:
    """A stage whose load is a share of the capacity, with the arrivals that this makes.

    Args:
        stage: its level is the share, its arrivals come once a second on average.
        capacity: of the server.
        duration_seconds: no pair of sessions begins to arrive later than that.
    """
    assert stage.level is not None
    assert stage.arrivals_seconds is not None
    rate = stage.level * capacity.sessions_per_second(stage.sessions)
    times = [arrival / rate for arrival in stage.arrivals_seconds]
    pairs = enumerate(itertools.pairwise(stage.sessions), 1)
    kept = next((n for n, (a, b) in pairs if a.pair != b.pair and times[n] > duration_seconds), len(times))
    return replace(
        stage,
        name=f"{stage.name} ({rate:.2g}/s)",
        sessions=stage.sessions[:kept],
        arrivals_seconds=tuple(times[:kept]),
    )
