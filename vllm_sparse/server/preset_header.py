"""A header that names the preset of requests that name none themselves, for gateways, which cannot write into bodies.

Only where the server is started with ``--middleware=vllm_sparse.server.preset_header.PresetHeader``; elsewhere the
header means nothing, as to vLLM.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from typing import Any

from vllm_sparse.config.messages import SparseParamsError
from vllm_sparse.config.names import DENSE
from vllm_sparse.config.presets import PRESETS

HEADER = "x-sparse-preset"
# Keys of a request that choose for it what a preset would.
CHOOSING_KEYS = ("sparse_preset", "sparse_prefill", "sparse_decode")

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]

# Header of the HTTP request that is being answered; each is answered in a context of its own.
_ASKED: ContextVar[str | None] = ContextVar("preset by header", default=None)


class PresetHeader:
    """ASGI middleware that keeps the header for `with_preset`."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answer a request."""
        headers = dict(scope.get("headers", ()))
        value = headers.get(HEADER.encode())
        _ASKED.set(None if value is None else value.decode("latin-1"))
        await self.app(scope, receive, send)


def with_preset(request: Any, extras_field: str) -> None:
    """Let a request have the preset of its HTTP request's header, where it chooses nothing itself.

    Requests without sampling extras, and beam search, which drops them, run what the server's configuration says.

    Args:
        request: of vLLM's protocol, parsed; changed.
        extras_field: name of the field that holds sampling extras.

    Raises:
        SparseParamsError: there is no such preset.
    """
    preset = _ASKED.get()
    if preset is None or extras_field not in type(request).model_fields or getattr(request, "use_beam_search", False):
        return
    extras = getattr(request, extras_field) or {}
    if any(key in extras for key in CHOOSING_KEYS):
        return
    if preset != DENSE and preset not in PRESETS:
        raise SparseParamsError(
            "sparse_preset", preset, f"the header {HEADER} is {preset!r}; allowed are {', '.join([DENSE, *PRESETS])}"
        )
    setattr(request, extras_field, {**extras, "sparse_preset": preset})
