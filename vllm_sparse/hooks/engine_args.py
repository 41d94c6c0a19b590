"""vLLM's `EngineArgs`: the first moment at which a server's configuration is known as a whole.

A wrong ``"sparse"`` object is refused while the command line is read, not in a process that is started minutes later;
directories that the other processes inherit are made before these start. Not needed any more once vLLM lets a plugin
check `additional_config` when the configuration is made.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from vllm_sparse.hooks.wrapping import is_wrapped, wraps


def install() -> None:
    """Wrap `create_engine_config`.

    Only processes that build vLLM's configuration have its arguments module, which is what loaded this plugin there.
    """
    arguments = sys.modules.get("vllm.engine.arg_utils")
    create = getattr(getattr(arguments, "EngineArgs", None), "create_engine_config", None)
    if create is None or is_wrapped(create):
        return

    @wraps(create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = create(self, *args, **kwargs)
        _start_server(vllm_config)
        return vllm_config

    arguments.EngineArgs.create_engine_config = create_engine_config  # type: ignore[union-attr]


def _start_server(vllm_config: Any) -> None:
    """Check the plugin's configuration, if the server uses it, and say what it is."""
    from vllm_sparse.config.model_layers import check_directions, check_sparse_layers
    from vllm_sparse.config.server import server_config, uses_sparse_backend
    from vllm_sparse.hooks.output_processor import trace_requests
    from vllm_sparse.server.runtime_config import announce_directory

    if not uses_sparse_backend(vllm_config):
        return
    check_directions(vllm_config.model_config)
    check_sparse_layers(vllm_config.model_config)
    config = server_config(vllm_config)
    announce_directory()
    if vllm_config.observability_config.otlp_traces_endpoint is not None:
        trace_requests(vllm_config)
    logging.getLogger("vllm.sparse").info(
        "Sparse attention: requests may choose %s; those that name none run prefill %s and decode %s; "
        "contexts of fewer than %d tokens run dense unless a request sets sparse_min_tokens.",
        ", ".join(config.methods),
        *(config.default_method(phase) or f"by preset {config.preset}" for phase in ("prefill", "decode")),
        config.min_tokens,
    )
