"""A server that the load test starts itself, and ends."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

from vllm_sparse.server_process import StartError, becomes_healthy, is_healthy, running

START_SECONDS = 900.0


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


def wait_until_healthy(url: str, limit_seconds: float) -> None:
    """Wait for a server that somebody else starts.

    Raises:
        ServerError: it is not healthy in time.
    """
    if not becomes_healthy(url, limit_seconds):
        raise ServerError(f"no server at {url} was healthy within {limit_seconds:g} s (--wait)")
