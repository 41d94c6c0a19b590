"""What the load test and its client processes say to one another: frames of MessagePack over a pipe."""

from __future__ import annotations

import asyncio
from typing import TypeVar

import msgspec

from loadtest.load.reply import Reply

LENGTH_BYTES = 4


class Settings(msgspec.Struct, tag=True):
    """The first frame: whom to ask and how. The key of an API travels here, where no list of processes shows it.

    Attributes:
        url, headers, certificates, timeout_seconds: as of `loadtest.load.client.Client` and its connections.
        origin: of the run's clock.
    """

    url: str
    headers: dict[str, str]
    certificates: str | None
    timeout_seconds: float
    origin: float


class Ask(msgspec.Struct, tag=True):
    """A request to send; the answer has its number."""

    number: int
    path: str
    content: bytes
    cancel_after_seconds: float | None


class Cancel(msgspec.Struct, tag=True):
    """End a request that runs."""

    number: int


class Measure(msgspec.Struct, tag=True):
    """Say what the process has cost since the last time."""


class Answer(msgspec.Struct, tag=True):
    """What became of a request."""

    number: int
    reply: Reply


class Cost(msgspec.Struct, tag=True):
    """What the process has cost, as `loadtest.load.overhead.Overhead` reports it."""

    report: dict[str, float | dict[str, float]]


ToClient = Settings | Ask | Cancel | Measure
FromClient = Answer | Cost

Frame = TypeVar("Frame")


def write_frame(writer: asyncio.WriteTransport | asyncio.StreamWriter, message: ToClient | FromClient) -> None:
    """Write a message."""
    content = msgspec.msgpack.encode(message)
    writer.write(len(content).to_bytes(LENGTH_BYTES, "big") + content)


async def read_frame(reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[Frame]) -> Frame | None:
    """The next message; none at the end."""
    try:
        length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
        return decoder.decode(await reader.readexactly(length))
    except asyncio.IncompleteReadError:
        return None
