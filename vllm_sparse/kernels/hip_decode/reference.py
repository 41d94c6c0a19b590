"""HiP's search for a decode step of one request in PyTorch: the specification, on any device, without a sync."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_sparse.kernels.hierarchical_descent.reference import (
    LEAF_TOKENS,
    Searches,
    Stage,
    forced_leaves,
    search_queries,
    search_start,
)
from vllm_sparse.keys import PagedKeys


@dataclass(frozen=True)
class DecodeSearch:
    """What `decode_leaves` searches and what it always keeps.

    Attributes:
        stages: as in `hierarchical_descent`, with query stride 1.
        sink_tokens: first tokens of the context, always kept, rounded up to whole leaves.
        window_tokens: tokens before the newest one that are always kept.
        first_refresh_steps: decode steps between two searches of the first stage.
        mass_scale: softmax scale of the model, for a last stage that scores key blocks by the attention to all of their
            keys; None: it descends to single keys as the other stages do.
    """

    stages: Sequence[Stage]
    sink_tokens: int
    window_tokens: int
    first_refresh_steps: int
    mass_scale: float | None = None


def search_end(context: int, window_tokens: int, first_refresh_steps: int) -> int:
    """Token after the search range of a decode step, where the window starts."""
    last_search = context - context % first_refresh_steps
    return max(last_search - 1 - window_tokens, 0)


def decode_leaves(
    query: torch.Tensor, keys: PagedKeys, kept: Sequence[torch.Tensor], search: DecodeSearch
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Select leaves; arguments and results as in the public function."""
    context, kv_heads, stages = keys.seq_len, keys.num_kv_heads, search.stages
    begin = search_start(search.sink_tokens)
    end = search_end(context, search.window_tokens, search.first_refresh_steps)
    stop = torch.full((kv_heads, 1), end, device=query.device)
    mask = forced_leaves(context, begin, stop)
    if end <= begin:
        return [stop[:, :0]] * len(stages), mask
    searches = Searches(lambda position: (keys.gather(position),), begin, stop, end - begin)
    queries = search_queries(query.unsqueeze(0), 1, kv_heads, 1)
    results = list(kept)
    for number in range(len(kept), len(stages)):
        parents, parent_tokens = (results[-1], stages[number - 1].key_block_tokens) if results else (None, 0)
        mass_scale = search.mass_scale if number == len(stages) - 1 else None
        results.append(searches.prune(stages[number], queries, parents, parent_tokens, mass_scale))
    return results, mask | searches.leaf_mask(results[-1], stages[-1].key_block_tokens, -(-context // LEAF_TOKENS))
