"""vLLM's `RequestState`: what a request asks for, kept with its state in the API server, and gone when that goes.

Spans and latencies by method need it. Not needed any more once the state keeps the sampling parameters themselves.
"""

from __future__ import annotations

from typing import Any

from vllm_sparse.config.request import ALL_DENSE, RESOLVED_KEY, SparseParams, deserialize
from vllm_sparse.hooks.wrapping import is_wrapped, wraps


def install() -> None:
    """Make request states carry what the request asks for."""
    from vllm.v1.engine.output_processor import RequestState

    make = RequestState.__dict__["from_new_request"].__func__
    if is_wrapped(make):
        return

    @wraps(make)
    def from_new_request(cls: Any, tokenizer: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        state = make(cls, tokenizer, request, *args, **kwargs)
        if request.sampling_params is not None:
            resolved = (request.sampling_params.extra_args or {}).get(RESOLVED_KEY)
            state.sparse_params = ALL_DENSE if resolved is None else deserialize(resolved)
        return state

    RequestState.from_new_request = classmethod(from_new_request)


def params_of(state: Any) -> SparseParams | None:
    """What a request asks for; None where it generates nothing, or came before `install`.

    Args:
        state: vLLM's `RequestState`.
    """
    params: SparseParams | None = getattr(state, "sparse_params", None)
    return params
