"""Several client processes that look like one client."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec

from loadtest.load.client import Clock
from loadtest.load.frames import (
    Answer,
    Ask,
    Cancel,
    Cost,
    FromClient,
    Measure,
    Settings,
    ToClient,
    read_frame,
    write_frame,
)
from loadtest.load.http import Server
from loadtest.load.reply import Reply

END_SECONDS = 10.0


class ClientProcessError(RuntimeError):
    """A client process that ended before the load test."""


class _Process:
    """One client process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._cost: asyncio.Future[dict[str, Any]] | None = None
        self._reading = asyncio.create_task(self._read())

    @property
    def in_flight(self) -> int:
        return len(self._waiting)

    def write(self, message: ToClient) -> None:
        assert self._process.stdin is not None
        write_frame(self._process.stdin, message)

    async def ask(self, path: str, content: bytes, cancel_after_seconds: float | None) -> Reply:
        number = next(self._numbers)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        if self._reading.done():
            raise ClientProcessError("a client process has ended")
        self._waiting[number] = future
        self.write(Ask(number, path, content, cancel_after_seconds))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            # The process ends the request, and its answer says that and what had come.
            self.write(Cancel(number))
            return await future

    async def cost(self) -> dict[str, Any]:
        self._cost = asyncio.get_running_loop().create_future()
        self.write(Measure())
        return await self._cost

    async def _read(self) -> None:
        assert self._process.stdout is not None
        decoder = msgspec.msgpack.Decoder(FromClient)
        while (message := await read_frame(self._process.stdout, decoder)) is not None:
            if isinstance(message, Answer):
                self._waiting.pop(message.number).set_result(message.reply)
            elif isinstance(message, Cost) and self._cost is not None:
                self._cost.set_result(message.report)
        error = ClientProcessError(f"a client process ended with {await self._process.wait()}")
        waiting: list[asyncio.Future[Any]] = [*self._waiting.values()]
        if self._cost is not None:
            waiting.append(self._cost)
        for future in waiting:
            if not future.done():
                future.set_exception(error)

    async def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), END_SECONDS)
        except TimeoutError:
            self._process.kill()
        await self._reading


class Clients:
    """Sends each request by the process that runs the fewest.

    Args:
        processes: that wait for requests.
    """

    def __init__(self, processes: list[_Process]) -> None:
        self._processes = processes

    async def send(self, path: str, body: Mapping[str, Any], cancel_after_seconds: float | None = None) -> Reply:
        """As `loadtest.load.client.Client.send`.

        Raises:
            ClientProcessError: the process has ended.
        """
        content = json.dumps(body).encode()
        process = min(self._processes, key=lambda one: one.in_flight)
        return await process.ask(path, content, cancel_after_seconds)

    async def costs(self) -> list[dict[str, Any]]:
        """What each process has cost since the last time."""
        return list(await asyncio.gather(*(process.cost() for process in self._processes)))


@contextlib.asynccontextmanager
async def client_processes(count: int, server: Server, timeout_seconds: float, clock: Clock) -> AsyncIterator[Clients]:
    """Start client processes, and end them."""
    processes: list[_Process] = []
    certificates = None if server.certificates is None else str(server.certificates)
    settings = Settings(server.url, dict(server.headers), certificates, timeout_seconds, clock.origin)
    try:
        for _ in range(count):
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "loadtest.load.client_process",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                # Interruptions are the load test's to deal with.
                start_new_session=True,
            )
            processes.append(_Process(process))
            processes[-1].write(settings)
        yield Clients(processes)
    finally:
        await asyncio.gather(*(process.end() for process in processes))
