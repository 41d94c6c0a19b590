"""A simulated server, and runs of the harness against it as a user starts them."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.serving.server import free_port

ROOT = Path(__file__).parents[2]
START_SECONDS = 30.0
RUN_SECONDS = 240.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What times the simulated server is repeated where it fails: a busy machine makes client and server late.

    A load test that measures wrong fails on a quiet machine too, every time.
    """
    again = pytest.mark.flaky(reruns=3, reruns_delay=5, only_rerun=["AssertionError"])
    for item in items:
        if "simulated" in getattr(item, "fixturenames", ()):
            item.add_marker(again)


def prompts_file(folder: Path, count: int, tokens: int) -> Path:
    """Prompts with known answers: JSON lines as the workload `jsonl` reads them."""
    path = folder / "prompts.jsonl"
    lines = [
        {"prompt": f"number {number}: answer=word{number} end", "output_tokens": tokens, "answers": [f"word{number}"]}
        for number in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def scenario_of(folder: Path, methods: Mapping[str, Any], load: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """A scenario of prompts with known answers, 20 tokens each, for the simulated server."""
    tokens = settings.pop("tokens", 20)
    return {
        "description": "test",
        "methods": methods,
        "workloads": [{"name": "asked", "kind": "jsonl", "file": str(prompts_file(folder, 40, tokens))}],
        "load": load,
        "slo": {"ttft_seconds": 10, "tpot_seconds": 10},
        "scrape_seconds": 0.2,
        **settings,
    }


@dataclass(frozen=True)
class Finished:
    """A run of the command.

    Attributes:
        folder: of the run.
        code: the exit status.
        output: of the command, both streams.
    """

    folder: Path
    code: int
    output: str

    @property
    def report(self) -> dict[str, Any]:
        """report.json."""
        report: dict[str, Any] = json.loads((self.folder / "report.json").read_text())
        return report

    @property
    def page(self) -> str:
        """report.html."""
        return (self.folder / "report.html").read_text()

    @property
    def requests(self) -> list[dict[str, Any]]:
        """Every request, warm-up included."""
        return [request for stage in self.report["stages"] for request in stage["requests"]]


class Simulated:
    """A running simulated server.

    Args:
        certificate: file of a key and a certificate that it serves https with; none: http.
    """

    def __init__(self, certificate: Path | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}" if certificate is None else f"https://127.0.0.1:{self.port}"
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.loadtest.simulated_server", "--port", str(self.port)),
                *(["--certificate", str(certificate)] if certificate else []),
            ],
            cwd=ROOT,
        )
        trusted = True if certificate is None else ssl.create_default_context(cafile=certificate)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                httpx.get(f"{self.url}/health", verify=trusted).raise_for_status()
                return
            except httpx.TransportError:
                assert time.monotonic() < deadline, "the simulated server does not start"
                time.sleep(0.05)

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """What it was asked."""
        bodies: list[dict[str, Any]] = httpx.get(f"{self.url}/requests").json()
        return bodies

    @property
    def truths(self) -> list[dict[str, Any]]:
        """What it did, by its own clock, in the order of the requests."""
        truths: list[dict[str, Any]] = httpx.get(f"{self.url}/truth").json()
        return truths

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


@pytest.fixture
def simulated() -> Iterator[Simulated]:
    """A simulated server of the test's own."""
    server = Simulated()
    yield server
    server.stop()


def command_of(scenario: Path, url: str, folder: Path, arguments: Sequence[str] = ()) -> list[str]:
    """The load test's command line."""
    given = [str(scenario), "--url", url, "--out", str(folder), *arguments]
    return [sys.executable, "-m", "loadtest.load", *given]


class _Tables(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[list[str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.found.append([])
        elif tag == "tr":
            self.found[-1].append([])
        elif tag in ("td", "th"):
            self.found[-1][-1].append("")
        elif tag == "small":
            self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1] and self.found[-1][-1]:
            self.found[-1][-1][-1] += data


def tables_of(page: str) -> list[list[list[str]]]:
    """The tables of a page: rows of the cells' texts, the header first."""
    reader = _Tables()
    reader.feed(page)
    return [[[" ".join(cell.split()) for cell in row] for row in table] for table in reader.found]


LoadTest = Callable[..., Finished]


@pytest.fixture
def load_test(tmp_path: Path, simulated: Simulated) -> LoadTest:
    """Runs a scenario to its end, or interrupts it after some seconds from its first request on."""

    def run(
        scenario: Mapping[str, Any], interrupt_after_seconds: float | None = None, how: int = signal.SIGINT
    ) -> Finished:
        path, folder = tmp_path / "scenario.yaml", tmp_path / "run"
        path.write_text(yaml.safe_dump(dict(scenario)))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command_of(path, simulated.url, folder),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if interrupt_after_seconds is not None:
            _wait_for_requests(folder / "journal.jsonl", process)
            time.sleep(interrupt_after_seconds)
            process.send_signal(how)
        output, _ = process.communicate(timeout=RUN_SECONDS)
        return Finished(folder, process.returncode, output)

    return run


def _wait_for_requests(journal: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not journal.exists() or '"kind": "request"' not in journal.read_text():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no request was sent"
        time.sleep(0.05)
