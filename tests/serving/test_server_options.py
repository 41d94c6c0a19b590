"""Server-wide defaults, several API servers, preemption: one server with a configuration."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from loadtest.quality.text import score
from tests.serving.server import BOTH, FLEXPREFILL, MetricsChange, Reply, Server, prompt_of


def test_configured_defaults_apply(configured_server: Server) -> None:
    prompt = prompt_of(20, 3000)
    before = configured_server.metrics()
    reply = configured_server.ask("chat", prompt)
    change = MetricsChange(before, configured_server.metrics())
    assert reply.text
    assert change.requests("prefill", "flexprefill") == change.requests("decode", "dense") == 1
    # The configured minimum of 1024 tokens and the configured least budget hold.
    assert change.density_count("prefill", "flexprefill") == 2
    assert change.density("prefill", "flexprefill") < 0.9


def test_request_overrides_defaults(configured_server: Server) -> None:
    prompt = prompt_of(20, 3000)
    before = configured_server.metrics()
    configured_server.ask("chat", prompt, {"flexprefill_min_budget": 1 << 20, "flexprefill_tau": 0})
    between = configured_server.metrics()
    configured_server.ask("chat", prompt, {"sparse_min_tokens": 2500})
    after = configured_server.metrics()
    assert MetricsChange(before, between).density("prefill", "flexprefill") > 0.99
    assert MetricsChange(between, after).fallbacks("prefill", "flexprefill", "short_context") == 1
    assert MetricsChange(between, after).density_count("prefill", "flexprefill") == 1


def test_request_opts_out(configured_server: Server) -> None:
    before = configured_server.metrics()
    configured_server.ask("chat", prompt_of(20, 3000), {"sparse_prefill": "dense"})
    change = MetricsChange(before, configured_server.metrics())
    assert change.requests("prefill", "dense") == 1
    assert change("vllm_sparse_density_ratio_count") == 0


def test_defaults_and_the_same_settings_share_the_prefix_cache(configured_server: Server) -> None:
    content = prompt_of(21, 1500).content
    written_out = {**FLEXPREFILL, "sparse_min_tokens": 1024, "flexprefill_gamma": 0.9, "flexprefill_min_budget": 256}
    assert configured_server.chat(content).cached_tokens == 0
    assert configured_server.chat(content, written_out).cached_tokens > 1400
    assert configured_server.chat(content, {"sparse_prefill": "dense"}).cached_tokens == 0


def test_method_that_is_not_enabled_is_refused(configured_server: Server) -> None:
    for stream in (False, True):
        reply = configured_server.chat("Hello.", BOTH, stream=stream)
        assert reply.status == 400
        assert "sparse_decode is 'tidal'" in reply.error
        assert "does not enable it" in reply.error
        assert "allowed are dense" in reply.error


def test_all_api_servers_serve_all_metrics(configured_server: Server) -> None:
    """Which API server answers is chance, so every snapshot must hold what all of them and the worker counted."""
    before = configured_server.metrics()
    for number in range(8):
        configured_server.ask("chat", prompt_of(30 + number, 1500), max_tokens=2)
    changes = [MetricsChange(before, configured_server.metrics()) for _ in range(16)]
    assert [change.requests("prefill", "flexprefill") for change in changes] == [8] * len(changes)
    assert [change.density_count("prefill", "flexprefill") for change in changes] == [8] * len(changes)
    assert configured_server.log.read_text().count("Started server process") == 2


def test_preempted_requests_answer_right(configured_server: Server, answers_known: None) -> None:
    replies = preempted(configured_server)
    for number, reply in replies.items():
        assert score(prompt_of(number, 4000), reply.text) == 1, reply.text


def test_preempted_requests_finish(configured_server: Server) -> None:
    for reply in preempted(configured_server).values():
        assert reply.usage["completion_tokens"] == 420
        assert reply.text


def preempted(server: Server) -> dict[int, Reply]:
    """Three requests that fill the KV cache with their prompts, so that their generation cannot be held too."""
    numbers = (40, 41, 42)
    extras: dict[str, Any] = {"flexprefill_min_budget": 512}
    before = server.metrics()

    def ask(number: int) -> Reply:
        return server.ask("chat", prompt_of(number, 4000), extras, max_tokens=420, ignore_eos=True)

    with ThreadPoolExecutor(len(numbers)) as pool:
        replies = dict(zip(numbers, pool.map(ask, numbers), strict=True))
    change = MetricsChange(before, server.metrics())
    assert change("vllm:num_preemptions_total") > 0
    assert change.density("prefill", "flexprefill") < 1
    return replies
