"""HiP's selection for prefill: prune the keys in stages, by descents that end at single keys."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.hierarchical_descent import reference
from vllm_sparse.kernels.hierarchical_descent.reference import LEAF_TOKENS, DescentArguments, Stage
from vllm_sparse.keys import PagedKeys, PlainKeys

__all__ = ["LEAF_TOKENS", "DescentArguments", "Stage", "hierarchical_descent"]


def hierarchical_descent(query: torch.Tensor, keys: PagedKeys, arguments: DescentArguments) -> torch.Tensor:
    """Select the leaves of `LEAF_TOKENS` keys that each query block reads.

    The algorithm is InfiniteHiP's (arXiv 2502.08910, algorithms 1 and 2). The search range of a query block whose first
    query is at position ``p`` is ``[sink, p - window)``. A stage cuts what is left of it into key blocks, counted from
    the beginning of the range, and scores each key block by a descent: a step compares the midpoint keys of the two
    halves and enters the half whose key has the larger product with any query of the query block (the left half if both
    are equal), until one key is left. The score is the largest product that the descent met. The stage keeps the key
    blocks of the highest scores; of equal scores the lower key block wins. Before a stage scores, it averages adjacent
    queries. Products are not scaled, so in a maximum over heads the query heads with large queries weigh more.

    A key block that crosses the end of the range is searched and counted only as far as it lies in the range. A stage
    that may keep all that is left prunes nothing. The sink, the window and the query block's own tokens are kept
    whatever the stages find, in whole leaves.

    Runs in Triton on CUDA, else in PyTorch; without a device-to-host sync.

    Args:
        query: ``[query_tokens, query_heads, head_size]`` of a prompt chunk, at the last positions of the context.
        keys: the request's keys, those of the prompt chunk included.
        arguments: the stages, who shares a list, and what is always kept.

    Returns:
        bool ``[heads, ceil(query_tokens / query_block_tokens), ceil(context / LEAF_TOKENS)]``. No leaf begins after a
        query block's last query.
    """
    if query.is_cuda and isinstance(keys, PlainKeys):
        from vllm_sparse.kernels.hierarchical_descent import triton

        return triton.hierarchical_descent(query, keys, arguments)
    return reference.hierarchical_descent(query, keys, arguments)
