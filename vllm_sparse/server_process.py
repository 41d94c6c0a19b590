"""A server as a child process: started, waited for, and ended with all its processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

STOP_SECONDS = 30.0
POLL_SECONDS = 0.5
LOG_LINES = 20

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class StartError(RuntimeError):
    """A server that does not start; the message has the end of its log."""


@contextlib.contextmanager
def running(
    command: Sequence[str], url: str, log: Path, limit_seconds: float, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server's command, wait until it is healthy, and end it with all its processes afterwards.

    Args:
        command: the program and its arguments.
        url: where it will listen.
        log: takes its output.
        limit_seconds: until it has to be healthy.
        environment: of the process; default: this one's.

    Yields:
        The command's process.

    Raises:
        StartError: the command ends early, or is not ready in time.
        OSError: there is no such program.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=None if environment is None else dict(environment),
            # A group of its own: an interruption of this process must not end the server before its requests.
            start_new_session=True,
        )
    try:
        if not becomes_healthy(url, limit_seconds, process):
            what = f"ended with {process.returncode}" if process.poll() is not None else "was not ready in time"
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            raise StartError(f"the server {what}; its log, {log}, ends with:\n{tail}")
        yield process
    finally:
        _stop(process)


def becomes_healthy(url: str, limit_seconds: float, process: subprocess.Popen[bytes] | None = None) -> bool:
    """Whether a server is healthy in time, and before its process, if that is given, ends."""
    deadline = time.monotonic() + limit_seconds
    while not is_healthy(url):
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            return False
        time.sleep(POLL_SECONDS)
    return True


def is_healthy(url: str) -> bool:
    """Whether a server answers at `/health`."""
    try:
        # Straight to the server: a proxy of the environment would answer for it.
        with _direct.open(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        # Whatever is left of the group: engines that outlive their server, or a server that does not end.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(STOP_SECONDS)
