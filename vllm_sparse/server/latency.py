"""Tokens and latency of requests by the methods that they ask for, as the API server sees them.

vLLM's stat loggers see latencies without the requests that they belong to, so `hooks.output_processor` lets an
iteration's statistics carry them by the methods of their requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import prometheus_client

from vllm_sparse.config.names import DENSE
from vllm_sparse.metrics.histogram import observe_all

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_sparse.config.request import SparseParams

# Of a request, by the methods of its prompt and its generation.
Methods = tuple[str, str]


@dataclass
class Observed:
    """What one iteration brought requests of the same methods."""

    first_token_seconds: list[float] = field(default_factory=list)
    inter_token_seconds: list[float] = field(default_factory=list)
    request_seconds: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    generated_tokens: int = 0


class RequestMetrics:
    """Histograms and counters of requests.

    Args:
        bucket_overrides: vLLM's ``--custom-histogram-buckets``.
    """

    def __init__(self, bucket_overrides: Mapping[str, list[float]] | None) -> None:
        from vllm.v1.metrics.buckets import histogram_buckets

        def histogram(name: str, text: str, family: Any) -> prometheus_client.Histogram:
            return prometheus_client.Histogram(
                f"vllm_sparse_{name}_seconds",
                f"{text}, by the methods that the request asks for; buckets are vLLM's.",
                ["prefill", "decode"],
                buckets=histogram_buckets(family, overrides=bucket_overrides),
            )

        self._first_token = histogram("time_to_first_token", "Time to first token", "time_to_first_token")
        self._inter_token = histogram("inter_token_latency", "Time between tokens", "inter_token_latency")
        self._request = histogram("e2e_request_latency", "Time from arrival to the last token", "request_latency")
        self._tokens = prometheus_client.Counter(
            "vllm_sparse_tokens",
            "Prompt tokens computed (phase prefill; not those from the prefix cache) and tokens generated (phase "
            "decode), by the method that the request asks for.",
            ["phase", "method"],
        )

    def record(self, iteration_stats: Any) -> None:
        """Take what one iteration brought.

        Args:
            iteration_stats: vLLM's, or None.
        """
        observed: dict[Methods, Observed] = getattr(iteration_stats, "sparse_observed", {})
        for methods, values in observed.items():
            for histogram, seconds in (
                (self._first_token, values.first_token_seconds),
                (self._inter_token, values.inter_token_seconds),
                (self._request, values.request_seconds),
            ):
                if seconds:
                    observe_all(histogram.labels(*methods), seconds)
            for phase, method, tokens in zip(
                ("prefill", "decode"), methods, (values.prompt_tokens, values.generated_tokens), strict=True
            ):
                if tokens:
                    self._tokens.labels(phase, method).inc(tokens)


def observed_of(iteration_stats: Any, params: SparseParams) -> Observed:
    """Where an iteration's values of requests with these settings go.

    Args:
        iteration_stats: vLLM's, which carries them to `RequestMetrics.record`.
        params: of the request.
    """
    by_methods: dict[Methods, Observed] | None = getattr(iteration_stats, "sparse_observed", None)
    if by_methods is None:
        by_methods = iteration_stats.sparse_observed = {}
    methods = params.prefill.name if params.prefill else DENSE, params.decode.name if params.decode else DENSE
    return by_methods.setdefault(methods, Observed())
