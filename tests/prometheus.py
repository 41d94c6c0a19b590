"""A real Prometheus as a child process, promtool, and what stands in the dashboard and the rules."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import prometheus_client
import yaml

from tests.tools import tool

ROOT = Path(__file__).parents[1]
RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
RULE_TESTS = ROOT / "deploy" / "prometheus" / "rules.test.yaml"
DASHBOARD = ROOT / "deploy" / "grafana" / "vllm-sparse.json"
READY_SECONDS = 30.0

_NAME = re.compile(r"\bvllm(?::[a-z]|_sparse)[a-zA-Z0-9_:]*")


def metric_names(expression: str) -> set[str]:
    """Names of the metrics of ours and of vLLM in an expression."""
    return set(_NAME.findall(expression))


def counted(name: str, **labels: str) -> float:
    """Sum of the samples of this process with this name and at least these labels."""
    samples = (sample for family in prometheus_client.REGISTRY.collect() for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items())


def all_rules() -> list[dict[str, Any]]:
    """The rules of `RULES`."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def rule_expressions() -> dict[str, str]:
    """Expression of each rule of `RULES` by its name."""
    return {rule.get("record") or rule["alert"]: rule["expr"] for rule in all_rules()}


def panel_targets() -> list[tuple[str, str, str]]:
    """Title, expression and legend of each query of the dashboard."""
    dashboard = json.loads(DASHBOARD.read_text())
    return [
        (panel["title"], target["expr"], target["legendFormat"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    ]


def filled_in(expression: str, rate_interval: str, time_range: str = "15m") -> str:
    """A dashboard's expression with Grafana's variables replaced, all servers chosen."""
    filled = expression.replace("$__rate_interval", rate_interval).replace("$__range", time_range)
    for name in ("namespace", "model", "pod"):
        filled = filled.replace(f"${name}", ".*")
    assert "$" not in filled, filled
    return filled


class Prometheus:
    """A running Prometheus and its HTTP API."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: Any) -> Any:
        """Data of an answer of its HTTP API."""
        reply = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30)
        assert reply.status_code == 200, reply.text
        return reply.json()["data"]

    def query(self, expression: str, at_seconds: float | None = None) -> list[dict[str, Any]]:
        """Samples of an instant query, now or at a time since the epoch."""
        at = {} if at_seconds is None else {"time": at_seconds}
        result: list[dict[str, Any]] = self.get("query", query=expression, **at)["result"]
        return result

    def wait_for_scrapes(self, count: int) -> None:
        """Wait until the target has been scraped so many times more."""
        scrapes = 'prometheus_target_interval_length_seconds_count{interval="1s"}'
        started = self._number(scrapes)
        deadline = time.monotonic() + READY_SECONDS
        while self._number(scrapes) < started + count:
            assert time.monotonic() < deadline, "Prometheus does not scrape"
            time.sleep(0.2)

    def _number(self, name: str) -> float:
        wanted = [line for line in httpx.get(f"{self.url}/metrics").text.splitlines() if line.startswith(name)]
        return float(wanted[0].rpartition(" ")[2]) if wanted else 0.0


@contextlib.contextmanager
def prometheus(target: str, port: int, folder: Path) -> Iterator[Prometheus]:
    """Run a Prometheus that scrapes one target every second and evaluates `RULES`.

    Args:
        target: ``host:port`` to scrape.
        port: that it listens on.
        folder: for its data and log.
    """
    configuration = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "vllm", "static_configs": [{"targets": [target]}]}],
    }
    with running(configuration, port, folder) as started:
        yield started


@contextlib.contextmanager
def running(configuration: dict[str, Any], port: int, folder: Path) -> Iterator[Prometheus]:
    """Run a Prometheus with this configuration over what lies in ``folder/data``; arguments as of `prometheus`."""
    (folder / "prometheus.yml").write_text(json.dumps(configuration))
    command = [tool("prometheus"), f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder}/data"]
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=output, stderr=output)
    started = Prometheus(f"http://127.0.0.1:{port}")
    try:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{started.url}/-/ready").status_code == 200:
                    break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield started
    finally:
        process.terminate()
        process.wait(20)
