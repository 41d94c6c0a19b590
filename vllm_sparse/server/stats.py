"""Recent density of each layer and head, asked of all ranks of all engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_sparse.hooks.worker_base import WORKER_METHOD

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.engine.protocol import EngineClient


async def collect(engine_client: EngineClient) -> dict[str, Any]:
    """Density of late rows, KV tokens read over KV tokens in reach, in each layer and query head.

    The means are weighted exponentially: about the last 64 prefill chunks, or decode steps of a request, count. Asking
    takes the engines a moment between two steps, so do so every few seconds at most.

    Args:
        engine_client: of the API server.

    Returns:
        ``{"engines": [{"engine": 0, "density": {phase: {method: {"rows": n, "density": [layers][query_heads]}}}}]}``,
        an entry for each data-parallel engine that this API server feeds. Layers that a method leaves dense are 1.
    """
    core = getattr(engine_client, "engine_core", None)
    if core is not None and hasattr(core, "call_utility_all_async"):
        # `collective_rpc` runs in all engines and returns what the first one says.
        answers = await core.call_utility_all_async("collective_rpc", WORKER_METHOD, None, (), {})
    else:
        answers = [await engine_client.collective_rpc(WORKER_METHOD)]
    return {"engines": sorted(map(_merge_ranks, answers), key=lambda engine: engine["engine"])}


def _merge_ranks(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One engine's answer from its tensor-parallel ranks, each of which has some of the heads."""
    ranks = sorted(ranks, key=lambda rank: rank["rank"])
    density: dict[str, Any] = {}
    for phase, methods in ranks[0]["density"].items():
        for method, first in methods.items():
            parts = [rank["density"].get(phase, {}).get(method) for rank in ranks]
            if None in parts:
                # A rank was asked a moment before it finished the first row.
                continue
            layers = zip(*(part["density"] for part in parts), strict=True)
            heads = [[value for part in layer for value in part] for layer in layers]
            density.setdefault(phase, {})[method] = {"rows": first["rows"], "density": heads}
    return {"engine": ranks[0]["engine"], "density": density}
