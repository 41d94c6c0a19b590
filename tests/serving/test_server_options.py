"""Server-wide defaults, enabled methods, several API servers, preemption: one server with a configuration."""

from __future__ import annotations

from loadtest.text.needles import score
from loadtest.text.tokenizer import chat_text
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
    configured_server.ask(
        "chat", prompt, {"flexprefill_min_budget_tokens": 1 << 20, "flexprefill_divergence_threshold": 0}
    )
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
    written_out = {
        **FLEXPREFILL,
        "sparse_min_tokens": 1024,
        "flexprefill_gamma": 0.9,
        "flexprefill_min_budget_tokens": 256,
    }
    assert configured_server.chat(content).cached_tokens == 0
    assert configured_server.chat(content, written_out).cached_tokens > 1400
    # Tokens before the minimum are dense in either.
    assert 1024 - 32 <= configured_server.chat(content, {"sparse_prefill": "dense"}).cached_tokens <= 1024


def test_a_prefix_hit_changes_no_answer(configured_server: Server, answers_known: None) -> None:
    """A decode method that reads summaries finds those of blocks that another request wrote."""
    prompt = prompt_of(22, 3000)
    extras = {"sparse_prefill": "dense", "sparse_decode": "blocktopk", "blocktopk_budget_tokens": 512}
    body = {"max_tokens": 48, "ignore_eos": True, "cache_salt": configured_server.fresh_salt()}
    before = configured_server.metrics()
    computed = configured_server.ask("chat", prompt, extras, **body)
    hit = configured_server.ask("chat", prompt, extras, **body)
    change = MetricsChange(before, configured_server.metrics())
    assert computed.cached_tokens == 0
    assert hit.cached_tokens > 2900
    assert hit.text == computed.text
    assert score(prompt, hit.text) == 1, hit.text
    assert change.density_count("decode", "blocktopk") == 2 * 47
    assert change.density("decode", "blocktopk") < 0.25


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


PREEMPTED = (40, 41, 42)
GENERATED_TOKENS = 900


def test_preempted_requests_answer_right(configured_server: Server, answers_known: None) -> None:
    texts = preempted(configured_server).texts
    for number, text in zip(PREEMPTED, texts, strict=True):
        assert score(prompt_of(number, 4000), text) == 1, text


def test_preempted_requests_finish(configured_server: Server) -> None:
    reply = preempted(configured_server)
    assert reply.usage["completion_tokens"] == len(PREEMPTED) * GENERATED_TOKENS
    assert all(reply.texts)


def preempted(server: Server) -> Reply:
    """Three prompts that nearly fill the KV cache, so that what they generate cannot be held too.

    They are one HTTP request: requests of their own could arrive so far apart that one has ended before the cache is
    full, and nothing would be preempted.
    """
    before = server.metrics()
    reply = server.complete(
        [chat_text(prompt_of(number, 4000).content) for number in PREEMPTED],
        {"flexprefill_min_budget_tokens": 512},
        max_tokens=GENERATED_TOKENS,
        ignore_eos=True,
        add_special_tokens=False,
        cache_salt=server.fresh_salt(),
    )
    assert reply.status == 200, reply.raw
    change = MetricsChange(before, server.metrics())
    assert change("vllm:num_preemptions_total") > 0
    assert change.density("prefill", "flexprefill") < 1
    return reply
