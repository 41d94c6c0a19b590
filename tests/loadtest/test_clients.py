"""Several client processes: the same answers and times as one, and no process that outlives the run."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from loadtest.load.client import Clock
from loadtest.load.clients import ClientProcessError, client_processes
from loadtest.load.http import Server
from tests.loadtest.conftest import ROOT, Simulated, command_of, scenario_of

CHAT = "/v1/chat/completions"


def body(**behaviour: Any) -> dict[str, Any]:
    options = {"include_usage": True, "continuous_usage_stats": True}
    messages = [{"role": "user", "content": "answer=yes"}]
    return {"messages": messages, "max_tokens": 6, "stream_options": options, "vllm_xargs": behaviour}


def test_processes_send_and_read(simulated: Simulated) -> None:
    async def run(server: Server) -> None:
        clock = Clock()
        async with client_processes(2, server, 30.0, clock) as clients:
            asked = [body(ttft_seconds=0.2, tpot_seconds=0.05)] * 6 + [body(fault="500")]
            replies = await asyncio.gather(*(clients.send(CHAT, one) for one in asked))
            assert [reply.status for reply in replies] == ["ok"] * 6 + ["http_500"]
            for reply in replies[:6]:
                assert (reply.text, reply.output_tokens, reply.counted_by) == ("yes" + " more" * 5, 6, "usage")
                assert reply.first_token_seconds is not None
                assert 0.2 <= reply.first_token_seconds - reply.sent_seconds < 1
                assert 0 < reply.sent_seconds < reply.end_seconds < clock(), "one clock for all processes"
            away = await clients.send(CHAT, body(ttft_seconds=60), cancel_after_seconds=0.2)
            assert away.status == "cancelled"
            long = asyncio.create_task(clients.send(CHAT, body(tpot_seconds=1)))
            await asyncio.sleep(0.5)
            long.cancel()
            reply = await long
            assert (reply.status, reply.text) == ("interrupted", "yes"), "what had come is kept"
            assert len(await clients.costs()) == 2

    with Server(simulated.url, {}) as server:
        asyncio.run(run(server))


def test_a_process_that_ends_is_no_quiet_server(simulated: Simulated) -> None:
    async def run(server: Server) -> None:
        async with client_processes(1, server, 30.0, Clock()) as clients:
            asked = asyncio.create_task(clients.send(CHAT, body(ttft_seconds=60)))
            await asyncio.sleep(2)
            (child,) = [one for one in psutil.Process().children() if "loadtest.load.client_process" in one.cmdline()]
            child.kill()
            with pytest.raises(ClientProcessError, match="a client process ended with -9"):
                await asked
            with pytest.raises(ClientProcessError):
                await clients.send(CHAT, body())

    with Server(simulated.url, {}) as server:
        asyncio.run(run(server))


@pytest.mark.parametrize("how", [None, signal.SIGINT, signal.SIGKILL])
def test_the_command_starts_and_ends_them(simulated: Simulated, tmp_path: Path, how: int | None) -> None:
    mine, folder = tmp_path / "mine.yaml", tmp_path / "run"
    methods = {"one": {"ttft_seconds": 0.1 if how is None else 30.0}}
    load = {"loop": "open", "rates": [40], "requests": 60}
    mine.write_text(yaml.safe_dump(scenario_of(tmp_path, methods, load, warm_up_rounds=0)))
    command = command_of(mine, simulated.url, folder, ["--clients", "2"])
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while not simulated.bodies:
        assert time.monotonic() < deadline
        children = psutil.Process(process.pid).children()
        time.sleep(0.05)
    assert len(children) == 2
    if how is not None:
        time.sleep(1)
        process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    psutil.wait_procs(children, timeout=15)
    assert not any(child.is_running() for child in children)
    if how is None:
        assert process.returncode == 0, output
        assert "| one    | 60/60" in output
        assert "by the busiest of 2 processes" in output
    elif how == signal.SIGINT:
        assert "the run did not come to its end" in output


def test_a_number_of_processes_is_wanted(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "loadtest.load", "smoke", "--clients", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert "'0' is no number of processes, 1 or more" in ended.stderr
