"""One streamed request to an OpenAI-compatible server: what came when, and if it failed, how. Nothing is retried."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

# Shorter than the servers' own, so that a request never takes a connection that the server is about to close.
KEEP_ALIVE_SECONDS = 4.0
DETAIL_CHARACTERS = 300

FAILURES = {
    "refused": "no connection: nobody listens there",
    "disconnected": "the connection broke before the answer was complete",
    "timeout_first_token": "no token within the request timeout",
    "timeout_stream": "the stream stalled or took longer than the request timeout",
    "garbage": "the answer is no event stream of JSON",
    "stream_error": "the stream reports an error",
    "truncated": "the stream ended without [DONE]",
    "empty": "the stream ended without a token",
    "interrupted": "the load test was interrupted while it ran",
}
"""Kinds of failure beside ``http_429``, ``http_500`` and the like."""


@dataclass
class Reply:
    """What became of a request; times are of `Clock`.

    Attributes:
        sent_seconds: when it was sent.
        status: ``ok``, ``http_`` with the code, or a key of `FAILURES`.
        detail: what the server or the connection said of a failure.
        first_token_seconds, last_token_seconds: of what was generated.
        end_seconds: when nothing more came.
        gaps_milliseconds: between pieces of the stream; a piece may hold several tokens.
        input_tokens, output_tokens, cached_tokens: as the server counts, if it says so.
        text: the answer, without a reasoning part.
        finish_reason: as the server names it.
    """

    sent_seconds: float
    status: str = "ok"
    detail: str = ""
    first_token_seconds: float | None = None
    last_token_seconds: float | None = None
    end_seconds: float = 0.0
    gaps_milliseconds: list[float] = field(default_factory=list)
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    text: str = ""
    finish_reason: str | None = None

    def fail(self, status: str, detail: object = "") -> None:
        """Say how it failed."""
        self.status, self.detail = status, str(detail)[:DETAIL_CHARACTERS]


class Clock:
    """Seconds since the run began."""

    def __init__(self) -> None:
        self._origin = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._origin


class _BadStreamError(Exception):
    def __init__(self, status: str, detail: object) -> None:
        super().__init__(detail)
        self.status = status


class Client:
    """Sends requests to one server.

    Args:
        http: connections.
        url: of the server, without a path.
        timeout_seconds: of a whole request.
        clock: of all times.
    """

    def __init__(
        self, http: aiohttp.ClientSession, url: str, timeout_seconds: float, clock: Callable[[], float]
    ) -> None:
        self._http = http
        self._url = url
        self._timeout_seconds = timeout_seconds
        self._clock = clock

    async def send(self, path: str, body: Mapping[str, Any]) -> Reply:
        """Send a request and read its stream to the end. Cancelling it gives a reply that says so."""
        content = json.dumps(body).encode()
        reply = Reply(self._clock())
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await self._exchange(path, content, reply)
        except TimeoutError:
            reply.fail("timeout_stream" if reply.first_token_seconds is not None else "timeout_first_token")
        except aiohttp.ClientConnectorError as error:
            reply.fail("refused", error)
        except (aiohttp.ClientError, ConnectionError) as error:
            reply.fail("disconnected", error or type(error).__name__)
        except _BadStreamError as error:
            reply.fail(error.status, error)
        except asyncio.CancelledError:
            reply.fail("interrupted")
        reply.end_seconds = self._clock()
        return reply

    async def _exchange(self, path: str, content: bytes, reply: Reply) -> None:
        headers = {"Content-Type": "application/json"}
        async with self._http.post(f"{self._url}{path}", data=content, headers=headers) as response:
            if response.status != 200:
                reply.fail(f"http_{response.status}", await response.text(errors="replace"))
                return
            await self._read(response, reply)

    async def _read(self, response: aiohttp.ClientResponse, reply: Reply) -> None:
        pieces: list[str] = []
        try:
            async for event, seconds in self._events(response):
                self._take(event, seconds, reply, pieces)
        finally:
            reply.text = "".join(pieces)
        if reply.first_token_seconds is None:
            raise _BadStreamError("empty", "")

    async def _events(self, response: aiohttp.ClientResponse) -> AsyncIterator[tuple[dict[str, Any], float]]:
        """The stream's JSON events, each with the time at which it arrived."""
        rest = b""
        async for chunk in response.content.iter_any():
            seconds = self._clock()
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                line = line.strip()
                if line == b"data: [DONE]":
                    return
                # Between events: empty lines, comments that keep the connection open, and names of events.
                if not line or line.startswith((b":", b"event:")):
                    continue
                yield _parse(line), seconds
        raise _BadStreamError("truncated", "") if not rest.strip() else _BadStreamError("garbage", rest[:100])

    def _take(self, event: dict[str, Any], seconds: float, reply: Reply, pieces: list[str]) -> None:
        if event.get("error"):
            raise _BadStreamError("stream_error", event["error"])
        if usage := event.get("usage"):
            reply.input_tokens = usage.get("prompt_tokens")
            reply.output_tokens = usage.get("completion_tokens")
            reply.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            text = choice.get("text") or delta.get("content")
            reply.finish_reason = choice.get("finish_reason") or reply.finish_reason
            # Servers may announce the role before anything is generated.
            if "role" in delta and not text and reply.first_token_seconds is None:
                continue
            if reply.last_token_seconds is None:
                reply.first_token_seconds = seconds
            else:
                reply.gaps_milliseconds.append(round((seconds - reply.last_token_seconds) * 1e3, 2))
            reply.last_token_seconds = seconds
            if text:
                pieces.append(text)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line.removeprefix(b"data:")) if line.startswith(b"data:") else None
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise _BadStreamError("garbage", line[:100])
    return event


@contextlib.asynccontextmanager
async def connections(headers: Mapping[str, str]) -> AsyncIterator[aiohttp.ClientSession]:
    """Connections without a limit to their number: whoever limits the load is the scenario."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=dict(headers), cookie_jar=aiohttp.DummyCookieJar()
    ) as http:
        yield http
