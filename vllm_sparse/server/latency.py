"""Tokens and latency of requests by the methods that they ask for, as the API server sees them.

vLLM's stat loggers see latencies without the requests that they belong to, so `hooks.output_processor` lets an
iteration's statistics carry them by the methods of their requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import prometheus_client

from vllm_sparse.config.names import DENSE
from vllm_sparse.metrics.histogram import observe_all, summarise_all

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_sparse.config.request import SparseParams

# Methods of a request's prompt and of its generation, and the class of its prompt's length.
RequestKind = tuple[str, str, str]
# Shortest prompt of each class of lengths, in tokens. Methods are comparable where their prompts are of one length.
LENGTHS = {0: "0-4K", 4096: "4K-16K", 16384: "16K-64K", 65536: "64K-256K", 262144: "256K+"}


@dataclass
class Observed:
    """What one iteration brought requests of the same methods and class of lengths."""

    first_token_seconds: list[float] = field(default_factory=list)
    inter_token_seconds: list[float] = field(default_factory=list)
    request_seconds: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    generated_tokens: int = 0


class RequestMetrics:
    """Histograms and counters of requests.

    Args:
        bucket_overrides: vLLM's ``--custom-histogram-buckets``.
        model_name: label of the metrics, as of vLLM's own.
    """

    def __init__(self, bucket_overrides: Mapping[str, list[float]] | None, model_name: str) -> None:
        from vllm.v1.metrics.buckets import histogram_buckets

        self._model_name = model_name

        def histogram(name: str, text: str, family: Any) -> prometheus_client.Histogram:
            return prometheus_client.Histogram(
                f"vllm_sparse_{name}_seconds",
                f"{text}, by the methods that the request asks for; buckets are vLLM's.",
                ["model_name", "prefill", "decode"],
                buckets=histogram_buckets(family, overrides=bucket_overrides),
            )

        self._first_token = histogram("time_to_first_token", "Time to first token", "time_to_first_token")
        self._inter_token = histogram("inter_token_latency", "Time between tokens", "inter_token_latency")
        self._request = histogram("e2e_request_latency", "Time from arrival to the last token", "request_latency")
        # Summaries, which are two series each: histograms of each length would be some hundred more a method.
        self._first_token_by_length = prometheus_client.Summary(
            "vllm_sparse_time_to_first_token_by_length_seconds",
            "Time to first token, by the method of the prompt and the class of its length in tokens.",
            ["model_name", "prefill", "prompt_tokens"],
        )
        self._inter_token_by_length = prometheus_client.Summary(
            "vllm_sparse_inter_token_latency_by_length_seconds",
            "Time between tokens, by the method of the generation and the class of the prompt's length in tokens.",
            ["model_name", "decode", "prompt_tokens"],
        )
        self._tokens = prometheus_client.Counter(
            "vllm_sparse_tokens",
            "Prompt tokens computed (phase prefill; not those from the prefix cache) and tokens generated (phase "
            "decode), by the method that the request asks for.",
            ["model_name", "phase", "method"],
        )

    def record(self, iteration_stats: Any) -> None:
        """Take what one iteration brought.

        Args:
            iteration_stats: vLLM's, or None.
        """
        observed: dict[RequestKind, Observed] = getattr(iteration_stats, "sparse_observed", {})
        for (*methods, length), values in observed.items():
            for histogram, seconds in (
                (self._first_token, values.first_token_seconds),
                (self._inter_token, values.inter_token_seconds),
                (self._request, values.request_seconds),
            ):
                if seconds:
                    observe_all(histogram.labels(self._model_name, *methods), seconds)
            for summary, method, seconds in zip(
                (self._first_token_by_length, self._inter_token_by_length),
                methods,
                (values.first_token_seconds, values.inter_token_seconds),
                strict=True,
            ):
                if seconds:
                    summarise_all(summary.labels(self._model_name, method, length), seconds)
            for phase, method, tokens in zip(
                ("prefill", "decode"), methods, (values.prompt_tokens, values.generated_tokens), strict=True
            ):
                if tokens:
                    self._tokens.labels(self._model_name, phase, method).inc(tokens)


def observed_of(iteration_stats: Any, params: SparseParams, prompt_tokens: int) -> Observed:
    """Where an iteration's values of requests with these settings and about this length go.

    Args:
        iteration_stats: vLLM's, which carries them to `RequestMetrics.record`.
        params: of the request.
        prompt_tokens: length of its prompt.
    """
    by_kind: dict[RequestKind, Observed] | None = getattr(iteration_stats, "sparse_observed", None)
    if by_kind is None:
        by_kind = iteration_stats.sparse_observed = {}
    methods = params.prefill.name if params.prefill else DENSE, params.decode.name if params.decode else DENSE
    return by_kind.setdefault((*methods, length_class(prompt_tokens)), Observed())


def length_class(prompt_tokens: int) -> str:
    """Which of `LENGTHS` a prompt of so many tokens is in."""
    return next(name for shortest, name in reversed(LENGTHS.items()) if prompt_tokens >= shortest)
