"""The plugin's HTTP routes, attached to vLLM's API server where ``VLLM_PLUGINS`` names them."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from vllm_sparse.backend.layer_table import merged
from vllm_sparse.config.model_layers import sparse_layers
from vllm_sparse.config.server import server_config, uses_sparse_backend
from vllm_sparse.hooks.worker_base import LAYERS_METHOD
from vllm_sparse.server.decode_room import has_decode_graphs
from vllm_sparse.server.routes import config, methods, stats
from vllm_sparse.server.runtime_config import ROUTES_NAME, Served


class SparseEndpoints:
    """An endpoint plugin, as `vllm.plugins.endpoint_plugins.interface.EndpointPlugin` describes one."""

    name = ROUTES_NAME
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; vLLM's API key guards them as all below ``/v1``."""
        for group in (methods, config, stats):
            app.include_router(group.router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Leave what the routes need in the application's state; None where this server runs dense attention."""
        vllm_config = engine_client.vllm_config
        state.sparse_served = None
        if uses_sparse_backend(vllm_config):
            start, model = server_config(vllm_config), vllm_config.model_config
            ranks = await engine_client.collective_rpc(LAYERS_METHOD)
            state.sparse_served = Served(
                start,
                sparse_layers(model),
                model.model_arch_config.total_num_attention_heads,
                model.max_model_len,
                has_decode_graphs(vllm_config),
                merged(ranks),
            )
