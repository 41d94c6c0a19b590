"""vLLM's `BaseServing`: the one door of all HTTP routes, which see each parsed request there before they answer.

A stream has begun by the time its request is admitted (`hooks.input_processor`), so that is too late for HTTP 400. Not
needed any more once vLLM processes a request's inputs before it answers a stream.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from vllm_sparse.hooks.wrapping import is_wrapped, wraps
from vllm_sparse.server.door import check_body, check_request

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Handler = Callable[..., Awaitable[Any]]


def install(vllm_config: VllmConfig) -> None:
    """In the API server: check what requests ask for where vLLM looks their model up, the first thing a route does.

    Args:
        vllm_config: the server's configuration.
    """
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
    from vllm.entrypoints.serve.engine.serving import BaseServing

    if is_wrapped(BaseServing._check_model):
        return
    for serving in (BaseServing, PoolingBaseServing):
        serving._check_model = _checking_parsed(vllm_config, serving._check_model)
    # Request classes of these drop what they do not know, where others keep it: those of token ids, and those that are
    # made chats (Anthropic's, Cohere's).
    OpenAIServingChat.create_chat_completion = _checking_body(OpenAIServingChat.create_chat_completion)
    ServingTokens.serve_tokens = _checking_body(ServingTokens.serve_tokens)


def _checking_parsed(vllm_config: VllmConfig, look_up: Handler) -> Handler:
    from vllm.entrypoints.scale_out.derender.serving import ServingDerender
    from vllm.entrypoints.serve.tokenize.serving import ServingTokenization

    @wraps(look_up)
    async def check_model(self: Any, request: Any) -> Any:
        # These run no model, and clients send them the bodies of other routes.
        if not isinstance(self, ServingDerender | ServingTokenization):
            check_request(vllm_config, request)
        return await look_up(self, request)

    return check_model


def _checking_body(handle: Handler) -> Handler:
    @wraps(handle)
    async def handle_checked(self: Any, request: Any, raw_request: Any = None) -> Any:
        if raw_request is not None:
            # Parsed before, and kept by the request.
            check_body(await raw_request.json(), request)
        return await handle(self, request, raw_request)

    return handle_checked
