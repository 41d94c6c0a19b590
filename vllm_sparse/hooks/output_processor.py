"""vLLM's `OutputProcessor`: request spans and latencies, by what a request asks for.

vLLM makes a request's span in one piece and hands latencies to stat loggers without the requests that they belong to.
Not needed any more once plugins may add attributes to a span, and stat loggers see the request of a latency.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from vllm_sparse.config.request import ALL_DENSE
from vllm_sparse.hooks import request_state
from vllm_sparse.hooks.wrapping import is_wrapped, wraps
from vllm_sparse.server.latency import observed_of
from vllm_sparse.server.spans import span_attributes

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_REQUEST_ATTRIBUTES: ContextVar[dict[str, Any] | None] = ContextVar("sparse request attributes", default=None)


def trace_requests(vllm_config: VllmConfig) -> None:
    """Make vLLM's request spans carry `vllm_sparse.server.spans.span_attributes`; idempotent."""
    from vllm.platforms import current_platform
    from vllm.v1.engine import output_processor
    from vllm.v1.engine.output_processor import OutputProcessor

    request_state.install()
    trace, make_span = OutputProcessor.do_tracing, output_processor.instrument_manual
    if is_wrapped(trace):
        return

    # Verification steps of speculative decoding run dense.
    token_lists = current_platform.is_cuda() and vllm_config.speculative_config is None

    @wraps(trace)
    def do_tracing(self: Any, engine_core_output: Any, req_state: Any, iteration_stats: Any) -> None:
        # The newest token that was generated is in no context yet.
        seq_len = req_state.prompt_len + req_state.stats.num_generation_tokens - 1
        params = request_state.params_of(req_state) or ALL_DENSE
        attributes = span_attributes(params, req_state.prompt_len, seq_len, token_lists)
        token = _REQUEST_ATTRIBUTES.set(attributes)
        try:
            trace(self, engine_core_output, req_state, iteration_stats)
        finally:
            _REQUEST_ATTRIBUTES.reset(token)

    @wraps(make_span)
    def instrument_manual(*args: Any, attributes: dict[str, Any], **kwargs: Any) -> Any:
        return make_span(*args, attributes={**attributes, **(_REQUEST_ATTRIBUTES.get() or {})}, **kwargs)

    OutputProcessor.do_tracing = do_tracing
    output_processor.instrument_manual = instrument_manual


def observe_requests() -> None:
    """Make vLLM's iteration statistics carry latencies by methods; idempotent.

    A value is taken from vLLM where it has just been worked out, so that these histograms lie over vLLM's own.
    """
    from vllm.v1.engine.output_processor import OutputProcessor

    request_state.install()
    update, finish = OutputProcessor._update_stats_from_output, OutputProcessor._update_stats_from_finished
    if is_wrapped(update):
        return

    @wraps(update)
    def update_from_output(self: Any, state: Any, output: Any, timestamp: Any, iteration_stats: Any) -> None:
        update(self, state, output, timestamp, iteration_stats)
        params = request_state.params_of(state)
        if params is None or iteration_stats is None:
            return
        observed = observed_of(iteration_stats, params, state.prompt_len)
        observed.generated_tokens += len(output.new_token_ids)
        if not state.is_prefilling:
            observed.inter_token_seconds.append(iteration_stats.inter_token_latencies_iter[-1])
            return
        observed.first_token_seconds.append(iteration_stats.time_to_first_tokens_iter[-1])
        if output.prefill_stats is not None:
            observed.prompt_tokens += output.prefill_stats.num_computed_tokens

    @wraps(finish)
    def update_from_finished(self: Any, state: Any, finish_reason: Any, iteration_stats: Any) -> None:
        finish(self, state, finish_reason, iteration_stats)
        params = request_state.params_of(state)
        if params is not None and iteration_stats is not None:
            seconds = iteration_stats.finished_requests[-1].e2e_latency
            observed_of(iteration_stats, params, state.prompt_len).request_seconds.append(seconds)

    OutputProcessor._update_stats_from_output = update_from_output
    OutputProcessor._update_stats_from_finished = update_from_finished
