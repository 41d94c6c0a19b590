"""Answers of a running server: every method, both endpoints, streaming or not, and what the metrics say of them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from loadtest.text.needles import score
from tests.serving.server import BOTH, FLEXPREFILL, TIDAL, MetricsChange, Reply, Server, prompt_of

# Sparse on short prompts too, so that the tests are quick.
SHORT = {"sparse_min_tokens": 512}
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "flexprefill": {**FLEXPREFILL, **SHORT, "flexprefill_min_budget_tokens": 256},
    "tidal": {**TIDAL, **SHORT, "tidal_budget_tokens": 256},
    "sale": {"sparse_prefill": "sale", **SHORT, "sale_tau": 0.03},
    "dhsa": {"sparse_prefill": "dhsa", **SHORT, "dhsa_density": 0.4},
    "hip": {"sparse_prefill": "hip", **SHORT, "hip_stage_budget_tokens": [2048, 1024, 512], "hip_recent_tokens": 256},
    "hip_decode": {
        "sparse_decode": "hip",
        **SHORT,
        "hip_stage_block_tokens": [64, 16],
        "hip_stage_budget_tokens": [2048, 1024],
        "hip_sink_tokens": 64,
        "hip_recent_tokens": 256,
        "hip_dense_layers": 2,
    },
    "both": {**BOTH, **SHORT, "flexprefill_min_budget_tokens": 256, "tidal_budget_tokens": 256},
}
# What the lists of a phase's methods stay below; single keys lead hip's search, which needs more to answer right.
MOST_DENSITY = {"prefill": 0.9, "decode": 0.2, "hip_decode": 0.65}


def sparse_phases(extras: dict[str, Any]) -> dict[str, str]:
    """Method of each phase that a request makes sparse."""
    phases = {"prefill": extras.get("sparse_prefill"), "decode": extras.get("sparse_decode")}
    return {phase: method for phase, method in phases.items() if method is not None}


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize("method", METHODS)
def test_streamed_text_is_the_text(server: Server, method: str, endpoint: str) -> None:
    prompt = prompt_of(1, 3000)
    extras = METHODS[method]
    before = server.metrics()
    whole = server.ask(endpoint, prompt, extras)
    streamed = server.ask(endpoint, prompt, extras, stream=True)
    change = MetricsChange(before, server.metrics())

    assert whole.text
    assert streamed.text == whole.text
    assert streamed.usage["completion_tokens"] == whole.usage["completion_tokens"]
    assert whole.cached_tokens == streamed.cached_tokens == 0
    steps = 2 * (whole.usage["completion_tokens"] - 1)
    for phase in ("prefill", "decode"):
        sparse = sparse_phases(extras).get(phase)
        assert change.requests(phase, sparse or "dense") == 2
        assert change("vllm_sparse_requests_total", phase=phase) == 2
        # 3000 tokens are two chunks.
        observations = {"prefill": 4, "decode": steps}[phase] if sparse else 0
        assert change("vllm_sparse_density_ratio_count", phase=phase) == observations
        if sparse:
            assert change.density(phase, sparse) < MOST_DENSITY[method if method in MOST_DENSITY else phase]
    assert change("vllm_sparse_fallbacks_total") == 0


@pytest.mark.parametrize("method", METHODS)
def test_short_prompts_are_answered_right(server: Server, answers_known: None, method: str) -> None:
    prompt = prompt_of(2, 3000)
    assert score(prompt, server.ask("chat", prompt, METHODS[method]).text) == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_long_prompt_runs_sparse(server: Server, stream: bool) -> None:
    """16K tokens, three needles, default knobs."""
    reply, change = ask_long(server, stream)
    assert reply.usage["prompt_tokens"] > 15_000
    assert change.requests("prefill", "flexprefill") == change.requests("decode", "tidal") == 1
    # The first four of eight chunks lie before the default minimum of 8192 tokens.
    assert change.density_count("prefill", "flexprefill") == 4
    assert change.fallbacks("prefill", "flexprefill", "short_context") == 4
    assert change.density_count("decode", "tidal") == reply.usage["completion_tokens"] - 1
    assert change("vllm_sparse_fallbacks_total", phase="decode") == 0
    assert 0 < change.density("decode", "tidal") < 0.3


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_long_prompt_is_answered_right_and_sparsely(server: Server, answers_known: None, stream: bool) -> None:
    """How sparse a prefill can be depends on the model's attention."""
    reply, change = ask_long(server, stream)
    prompt = prompt_of(3 + stream, 16_000)
    assert score(prompt, reply.text) == 1, (prompt.answers, reply.text)
    assert 0 < change.density("prefill", "flexprefill") < 0.6
    assert 0 < change.density("decode", "tidal") < 0.3


def ask_long(server: Server, stream: bool) -> tuple[Reply, MetricsChange]:
    """Ask for one of three needles in 16K tokens."""
    before = server.metrics()
    reply = server.ask("chat", prompt_of(3 + stream, 16_000), BOTH, stream=stream)
    assert reply.cached_tokens == 0
    return reply, MetricsChange(before, server.metrics())


def test_the_guard_catches_a_broken_selection_within_the_answer(server: Server, answers_known: None) -> None:
    """One block of 64 tokens and the newest token: too few to read the needle's digits, which follow some words."""
    broken = {
        "sparse_decode": "hip",
        **SHORT,
        "hip_stage_block_tokens": [64],
        "hip_stage_budget_tokens": [64],
        "hip_refresh_steps": [64],
        "hip_sink_tokens": 0,
        "hip_recent_tokens": 1,
    }
    prompt = prompt_of(2, 3000)
    before = server.metrics()
    assert score(prompt, server.ask("chat", prompt, broken).text) == 0
    between = server.metrics()
    assert MetricsChange(before, between)("vllm_sparse_guard_checks_total") == 0
    assert score(prompt, server.ask("chat", prompt, {**broken, "sparse_min_recall": 0.5}).text) == 1
    change = MetricsChange(between, server.metrics())
    layers = change("vllm_sparse_guard_layers_total", phase="decode", method="hip")
    assert 4 <= layers <= change("vllm_sparse_guard_checks_total", phase="decode", method="hip")
    assert change.fallbacks("decode", "hip", "low_recall") > 0
    assert "of a request is dense from now on: hip in decoding kept " in server.log.read_text()


def test_short_request_runs_dense(server: Server) -> None:
    """A request that cannot reach the minimum runs dense, and that it asked for more is counted."""
    prompt = prompt_of(5, 1000)
    before = server.metrics()
    sparse = server.ask("chat", prompt, BOTH)
    dense = server.ask("chat", prompt)
    change = MetricsChange(before, server.metrics())
    assert sparse.text == dense.text
    assert change("vllm_sparse_density_ratio_count") == 0
    assert change.fallbacks("prefill", "flexprefill", "short_context") == 1


def test_log_says_what_runs_and_once_what_falls_back(server: Server) -> None:
    for seed in (5, 6):
        server.ask("chat", prompt_of(seed, 1000), FLEXPREFILL)
    log = server.log.read_text()
    assert "requests may choose flexprefill, " in log
    assert "run prefill dense and decode dense; contexts of fewer than 8192 tokens run dense" in log
    assert log.count("asked for flexprefill in its prefill ran a step dense: its context is shorter") == 1


def test_fallbacks_of_short_contexts_are_counted(server: Server) -> None:
    """The prompt is below the minimum, the prompt with its answer is not."""
    prompt = prompt_of(5, 1000)
    tokens = server.ask("chat", prompt, max_tokens=1).usage["prompt_tokens"]
    extras = {**BOTH, "tidal_budget_tokens": 256, "sparse_min_tokens": tokens + 5}
    before = server.metrics()
    reply = server.ask("chat", prompt, extras, max_tokens=10, ignore_eos=True)
    change = MetricsChange(before, server.metrics())
    assert reply.usage["completion_tokens"] == 10
    assert change.fallbacks("prefill", "flexprefill", "short_context") == 1
    # Nine decode steps, with contexts of tokens + 1 to tokens + 9.
    assert change.fallbacks("decode", "tidal", "short_context") == 4
    assert change.density_count("decode", "tidal") == 5


def test_every_nth_step_is_dense(server: Server) -> None:
    """Where the context is a multiple, after a hit in the prefix cache too; such a step has density 1."""
    prompt = prompt_of(12, 1000)
    salt = server.fresh_salt()
    extras = {**TIDAL, "tidal_budget_tokens": 256, "sparse_min_tokens": 512, "tidal_dense_every_steps": 4}
    for _ in range(2):
        before = server.metrics()
        reply = server.ask("chat", prompt, extras, max_tokens=13, ignore_eos=True, cache_salt=salt)
        change = MetricsChange(before, server.metrics())
        tokens = reply.usage["prompt_tokens"]
        contexts = range(tokens + 1, tokens + 13)
        assert change.density_count("decode", "tidal") == len(contexts)
        assert change("vllm_sparse_fallbacks_total", phase="decode") == 0
        # Lists are blocks of a CPU's cache, the last of which may hold a single token.
        sparse = [224 / context for context in contexts if context % 4]
        assert len(sparse) == 9
        least = (3 + sum(sparse)) / 12
        assert least < change.density("decode", "tidal") < least + 0.2
    assert reply.cached_tokens > 0


def test_full_coverage_is_dense(server: Server) -> None:
    """gamma 1 is the dense path itself; a minimum budget of everything goes through sparse lists to the same text."""
    prompt = prompt_of(6, 3000)
    dense = server.ask("completions", prompt, logprobs=1)
    before = server.metrics()
    gamma_one = server.ask("completions", prompt, {**FLEXPREFILL, **SHORT, "flexprefill_gamma": 1.0}, logprobs=1)
    between = server.metrics()
    everything = {
        **FLEXPREFILL,
        **SHORT,
        "flexprefill_min_budget_tokens": 1 << 20,
        "flexprefill_divergence_threshold": 0,
    }
    full_lists = server.ask("completions", prompt, everything, logprobs=1)
    after = server.metrics()

    assert gamma_one.text == full_lists.text == dense.text
    assert gamma_one.logprobs == pytest.approx(dense.logprobs, abs=0.01)
    assert full_lists.logprobs == pytest.approx(dense.logprobs, abs=0.1)
    assert MetricsChange(before, between).requests("prefill", "dense") == 1
    assert MetricsChange(before, between)("vllm_sparse_density_ratio_count") == 0
    assert MetricsChange(between, after).density("prefill", "flexprefill") == pytest.approx(1)


def test_budget_of_the_whole_context_is_dense(server: Server) -> None:
    prompt = prompt_of(7, 3000)
    dense = server.ask("completions", prompt, logprobs=1)
    before = server.metrics()
    whole = server.ask("completions", prompt, {**TIDAL, **SHORT, "tidal_budget_tokens": 4096}, logprobs=1)
    between = server.metrics()
    nearly = server.ask("completions", prompt, {**TIDAL, **SHORT, "tidal_budget_tokens": 2900}, logprobs=1)
    after = server.metrics()

    assert whole.text == nearly.text == dense.text
    assert whole.logprobs == pytest.approx(dense.logprobs, abs=0.01)
    steps = whole.usage["completion_tokens"] - 1
    assert MetricsChange(before, between).fallbacks("decode", "tidal", "short_context") == steps
    assert MetricsChange(before, between)("vllm_sparse_density_ratio_count") == 0
    assert 0.9 < MetricsChange(between, after).density("decode", "tidal") < 1


class TestOtherOptions:
    """Options of vLLM's own API keep working beside sparse settings."""

    def test_several_samples(self, server: Server) -> None:
        prompt = prompt_of(8, 1500)
        reply = server.ask("chat", prompt, METHODS["both"], n=2, temperature=1.0, seed=5)
        assert len(reply.texts) == 2
        assert all(reply.texts)

    def test_seed(self, server: Server) -> None:
        prompt = prompt_of(8, 1500)
        first, again = (
            server.ask("chat", prompt, METHODS["both"], temperature=1.0, seed=5, max_tokens=12) for _ in range(2)
        )
        assert first.text == again.text

    def test_list_of_prompts(self, server: Server) -> None:
        # Together they fit into one step, so that every prompt is one chunk, as alone.
        prompts = [prompt_of(seed, 600) for seed in (8, 9, 10)]
        before = server.metrics()
        together = server.complete(
            [prompt.completion_prompt for prompt in prompts], METHODS["both"], cache_salt=server.fresh_salt()
        )
        assert MetricsChange(before, server.metrics()).requests("decode", "tidal") == 3
        alone = [server.ask("completions", prompt, METHODS["both"]).text for prompt in prompts]
        assert list(together.texts) == alone

    def test_logprobs(self, server: Server) -> None:
        reply = server.ask("chat", prompt_of(8, 1500), METHODS["both"], logprobs=True, top_logprobs=2, max_tokens=4)
        content = reply.body["choices"][0]["logprobs"]["content"]
        assert len(content) == reply.usage["completion_tokens"]
        assert all(len(token["top_logprobs"]) == 2 for token in content)

    def test_prompt_logprobs(self, server: Server) -> None:
        reply = server.ask("completions", prompt_of(8, 1500), METHODS["both"], prompt_logprobs=0, max_tokens=2)
        assert len(reply.body["choices"][0]["prompt_logprobs"]) == reply.usage["prompt_tokens"]

    def test_stop_string(self, server: Server) -> None:
        prompt = prompt_of(8, 1500)
        text = server.ask("chat", prompt, METHODS["both"], max_tokens=24, ignore_eos=True).text
        (stop,) = re.findall(r"\w+", text)[2:3]
        stopped = server.ask("chat", prompt, METHODS["both"], max_tokens=24, ignore_eos=True, stop=[stop])
        assert stopped.text == text[: text.index(stop)]
        assert stopped.body["choices"][0]["finish_reason"] == "stop"
