"""Servers that end under load: asked to, or because one of their processes is killed."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serving.server import BOTH, MODEL_NAME, Server
from tests.serving.test_layouts import file_folders

ARGUMENTS = (
    *("--kv-cache-memory-bytes", "256M", "--max-model-len", "8192", "--enforce-eager", "--shutdown-timeout", "120"),
)
CLIENTS, END_SECONDS = 4, 150.0
# Long enough that a signal reaches a server that generates, short enough that it ends in time.
GENERATION_SECONDS = 10.0

pytestmark = pytest.mark.usefixtures("no_server")


def generate(server: Server, number: int, tokens: int) -> httpx.Response:
    """One client's request, sparse in both phases, of so many tokens."""
    body = {"model": MODEL_NAME, "prompt": [5 + number] * 1000, "max_tokens": tokens, "ignore_eos": True}
    body |= {"vllm_xargs": {**BOTH, "sparse_min_tokens": 0, "tidal_budget_tokens": 256}}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=2 * END_SECONDS)


class Load:
    """Clients that wait for generations of a server, and how each of them ended."""

    def __init__(self, server: Server, tokens: int) -> None:
        self.ends: list[str] = []
        self._server, self._tokens = server, tokens
        self._clients = [threading.Thread(target=self._ask, args=(number,), daemon=True) for number in range(CLIENTS)]
        for client in self._clients:
            client.start()
        deadline = time.monotonic() + END_SECONDS
        while server.metrics().total("vllm:num_requests_running") < CLIENTS:
            assert time.monotonic() < deadline, self.ends
            time.sleep(0.2)

    def _ask(self, number: int) -> None:
        try:
            reply = generate(self._server, number, self._tokens)
            tokens = reply.json()["usage"]["completion_tokens"] if reply.status_code == 200 else 0
            self.ends.append(f"{reply.status_code}, {tokens} tokens")
        except httpx.TimeoutException:
            self.ends.append("timeout")
        except httpx.TransportError:
            self.ends.append("connection closed")

    def wait(self) -> list[str]:
        """How the clients ended, all of them soon."""
        for client in self._clients:
            client.join(10)
        assert len(self.ends) == CLIENTS
        return self.ends


@pytest.fixture
def server(model_folder: Path, tmp_path: Path) -> Iterator[Server]:
    """A server of each test's own, since the test ends it."""
    server = Server(model_folder, ARGUMENTS, tmp_path / "log", {"VLLM_PLUGINS": "sparse"})
    try:
        yield server
    finally:
        server.stop()


def processes_of(server: Server) -> list[psutil.Process]:
    first = psutil.Process(server.pid)
    return [first, *first.children(recursive=True)]


def all_end(processes: list[psutil.Process], folders: set[Path]) -> bool:
    """Whether processes end in time, and leave no file of metrics."""
    _, alive = psutil.wait_procs(processes, timeout=END_SECONDS)
    return not alive and not any(folder.exists() for folder in folders)


def test_sigterm_lets_requests_end(server: Server) -> None:
    processes, folders = processes_of(server), file_folders(server)
    assert folders
    generate(server, 0, 10)
    begin = time.monotonic()
    generate(server, 0, 200)
    tokens = min(6000, max(400, int(200 * GENERATION_SECONDS / (time.monotonic() - begin))))
    clients = Load(server, tokens)
    assert clients.ends == []
    processes[0].send_signal(signal.SIGTERM)
    assert all_end(processes, folders)
    assert clients.wait() == [f"200, {tokens} tokens"] * CLIENTS


@pytest.mark.parametrize("killed", ["EngineCore", "Worker"])
def test_a_killed_process_ends_the_server_and_every_client_is_told(server: Server, killed: str) -> None:
    processes, folders = processes_of(server), file_folders(server)
    clients = Load(server, 6000)
    (victim,) = [process for process in processes if any(killed in part for part in process.cmdline())]
    victim.send_signal(signal.SIGKILL)
    assert all_end(processes, folders)
    assert set(clients.wait()) <= {"500, 0 tokens", "connection closed"}
    assert "EngineDeadError" in server.log.read_text()
