"""Speculative decoding beside sparse requests: prompts are sparse, verification is dense and counted, answers stay."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtest.text.needles import score
from tests.oracle import needs_cuda
from tests.serving.server import FLEXPREFILL, TIDAL, MetricsChange, Server, prompt_of

DRAFTED = 3
# Only model runner V2, which needs a GPU, tells plugins what requests ask for while tokens are drafted.
pytestmark = [needs_cuda, pytest.mark.usefixtures("no_server")]


@pytest.fixture(scope="module", params=["ngram", "draft_model"])
def drafting_server(
    request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server that drafts tokens from the prompt, or by the model itself."""
    drafts: dict[str, dict[str, str | int]] = {
        "ngram": {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 4},
        "draft_model": {"method": "draft_model", "model": str(model_folder)},
    }
    arguments = (
        *("--kv-cache-memory-bytes", "1G", "--max-num-batched-tokens", "2048", "--max-model-len", "8192"),
        *("--gpu-memory-utilization", "0.1"),
        # vLLM 0.32 compiles the drafter for fewer tokens than its profiling gives it, and does not start then.
        *(("--enforce-eager",) if request.param == "draft_model" else ()),
        *("--speculative-config", json.dumps({**drafts[request.param], "num_speculative_tokens": DRAFTED})),
    )
    server = Server(model_folder, arguments, tmp_path_factory.mktemp("drafting") / "log", {"VLLM_PLUGINS": "sparse"})
    try:
        yield server
    finally:
        server.stop()


def test_prompts_are_sparse_and_verification_is_dense(drafting_server: Server) -> None:
    # The costs of an H200 would leave such short prompts dense.
    forced = {"sparse_min_tokens": 512, "sparse_unprofitable": "sparse"}
    extras = {**FLEXPREFILL, **TIDAL, **forced, "flexprefill_min_budget_tokens": 256}
    before = drafting_server.metrics()
    for seed in range(4):
        prompt = prompt_of(seed, 3000)
        assert score(prompt, drafting_server.ask("chat", prompt, extras).text) == 1.0
    change = MetricsChange(before, drafting_server.metrics())
    assert change("vllm:spec_decode_num_accepted_tokens_total") > 0
    assert change.density_count("prefill", "flexprefill") > 0
    assert change.density_count("decode", "tidal") == 0
    assert change.fallbacks("decode", "tidal", "speculative") > 0
    assert change("vllm_sparse_fallbacks_total") == change.fallbacks("decode", "tidal", "speculative")
