"""vLLM's choice of a layer's attention backend: layers without full attention get what vLLM picks for them.

`--attention-backend` names one backend for all layers. vLLM's own `backend_per_kind` tells windows apart, yet has no
word for "what you would pick", and takes chunked-local layers for full ones, which they derive from. Not needed any
more once `backend_per_kind` has both.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from vllm_sparse.hooks.wrapping import is_wrapped, wraps

# Modules whose layers derive from full attention and change what it reads.
DERIVING_MODULES = ("chunked_local_attention", "static_sink_attention", "prefill_prefix_lm_attention")

_DERIVING: ContextVar[bool] = ContextVar("layer that derives from full attention", default=False)


def install(name: str) -> None:
    """Wrap the choice; idempotent.

    Args:
        name: of the backend's member in `AttentionBackendEnum`.
    """
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    sparse = AttentionBackendEnum.__members__[name]
    choose = selector._cached_get_attn_backend
    if is_wrapped(choose):
        return

    @wraps(choose)
    def choose_for_layer(backend: Any, attn_selector_config: Any, num_heads: Any = None, **others: Any) -> Any:
        if backend is sparse and (_DERIVING.get() or attn_selector_config.has_sliding_window):
            backend = None
        return choose(backend=backend, attn_selector_config=attn_selector_config, num_heads=num_heads, **others)

    selector._cached_get_attn_backend = choose_for_layer


def install_deriving() -> None:
    """Let layers that derive from full attention be told apart; idempotent.

    Called where a model is about to be made: importing vLLM's layers would slow each command down.
    """
    for name in DERIVING_MODULES:
        module: Any = importlib.import_module(f"vllm.model_executor.layers.attention.{name}")
        if not is_wrapped(module.get_attn_backend):
            module.get_attn_backend = _deriving(module.get_attn_backend)


def _deriving(choose: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(choose)
    def choose_for_deriving(*args: Any, **kwargs: Any) -> Any:
        token = _DERIVING.set(True)
        try:
            return choose(*args, **kwargs)
        finally:
            _DERIVING.reset(token)

    return choose_for_deriving
