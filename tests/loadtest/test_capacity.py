"""What a server sustains, from a warm-up with known times."""

from __future__ import annotations

from typing import Any

import pytest

from loadtest.load.capacity import Capacity, hopeless, paced
from loadtest.load.plan import Session, Stage
from loadtest.load.settings import ScenarioError
from loadtest.load.workloads.prompt import Prompt, Turn


def turn(session: int, method: str, seconds: float, tokens: int = 1500, status: str = "ok") -> dict[str, Any]:
    return {
        "session": session,
        "workload": "needles",
        "method": method,
        "planned_input_tokens": tokens,
        "intended_seconds": 100.0,
        "last_token_seconds": 100.0 + seconds if status == "ok" else None,
        "status": status,
    }


def session(method: str, pair: str, tokens: int = 1500) -> Session:
    return Session(Prompt("p", (Turn("hello", 3),), tokens), "needles", method, pair, "salt")


def test_the_quickest_round_of_each_kind_counts() -> None:
    """The first round may compile; a request that failed tells nothing."""
    warm_up = [
        turn(0, "dense", 9.0),
        turn(1, "dense", 1.0),
        turn(2, "dense", 4.0, tokens=3000),
        turn(3, "tidal", 2.0),
        turn(4, "tidal", 0.01, status="http_500"),
    ]
    capacity = Capacity(warm_up)
    assert capacity.seconds(session("dense", "a")) == 1.0
    assert capacity.seconds(session("dense", "a", tokens=2100)) == 4.0
    assert capacity.seconds(session("tidal", "a", tokens=90)) == 4.0, "an unknown kind counts as the slowest"
    mixture = [session("dense", "a"), session("tidal", "a"), session("tidal", "b")]
    assert capacity.sessions_per_second(mixture) == pytest.approx(3 / 5)


def test_a_conversation_takes_as_long_as_its_turns() -> None:
    capacity = Capacity(
        [turn(0, "dense", 1.0), turn(0, "dense", 2.0), turn(1, "dense", 0.5), turn(1, "dense", 0, status="x")]
    )
    assert capacity.seconds(session("dense", "a")) == 3.0


def test_a_warm_up_that_failed_has_no_capacity() -> None:
    with pytest.raises(ScenarioError, match="no session of the warm-up succeeded"):
        Capacity([turn(0, "dense", 1.0, status="timeout")])


def test_a_stage_ends_with_a_whole_pair() -> None:
    sessions = tuple(session(method, f"pair {number // 2}") for number, method in enumerate(["dense", "tidal"] * 10))
    stage = Stage(
        "0.5 of capacity", 0.5, ("dense", "tidal"), sessions, tuple(float(number + 1) for number in range(20))
    )
    slow = paced(stage, Capacity([turn(0, "dense", 4.0), turn(1, "tidal", 2.0)]), duration_seconds=50)
    # The capacity is a session every 3 seconds; at half of it comes one every 6 seconds, and the ninth is too late.
    assert slow.arrivals_seconds == pytest.approx([6.0 * number for number in range(1, 9)])
    assert slow.sessions == sessions[:8]
    assert slow.name == "0.5 of capacity (0.17/s)"
    quick = paced(stage, Capacity([turn(0, "dense", 0.4), turn(1, "tidal", 0.2)]), duration_seconds=50)
    assert quick.sessions == sessions


def test_sessions_at_once_tell_what_the_server_gains_by_them() -> None:
    alone = [turn(0, "dense", 4.0), turn(1, "tidal", 2.0)]
    at_once = [
        turn(number, method, 99.0) | {"sent_seconds": 10.0 + 0.1 * number, "end_seconds": 14.0}
        for number, method in enumerate(["dense", "tidal"] * 2)
    ]
    capacity = Capacity(alone, at_once)
    assert capacity.gain == pytest.approx(3), "twelve seconds of work in four"
    mixture = [session("dense", "a"), session("tidal", "a")]
    assert capacity.sessions_per_second(mixture) == pytest.approx(1)
    assert capacity.sessions_within(mixture * 10, 13.0) == 4
    assert capacity.sessions_within(mixture * 10, 0.1) == 1
    slower = [one | {"end_seconds": 99.0} for one in at_once]
    assert Capacity(alone, slower).gain == 1, "one after the other is what it sustains at least"


def test_a_rate_far_above_the_capacity_is_hopeless() -> None:
    capacity = Capacity([turn(0, "dense", 4.0)])
    sessions = (session("dense", "a"),)
    assert hopeless(Stage("2/s", 2.0, ("dense",), sessions, (1.0,)), capacity) is None
    reason = hopeless(Stage("3/s", 3.0, ("dense",), sessions, (1.0,)), capacity)
    assert reason is not None
    assert reason.startswith("3 sessions/s are 12 times what the server sustained in the warm-up (0.25/s)")
