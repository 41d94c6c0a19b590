"""Models whose layers are of several kinds: full attention by this backend, the others by what vLLM picks."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.hybrid_models import CONFIGS, WINDOW_TOKENS, full_layers, write_model
from tests.serving.hybrid_run import FORCED_TOKEN, GENERATED, TOP, largest
from tests.serving.server import Server, random_prompt

SHORT_TOKENS, LONG_TOKENS = 300, 1000
# Of the KV cache on a CPU.
BLOCK_TOKENS = 32
# Methods that choose by order alone, so that models with a soft cap run them too. Lists hold everything: a budget that
# the context has passed is rounded up to the block that it ends in.
EVERYTHING: dict[str, Any] = {
    "sparse_prefill": "dhsa", "dhsa_budget_tokens": 4096, "dhsa_candidate_factor": 1,
    "sparse_decode": "tidal", "tidal_budget_tokens": LONG_TOKENS, "tidal_dense_layers": 0,
    "tidal_list_per": "query_head",
    "sparse_min_tokens": SHORT_TOKENS + GENERATED + 1,
}  # fmt: skip
FEW = {**EVERYTHING, "dhsa_budget_tokens": 128, "tidal_budget_tokens": 128}
# vLLM's linear attention on CPUs takes no other.
DTYPES = {"qwen3_next": "bfloat16"}
# Of log probabilities in float32: rounding, and more than rounding.
SAME, OTHER = 2e-3, 2e-2
# Mean of the differences in bfloat16, whose rounding sends single tokens to other experts.
SAME_IN_MEAN = 0.05


PROMPTS = [random_prompt(1, LONG_TOKENS), random_prompt(2, SHORT_TOKENS)]


def run_offline(model: Path, backend: str, extras: list[dict[str, Any]], **options: Any) -> list[list[list[float]]]:
    """Results of `hybrid_run.run` in a child process; an empty backend is vLLM's own choice, `options` are of `LLM`."""
    task, result = model / f"task{backend}.json", model / f"result{backend}.json"
    settings = {
        "model_folder": str(model),
        "backend": backend,
        "prompts": PROMPTS,
        "extras": extras,
        "options": options,
    }
    task.write_text(json.dumps({**settings, "dtype": DTYPES.get(model.name, "float32")}))
    ended = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("hybrid_run.py")), str(task), str(result)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=600,
        check=False,
        # One process in place of three, which spend their time importing vLLM.
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )
    assert ended.returncode == 0, ended.stdout[-6000:]
    results: list[list[list[float]]] = json.loads(result.read_text())
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hybrid")


@functools.cache
def model_of(folder: Path, name: str) -> Path:
    return write_model(name, folder / name)


@functools.cache
def sparse_runs(folder: Path, name: str) -> dict[str, list[list[float]]]:
    """Log probabilities of both prompts with the sparse backend, by what the request asks for."""
    dense, everything, few = run_offline(model_of(folder, name), "SPARSE", [{}, EVERYTHING, FEW])
    return {"dense": dense, "everything": everything, "few": few}


def largest_difference(left: list[float], right: list[float]) -> float:
    assert len(left) == len(right)
    return max(abs(one - other) for one, other in zip(left, right, strict=True))


def mean_difference(left: list[float], right: list[float]) -> float:
    return sum(abs(one - other) for one, other in zip(left, right, strict=True)) / len(left)


@pytest.mark.usefixtures("no_server")
@pytest.mark.parametrize("name", CONFIGS)
class TestModel:
    def test_dense_is_what_vllm_computes_by_itself(self, folder: Path, name: str) -> None:
        stock = run_offline(model_of(folder, name), "", [{}])[0]
        assert sparse_runs(folder, name)["dense"] == stock

    def test_lists_of_everything_give_the_same(self, folder: Path, name: str) -> None:
        """Only if the lists are of the right cache group, the layers of the right number, and caps and sinks kept."""
        runs = sparse_runs(folder, name)
        everything, dense = runs["everything"][0], runs["dense"][0]
        if name in DTYPES:
            assert mean_difference(everything, dense) < SAME_IN_MEAN < mean_difference(runs["few"][0], dense)
        else:
            assert largest_difference(everything, dense) < SAME

    def test_few_keys_change_the_prompt_and_the_generation(self, folder: Path, name: str) -> None:
        runs = sparse_runs(folder, name)
        few, dense = runs["few"][0], runs["dense"][0]
        for part in (slice(0, LONG_TOKENS - 1), slice(LONG_TOKENS - 1, None)):
            assert largest_difference(few[part], dense[part]) > OTHER

    def test_a_short_neighbour_stays_dense(self, folder: Path, name: str) -> None:
        runs = sparse_runs(folder, name)
        assert largest_difference(runs["few"][1], runs["dense"][1]) < SAME


@pytest.fixture(scope="module")
def gemma(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the small Gemma 3 with the plugin's routes."""
    arguments = (
        *("--kv-cache-memory-bytes", "256M", "--max-num-batched-tokens", "512", "--enable-prompt-tokens-details"),
        *("--enforce-eager", "--block-size", "32", "--max-model-len", "4096"),
        *("--additional-config", json.dumps({"sparse": {"recall_interval_steps": 1}})),
    )
    log = tmp_path_factory.mktemp("gemma") / "log"
    server = Server(model_of(folder, "gemma3"), arguments, log, {"VLLM_PLUGINS": "sparse"})
    try:
        yield server
    finally:
        server.stop()


def complete(
    server: Server, tokens: list[int], extras: dict[str, Any], generated: int = GENERATED
) -> tuple[list[float], int]:
    """The largest log probabilities of each forced step, and how many prompt tokens were in the cache."""
    body = {
        "prompt": tokens, "max_tokens": generated, "ignore_eos": True, "logprobs": TOP,
        "allowed_token_ids": [FORCED_TOKEN], "vllm_xargs": extras,
    }  # fmt: skip
    reply = server.post("/v1/completions", body)
    assert reply.status == 200, reply.raw
    steps = reply.body["choices"][0]["logprobs"]["top_logprobs"]
    return [logprob for step in steps for logprob in largest(list(step.values()))], reply.cached_tokens


@pytest.mark.usefixtures("no_server")
class TestServer:
    def test_the_log_and_the_route_tell_which_backend_serves_which_layers(self, gemma: Server) -> None:
        full = full_layers("gemma3")
        table = httpx.get(f"{gemma.url}/v1/sparse/methods", timeout=60).json()["layers"]
        by_kind = {kind["kind"]: kind for kind in table}
        window = by_kind.pop(f"sliding window of {WINDOW_TOKENS} tokens")
        assert window["backend"] == "CPU_ATTN"
        assert window["layers"] == [layer for layer in range(8) if layer not in full]
        assert by_kind.pop("full attention")["layers"] == full
        assert not by_kind
        log = gemma.log.read_text()
        assert log.count("Sparse attention: full attention: SPARSE serves layers 2, 5, 7") == 1
        assert log.count(f"sliding window of {WINDOW_TOKENS} tokens: CPU_ATTN serves layers 0-1, 3-4, 6") == 1

    def test_density_is_told_of_full_layers_alone(self, gemma: Server) -> None:
        complete(gemma, random_prompt(3, LONG_TOKENS), FEW)
        complete(gemma, random_prompt(4, 64), {})
        engines = httpx.get(f"{gemma.url}/v1/sparse/stats", timeout=60).json()["engines"]
        prefill = engines[0]["density"]["prefill"]["dhsa"]["density"]
        assert len(prefill) == len(full_layers("gemma3"))
        assert all(0 < head < 0.9 for heads in prefill for head in heads)

    def test_knobs_that_name_layers_count_full_ones(self, gemma: Server) -> None:
        body = {"prompt": [5, 6], "vllm_xargs": {"sparse_decode": "tidal", "tidal_dense_layers": 3}}
        reply = gemma.post("/v1/completions", body)
        assert reply.status == 400
        assert "this model has 3 layers, so 0 to 2 are allowed" in reply.error

    def test_only_equal_settings_share_the_cache_of_all_groups(self, gemma: Server) -> None:
        prompt = random_prompt(5, LONG_TOKENS)
        computed, cached = complete(gemma, prompt, FEW)
        assert cached == 0
        # Tokens before the minimum are dense for everybody, and found while no group has given up its blocks of them.
        shared = FEW["sparse_min_tokens"] // BLOCK_TOKENS * BLOCK_TOKENS
        dense, cached = complete(gemma, prompt, {})
        assert cached <= shared
        assert largest_difference(computed, dense) > OTHER
        for extras, alone in (({}, dense), (FEW, computed)):
            found, cached = complete(gemma, prompt, extras)
            assert cached > LONG_TOKENS - 64
            # What is left of the prompt after a hit is shorter than a chunk that may be sparse.
            assert extras or largest_difference(found, alone) < SAME
        assert complete(gemma, prompt, {**FEW, "dhsa_budget_tokens": 256})[1] <= shared

    def test_a_generation_is_sparse_after_a_dense_prompt_and_shared_up_to_there(self, gemma: Server) -> None:
        extras = {**FEW, "sparse_prefill": "dense"}
        for knob in ("dhsa_budget_tokens", "dhsa_candidate_factor"):
            extras.pop(knob)
        prompt = random_prompt(6, LONG_TOKENS)
        dense, _ = complete(gemma, prompt, {})
        sparse, cached = complete(gemma, prompt, extras, generated=80)
        assert cached > LONG_TOKENS - 64
        # The prompt's last token is a step of the prompt.
        assert largest_difference(sparse[:TOP], dense[:TOP]) < SAME
        assert largest_difference(sparse[TOP : GENERATED * TOP], dense[TOP:]) > OTHER
        continued = [*prompt, *[FORCED_TOKEN] * 80, 6]
        assert complete(gemma, continued, {})[1] <= LONG_TOKENS
        assert complete(gemma, continued, extras)[1] <= LONG_TOKENS + 81
