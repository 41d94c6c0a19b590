"""A real Prometheus scrapes a real server under mixed load: every panel and rule finds its metrics there."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.prometheus import (
    Prometheus,
    filled_in,
    metric_names,
    panel_targets,
    prometheus,
    rule_expressions,
)
from tests.serving.server import BOTH, FLEXPREFILL, Server, free_port, prompt_of
from tests.tools import tool

CONFIGURATION = {
    "sparse": {
        "methods": ["flexprefill", "dhsa", "tidal", "blocktopk", "tokentopk"],
        "min_tokens": 1024,
        "timing_interval_steps": 2,
        "recall_interval_steps": 2,
    }
}
ARGUMENTS = (
    *("--kv-cache-memory-bytes", "512M", "--max-num-batched-tokens", "2048", "--enforce-eager"),
    *("--additional-config", json.dumps(CONFIGURATION)),
)
LOAD: tuple[tuple[int, dict[str, Any]], ...] = (
    (4000, {}),
    (4000, BOTH),
    (3000, FLEXPREFILL),
    (3000, {"sparse_prefill": "dhsa", "sparse_decode": "blocktopk"}),
    # Too short: falls back in both phases.
    (300, BOTH),
    # A floor that no list reaches: the guard sends layers dense.
    (3000, {**BOTH, "sparse_min_recall": 1}),
    (300, {"sparse_preset": "fast"}),
)
WAVES = 2


@dataclass
class Observed:
    """What is left of the load.

    Attributes:
        scrape: the server's metrics as text.
        prometheus: which scraped them meanwhile.
    """

    scrape: str
    prometheus: Prometheus

    @property
    def names(self) -> set[str]:
        """Names of all samples in the scrape."""
        lines = [line for line in self.scrape.splitlines() if line and not line.startswith("#")]
        return {line.partition("{")[0].partition(" ")[0] for line in lines}


def put_load(server: Server, seed: int) -> None:
    """All kinds of requests at once."""

    def ask(number: int) -> None:
        tokens, extras = LOAD[number]
        reply = server.ask("completions", prompt_of(seed + number, tokens, 1), extras, max_tokens=16)
        assert reply.status == 200, reply.raw

    with ThreadPoolExecutor(len(LOAD)) as pool:
        list(pool.map(ask, range(len(LOAD))))


@pytest.fixture(scope="module")
def observed(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    tool("prometheus")
    folder = tmp_path_factory.mktemp("observed")
    server = Server(model_folder, ARGUMENTS, folder / "server.log")
    try:
        with prometheus(f"127.0.0.1:{server.port}", free_port(), folder) as running:
            for wave in range(WAVES):
                put_load(server, 100 * wave)
                # Rates need values before and after.
                running.wait_for_scrapes(3)
            yield Observed(httpx.get(f"{server.url}/metrics").text, running)
    finally:
        server.stop()


@pytest.mark.usefixtures("no_server")
class TestUnderLoad:
    @pytest.mark.parametrize(("title", "expression"), [(title, query) for title, query, _ in panel_targets()])
    def test_panel_shows_data(self, observed: Observed, title: str, expression: str) -> None:
        samples = observed.prometheus.query(filled_in(expression, "5m"))
        values = [float(sample["value"][1]) for sample in samples]
        assert any(math.isfinite(value) for value in values), f"{title}: {expression} found {samples}"

    def test_names_are_those_of_the_server(self, observed: Observed) -> None:
        rules = rule_expressions()
        expressions = [*(query for _, query, _ in panel_targets()), *rules.values()]
        used = set().union(*map(metric_names, expressions)) - rules.keys()
        assert used <= observed.names, f"the server does not have {used - observed.names}"
        assert {name for name in used if name.startswith("vllm_sparse_")}

    def test_rules_are_evaluated(self, observed: Observed) -> None:
        groups = observed.prometheus.get("rules")["groups"]
        rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
        assert rules.keys() == rule_expressions().keys()
        for name, rule in rules.items():
            assert rule["health"] == "ok", f"{name}: {rule.get('lastError')}"
            if name.startswith("vllm_sparse:"):
                assert observed.prometheus.query(name), f"{name} recorded nothing"

    def test_values_make_sense(self, observed: Observed) -> None:
        def value(expression: str) -> float:
            (sample,) = observed.prometheus.query(expression)
            return float(sample["value"][1])

        for name in ("time_to_first_token", "e2e_request_latency", "inter_token_latency"):
            # All requests are there, by methods as in vLLM's own.
            ours, own = f"sum(vllm_sparse_{name}_seconds_count)", f"sum(vllm:{name}_seconds_count)"
            assert value(ours) == value(own) > 0
            assert value(f"sum(vllm_sparse_{name}_seconds_sum)") == pytest.approx(value(own.replace("count", "sum")))
        assert value('vllm_sparse_time_to_first_token_seconds_count{prefill="dhsa", decode="blocktopk"}') == WAVES
        assert value('sum(vllm_sparse_tokens_total{phase="decode"})') == value("sum(vllm:generation_tokens_total)")
        assert value('sum(vllm_sparse_tokens_total{phase="prefill"})') == value("sum(vllm:prompt_tokens_total)")
        assert 0 < value("sum(vllm_sparse_recall_ratio_sum) / sum(vllm_sparse_recall_ratio_count)") <= 1
        for phase in ("prefill", "decode"):
            fallbacks = f'sum(vllm_sparse_fallbacks_total{{phase="{phase}", reason="short_context"}})'
            assert value(fallbacks) >= WAVES
            total = value(f'sum(vllm_sparse_attention_total_seconds_total{{phase="{phase}"}})')
            selection = value(f'sum(vllm_sparse_selection_seconds_total{{phase="{phase}"}})')
            assert 0 < selection < total
        assert value("vllm_sparse_side_data_bytes") > 0

    def test_promtool_finds_no_fault(self, observed: Observed) -> None:
        ours = [line for line in observed.scrape.splitlines() if "vllm_sparse_" in line.split("{")[0]]
        ended = subprocess.run(
            [tool("promtool"), "check", "metrics"],
            input="\n".join(ours) + "\n",
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert len(ours) > 100
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert not ended.stdout + ended.stderr
