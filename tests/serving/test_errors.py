"""Wrong settings, as a new user would write them: HTTP 400 with the key, the value and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.serving.server import BOTH, FLEXPREFILL, TIDAL, MetricsChange, Server

# Name, extras, what the message must contain.
WRONG: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("unknown method", {"sparse_prefill": "flexprefil"}, ("sparse_prefill", "flexprefil", "dense, flexprefill")),
    ("unknown decode method", {"sparse_decode": "quest"}, ("sparse_decode", "quest", "dense, tidal")),
    ("empty method", {"sparse_decode": ""}, ("sparse_decode", "''", "dense, tidal")),
    ("true as method", {"sparse_prefill": True}, ("sparse_prefill", "dense, flexprefill")),
    ("list of methods", {"sparse_prefill": ["flexprefill"]}, ("sparse_prefill", "['flexprefill']", "dense")),
    ("method of the other phase", {"sparse_prefill": "tidal"}, ("sparse_prefill", "tidal", "sparse_decode")),
    ("null", {"sparse_prefill": None}, ("vllm_xargs.sparse_prefill", "valid string")),
    ("nested object", {"sparse": {"prefill": "flexprefill"}}, ("vllm_xargs.sparse", "valid string")),
    ("not an object", ["flexprefill"], ("vllm_xargs", "valid dictionary")),
    ("unknown preset", {"sparse_preset": "turbo"}, ("sparse_preset", "'turbo'", "dense, quality, balanced, fast")),
    (
        "preset of a method that is not enabled",
        {"sparse_preset": "balanced"},
        ("'balanced', whose decode method tokentopk this server does not enable", '"methods": ['),
    ),
    ("unknown setting", {"sparse_method": "tidal"}, ("sparse_method", "sparse_prefill, sparse_decode")),
    ("reserved key", {"sparse_resolved": '{"min_tokens":0}'}, ("sparse_resolved", "sparse_prefill, sparse_decode")),
    ("unknown knob", {**TIDAL, "tidal_buget": 512}, ("tidal_buget", "tidal_budget_tokens")),
    ("knob without its method", {"tidal_budget_tokens": 512}, ("tidal_budget_tokens", '"sparse_decode": "tidal"')),
    (
        "knob of another method",
        {**FLEXPREFILL, "tidal_budget_tokens": 512},
        ("tidal_budget_tokens", '"sparse_decode": "tidal"'),
    ),
    ("text for a number", {**FLEXPREFILL, "flexprefill_gamma": "0.9"}, ("flexprefill_gamma", "'0.9'", "a number")),
    (
        "fraction for an integer",
        {**TIDAL, "tidal_budget_tokens": 512.5},
        ("tidal_budget_tokens", "512.5", "an integer"),
    ),
    ("too large", {**FLEXPREFILL, "flexprefill_gamma": 1.5}, ("flexprefill_gamma", "1.5", "at most 1")),
    ("too small", {**TIDAL, "tidal_budget_tokens": 8}, ("tidal_budget_tokens", "8", "at least 16")),
    ("not a number", {**FLEXPREFILL, "flexprefill_gamma": math.nan}, ("flexprefill_gamma", "nan", "a number")),
    (
        "infinity",
        {**FLEXPREFILL, "flexprefill_divergence_threshold": math.inf},
        ("flexprefill_divergence_threshold", "inf", "at most 1"),
    ),
    ("beyond 64 bits", {**TIDAL, "tidal_budget_tokens": 1 << 70}, ("tidal_budget_tokens", str(1 << 70), "at most")),
    ("unknown choice", {**TIDAL, "tidal_list_per": "head"}, ("tidal_list_per", "'head'", "'kv_head', 'query_head'")),
    ("number for a list", {**TIDAL, "tidal_reselect_layers": 3}, ("tidal_reselect_layers", "3", "a list")),
    ("missing layer", {**TIDAL, "tidal_reselect_layers": [99]}, ("tidal_reselect_layers", "99", "3 to 7")),
    ("too many full layers", {**TIDAL, "tidal_dense_layers": 9}, ("tidal_dense_layers", "9", "0 to 7")),
    (
        "knobs that contradict",
        {**TIDAL, "tidal_budget_tokens": 64, "tidal_sink_tokens": 64},
        ("tidal_budget_tokens is 64", "sink_tokens 64", "recent_tokens 64"),
    ),
    ("negative minimum", {**BOTH, "sparse_min_tokens": -1}, ("sparse_min_tokens", "-1", "0 or more")),
    ("recall above 1", {**BOTH, "sparse_min_recall": 1.1}, ("sparse_min_recall", "1.1", "number from 0 to 1")),
    (
        "minimum that no number holds",
        {**BOTH, "sparse_min_tokens": 10**18},
        ("sparse_min_tokens is 1000000000000000000", "limits.min_tokens", "at most 16777216"),
    ),
    ("text as minimum", {**BOTH, "sparse_min_tokens": "1k"}, ("sparse_min_tokens", "'1k'", "an integer")),
)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("endpoint", ["completions", "chat", "responses", "messages"])
@pytest.mark.parametrize(("extras", "expected"), [wrong[1:] for wrong in WRONG], ids=[wrong[0] for wrong in WRONG])
def test_wrong_settings_are_refused(
    server: Server, extras: Any, expected: tuple[str, ...], endpoint: str, stream: bool
) -> None:
    before = server.metrics()
    messages = [{"role": "user", "content": "Hello."}]
    path, body = {
        "completions": ("/v1/completions", {"prompt": "Hello.", "max_tokens": 4}),
        "chat": ("/v1/chat/completions", {"messages": messages, "max_tokens": 4}),
        "responses": ("/v1/responses", {"input": "Hello.", "max_output_tokens": 16}),
        "messages": ("/v1/messages", {"messages": messages, "max_tokens": 4}),
    }[endpoint]
    reply = server.post(path, {**body, "vllm_xargs": extras, "stream": stream})
    assert reply.status == 400, reply.raw
    missing = [part for part in expected if part not in reply.error]
    assert not missing, reply.error
    after = server.metrics()
    assert MetricsChange(before, after)("vllm_sparse_requests_total") == 0
    assert after.total("vllm:num_requests_running") == after.total("vllm:num_requests_waiting") == 0


# What vLLM's own types refuse elsewhere reaches the plugin here, where extras may be any JSON.
OWN_TYPES = {"null", "nested object", "not an object", "beyond 64 bits"}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("extras", "expected"),
    [wrong[1:] for wrong in WRONG if wrong[0] not in OWN_TYPES]
    + [
        ({"sparse_prefill": None}, ("sparse_prefill is None", "dense, flexprefill")),
        ({"sparse": {"prefill": "flexprefill"}}, ("sparse is no setting", "sparse_prefill, sparse_decode")),
        ({**TIDAL, "tidal_reselect_layers": [[3]]}, ("tidal_reselect_layers", "[[3]]", "a list of integers")),
    ],
)
def test_wrong_settings_of_token_ids_are_refused(
    server: Server, extras: Any, expected: tuple[str, ...], stream: bool
) -> None:
    before = server.metrics()
    sampling = {"max_tokens": 4, "extra_args": extras}
    reply = server.post("/inference/v1/generate", {"token_ids": [5] * 4, "sampling_params": sampling, "stream": stream})
    assert reply.status == 400, reply.raw
    missing = [part for part in expected if part not in reply.error]
    assert not missing, reply.error
    assert MetricsChange(before, server.metrics())("vllm_sparse_requests_total") == 0


MESSAGES = [{"role": "user", "content": "Hello."}]
SCORED = {"query": "Hello.", "items": ["Yes.", "No."], "label_token_ids": [5, 6]}


@pytest.mark.parametrize(
    ("path", "body", "advice"),
    [
        ("/v1/completions", {"prompt": "Hello.", **TIDAL}, "sparse_decode is 'tidal'"),
        ("/v1/chat/completions", {"messages": MESSAGES, **TIDAL}, "move it to vllm_xargs"),
        ("/v1/chat/completions/batch", {"messages": [MESSAGES], **TIDAL}, "move it to vllm_xargs"),
        ("/v1/responses", {"input": "Hello.", "stream": True, **TIDAL}, "move it to vllm_xargs"),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 4, **TIDAL}, "move it to vllm_xargs"),
        ("/generative_scoring", {**SCORED, "vllm_xargs": TIDAL}, "this kind of request takes no sampling extras"),
        ("/generative_scoring", {**SCORED, **TIDAL}, "this kind of request takes no sampling extras"),
        (
            "/inference/v1/generate",
            {"token_ids": [5] * 4, "sampling_params": {"max_tokens": 4}, "vllm_xargs": TIDAL},
            "vllm_xargs.sparse_decode is 'tidal', where it is not read; move it to sampling_params.extra_args",
        ),
        (
            "/inference/v1/generate",
            {"token_ids": [5] * 4, "sampling_params": {"max_tokens": 4, **TIDAL}},
            "sampling_params.sparse_decode is 'tidal', where it is not read; move it to sampling_params.extra_args",
        ),
    ],
)
def test_settings_that_nothing_reads_are_refused(server: Server, path: str, body: dict[str, Any], advice: str) -> None:
    """They would be dropped without a word."""
    reply = server.post(path, body)
    assert reply.status == 400, reply.raw
    assert "sparse_decode" in reply.error
    assert advice in reply.error


def test_a_batch_of_chats_is_checked_and_served(server: Server) -> None:
    path, body = "/v1/chat/completions/batch", {"messages": [MESSAGES] * 2, "max_tokens": 2}
    reply = server.post(path, {**body, "vllm_xargs": {**TIDAL, "tidal_budget_tokens": 8}})
    assert reply.status == 400, reply.raw
    assert "tidal_budget_tokens is 8" in reply.error
    before = server.metrics()
    assert len(server.post(path, {**body, "vllm_xargs": TIDAL}).texts) == 2
    assert MetricsChange(before, server.metrics()).requests("decode", "tidal") == 2


def test_scores_and_token_ids_are_served(server: Server) -> None:
    before = server.metrics()
    assert server.post("/generative_scoring", SCORED).status == 200
    body = {"token_ids": [5] * 4, "sampling_params": {"max_tokens": 4, "extra_args": TIDAL}}
    assert server.post("/inference/v1/generate", body).status == 200
    change = MetricsChange(before, server.metrics())
    assert change.requests("decode", "dense") == 2
    assert change.requests("decode", "tidal") == 1


def test_token_counts_take_the_bodies_of_other_routes(server: Server) -> None:
    """Clients count tokens of what they are about to send."""
    assert server.post("/tokenize", {"messages": MESSAGES, "vllm_xargs": TIDAL}).status == 200


def test_each_answer_counts(server: Server) -> None:
    """As it does in vLLM's metrics and in the histograms of latency."""
    before = server.metrics()
    server.complete("Hello.", TIDAL, max_tokens=2, n=3, temperature=1)
    change = MetricsChange(before, server.metrics())
    assert change.requests("decode", "tidal") == change("vllm:e2e_request_latency_seconds_count") == 3
    assert change("vllm_sparse_e2e_request_latency_seconds_count") == 3


@pytest.mark.parametrize("key", ["Sparse_Decode", "sparse-decode", "sparseDecode", "tidalBudget"])
def test_misspelt_prefix_is_refused(server: Server, key: str) -> None:
    """Nobody else's key begins like this; to run dense without a word would surprise its writer."""
    reply = server.complete("Hello.", {key: "tidal"}, max_tokens=1)
    assert reply.status == 400, reply.raw
    assert key in reply.error


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_beam_search_is_refused(server: Server, endpoint: str) -> None:
    """Beam search drops sampling extras, so it would run dense without a word."""
    ask = server.chat if endpoint == "chat" else server.complete
    reply = ask("Hello.", TIDAL, use_beam_search=True, n=2)
    assert reply.status == 400
    assert "sparse_decode" in reply.error
    assert "beam search" in reply.error
    assert len(ask("Hello.", use_beam_search=True, n=2, max_tokens=4).texts) == 2


def test_one_wrong_prompt_of_a_list_reaches_no_engine(server: Server) -> None:
    before = server.metrics()
    assert server.complete(["Hello.", "Goodbye."], {"sparse_prefill": "x"}).status == 400
    assert MetricsChange(before, server.metrics())("vllm_sparse_requests_total") == 0


def test_other_extras_are_left_alone(server: Server) -> None:
    """Keys without a prefix of the plugin belong to others."""
    assert server.complete("Hello.", {"tide_table": 3, "spare": "x", "hipster": 1}, max_tokens=2).status == 200


@pytest.mark.parametrize("path", ["/v1/sparse/methods", "/v1/sparse/config"])
def test_routes_are_off_unless_asked_for(server: Server, path: str) -> None:
    """`VLLM_PLUGINS` asks for them."""
    assert server.call("GET", path).status_code == 404
    assert server.call("PUT", path, json={}).status_code == 404


def test_server_still_answers(server: Server) -> None:
    assert server.chat("Hello.", {**BOTH, "sparse_min_tokens": 0, "tidal_budget_tokens": 128}).text
    assert server.metrics().total("vllm:num_requests_running") == 0
