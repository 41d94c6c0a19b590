"""Sparse settings on the spans that vLLM makes of requests, where its OpenTelemetry is on."""

from __future__ import annotations

import dataclasses
import functools
from contextvars import ContextVar
from typing import Any

from vllm_sparse.params import ALL_DENSE, DENSE, RESOLVED_KEY, SparseParams, deserialize

PREFIX = "vllm_sparse"
_REQUEST_ATTRIBUTES: ContextVar[dict[str, Any] | None] = ContextVar("sparse request attributes", default=None)


def span_attributes(params: SparseParams, prompt_tokens: int, context_tokens: int) -> dict[str, Any]:
    """What a request's span says of sparse attention.

    Args:
        params: what the request asked for, defaults applied.
        prompt_tokens: of its prompt.
        context_tokens: of its last decode step.

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
    return attributes


def trace_requests() -> None:
    """Make vLLM's request spans carry `span_attributes`; idempotent."""
    from vllm.v1.engine import output_processor
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    make_state, trace, make_span = (
        RequestState.__dict__["from_new_request"].__func__,
        OutputProcessor.do_tracing,
        output_processor.instrument_manual,
    )
    if hasattr(trace, "__wrapped__"):
        return

    @functools.wraps(make_state)
    def from_new_request(cls: Any, tokenizer: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        state = make_state(cls, tokenizer, request, *args, **kwargs)
        extras = (request.sampling_params.extra_args if request.sampling_params else None) or {}
        state.sparse_params = deserialize(extras[RESOLVED_KEY]) if RESOLVED_KEY in extras else ALL_DENSE
        return state

    @functools.wraps(trace)
    def do_tracing(self: Any, engine_core_output: Any, req_state: Any, iteration_stats: Any) -> None:
        # The newest token that was generated is in no context yet.
        context_tokens = req_state.prompt_len + req_state.stats.num_generation_tokens - 1
        attributes = span_attributes(req_state.sparse_params, req_state.prompt_len, context_tokens)
        token = _REQUEST_ATTRIBUTES.set(attributes)
        try:
            trace(self, engine_core_output, req_state, iteration_stats)
        finally:
            _REQUEST_ATTRIBUTES.reset(token)

    @functools.wraps(make_span)
    def instrument_manual(*args: Any, attributes: dict[str, Any], **kwargs: Any) -> Any:
        return make_span(*args, attributes={**attributes, **(_REQUEST_ATTRIBUTES.get() or {})}, **kwargs)

    RequestState.from_new_request = classmethod(from_new_request)
    OutputProcessor.do_tracing = do_tracing
    output_processor.instrument_manual = instrument_manual
