"""Everything that a run will send, and when: made before the first request, equal for equal scenarios and seeds."""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.load.arrivals import arrivals, count_in, replay
from loadtest.load.scenario import ClosedLoad, OpenLoad, Scenario
from loadtest.load.settings import ScenarioError
from loadtest.load.workloads.build import PromptMaker
from loadtest.load.workloads.files import local
from loadtest.load.workloads.kinds import Workload
from loadtest.load.workloads.prompt import Prompt
from loadtest.load.workloads.traces import read_trace

WARM_UP = "warm-up"
AT_ONCE = "warm-up at once"
WARM_UPS = (WARM_UP, AT_ONCE)
"""Names of the stages of which nothing counts."""
MOST_AT_ONCE = 32


@dataclass(frozen=True)
class Session:
    """A prompt on its way.

    Attributes:
        prompt: its turns.
        workload: name.
        method: name.
        pair: equal for the sessions of a prompt that differ in nothing but the method.
        salt: keeps it from blocks of the prefix cache that are not its own.
    """

    prompt: Prompt
    workload: str
    method: str
    pair: str
    salt: str


@dataclass(frozen=True)
class Stage:
    """One level of load.

    Attributes:
        name: for the report.
        level: sessions a second, or at once, or share of the capacity; none for a trace.
        methods: those that it measures.
        sessions: in the order of their start.
        arrivals_seconds: when each starts, from the stage's beginning; none in a closed loop. Where the level is a
            share of the capacity, once a second on average until `paced` knows the capacity.
    """

    name: str
    level: float | None
    methods: tuple[str, ...]
    sessions: tuple[Session, ...]
    arrivals_seconds: tuple[float, ...] | None

    def schedule(self) -> list[dict[str, Any]]:
        """What the report keeps of it: enough to see what was sent when, without the texts."""
        times = self.arrivals_seconds or [None] * len(self.sessions)
        return [
            {
                "arrival_seconds": None if time is None else round(time, 6),
                "workload": session.workload,
                "method": session.method,
                "pair": session.pair,
                "prompt_digest": session.prompt.digest,
                "turns": len(session.prompt.turns),
                "input_tokens": session.prompt.input_tokens,
            }
            for time, session in zip(times, self.sessions, strict=True)
        ]


def load_unit(load: OpenLoad | ClosedLoad) -> str:
    """What a stage's level counts."""
    if isinstance(load, ClosedLoad):
        return " at once"
    return "/s" if load.capacity_shares is None else " of capacity"


class Planner:
    """Makes the stages of a scenario.

    Args:
        scenario: what to plan.
        makers: of each workload's prompts, by its name.
        salt: differs from run to run, so that no run finds the blocks of an earlier one in the prefix cache.
    """

    def __init__(self, scenario: Scenario, makers: Mapping[str, PromptMaker], salt: str) -> None:
        self._scenario = scenario
        self._makers = makers
        self._salt = salt

    def warm_up(self) -> Stage:
        """A request for each method, workload and doubling of the prompt's length, `warm_up_rounds` times."""
        sessions = [
            self._session(WARM_UP, prompt, workload, method, f"round {number}")
            for number in range(self._scenario.warm_up_rounds)
            for workload in self._scenario.workloads
            for prompt in self._one_of_each_length(workload)
            for method in workload.methods or self._scenario.methods
        ]
        return Stage(WARM_UP, 1, tuple(self._scenario.methods), tuple(sessions), None)

    def at_once(self) -> Stage:
        """Sessions of the warm-up's kinds that run at once, to see what the server sustains; nothing without a rate."""
        load = self._scenario.load
        kinds = self.warm_up().sessions if isinstance(load, OpenLoad) and load.trace is None else ()
        sessions = [
            self._session(AT_ONCE, kind.prompt, self._workload(kind.workload), kind.method, f"time {number}")
            for number, kind in zip(range(MOST_AT_ONCE), itertools.cycle(kinds), strict=False)
        ]
        return Stage(AT_ONCE, len(sessions), tuple(self._scenario.methods), tuple(sessions), None)

    def _workload(self, name: str) -> Workload:
        return next(workload for workload in self._scenario.workloads if workload.name == name)

    def _one_of_each_length(self, workload: Workload) -> list[Prompt]:
        maker = self._makers[workload.name]
        prompts = [maker(number) for number in range(min(maker.distinct, 20))]
        return list({prompt.input_tokens.bit_length(): prompt for prompt in prompts}.values())

    def stages(self) -> list[list[Stage]]:
        """Sweeps in order, each a list of stages with rising load.

        Raises:
            ScenarioError: a prompt cannot be made, or no workload uses a method that runs apart.
        """
        load = self._scenario.load
        if isinstance(load, OpenLoad) and load.search is not None:
            return []
        return [self._sweep(chosen) for chosen in self._together()]

    def searches(self) -> list[Callable[[int, float], Stage]]:
        """For each search its maker of stages, by their number and rate; equal numbers have equal prompts."""
        load = self._scenario.load
        if not isinstance(load, OpenLoad) or load.search is None:
            return []
        found: list[Callable[[int, float], Stage]] = [
            functools.partial(self._stage, methods=chosen) for chosen in self._together()
        ]
        # Prompts are made before the first request, whatever the rates turn out to be.
        for maker in self._makers.values():
            for number in range(self._pool(maker)):
                maker(number)
        return found

    def _pool(self, maker: PromptMaker) -> int:
        """Prompts of a stage before they repeat: a search has no more than its shortest stages need."""
        load = self._scenario.load
        searched = isinstance(load, OpenLoad) and load.search is not None
        return min(maker.distinct, load.requests or 1) if searched else maker.distinct

    def _together(self) -> list[tuple[str, ...]]:
        """The methods of each sweep."""
        methods = tuple(self._scenario.methods)
        return [(method,) for method in methods] if self._scenario.load.methods_apart else [methods]

    def _sweep(self, methods: tuple[str, ...]) -> list[Stage]:
        load = self._scenario.load
        if isinstance(load, OpenLoad):
            levels: Sequence[float | None] = load.rates or load.capacity_shares or [None]
        else:
            levels = load.concurrency
        return [self._stage(number, level, methods) for number, level in enumerate(levels)]

    def _stage(self, number: int, level: float | None, methods: tuple[str, ...]) -> Stage:
        load = self._scenario.load
        # Equal for every sweep: methods that run apart get the same prompts at the same times.
        rng = random.Random(f"{self._scenario.seed}/stage {number}")
        unit = load_unit(load)
        name = "trace" if level is None else f"{level:g}{unit}"
        if load.methods_apart:
            name = f"{methods[0]}, {name}"
        if not isinstance(load, OpenLoad):
            return Stage(name, level, methods, self._sessions(name, methods, load.requests, rng), None)
        if load.trace is not None:
            times = self._replayed(load)
            return Stage(name, level, methods, self._sessions(name, methods, len(times), rng), tuple(times))
        assert level is not None
        assert load.arrivals != "trace"
        count = load.requests or count_in(level, load.duration_seconds or 0, load.ramp_seconds)
        if load.search is not None:
            count = max(count, count_in(level, load.search.stage_seconds, load.ramp_seconds))
        sessions = self._sessions(name, methods, count, rng)
        rate = level if load.capacity_shares is None else 1.0
        times = arrivals(
            load.arrivals, rate, len(sessions), rng, burstiness=load.burstiness or 1, ramp_seconds=load.ramp_seconds
        )
        return Stage(name, level, methods, sessions, tuple(times))

    def _replayed(self, load: OpenLoad) -> list[float]:
        assert load.trace is not None
        times = [line.timestamp_seconds for line in read_trace(local(load.trace))]
        known = [time for time in times if time is not None]
        if len(known) < len(times):
            place = times.index(None) + 1
            raise ScenarioError(f"{load.trace}: every request needs a timestamp_seconds, number {place} has none")
        return [time / load.trace_speed for time in replay(known)[: load.requests]]

    def _sessions(self, stage: str, methods: tuple[str, ...], count: int, rng: random.Random) -> tuple[Session, ...]:
        workloads = [one for one in self._scenario.workloads if not one.paired or self._methods_of(one, methods)]
        if not workloads:
            raise ScenarioError(f"no workload uses {', '.join(methods)}")
        weights = [workload.weight for workload in workloads]
        # Methods are drawn apart from workloads: these stay the same whichever methods a sweep runs.
        method_rng = random.Random(rng.getrandbits(32))
        taken: Counter[str] = Counter()
        sessions: list[Session] = []
        while len(sessions) < count:
            (workload,) = rng.choices(workloads, weights)
            number = taken[workload.name]
            taken[workload.name] += 1
            maker = self._makers[workload.name]
            pool = self._pool(maker)
            prompt = maker(number % pool)
            allowed = self._methods_of(workload, methods)
            if workload.paired:
                chosen = list(allowed)
                method_rng.shuffle(chosen)
            else:
                allowed = allowed or self._methods_of(workload, tuple(self._scenario.methods))
                chosen = method_rng.choices(list(allowed), list(allowed.values()))
            time = f"time {number // pool}"
            sessions += [self._session(stage, prompt, workload, method, time) for method in chosen]
        # A trace has as many arrivals as it has; elsewhere the last group stays whole.
        return tuple(sessions[:count] if self._replays else sessions)

    @property
    def _replays(self) -> bool:
        return isinstance(self._scenario.load, OpenLoad) and self._scenario.load.trace is not None

    def _methods_of(self, workload: Workload, methods: tuple[str, ...]) -> dict[str, float]:
        weights = workload.methods or dict.fromkeys(self._scenario.methods, 1.0)
        return {method: weight for method, weight in weights.items() if method in methods}

    def _session(self, stage: str, prompt: Prompt, workload: Workload, method: str, time: str) -> Session:
        whole = f"{self._salt}/{stage}/{method}/{time}/{prompt.shared or prompt.name}"
        # vLLM takes neither long salts nor some signs.
        salt = hashlib.sha256(whole.encode()).hexdigest()[:32]
        return Session(prompt, workload.name, method, f"{prompt.name}, {time}", salt)
