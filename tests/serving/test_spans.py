"""Sparse settings on the spans that a server exports to an OpenTelemetry collector."""

from __future__ import annotations

import secrets
from typing import Any

from loadtest.text.tokenizer import chat_text
from tests.serving.server import Server, prompt_of
from tests.serving.span_receiver import SpanReceiver


def traced(server: Server, spans: SpanReceiver, tokens: int, extras: dict[str, Any] | None) -> dict[str, Any]:
    """Attributes of the span of a request with a prompt of about `tokens` tokens."""
    trace_id = secrets.token_hex(16)
    body = {
        "model": "needle",
        "prompt": chat_text(prompt_of(50, tokens).content),
        "max_tokens": 4,
        "ignore_eos": True,
        **({} if extras is None else {"vllm_xargs": extras}),
    }
    headers = {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}
    reply = server.call("POST", "/v1/completions", json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    attributes = spans.request(trace_id)
    # vLLM's own attributes stay.
    assert attributes["gen_ai.usage.completion_tokens"] == 4
    assert attributes["gen_ai.usage.prompt_tokens"] == reply.json()["usage"]["prompt_tokens"]
    return {name: value for name, value in attributes.items() if name.startswith("vllm_sparse.")}


def test_a_span_says_what_the_defaults_chose(configured_server: Server, spans: SpanReceiver) -> None:
    found = traced(configured_server, spans, 2500, None)
    assert found["vllm_sparse.prefill.method"] == "flexprefill"
    assert found["vllm_sparse.prefill.gamma"] == 0.9
    assert found["vllm_sparse.prefill.min_budget_tokens"] == 256
    assert found["vllm_sparse.prefill.faithful"] is False
    assert found["vllm_sparse.prefill.min_tokens"] == 1024
    assert found["vllm_sparse.decode.method"] == "dense"
    assert "vllm_sparse.prefill.fallback" not in found
    assert not [name for name in found if name.startswith("vllm_sparse.decode.") and not name.endswith(".method")]


def test_a_span_says_what_a_request_chose(configured_server: Server, spans: SpanReceiver) -> None:
    extras = {"sparse_prefill": "dense", "sparse_decode": "blocktopk", "blocktopk_budget_tokens": 512}
    found = traced(configured_server, spans, 2500, extras)
    assert found["vllm_sparse.prefill.method"] == "dense"
    assert found["vllm_sparse.decode.method"] == "blocktopk"
    assert found["vllm_sparse.decode.budget_tokens"] == 512
    assert found["vllm_sparse.decode.scores"] == "bounds"
    assert "vllm_sparse.decode.fallback" not in found


def test_a_span_says_that_a_short_request_ran_dense(configured_server: Server, spans: SpanReceiver) -> None:
    extras = {"sparse_decode": "blocktopk", "blocktopk_budget_tokens": 4096}
    short = traced(configured_server, spans, 600, extras)
    assert short["vllm_sparse.prefill.fallback"] == short["vllm_sparse.decode.fallback"] == "short_context"
    within_budget = traced(configured_server, spans, 2500, extras)
    assert within_budget["vllm_sparse.decode.fallback"] == "short_context"
    assert "vllm_sparse.prefill.fallback" not in within_budget


def test_a_dense_request_says_so(configured_server: Server, spans: SpanReceiver) -> None:
    found = traced(configured_server, spans, 600, {"sparse_prefill": "dense"})
    assert found == {"vllm_sparse.prefill.method": "dense", "vllm_sparse.decode.method": "dense"}
