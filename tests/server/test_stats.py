"""Densities of all layers and heads of a model, from those of its processes."""

from __future__ import annotations

import asyncio
from typing import Any

from vllm_sparse.server.stats import collect


def rank(number: int, layers: list[int], **decode: list[list[float]]) -> dict[str, Any]:
    """What a process tells: its layers, and the densities of its layers and heads."""
    density = {method: {"rows": 3, "density": heads} for method, heads in decode.items()}
    return {"engine": 1, "rank": number, "layers": layers, "density": {"decode": density} if density else {}}


class Engine:
    """Answers as vLLM's client does."""

    def __init__(self, *ranks: dict[str, Any]) -> None:
        self._ranks = ranks

    async def collective_rpc(self, method: str) -> list[dict[str, Any]]:
        return list(self._ranks)


def merged(*ranks: dict[str, Any]) -> Any:
    """The density of decoding of one engine."""
    engine: Any = Engine(*ranks)
    (found,) = asyncio.run(collect(engine))["engines"]
    assert found["engine"] == 1
    return found["density"].get("decode", {})


def test_ranks_share_heads_and_stages_share_layers() -> None:
    ranks = [
        rank(0, [0, 1], tidal=[[1.0], [0.2]]),
        rank(1, [0, 1], tidal=[[1.0], [0.3]]),
        rank(2, [2], tidal=[[0.4]]),
        rank(3, [2], tidal=[[0.5]]),
    ]
    expected = {"tidal": {"rows": 3, "density": [[1.0, 1.0], [0.2, 0.3], [0.4, 0.5]]}}
    assert merged(*ranks) == merged(*reversed(ranks)) == expected


def test_layers_of_a_stage_that_a_method_leaves_dense_are_one() -> None:
    found = merged(rank(0, [0, 1]), rank(1, []), rank(2, [2], tidal=[[0.4, 0.6]]))
    assert found == {"tidal": {"rows": 3, "density": [[1.0, 1.0], [1.0, 1.0], [0.4, 0.6]]}}


def test_a_rank_that_has_not_finished_its_first_row() -> None:
    assert merged(rank(0, [0], tidal=[[0.5]]), rank(1, [0])) == {}
