"""What a request asks for, kept with vLLM's own state of it in the API server, and gone when that goes."""

from __future__ import annotations

import functools
from typing import Any

from vllm_sparse.config.request import ALL_DENSE, RESOLVED_KEY, SparseParams, deserialize


def keep_params_of_requests() -> None:
    """Make vLLM's request states carry what the request asks for; idempotent."""
    from vllm.v1.engine.output_processor import RequestState

    make = RequestState.__dict__["from_new_request"].__func__
    if hasattr(make, "__wrapped__"):
        return

    @functools.wraps(make)
    def from_new_request(cls: Any, tokenizer: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        state = make(cls, tokenizer, request, *args, **kwargs)
        if request.sampling_params is not None:
            resolved = (request.sampling_params.extra_args or {}).get(RESOLVED_KEY)
            state.sparse_params = ALL_DENSE if resolved is None else deserialize(resolved)
        return state

    RequestState.from_new_request = classmethod(from_new_request)


def params_of(state: Any) -> SparseParams | None:
    """What a request asks for; None where it generates nothing, or came before `keep_params_of_requests`.

    Args:
        state: vLLM's `RequestState`.
    """
    params: SparseParams | None = getattr(state, "sparse_params", None)
    return params
