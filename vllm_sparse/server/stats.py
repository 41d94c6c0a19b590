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
    """One engine's answer from its ranks: each stage of the pipeline has some of the layers, each rank of a stage some
    of the heads."""
    stages: dict[int, list[dict[str, Any]]] = {}
    for rank in sorted(ranks, key=lambda rank: rank["rank"]):
        # A stage may hold no layer that this backend serves.
        if rank["layers"]:
            stages.setdefault(rank["layers"][0], []).append(rank)
    merged = [(len(stage[0]["layers"]), _merge_heads(stage)) for _, stage in sorted(stages.items())]
    density: dict[str, Any] = {}
    for phase, method in dict.fromkeys(key for _, stage in merged for key in stage):
        parts = [stage.get((phase, method)) for _, stage in merged]
        found = next(part for part in parts if part is not None)
        # Where a stage has seen none, the method leaves its layers dense.
        dense = [1.0] * len(found["density"][0])
        layers = [
            heads
            for (count, _), part in zip(merged, parts, strict=True)
            for heads in ([dense] * count if part is None else part["density"])
        ]
        density.setdefault(phase, {})[method] = {"rows": found["rows"], "density": layers}
    return {"engine": max(rank["engine"] for rank in ranks), "density": density}


def _merge_heads(ranks: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows and densities of one stage by phase and method, from its tensor-parallel ranks."""
    merged = {}
    for phase, methods in ranks[0]["density"].items():
        for method, first in methods.items():
            parts = [rank["density"].get(phase, {}).get(method) for rank in ranks]
            if None in parts:
                # A rank was asked a moment before it finished the first row.
                continue
            layers = zip(*(part["density"] for part in parts), strict=True)
            heads = [[value for part in layer for value in part] for layer in layers]
            merged[phase, method] = {"rows": first["rows"], "density": heads}
    return merged
