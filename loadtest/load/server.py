"""A server that the load test starts itself, and ends."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

START_SECONDS = 900.0
STOP_SECONDS = 30.0
POLL_SECONDS = 0.5
LOG_LINES = 20


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
    if _is_healthy(url):
        raise ServerError(f"something serves at {url} already: leave --serve out to test it, or take another port")
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                shlex.split(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A group of its own: an interruption of the load test must not end the server before its requests.
                start_new_session=True,
            )
        except OSError as error:
            raise ServerError(f"--serve {command}: {error}") from None
    try:
        _wait(process, url, log)
        yield process
    finally:
        _stop(process)


def wait_until_healthy(url: str, limit_seconds: float) -> None:
    """Wait for a server that somebody else starts.

    Raises:
        ServerError: it is not healthy in time.
    """
    if not _becomes_healthy(url, limit_seconds):
        raise ServerError(f"no server at {url} was healthy within {limit_seconds:g} s (--wait)")


def _becomes_healthy(url: str, limit_seconds: float, process: subprocess.Popen[bytes] | None = None) -> bool:
    """Whether a server is healthy in time, and before its process, if that is given, ends."""
    deadline = time.monotonic() + limit_seconds
    while not _is_healthy(url):
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            return False
        time.sleep(POLL_SECONDS)
    return True


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    if not _becomes_healthy(url, START_SECONDS, process):
        what = f"ended with {process.returncode}" if process.poll() is not None else "was not ready in time"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
        raise ServerError(f"the server {what}; its log, {log}, ends with:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        # Whatever is left of the group: engines that outlive their server, or a server that does not end.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(STOP_SECONDS)
