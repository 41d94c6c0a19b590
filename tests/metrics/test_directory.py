"""Directories of servers that ended as they should, and of those that could not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_sparse.metrics import DIRECTORY_VARIABLE, PROMETHEUS_VARIABLE

SERVER = """
import os, sys, time
from vllm_sparse.metrics import announce_directory, DIRECTORY_VARIABLE
announce_directory()
print(os.environ[DIRECTORY_VARIABLE], flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if key not in (DIRECTORY_VARIABLE, PROMETHEUS_VARIABLE)}
    return {**own, "TMPDIR": str(tmp_path)}


def start(environment: dict[str, str], seconds: float) -> tuple[subprocess.Popen[str], Path]:
    """A server that lives so long, and its directory."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(seconds)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    return server, Path(server.stdout.readline().strip())


def test_a_killed_servers_directory_is_removed_by_the_next_and_a_running_ones_is_not(
    environment: dict[str, str], tmp_path: Path
) -> None:
    running, kept = start(environment, 600)
    killed, abandoned = start(environment, 600)
    being_made = tmp_path / "vllm-sparse-metrics-new"
    being_made.mkdir()
    try:
        assert kept.is_dir()
        assert abandoned.is_dir()
        killed.send_signal(signal.SIGKILL)
        killed.wait(20)
        assert abandoned.is_dir(), "nobody could remove it"
        last, own = start(environment, 0)
        assert last.wait(60) == 0
        assert not abandoned.exists()
        assert kept.is_dir()
        assert being_made.is_dir()
        assert not own.exists(), "a server removes its directory at its end"
    finally:
        for server in (running, killed):
            server.kill()
            server.wait(20)
