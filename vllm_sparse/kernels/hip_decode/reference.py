"""HiP's search for a decode step of one request in PyTorch: the specification, on any device, without a sync."""

from __future__ import annotations

from collections.abc import Sequence

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


def search_end(context: int, window_tokens: int, first_refresh: int) -> int:
    """Token after the search range of a decode step, where the window starts."""
    last_search = context - context % first_refresh
    return max(last_search - 1 - window_tokens, 0)


def decode_leaves(
    query: torch.Tensor,
    keys: PagedKeys,
    stages: Sequence[Stage],
    kept: Sequence[torch.Tensor],
    sink_tokens: int,
    window_tokens: int,
    first_refresh: int,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The results of all stages and the leaves to read; arguments as in the public function."""
    context, kv_heads = keys.context_tokens, keys.num_kv_heads
    begin, end = search_start(sink_tokens), search_end(context, window_tokens, first_refresh)
    stop = torch.full((kv_heads, 1), end, device=query.device)
    mask = forced_leaves(context, begin, stop)
    if end <= begin:
        return [stop[:, :0]] * len(stages), mask
    searches = Searches(lambda position: (keys.gather(position),), begin, stop, end - begin)
    queries = search_queries(query.unsqueeze(0), 1, kv_heads, 1)
    results = list(kept)
    for number in range(len(kept), len(stages)):
        parents, parent_tokens = (results[-1], stages[number - 1].chunk_tokens) if results else (None, 0)
        results.append(searches.prune(stages[number], queries, parents, parent_tokens))
    return results, mask | searches.leaf_mask(results[-1], stages[-1].chunk_tokens, -(-context // LEAF_TOKENS))
