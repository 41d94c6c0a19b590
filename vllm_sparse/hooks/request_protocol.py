"""vLLM's request classes of the OpenAI protocol: where a stream can still be refused with HTTP 400.

A stream has begun by the time its request is admitted (`hooks.input_processor`), so settings are checked while the
request is parsed. Not needed any more once vLLM processes a request's inputs before it answers a stream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_sparse.server.admission import check_parsed, keep_checked

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def install(vllm_config: VllmConfig) -> None:
    """In the API server: check settings while a request is parsed.

    Args:
        vllm_config: the server's configuration.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    def wrap(original: Callable[..., Any], beam_search: bool) -> Callable[..., Any]:
        @functools.wraps(original)
        def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
            settings = check_parsed(vllm_config, self.vllm_xargs or {}, getattr(self, "cache_salt", None), beam_search)
            params = original(self, *args, **kwargs)
            if not beam_search:
                keep_checked(params, settings)
            return params

        return checked

    for request_class in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        for name in ("to_sampling_params", "to_beam_search_params"):
            original = getattr(request_class, name, None)
            if original is not None and not hasattr(original, "__wrapped__"):
                setattr(request_class, name, wrap(original, name == "to_beam_search_params"))
