"""Sparse settings on the spans that vLLM makes of requests, where its OpenTelemetry is on."""

from __future__ import annotations

import dataclasses
import functools
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_sparse.config.names import DENSE
from vllm_sparse.config.request import ALL_DENSE, SparseParams
from vllm_sparse.methods.decode import BatchDecodeMethod
from vllm_sparse.server.request_params import keep_params_of_requests, params_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PREFIX = "vllm_sparse"
_REQUEST_ATTRIBUTES: ContextVar[dict[str, Any] | None] = ContextVar("sparse request attributes", default=None)


def span_attributes(params: SparseParams, prompt_tokens: int, context_tokens: int, token_lists: bool) -> dict[str, Any]:
    """What a request's span says of sparse attention.

    Args:
        params: what the request asked for, defaults applied.
        prompt_tokens: of its prompt.
        context_tokens: of its last decode step.
        token_lists: decode steps read lists of single tokens, so that settings and context tell how many they read.

    Returns:
        Values of OpenTelemetry's types by attribute. ``...fallback`` says that all of a phase ran dense for its
        length; other reasons are known to the workers alone, whose metrics count them.
    """
    attributes: dict[str, Any] = {}
    for phase, method, tokens in (
        ("prefill", params.prefill, prompt_tokens),
        ("decode", params.decode, context_tokens),
    ):
        attributes[f"{PREFIX}.{phase}.method"] = DENSE if method is None else method.name
        if method is None:
            continue
        for knob, value in dataclasses.asdict(method).items():  # type: ignore[call-overload]
            if value is not None:
                attributes[f"{PREFIX}.{phase}.{knob}"] = value
        attributes[f"{PREFIX}.{phase}.min_tokens"] = params.min_tokens
        if tokens < params.min_tokens or tokens <= getattr(method, "budget_tokens", 0):
            attributes[f"{PREFIX}.{phase}.fallback"] = "short_context"
    if token_lists and isinstance(params.decode, BatchDecodeMethod):
        contexts = np.arange(prompt_tokens + 1, context_tokens + 1)
        sparse = contexts[(contexts >= params.min_tokens) & (contexts > params.decode.budget_tokens)]
        if sparse.size:
            attributes[f"{PREFIX}.decode.density"] = float((params.decode.list_tokens(sparse) / sparse).mean())
    return attributes


def trace_requests(vllm_config: VllmConfig) -> None:
    """Make vLLM's request spans carry `span_attributes`; idempotent."""
    from vllm.platforms import current_platform
    from vllm.v1.engine import output_processor
    from vllm.v1.engine.output_processor import OutputProcessor

    keep_params_of_requests()
    trace, make_span = OutputProcessor.do_tracing, output_processor.instrument_manual
    if hasattr(trace, "__wrapped__"):
        return

    # Verification steps of speculative decoding run dense.
    token_lists = current_platform.is_cuda() and vllm_config.speculative_config is None

    @functools.wraps(trace)
    def do_tracing(self: Any, engine_core_output: Any, req_state: Any, iteration_stats: Any) -> None:
        # The newest token that was generated is in no context yet.
        context_tokens = req_state.prompt_len + req_state.stats.num_generation_tokens - 1
        params = params_of(req_state) or ALL_DENSE
        attributes = span_attributes(params, req_state.prompt_len, context_tokens, token_lists)
        token = _REQUEST_ATTRIBUTES.set(attributes)
        try:
            trace(self, engine_core_output, req_state, iteration_stats)
        finally:
            _REQUEST_ATTRIBUTES.reset(token)

    @functools.wraps(make_span)
    def instrument_manual(*args: Any, attributes: dict[str, Any], **kwargs: Any) -> Any:
        return make_span(*args, attributes={**attributes, **(_REQUEST_ATTRIBUTES.get() or {})}, **kwargs)

    OutputProcessor.do_tracing = do_tracing
    output_processor.instrument_manual = instrument_manual
