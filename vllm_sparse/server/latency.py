"""Tokens and latency of requests by the methods that they ask for, as the API server sees them.

vLLM's stat loggers see latencies without the requests that they belong to. What a request asks for is therefore kept
with vLLM's state of it (`request_params`); a value is taken from vLLM where it has just been worked out, so that these
histograms lie over vLLM's own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import prometheus_client

from vllm_sparse.config.names import DENSE
from vllm_sparse.metrics.histogram import observe_all
from vllm_sparse.server.request_params import keep_params_of_requests, params_of

if TYPE_CHECKING:
    from collections.abc import Mapping

# Of a request, by the methods of its prompt and its generation.
Methods = tuple[str, str]


@dataclass
class _Observed:
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
        observed: dict[Methods, _Observed] = getattr(iteration_stats, "sparse_observed", {})
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


def _methods_of(state: Any) -> Methods | None:
    params = params_of(state)
    if params is None:
        return None
    return params.prefill.name if params.prefill else DENSE, params.decode.name if params.decode else DENSE


def _observed(iteration_stats: Any, methods: Methods) -> _Observed:
    """Where an iteration's values for these methods go."""
    by_methods: dict[Methods, _Observed] | None = getattr(iteration_stats, "sparse_observed", None)
    if by_methods is None:
        by_methods = iteration_stats.sparse_observed = {}
    return by_methods.setdefault(methods, _Observed())


def observe_requests() -> None:
    """Make vLLM's iteration statistics carry latencies by methods; idempotent."""
    from vllm.v1.engine.output_processor import OutputProcessor

    keep_params_of_requests()
    update, finish = OutputProcessor._update_stats_from_output, OutputProcessor._update_stats_from_finished
    if hasattr(update, "__wrapped__"):
        return

    @functools.wraps(update)
    def update_from_output(self: Any, state: Any, output: Any, timestamp: Any, iteration_stats: Any) -> None:
        update(self, state, output, timestamp, iteration_stats)
        methods = _methods_of(state)
        if methods is None or iteration_stats is None:
            return
        observed = _observed(iteration_stats, methods)
        observed.generated_tokens += len(output.new_token_ids)
        if not state.is_prefilling:
            observed.inter_token_seconds.append(iteration_stats.inter_token_latencies_iter[-1])
            return
        observed.first_token_seconds.append(iteration_stats.time_to_first_tokens_iter[-1])
        if output.prefill_stats is not None:
            observed.prompt_tokens += output.prefill_stats.num_computed_tokens

    @functools.wraps(finish)
    def update_from_finished(self: Any, state: Any, finish_reason: Any, iteration_stats: Any) -> None:
        finish(self, state, finish_reason, iteration_stats)
        methods = _methods_of(state)
        if methods is not None and iteration_stats is not None:
            seconds = iteration_stats.finished_requests[-1].e2e_latency
            _observed(iteration_stats, methods).request_seconds.append(seconds)

    OutputProcessor._update_stats_from_output = update_from_output
    OutputProcessor._update_stats_from_finished = update_from_finished
