"""A process that sends requests for the load test, which tells it by standard input when to send which.

Reading streams is what a client spends its time on: several processes read more of them than one.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

import msgspec

from loadtest.load.client import Client, Clock
from loadtest.load.frames import Answer, Ask, Cancel, Cost, Measure, Settings, ToClient, read_frame, write_frame
from loadtest.load.http import connections
from loadtest.load.overhead import Overhead


async def serve() -> None:
    """Do what is said until the input ends, as it does when the load test ends in whatever way."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    writer, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, sys.stdout.buffer)
    decoder = msgspec.msgpack.Decoder(ToClient)
    settings = await read_frame(reader, decoder)
    assert isinstance(settings, Settings)
    certificates = Path(settings.certificates) if settings.certificates else None
    running: dict[int, asyncio.Task[None]] = {}
    async with connections(settings.headers, certificates) as http:
        client = Client(http, settings.url, settings.timeout_seconds, Clock(settings.origin))

        async def answer(ask: Ask) -> None:
            reply = await client.send_content(ask.path, ask.content, ask.cancel_after_seconds)
            write_frame(writer, Answer(ask.number, reply))
            del running[ask.number]

        overhead, watching = _watched()
        while (message := await read_frame(reader, decoder)) is not None:
            if isinstance(message, Ask):
                running[message.number] = asyncio.create_task(answer(message))
            elif isinstance(message, Cancel) and message.number in running:
                running[message.number].cancel()
            elif isinstance(message, Measure):
                watching.cancel()
                write_frame(writer, Cost(overhead.report()))
                overhead, watching = _watched()
        for task in [watching, *running.values()]:
            task.cancel()


def _watched() -> tuple[Overhead, asyncio.Task[None]]:
    overhead = Overhead()
    return overhead, asyncio.create_task(overhead.watch())


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())
