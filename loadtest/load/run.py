"""Runs a plan against a server and writes the journal."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loadtest.load.capacity import Capacity, hopeless, paced
from loadtest.load.client import Client, Clock
from loadtest.load.clients import Clients, client_processes
from loadtest.load.http import Server, connections
from loadtest.load.journal import Journal, Record
from loadtest.load.measures import failed, good_share
from loadtest.load.overhead import Overhead
from loadtest.load.plan import WARM_UPS, Session, Stage
from loadtest.load.progress import Progress
from loadtest.load.scenario import ClosedLoad, OpenLoad, Scenario
from loadtest.load.scrape import Scraper
from loadtest.load.search import Search
from loadtest.load.workloads.prompt import Message, Turn

# What the sessions that run at once would take one after the other.
AT_ONCE_SECONDS = 20.0
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


class Runner:
    """Sends what was planned.

    Args:
        scenario: the limits and the form of the requests.
        model: served name.
        client: sends.
        journal: takes every request.
        clock: of all times.
        progress: what the user sees.
    """

    def __init__(
        self,
        scenario: Scenario,
        model: str,
        client: Client | Clients,
        journal: Journal,
        clock: Clock,
        progress: Progress,
    ) -> None:
        self._scenario = scenario
        self._model = model
        self._client = client
        self._journal = journal
        self._clock = clock
        self._progress = progress
        self._overhead = Overhead()
        self._tasks: set[asyncio.Task[None]] = set()
        self._errors: list[BaseException] = []
        self._records: list[dict[str, Any]] = []
        self.interrupted = False
        self.stopped: str | None = None

    def interrupt(self) -> None:
        """Send nothing more, and end what is running; everything is recorded."""
        self.interrupted = True
        self._cancel()

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def run(self, stage: Stage) -> list[dict[str, Any]]:
        """Run a stage to its end.

        Returns:
            Its requests as the journal has them.
        """
        about = {"name": stage.name, "level": stage.level, "methods": stage.methods, "schedule": stage.schedule()}
        self._journal.write("stage", {**about, "start_seconds": round(self._clock(), 6)})
        self._records = []
        self.stopped = None
        self._overhead = Overhead()
        self._progress.begin(stage.name, len(stage.sessions))
        watching = [asyncio.create_task(self._overhead.watch()), asyncio.create_task(self._progress.run())]
        if stage.arrivals_seconds is None:
            await self._closed_loop(stage)
        else:
            await self._open_loop(stage, stage.arrivals_seconds)
        for task in watching:
            task.cancel()
        self._journal.write("client", await self._costs())
        self._progress.end()
        return self._records

    async def _costs(self) -> dict[str, Any]:
        """What the client cost: of several processes, each time of the one that had it worst."""
        own = self._overhead.report()
        others = await self._client.costs() if isinstance(self._client, Clients) else []
        every = [own, *others]
        lags = [one["loop_lag_seconds"] for one in every]
        return {
            **own,
            "processes": len(others) or 1,
            "cpu_share": max(one["cpu_share"] for one in every),
            "loop_lag_seconds": {name: max(lag[name] for lag in lags) for name in own["loop_lag_seconds"]},
        }

    def _stop_if_useless(self, stage: Stage) -> None:
        """End the stage where the scenario says that it is not worth going on."""
        stop = self._scenario.stop
        if stop is None or stage.name in WARM_UPS or self.stopped is not None:
            return
        failures = sum(map(failed, self._records))
        if len(self._records) >= stop.after_requests and failures > stop.failed_share * len(self._records):
            self.stopped = f"{failures} of the first {len(self._records)} requests failed"
        elif stop.in_flight is not None and self._progress.in_flight > stop.in_flight:
            self.stopped = f"{self._progress.in_flight} requests were in flight"
        if self.stopped is not None:
            self._journal.write("stopped", {"reason": self.stopped})
            self._progress.show(f"{stage.name} was stopped: {self.stopped}")
            self._cancel()

    async def _open_loop(self, stage: Stage, arrivals_seconds: Sequence[float]) -> None:
        start = self._clock()
        ramp_seconds = self._scenario.load.ramp_seconds

        async def dispatch() -> None:
            for number, (session, arrival) in enumerate(zip(stage.sessions, arrivals_seconds, strict=True)):
                await asyncio.sleep(max(0.0, start + arrival - self._clock()))
                self._spawn(self._session(stage, number, session, start + arrival, arrival < ramp_seconds))

        self._spawn(dispatch())
        await self._all_done()

    async def _closed_loop(self, stage: Stage) -> None:
        load = self._scenario.load
        start = self._clock()
        waiting = iter(enumerate(stage.sessions))
        warming_up = stage.name in WARM_UPS
        ramp_seconds = 0.0 if warming_up else load.ramp_seconds
        duration_seconds = load.duration_seconds if isinstance(load, ClosedLoad) and not warming_up else None

        async def keep_busy(delay_seconds: float) -> None:
            await asyncio.sleep(delay_seconds)
            for number, session in waiting:
                elapsed = self._clock() - start
                if self.interrupted or self.stopped or (duration_seconds is not None and elapsed >= duration_seconds):
                    return
                await self._session(stage, number, session, None, elapsed < ramp_seconds)

        at_once = int(stage.level or 1)
        for place in range(at_once):
            self._spawn(keep_busy(ramp_seconds * place / at_once))
        await self._all_done()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        # An error of the load test itself must not pass for a quiet server.
        if not task.cancelled() and (error := task.exception()) is not None:
            self._errors.append(error)
            self.interrupt()

    async def _all_done(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._errors:
            raise self._errors[0]

    async def _session(self, stage: Stage, number: int, session: Session, intended: float | None, ramp: bool) -> None:
        await self._turns(stage, number, session, intended, ramp)
        self._progress.session_ended()

    async def _turns(self, stage: Stage, number: int, session: Session, intended: float | None, ramp: bool) -> None:
        history: list[Message] = list(session.prompt.history)
        for place, turn in enumerate(session.prompt.turns):
            if self.interrupted or self.stopped:
                return
            if place:
                of_tools = any(message["role"] == "tool" for message in turn.asked)
                wait_seconds = session.prompt.tool_seconds if of_tools else session.prompt.think_seconds
                intended = self._clock() + wait_seconds if wait_seconds else None
                await asyncio.sleep(wait_seconds)
            self._overhead.begin_request()
            self._progress.sent()
            self._stop_if_useless(stage)
            reply = await self._client.send(
                PATHS[self._scenario.endpoint],
                self._body(session, turn, history),
                # In the warm-up everything is measured.
                None if stage.name in WARM_UPS else session.prompt.cancel_after_seconds,
            )
            self._overhead.end_request()
            score = turn.score(reply.text) if reply.status == "ok" and turn.score is not None else None
            record = Record(
                stage.name,
                number,
                place,
                session.workload,
                session.method,
                session.pair,
                reply.sent_seconds if intended is None else intended,
                ramp,
                session.prompt.input_tokens,
                session.prompt.adapter,
                score,
                reply,
            )
            self._records.append(self._journal.record(record))
            self._progress.ended(failed(self._records[-1]))
            self._stop_if_useless(stage)
            if reply.status != "ok":
                return
            history += [*turn.asked, turn.answer or {"role": "assistant", "content": reply.text}]

    def _body(self, session: Session, turn: Turn, history: Sequence[Message]) -> Mapping[str, Any]:
        body: dict[str, Any] = {
            "model": session.prompt.adapter or self._model,
            "max_tokens": turn.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "cache_salt": session.salt,
        }
        if self._scenario.endpoint == "completions":
            body["prompt"] = f"{turn.content}\n{turn.answer_prefix}" if turn.answer_prefix else turn.content
        else:
            body["messages"] = [*history, *turn.asked]
            if session.prompt.tools:
                # Tools are in the prompt; that answers are as long as they were is all that the load needs of them.
                body |= {"tools": list(session.prompt.tools), "tool_choice": "none"}
            if turn.answer_prefix:
                body["messages"].append({"role": "assistant", "content": turn.answer_prefix})
                body |= {"continue_final_message": True, "add_generation_prompt": False}
        if turn.ignore_eos:
            body["ignore_eos"] = True
        if extras := self._scenario.methods[session.method]:
            body["vllm_xargs"] = dict(extras)
        return {**body, **self._scenario.request}


@contextlib.asynccontextmanager
async def _interruptible(runner: Runner) -> AsyncIterator[None]:
    """SIGINT and SIGTERM end the run, not the process: the report is still written. A second one ends the process."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def interrupt() -> None:
        for one in signals:
            loop.remove_signal_handler(one)
        runner.interrupt()

    for one in signals:
        loop.add_signal_handler(one, interrupt)
    try:
        yield
    finally:
        for one in signals:
            loop.remove_signal_handler(one)


async def run(
    scenario: Scenario,
    warm_up: Stage,
    at_once: Stage,
    sweeps: Sequence[Sequence[Stage]],
    searches: Sequence[Callable[[int, float], Stage]],
    server: Server,
    model: str,
    journal: Journal,
    processes: int = 1,
) -> None:
    """Run everything; a sweep ends with the stage at which the SLO breaks, and nothing follows a warm-up that failed.

    Args:
        scenario: the methods, limits and requests.
        warm_up: runs first.
        at_once: runs next, as far as it does not take too long; may be empty.
        sweeps: from `Planner.stages`.
        searches: from `Planner.searches`, of which each makes its stages as it goes on.
        server: where it is and what every request carries.
        model: served name.
        journal: takes everything.
        processes: that send and read; one: this one.
    """
    clock = Clock()
    progress = Progress(clock)
    url = server.url
    timeout_seconds = scenario.request_timeout_seconds
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(connections(server.headers, server.certificates))
        client: Client | Clients = Client(http, url, timeout_seconds, clock)
        if processes > 1:
            client = await stack.enter_async_context(client_processes(processes, server, timeout_seconds, clock))
        scraper = Scraper(http, url, scenario.scrape_seconds, clock, lambda reading: journal.write("metrics", reading))
        runner = Runner(scenario, model, client, journal, clock, progress)
        async with _interruptible(runner):
            scraping = asyncio.create_task(scraper.run())
            try:
                warming_up = await runner.run(warm_up) if warm_up.sessions else []
                useless = bool(warming_up) and all(request["status"] != "ok" for request in warming_up)
                if warming_up and at_once.sessions and not useless and not runner.interrupted:
                    capacity = await _capacity(runner, warming_up, at_once)
                    sweeps = _paced(sweeps, scenario, capacity, journal, progress.show)
                    for search in searches:
                        await _search(runner, search, capacity, scraper, scenario)
                for sweep in [] if useless else sweeps:
                    await _sweep(runner, sweep, scraper, scenario)
            finally:
                scraping.cancel()
                await asyncio.wait([scraping])
        await scraper.read()
    end = {"interrupted": runner.interrupted, "warm_up_failed": useless, "seconds": round(clock(), 3)}
    journal.write("end", end)


async def _capacity(runner: Runner, warming_up: Sequence[Mapping[str, Any]], at_once: Stage) -> Capacity:
    """What the server sustains, with sessions of `at_once` as many as do not take too long."""
    sessions = at_once.sessions[: Capacity(warming_up).sessions_within(at_once.sessions, AT_ONCE_SECONDS)]
    return Capacity(warming_up, await runner.run(replace(at_once, level=len(sessions), sessions=sessions)))


def _paced(
    sweeps: Sequence[Sequence[Stage]],
    scenario: Scenario,
    capacity: Capacity,
    journal: Journal,
    show: Callable[[str], None],
) -> Sequence[Sequence[Stage]]:
    """The stages at the pace that the server sustains, and without those that are hopeless."""
    load = scenario.load
    assert isinstance(load, OpenLoad)
    if load.rates is not None:
        return [_hopeful(sweep, capacity, journal, show) for sweep in sweeps]
    if load.capacity_shares is None:
        return sweeps
    assert load.duration_seconds is not None
    found = [[paced(stage, capacity, load.duration_seconds) for stage in sweep] for sweep in sweeps]
    for stage in (stage for sweep in found for stage in sweep):
        show(f"by the warm-up: {stage.name}, {len(stage.sessions)} sessions")
    return found


def _hopeful(
    sweep: Sequence[Stage], capacity: Capacity, journal: Journal, show: Callable[[str], None]
) -> Sequence[Stage]:
    """A sweep up to its first hopeless stage; the load rises from stage to stage."""
    for number, stage in enumerate(sweep):
        if (reason := hopeless(stage, capacity)) is not None:
            show(f"{stage.name} is not run: {reason}")
            journal.write("refused", {"name": stage.name, "level": stage.level, "reason": reason})
            return sweep[:number]
    return sweep


async def _sweep(runner: Runner, stages: Sequence[Stage], scraper: Scraper, scenario: Scenario) -> None:
    for stage in stages:
        if runner.interrupted or not await _held(runner, stage, scraper, scenario):
            return


async def _held(runner: Runner, stage: Stage, scraper: Scraper, scenario: Scenario) -> bool:
    """Run a stage: whether it held the SLO."""
    await scraper.read()
    requests = await runner.run(stage)
    await scraper.read()
    return runner.stopped is None and good_share(requests, scenario.slo) >= scenario.slo.share


async def _search(
    runner: Runner, make: Callable[[int, float], Stage], capacity: Capacity, scraper: Scraper, scenario: Scenario
) -> None:
    """Look for the highest rate that holds the SLO."""
    load = scenario.load
    assert isinstance(load, OpenLoad)
    assert load.search is not None
    how = load.search
    first = how.first_share * capacity.sessions_per_second(make(0, 1.0).sessions)
    search = Search(first, how.factor, how.refinements, how.most_stages)
    number = 0
    while (rate := search.next_rate()) is not None and not runner.interrupted:
        # Three digits say which rate it was, in the report as in the name of the stage.
        rate = float(f"{rate:.3g}")
        search.tell(rate, await _held(runner, make(number, rate), scraper, scenario))
        number += 1
