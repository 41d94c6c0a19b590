"""One streamed request to an OpenAI-compatible server: what came when, and if it failed, how. Nothing is retried."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp

from loadtest.load.reply import CANCELLED, Reply
from loadtest.load.stream import StreamError, read_answer


class Clock:
    """Seconds since the run began.

    Args:
        origin: when that was, on the machine's clock, which all its processes share; default: now.
    """

    def __init__(self, origin: float | None = None) -> None:
        self.origin = time.perf_counter() if origin is None else origin

    def __call__(self) -> float:
        return time.perf_counter() - self.origin


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

    async def send(self, path: str, body: Mapping[str, Any], cancel_after_seconds: float | None = None) -> Reply:
        """Send a request and read its stream to the end, or break it off after some seconds, as a user may do.

        Cancelling the call gives a reply that says so.
        """
        return await self.send_content(path, json.dumps(body).encode(), cancel_after_seconds)

    async def send_content(self, path: str, content: bytes, cancel_after_seconds: float | None = None) -> Reply:
        """As `send`, with a body that is JSON already."""
        reply = Reply(self._clock())
        breaks_off = cancel_after_seconds is not None and cancel_after_seconds < self._timeout_seconds
        try:
            async with asyncio.timeout(cancel_after_seconds if breaks_off else self._timeout_seconds):
                await self._exchange(path, content, reply)
        except TimeoutError:
            if breaks_off:
                reply.fail(CANCELLED)
            else:
                reply.fail("timeout_stream" if reply.first_token_seconds is not None else "timeout_first_token")
        except aiohttp.ClientConnectorError as error:
            reply.fail("refused", error)
        except (aiohttp.ClientError, ConnectionError) as error:
            reply.fail("disconnected", error or type(error).__name__)
        except StreamError as error:
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
            await read_answer(response, reply, self._clock)
