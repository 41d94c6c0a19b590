"""Latencies of requests by the methods that they ask for and by the length of their prompts."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.prometheus import counted
from vllm_sparse.config.request import ALL_DENSE
from vllm_sparse.server.latency import LENGTHS, RequestMetrics, length_class, observed_of

MODEL = "served"


@pytest.fixture
def metrics() -> Iterator[RequestMetrics]:
    registry = prometheus_client.REGISTRY
    before = set(registry._collector_to_names)
    yield RequestMetrics(None, MODEL)
    for collector in set(registry._collector_to_names) - before:
        registry.unregister(collector)


@given(st.integers(1, 1 << 21))
def test_a_length_is_in_the_class_that_begins_last_before_it(prompt_tokens: int) -> None:
    shortest = max(length for length in LENGTHS if length <= prompt_tokens)
    assert length_class(prompt_tokens) == LENGTHS[shortest]


def test_latencies_are_told_apart_by_length(metrics: RequestMetrics) -> None:
    iteration = SimpleNamespace()
    for prompt_tokens, first_token_seconds in ((4095, 1.0), (4096, 2.0), (9000, 4.0)):
        observed = observed_of(iteration, ALL_DENSE, prompt_tokens)
        observed.first_token_seconds.append(first_token_seconds)
        observed.inter_token_seconds += [0.5, 0.25]
        observed.generated_tokens += 2
    metrics.record(iteration)
    for length, count, first_token_seconds in (("0-4K", 1, 1.0), ("4K-16K", 2, 6.0)):
        labels = {"model_name": MODEL, "prefill": "dense", "prompt_tokens": length}
        assert counted("vllm_sparse_time_to_first_token_by_length_seconds_count", **labels) == count
        assert counted("vllm_sparse_time_to_first_token_by_length_seconds_sum", **labels) == first_token_seconds
        labels = {"model_name": MODEL, "decode": "dense", "prompt_tokens": length}
        assert counted("vllm_sparse_inter_token_latency_by_length_seconds_count", **labels) == 2 * count
        assert counted("vllm_sparse_inter_token_latency_by_length_seconds_sum", **labels) == 0.75 * count
    assert counted("vllm_sparse_time_to_first_token_seconds_count", model_name=MODEL, prefill="dense") == 3
    assert counted("vllm_sparse_tokens_total", model_name=MODEL, phase="decode", method="dense") == 6
