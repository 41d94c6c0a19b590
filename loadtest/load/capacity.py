"""Rates relative to what a server sustains: the warm-up tells how long each kind of session takes alone."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loadtest.load.measures import latency_seconds
from loadtest.load.plan import Session, Stage
from loadtest.load.settings import ScenarioError

Kind = tuple[str, str, int]
"""Workload, method, and the doubling of the prompt's length."""

HOPELESS = 10.0


class Capacity:
    """What a server sustains, by its warm-up.

    A session's work is the time that it takes while no other runs: the quickest of the warm-up's rounds, by kind. A
    server that computes several sessions at once does more than a second's work in a second: the `gain`.

    Args:
        alone: requests of the sessions that ran one after the other, as the journal has them; one that failed tells
            nothing.
        at_once: those of the sessions that ran all at once.

    Raises:
        ScenarioError: no session succeeded as a whole.
    """

    def __init__(self, alone: Sequence[Mapping[str, Any]], at_once: Sequence[Mapping[str, Any]] = ()) -> None:
        self._seconds: dict[Kind, float] = {}
        for kind, seconds in _whole_sessions(alone):
            self._seconds[kind] = min(seconds, self._seconds.get(kind, float("inf")))
        if not self._seconds:
            raise ScenarioError("no session of the warm-up succeeded, so there is no rate that the server sustains")
        self.gain = max(1.0, self._gain(at_once))

    def _gain(self, at_once: Sequence[Mapping[str, Any]]) -> float:
        work_seconds = sum(self._of_kind(kind) for kind, _ in _whole_sessions(at_once))
        if not work_seconds:
            return 1.0
        ends = max(request["end_seconds"] for request in at_once)
        return float(work_seconds / (ends - min(request["sent_seconds"] for request in at_once)))

    def seconds(self, session: Session) -> float:
        """How long a session takes alone; of a kind that the warm-up does not know, the slowest that it knows."""
        return self._of_kind((session.workload, session.method, session.prompt.input_tokens.bit_length()))

    def _of_kind(self, kind: Kind) -> float:
        return self._seconds.get(kind, max(self._seconds.values()))

    def sessions_per_second(self, sessions: Sequence[Session]) -> float:
        """Rate at which the server ends sessions of this mixture."""
        return self.gain / statistics.fmean(self.seconds(session) for session in sessions)

    def sessions_within(self, sessions: Sequence[Session], limit_seconds: float) -> int:
        """How many of the first sessions take no longer than that in all, one after the other; at least one."""
        ends = itertools.accumulate(map(self.seconds, sessions))
        return max(1, sum(end <= limit_seconds for end in ends))


def _whole_sessions(requests: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Kind, float]]:
    """Kind and seconds of each session of which every turn succeeded."""
    sessions: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for request in requests:
        sessions[request["session"]].append(request)
    for turns in sessions.values():
        latencies = [latency_seconds(turn) for turn in turns if turn["status"] == "ok"]
        known = [seconds for seconds in latencies if seconds is not None]
        if len(known) == len(turns):
            first = turns[0]
            yield (first["workload"], first["method"], first["planned_input_tokens"].bit_length()), sum(known)


def hopeless(stage: Stage, capacity: Capacity) -> str | None:
    """Why a rate is not worth sending, none if it is: so far above what the server sustained that only a queue grows.

    The warm-up runs few sessions at once, and a server may gain more with more of them: hence a wide margin.
    """
    assert stage.level is not None
    sustained = capacity.sessions_per_second(stage.sessions)
    if stage.level <= HOPELESS * sustained:
        return None
    return (
        f"{stage.level:g} sessions/s are {stage.level / sustained:.0f} times what the server sustained in the warm-up "
        f"({sustained:.2g}/s): lower load.rates, give load.capacity_shares in place of them, or set warm_up_rounds to "
        "0, where nothing is measured before"
    )


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
