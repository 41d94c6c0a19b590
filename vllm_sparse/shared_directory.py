"""Private directories that a server's first process makes and announces to those that it starts."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_LOCK_NAME = "in-use"
# Processes that announced, by variable. A forked child inherits the entries under another pid.
_announcers: dict[str, int] = {}
_held_locks: list[int | None] = []


def announce(variable: str, prefix: str) -> None:
    """In the process that starts the others: make a directory and name it in the environment; idempotent.

    It is removed when the process exits. A process that is killed cannot do that; the next one does.

    Args:
        variable: of the environment, handed to child processes and not meant to be set by users.
        prefix: of the directory's name, its own for each variable.
    """
    if variable in os.environ:
        return
    _remove_abandoned(prefix)
    directory = Path(tempfile.mkdtemp(prefix=prefix))
    # Held until this process ends, however it does.
    _held_locks.append(_lock(directory))
    os.environ[variable] = str(directory)
    owner = _announcers[variable] = os.getpid()

    def remove() -> None:
        # A forked child inherits this hook; the directory is not its own.
        if os.getpid() == owner:
            shutil.rmtree(directory, ignore_errors=True)

    atexit.register(remove)


def announced_here(variable: str) -> bool:
    """Whether this very process made the directory."""
    return _announcers.get(variable) == os.getpid()


def _lock(directory: Path) -> int | None:
    """An exclusive lock on a directory of ours, as a file descriptor; None if another process holds it."""
    descriptor = os.open(directory / _LOCK_NAME, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_abandoned(prefix: str) -> None:
    """Remove directories of servers that were killed."""
    for directory in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        try:
            # Without its lock file a directory is being made at this moment.
            descriptor = _lock(directory) if (directory / _LOCK_NAME).exists() else None
        except OSError:
            # Another user's, or removed meanwhile.
            continue
        if descriptor is not None:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(descriptor)
