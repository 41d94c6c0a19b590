"""The one HTTP client of the load test, and its one rule: straight to the server.

Proxies of the environment are not used, since a proxy would be measured along; ``https`` is checked against the
system's certificates, or those of a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

# Shorter than the servers' own, so that a request never takes a connection that the server is about to close.
KEEP_ALIVE_SECONDS = 4.0
REQUEST_SECONDS = 60.0
DETAIL_CHARACTERS = 300


class HttpError(Exception):
    """A server that does not answer as it should, worded for the user."""


@contextlib.asynccontextmanager
async def connections(
    headers: Mapping[str, str], certificates: Path | None = None
) -> AsyncIterator[aiohttp.ClientSession]:
    """Connections without a limit to their number: whoever limits the load is the scenario.

    Args:
        headers: of every request.
        certificates: file of the authorities that the server's certificate is checked against; default: the system's.
    """
    connector = aiohttp.TCPConnector(
        limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS, ssl=ssl.create_default_context(cafile=certificates)
    )
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=dict(headers), cookie_jar=aiohttp.DummyCookieJar()
    ) as http:
        yield http


class Server:
    """Single questions to a server before and after the test, one after the other.

    Args:
        url: without a path.
        headers: of every request.
        certificates: as of `connections`.

    Raises:
        OSError: the certificates cannot be read.
    """

    def __init__(self, url: str, headers: Mapping[str, str], certificates: Path | None = None) -> None:
        self.url = url
        self.headers = headers
        self.certificates = certificates
        ssl.create_default_context(cafile=certificates)
        self._loop = asyncio.Runner()
        self._connections = connections(headers, certificates)

    def __enter__(self) -> Self:
        self._http = self._loop.run(self._connections.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.run(self._connections.__aexit__(None, None, None))
        self._loop.close()

    def get(self, path: str) -> Any:
        """What the server answers to GET, as JSON.

        Raises:
            HttpError: nobody answers, or no status 200, or no JSON.
        """
        return self._loop.run(self._json("GET", path, None))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What the server answers to POST, as JSON.

        Raises:
            HttpError: as `get`.
        """
        return self._loop.run(self._json("POST", path, body))

    def is_healthy(self) -> bool:
        """Whether it answers at ``/health``."""

        async def ask() -> bool:
            try:
                async with self._http.get(f"{self.url}/health", timeout=aiohttp.ClientTimeout(total=5)) as response:
                    return response.status == 200
            except (aiohttp.ClientError, OSError):
                return False

        return self._loop.run(ask())

    async def _json(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
        try:
            async with self._http.request(method, f"{self.url}{path}", json=body, timeout=timeout) as response:
                text = await response.text(errors="replace")
                if response.status != 200:
                    raise HttpError(f"{path}: status {response.status}: {text[:DETAIL_CHARACTERS]}")
                return json.loads(text)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise HttpError(f"{path}: {error or type(error).__name__}") from None
