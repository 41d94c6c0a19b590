"""Metrics and stats are whole in every layout of processes, and no file of theirs is left behind."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serving.server import BOTH, Metrics, MetricsChange, Server, prompt_of
from vllm_sparse.metrics import DIRECTORY_VARIABLE, PROMETHEUS_VARIABLE

CONFIGURATION = {"sparse": {"min_tokens": 1024, "timing_interval_steps": 2, "recall_interval_steps": 2}}
ARGUMENTS = (
    *("--kv-cache-memory-bytes", "256M", "--max-num-batched-tokens", "2048", "--enforce-eager"),
    # Others may use the machine too.
    *("--gpu-memory-utilization", "0.1"),
    *("--no-enable-prefix-caching", "--additional-config", json.dumps(CONFIGURATION)),
)
REQUESTS, GENERATED = 3, 12
# The bundled model's, in 16 bits.
LAYERS, QUERY_HEADS, KV_HEADS, TOKEN_BYTES = 8, 4, 2, 2 * 64 * 2
END_SECONDS = 60.0


@dataclass(frozen=True)
class Layout:
    """How a server is laid out over processes."""

    arguments: tuple[str, ...]
    engines: int = 1
    ranks: int = 1


LAYOUTS = {
    "one server": Layout(()),
    "two API servers over two ranks": Layout(("--api-server-count", "2", "--tensor-parallel-size", "2"), ranks=2),
    "two engines": Layout(("--data-parallel-size", "2"), engines=2),
}


def file_folders(server: Server) -> set[Path]:
    """Folders of metrics files that the server's processes were told of."""
    folders = set()
    for process in psutil.Process(server.pid).children(recursive=True):
        environment = process.environ()
        folders |= {
            Path(environment[name]) for name in (DIRECTORY_VARIABLE, PROMETHEUS_VARIABLE) if name in environment
        }
    return folders


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return LAYOUTS[request.param]


@pytest.fixture(scope="module")
def laid_out(layout: Layout, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    variables = {"VLLM_PLUGINS": "sparse"}
    if layout.ranks > 1:
        # vLLM wants a NUMA node for each rank otherwise.
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        server = Server(model_folder, (*ARGUMENTS, *layout.arguments), tmp_path_factory.mktemp("layout") / "log")
    try:
        yield server
    finally:
        server.stop()


@pytest.mark.usefixtures("no_server")
class TestLayout:
    def test_nothing_is_lost_or_counted_twice(self, layout: Layout, laid_out: Server) -> None:
        prompt_tokens = 0
        for seed in range(REQUESTS):
            prompt = prompt_of(seed, 3000, 1)
            prompt_tokens = laid_out.ask("completions", prompt, BOTH, max_tokens=GENERATED, ignore_eos=True).usage[
                "prompt_tokens"
            ]
        metrics = self.settled(laid_out)
        steps = REQUESTS * (GENERATED - 1)
        both = {"prefill": "flexprefill", "decode": "tidal"}
        assert metrics.total("vllm_sparse_time_to_first_token_seconds_count", **both) == REQUESTS
        assert metrics.total("vllm_sparse_e2e_request_latency_seconds_count", **both) == REQUESTS
        assert metrics.total("vllm_sparse_inter_token_latency_seconds_count", **both) == steps
        assert metrics.total("vllm_sparse_tokens_total", phase="decode", method="tidal") == REQUESTS * GENERATED
        for name in ("time_to_first_token_seconds_sum", "inter_token_latency_seconds_sum"):
            assert metrics.total(f"vllm_sparse_{name}") == pytest.approx(metrics.total(f"vllm:{name}"))
        assert metrics.total("vllm_sparse_density_ratio_count", phase="decode") == steps
        # What is read and what is saved are what was in reach, of one rank.
        decode = {"phase": "decode", "method": "tidal"}
        moved = metrics.total("vllm_sparse_kv_read_bytes_total", **decode)
        saved = metrics.total("vllm_sparse_kv_saved_bytes_total", **decode)
        assert 0 < saved < moved
        # Prompts of about one length; the last one's is known.
        reach = sum(prompt_tokens + step for step in range(1, GENERATED)) * REQUESTS
        assert moved + saved == pytest.approx(reach * LAYERS * KV_HEADS * TOKEN_BYTES / layout.ranks, rel=0.02)
        for phase in ("prefill", "decode"):
            assert metrics.total("vllm_sparse_timed_rows_total", phase=phase) > 0
            assert metrics.total("vllm_sparse_recall_ratio_count", phase=phase) % (QUERY_HEADS / layout.ranks) == 0
            assert metrics.total("vllm_sparse_recall_ratio_count", phase=phase) > 0

    def test_each_rank_tells_its_memory(self, layout: Layout, laid_out: Server) -> None:
        metrics = self.settled(laid_out)
        ranks = {(str(engine), str(rank)) for engine in range(layout.engines) for rank in range(layout.ranks)}
        for name in ("device_memory_allocated", "device_memory_reserved", "device_memory_free"):
            labels = metrics.labels_of(f"vllm_sparse_{name}_bytes")
            told = {(label["engine"], label["rank"]) for label in labels}
            # An engine that has had no step has not asked its device.
            assert told <= ranks
            assert len(told) >= layout.ranks
            assert metrics.total(f"vllm_sparse_{name}_bytes") > 1 << 20
        assert len(metrics.labels_of("vllm_sparse_kv_cache_used_bytes")) == layout.engines

    def test_stats_of_each_layer_and_head(self, layout: Layout, laid_out: Server) -> None:
        reply = httpx.get(f"{laid_out.url}/v1/sparse/stats", timeout=60)
        assert reply.status_code == 200, reply.text
        engines = reply.json()["engines"]
        assert [engine["engine"] for engine in engines] == list(range(layout.engines))
        rows = 0
        for engine in engines:
            decode = engine["density"].get("decode", {}).get("tidal")
            if decode is None:
                continue
            rows += decode["rows"]
            density = decode["density"]
            assert [len(heads) for heads in density] == [QUERY_HEADS] * LAYERS
            # Layers 0 and 1 are dense, the others read what they or layers before them chose.
            assert all(density[layer] == [1.0] * QUERY_HEADS for layer in (0, 1))
            assert all(0.4 < head < 0.9 for layer in range(2, LAYERS) for head in density[layer])
            prefill = engine["density"]["prefill"]["flexprefill"]["density"]
            assert [len(heads) for heads in prefill] == [QUERY_HEADS] * LAYERS
            assert all(0 < head <= 1 for heads in prefill for head in heads)
        assert rows == REQUESTS * (GENERATED - 1)

    def test_a_change_reaches_all_processes(self, layout: Layout, laid_out: Server) -> None:
        """Each API server checks by the change, each engine's worker computes by it, whoever got it."""
        before = self.settled(laid_out)
        answer = laid_out.call("PUT", "/v1/sparse/config", json={"decode": "tidal"})
        assert answer.status_code == 200, answer.text
        told = [laid_out.call("GET", "/v1/sparse/config").json()["version"] for _ in range(12)]
        assert set(told) == {answer.json()["version"]}
        asked = 4
        for seed in range(asked):
            reply = laid_out.ask("completions", prompt_of(seed, 3000, 1), max_tokens=4, ignore_eos=True)
            assert reply.status == 200, reply.raw
        deadline = time.monotonic() + 10
        while (change := MetricsChange(before, laid_out.metrics())).density_count("decode", "tidal") < asked * 3:
            assert time.monotonic() < deadline, change.density_count("decode", "tidal")
            time.sleep(0.2)
        assert change.requests("decode", "tidal") == asked
        engines = {
            label["engine"] for label in laid_out.metrics().labels_of("vllm_sparse_device_memory_allocated_bytes")
        }
        assert len(engines) == layout.engines
        assert laid_out.call("PUT", "/v1/sparse/config", json={}).status_code == 200

    def test_no_file_is_left(self, layout: Layout, laid_out: Server) -> None:
        folders = file_folders(laid_out)
        assert folders
        assert all(any(folder.iterdir()) for folder in folders)
        if layout.engines > 1:
            # Not the server's own end, but a worker's, which takes the server down.
            workers = [
                process
                for process in psutil.Process(laid_out.pid).children(recursive=True)
                if any("Worker" in part for part in process.cmdline())
            ]
            workers[0].send_signal(signal.SIGKILL)
        else:
            os.kill(laid_out.pid, signal.SIGTERM)
        deadline = time.monotonic() + END_SECONDS
        while any(folder.exists() for folder in folders):
            assert time.monotonic() < deadline, f"left behind: {[folder for folder in folders if folder.exists()]}"
            time.sleep(0.5)

    @staticmethod
    def settled(server: Server) -> Metrics:
        """The metrics once the last request's have come from all processes."""
        deadline = time.monotonic() + 10
        while True:
            metrics = server.metrics()
            if metrics.total("vllm_sparse_e2e_request_latency_seconds_count") == REQUESTS:
                return metrics
            assert time.monotonic() < deadline
            time.sleep(0.2)
