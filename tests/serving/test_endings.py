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

# With vLLM's default, no time to drain, its API server waits for answers of the engine that it has killed.
ARGUMENTS = (
    *("--kv-cache-memory-bytes", "256M", "--max-model-len", "8192", "--enforce-eager", "--shutdown-timeout", "3"),
)
CLIENTS, END_SECONDS = 6, 60.0

pytestmark = pytest.mark.usefixtures("no_server")


@pytest.fixture
def loaded(model_folder: Path, tmp_path: Path) -> Iterator[tuple[Server, list[threading.Thread], list[str]]]:
    """A server that generates for some clients, the clients' threads, and how each of them ended."""
    server = Server(model_folder, ARGUMENTS, tmp_path / "log", {"VLLM_PLUGINS": "sparse"})
    ends: list[str] = []

    def ask(number: int) -> None:
        body = {"model": MODEL_NAME, "prompt": [5 + number] * 2000, "max_tokens": 6000, "ignore_eos": True}
        body |= {"vllm_xargs": {**BOTH, "sparse_min_tokens": 0}}
        try:
            reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
            ends.append(f"{reply.status_code} {reply.text[:200]}")
        except httpx.TransportError as error:
            ends.append("timeout" if isinstance(error, httpx.TimeoutException) else "connection closed")

    clients = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(CLIENTS)]
    try:
        for client in clients:
            client.start()
        deadline = time.monotonic() + 60
        while server.metrics().total("vllm:num_requests_running") < CLIENTS:
            assert time.monotonic() < deadline, ends
            time.sleep(0.2)
        yield server, clients, ends
    finally:
        server.stop()


@pytest.mark.parametrize("killed", [None, "EngineCore", "Worker"], ids=["asked", "engine killed", "worker killed"])
def test_it_ends_with_all_its_processes_and_every_client_is_told(
    loaded: tuple[Server, list[threading.Thread], list[str]], killed: str | None
) -> None:
    server, clients, ends = loaded
    first = psutil.Process(server.pid)
    processes, folders = [first, *first.children(recursive=True)], file_folders(server)
    assert folders
    assert ends == []
    if killed is None:
        first.send_signal(signal.SIGTERM)
    else:
        (victim,) = [process for process in processes if any(killed in part for part in process.cmdline())]
        victim.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=END_SECONDS)
    assert alive == []
    for client in clients:
        client.join(10)
    assert len(ends) == CLIENTS
    assert "timeout" not in ends
    # No answer looks like a whole one: they had thousands of tokens to go.
    assert not any(end.startswith("200") for end in ends), ends
    assert not any(folder.exists() for folder in folders)
    if killed is not None:
        assert "EngineDeadError" in server.log.read_text()
