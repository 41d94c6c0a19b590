"""vLLM's `SamplingParams`: those made while a request is answered keep what it was found to ask for.

The configuration may change before they are admitted, when a stream can no longer be refused. Not needed any more once
vLLM processes a request's inputs before it answers a stream.
"""

from __future__ import annotations

from typing import Any

from vllm_sparse.hooks.wrapping import is_wrapped, wraps
from vllm_sparse.server.door import keep_checked


def install() -> None:
    """Let parameters that routes make of a request keep what `server.door` found; idempotent."""
    from vllm.sampling_params import SamplingParams

    original = SamplingParams.from_optional
    if is_wrapped(original):
        return

    @wraps(original)
    def from_optional(*args: Any, **kwargs: Any) -> Any:
        return keep_checked(original(*args, **kwargs))

    SamplingParams.from_optional = staticmethod(from_optional)
