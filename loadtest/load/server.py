"""A server that the load test starts itself, and ends."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from loadtest.load.http import Server
from vllm_sparse.server_process import StartError, is_healthy, running

START_SECONDS = 900.0
POLL_SECONDS = 0.5


class ServerError(Exception):
    """A server that does not start, worded for the user."""


@contextlib.contextmanager
def served(command: str, url: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server's command, wait until it is healthy, and end it with all its processes afterwards.

    Args:
        command: as for a shell, such as ``vllm serve MODEL --port 8000``.
        url: where it will listen.
        log: takes its output.

    Yields:
        The command's process.

    Raises:
        ServerError: the command ends early, there is no such program, or it is not ready in time.
    """
    if is_healthy(url):
        raise ServerError(f"something serves at {url} already: leave --serve out to test it, or take another port")
    with contextlib.ExitStack() as stack:
        try:
            process = stack.enter_context(running(shlex.split(command), url, log, START_SECONDS))
        except OSError as error:
            raise ServerError(f"--serve {command}: {error}") from None
        except StartError as error:
            raise ServerError(str(error)) from None
        yield process


def wait_until_healthy(server: Server, limit_seconds: float) -> None:
    """Wait for a server that somebody else starts.

    Raises:
        ServerError: it is not healthy in time.
    """
    deadline = time.monotonic() + limit_seconds
    while not server.is_healthy():
        if time.monotonic() > deadline:
            raise ServerError(f"no server at {server.url} was healthy within {limit_seconds:g} s (--wait)")
        time.sleep(POLL_SECONDS)
