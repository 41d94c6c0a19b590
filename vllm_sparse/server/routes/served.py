"""What the routes have in common: the server that they speak of."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, HTTPException, Request

from vllm_sparse.server.runtime_config import Served


def _served(request: Request) -> Served:
    served: Served | None = request.app.state.sparse_served
    if served is None:
        raise HTTPException(404, "this server runs dense attention; start it with --attention-backend sparse")
    return served


ServedSparsely = Annotated[Served, Depends(_served)]
"""Parameter of a route; answers 404 where the server runs dense attention."""
