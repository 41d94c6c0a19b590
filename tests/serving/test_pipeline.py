"""Two stages of a pipeline answer as one process does, and count each chunk and step once."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.serving.server import BOTH, MetricsChange, Server, dtype_flags, prompt_of
from tests.serving.test_layouts import END_SECONDS, KV_HEADS, LAYERS, QUERY_HEADS, TOKEN_BYTES, file_folders

STAGES = 2
METHODS = ["flexprefill", "dhsa", "tidal", "tokentopk"]
CONFIGURATION = {"sparse": {"min_tokens": 1024, "timing_interval_steps": 2, "methods": METHODS}}
ARGUMENTS = (
    *("--kv-cache-memory-bytes", "256M", "--max-num-batched-tokens", "2048", "--gpu-memory-utilization", "0.1"),
    *("--no-enable-prefix-caching", "--additional-config", json.dumps(CONFIGURATION)),
)
# Traced, and run as it is: without a trace vLLM's own second stage fails on a CPU, at an assertion. The one process is
# traced too: what vLLM runs without a trace rounds otherwise, which tips lists, and so the text behind the answer.
TRACED = ("--compilation-config", json.dumps({"backend": "eager"}))
# Behind the first stage lists of tidal differ from those without a pipeline: its answer is compared where it is right.
DHSA_TOKENTOPK = {"sparse_prefill": "dhsa", "sparse_decode": "tokentopk"}
QUESTIONS: tuple[tuple[int, dict[str, Any] | None], ...] = (
    *((0, None), (1, None), (0, DHSA_TOKENTOPK), (1, DHSA_TOKENTOPK), (1, BOTH)),
)
GENERATED = 12


@pytest.fixture(scope="module")
def servers(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Starts one server at a time, with a pipeline or without."""
    started: dict[int, Server] = {}

    def start(stages: int) -> Server:
        if stages not in started:
            for other in started.values():
                other.stop()
            started.clear()
            environment = {"VLLM_PLUGINS": "sparse"}
            arguments = (*ARGUMENTS, *TRACED, "--pipeline-parallel-size", str(stages))
            if stages > 1:
                # vLLM wants a NUMA node for each rank otherwise.
                environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
            log = tmp_path_factory.mktemp("pipeline") / "log"
            started[stages] = Server(model_folder, arguments, log, environment)
        return started[stages]

    yield start
    for server in started.values():
        server.stop()


def answers(server: Server, at_once: int) -> list[str]:
    """To all questions, so many at once: of several, more than one step is on its way."""

    def answer(question: tuple[int, dict[str, Any] | None]) -> str:
        seed, extras = question
        return server.ask("completions", prompt_of(seed, 3000), extras, max_tokens=GENERATED).text

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(answer, QUESTIONS))


@pytest.mark.usefixtures("no_server")
class TestPipeline:
    def test_answers_are_those_of_one_process(self, servers: Any) -> None:
        alone = answers(servers(1), 1)
        right = [prompt_of(seed, 3000).answers[0] for seed, _ in QUESTIONS]
        assert [text.split(".")[0].strip() for text in alone] == right
        server = servers(STAGES)
        assert answers(server, 1) == alone
        assert [text.split(".")[0].strip() for text in answers(server, len(QUESTIONS))] == right

    def test_each_step_counts_once(self, servers: Any) -> None:
        server = servers(STAGES)
        before = server.metrics()
        reply = server.ask("completions", prompt_of(7, 3000, 1), BOTH, max_tokens=GENERATED, ignore_eos=True)
        server.ask("completions", prompt_of(7, 300, 1), BOTH, max_tokens=2, ignore_eos=True)
        metrics, tidal = server.metrics(), {"phase": "decode", "method": "tidal"}

        def change(name: str, **labels: str) -> float:
            return MetricsChange(before, metrics)(f"vllm_sparse_{name}", **labels)

        assert change("requests_total", **tidal) == 2
        assert change("density_ratio_count", **tidal) == GENERATED - 1
        assert change("density_ratio_count", phase="prefill", method="flexprefill") == 2
        for phase in ("prefill", "decode"):
            assert change("fallbacks_total", phase=phase, reason="short_context") == 1
        # Both stages together read and leave out what was in reach.
        tokens = sum(reply.usage["prompt_tokens"] + step for step in range(1, GENERATED))
        moved = change("kv_read_bytes_total", **tidal) + change("kv_saved_bytes_total", **tidal)
        assert moved == tokens * LAYERS * KV_HEADS * TOKEN_BYTES * (2 if dtype_flags() else 1)
        ranks = {label["rank"] for label in metrics.labels_of("vllm_sparse_device_memory_allocated_bytes")}
        assert ranks == {"0", "1"}

    def test_stats_and_layers_are_those_of_the_model(self, servers: Any) -> None:
        server = servers(STAGES)
        (engine,) = server.call("GET", "/v1/sparse/stats").json()["engines"]
        decode = engine["density"]["decode"]["tidal"]["density"]
        assert [len(heads) for heads in decode] == [QUERY_HEADS] * LAYERS
        assert [layer for layer in range(LAYERS) if decode[layer] == [1.0] * QUERY_HEADS] == [0, 1]
        (full,) = server.call("GET", "/v1/sparse/methods").json()["layers"]
        assert full["layers"] == list(range(LAYERS))

    def test_no_file_is_left(self, servers: Any) -> None:
        server = servers(STAGES)
        folders = file_folders(server)
        assert folders
        os.kill(server.pid, signal.SIGTERM)
        deadline = time.monotonic() + END_SECONDS
        while any(folder.exists() for folder in folders):
            assert time.monotonic() < deadline, folders
            time.sleep(0.5)
