"""vLLM's `InputProcessor`: where any request, online or offline, becomes an engine request.

There the request's sparse settings are resolved and its cache salt is set. Not needed any more once vLLM has a hook for
plugins that may change an engine request; `LogitsProcessor.validate_params` may only refuse one.
"""

from __future__ import annotations

from typing import Any

from vllm_sparse.hooks.wrapping import is_wrapped, wraps


def install() -> None:
    """Admit requests through `vllm_sparse.server.admission.admit`."""
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs
    if is_wrapped(original):
        return

    @wraps(original)
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        # Imported here: workers load this plugin too, and admit nothing.
        from vllm_sparse.server.admission import admit

        return admit(self.vllm_config, params, lambda: original(self, request_id, prompt, params, *args, **kwargs))

    InputProcessor.process_inputs = process_inputs
