"""Requests with different methods in one batch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from loadtest.text.needles import score
from tests.serving.server import BOTH, FLEXPREFILL, TIDAL, MetricsChange, Reply, Server, prompt_of

EXTRAS: tuple[dict[str, Any], ...] = ({}, FLEXPREFILL, TIDAL, BOTH)
LENGTHS = (5_000, 12_000, 7_000, 9_000, 6_000, 8_000, 5_500, 11_000, 6_500, 10_000)


def test_mixed_requests_at_once_answer_as_alone(server: Server, answers_known: None) -> None:
    """Ten requests get the text that each gets alone.

    Chunk boundaries depend on what else runs, and FlexPrefill chooses per chunk, so hidden states are not equal to the
    last bit; the answers of a model that knows them are. A row that read another request's pages would not answer its
    own question.
    """
    prompts = [prompt_of(100 + number, tokens) for number, tokens in enumerate(LENGTHS)]

    def ask(number: int) -> Reply:
        return server.ask("chat", prompts[number], EXTRAS[number % len(EXTRAS)])

    numbers = range(len(prompts))
    alone = [ask(number) for number in numbers]
    before = server.metrics()
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(ask, numbers))
    change = MetricsChange(before, server.metrics())

    assert [reply.text for reply in together] == [reply.text for reply in alone]
    assert [score(prompts[number], together[number].text) for number in numbers] == [1] * len(prompts)
    assert all(reply.cached_tokens == 0 for reply in (*alone, *together))
    chosen = [EXTRAS[number % len(EXTRAS)] for number in numbers]
    assert change.requests("prefill", "flexprefill") == sum("sparse_prefill" in extras for extras in chosen)
    assert change.requests("decode", "tidal") == sum("sparse_decode" in extras for extras in chosen)
    assert change("vllm:num_preemptions_total") == 0


def test_short_mixed_requests_at_once(server: Server) -> None:
    """Prompts of one chunk, however they are batched: even the log probabilities are those of the request alone."""
    prompts = [prompt_of(200 + number, 400) for number in range(4)]

    def ask(number: int) -> Reply:
        extras: dict[str, Any] = {**EXTRAS[number % len(EXTRAS)], "sparse_min_tokens": 64}
        if "sparse_prefill" in extras:
            extras["flexprefill_min_budget_tokens"] = 128
        if "sparse_decode" in extras:
            extras["tidal_budget_tokens"] = 128
        return server.ask("completions", prompts[number], extras, max_tokens=12, ignore_eos=True, logprobs=1)

    # All fit into one step of 2048 tokens, so that no prompt is divided.
    numbers = range(4)
    alone = [ask(number) for number in numbers]
    before = server.metrics()
    with ThreadPoolExecutor(len(numbers)) as pool:
        together = list(pool.map(ask, numbers))
    change = MetricsChange(before, server.metrics())
    assert [reply.text for reply in together] == [reply.text for reply in alone]
    for one, same in zip(alone, together, strict=True):
        assert same.logprobs == pytest.approx(one.logprobs, abs=0.02)
    assert change.density_count("prefill", "flexprefill") == 2
    assert change.density_count("decode", "tidal") == 2 * 11
