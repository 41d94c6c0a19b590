"""``/v1/sparse/stats``: how dense late rows were, in each layer and head."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException, Request

from vllm_sparse.config.server import uses_sparse_backend
from vllm_sparse.server.stats import collect

router = APIRouter(prefix="/v1/sparse", tags=["sparse attention"])


@router.get("/stats")
async def read_stats(request: Request) -> dict[str, Any]:
    """Density of late rows by engine, phase, method, layer and query head, as `vllm_sparse.server.stats.collect`."""
    engine_client = request.app.state.engine_client
    if not uses_sparse_backend(engine_client.vllm_config):
        raise HTTPException(404, "this server runs dense attention; start it with --attention-backend sparse")
    return await collect(engine_client)
