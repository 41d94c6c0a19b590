"""How metrics of worker processes reach the server's ``/metrics``.

vLLM serves the API server's registry, which workers cannot reach. The API server therefore makes a private directory
for prometheus_client's multi-process files before it starts the engine (`announce_directory`), workers write there
(`write_to_announced_directory`), and the API server merges it back (`vllm_sparse.server.collector`). Where vLLM itself
runs several API servers it has set such a directory up already, and that one is used.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

import prometheus_client

# Handed to child processes through the environment, not meant to be set by users.
DIRECTORY_VARIABLE = "SPARSE_METRICS_DIRECTORY"
PROMETHEUS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

_PREFIX = "vllm-sparse-metrics-"
_LOCK_NAME = "in-use"


def announce_directory() -> None:
    """In the API server, before the engine starts: make the directory that its children write metrics to.

    It is removed when the server exits. A server that is killed cannot do that; the next one does.
    """
    if PROMETHEUS_VARIABLE in os.environ or DIRECTORY_VARIABLE in os.environ:
        return
    _remove_abandoned()
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
    # Held until this process ends, however it does.
    _held_locks.append(_lock(directory))
    os.environ[DIRECTORY_VARIABLE] = str(directory)
    owner = os.getpid()
    _announcers.append(owner)

    def remove() -> None:
        # A forked child inherits this hook; the directory is not its own.
        if os.getpid() == owner:
            shutil.rmtree(directory, ignore_errors=True)

    atexit.register(remove)


# The process that announced, whose own metrics need no files. A forked child inherits the entry under another pid.
_announcers: list[int] = []
_held_locks: list[int | None] = []


def _lock(directory: Path) -> int | None:
    """An exclusive lock on a directory of ours, as a file descriptor; None if another process holds it."""
    descriptor = os.open(directory / _LOCK_NAME, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_abandoned() -> None:
    """Remove directories of servers that were killed."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            # Without its lock file a directory is being made at this moment.
            descriptor = _lock(directory) if (directory / _LOCK_NAME).exists() else None
        except OSError:
            # Another user's, or removed meanwhile.
            continue
        if descriptor is not None:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(descriptor)


def write_to_announced_directory() -> None:
    """In a worker, before its first metric: switch this process to multi-process files."""
    directory = os.environ.get(DIRECTORY_VARIABLE)
    if directory is None or os.getpid() in _announcers or PROMETHEUS_VARIABLE in os.environ:
        return
    os.environ[PROMETHEUS_VARIABLE] = directory
    prometheus_client.values.ValueClass = prometheus_client.values.MultiProcessValue()  # type: ignore[no-untyped-call]
