"""Servers that end under load: asked to, or because one of their processes is killed."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
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

pytestmark = pytest.mark.usefixtures("no_server")


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
        body = {"model": MODEL_NAME, "prompt": [5 + number] * 1000, "max_tokens": self._tokens, "ignore_eos": True}
        body |= {"vllm_xargs": {**BOTH, "sparse_min_tokens": 0, "tidal_budget_tokens": 256}}
        try:
            reply = httpx.post(f"{self._server.url}/v1/completions", json=body, timeout=2 * END_SECONDS)
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
def load(model_folder: Path, tmp_path: Path) -> Iterator[Callable[[int], tuple[Server, Load]]]:
    """Starts a server that generates so many tokens for each of some clients."""
    server = Server(model_folder, ARGUMENTS, tmp_path / "log", {"VLLM_PLUGINS": "sparse"})
    try:
        yield lambda tokens: (server, Load(server, tokens))
    finally:
        server.stop()


def all_end(processes: list[psutil.Process], folders: set[Path]) -> bool:
    """Whether processes end in time, and leave no file of metrics."""
    _, alive = psutil.wait_procs(processes, timeout=END_SECONDS)
    return not alive and not any(folder.exists() for folder in folders)


def test_sigterm_lets_requests_end(load: Callable[[int], tuple[Server, Load]]) -> None:
    server, clients = load(800)
    first = psutil.Process(server.pid)
    processes, folders = [first, *first.children(recursive=True)], file_folders(server)
    assert folders
    assert clients.ends == []
    first.send_signal(signal.SIGTERM)
    assert all_end(processes, folders)
    assert clients.wait() == ["200, 800 tokens"] * CLIENTS


@pytest.mark.parametrize("killed", ["EngineCore", "Worker"])
def test_a_killed_process_ends_the_server_and_every_client_is_told(
    load: Callable[[int], tuple[Server, Load]], killed: str
) -> None:
    server, clients = load(6000)
    first = psutil.Process(server.pid)
    processes, folders = [first, *first.children(recursive=True)], file_folders(server)
    (victim,) = [process for process in processes if any(killed in part for part in process.cmdline())]
    victim.send_signal(signal.SIGKILL)
    assert all_end(processes, folders)
    assert set(clients.wait()) <= {"500, 0 tokens", "connection closed"}
    assert "EngineDeadError" in server.log.read_text()
