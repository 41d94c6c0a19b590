"""HiP's selection: hierarchical pruning of the keys by descents to single keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_sparse.kernels.hierarchical_descent import reference
from vllm_sparse.kernels.hierarchical_descent.reference import LEAF_TOKENS, Stage
from vllm_sparse.keys import PagedKeys, PlainKeys

__all__ = ["LEAF_TOKENS", "Stage", "hierarchical_descent"]


def hierarchical_descent(
    query: torch.Tensor,
    keys: PagedKeys,
    stages: Sequence[Stage],
    query_block: int,
    heads: int,
    sink_tokens: int,
    window_tokens: int,
    dense_tail_tokens: int,
) -> torch.Tensor:
    """Leaves that each query block keeps (InfiniteHiP, arXiv 2502.08910, algorithms 1 and 2).

    The search range of a query block with first position ``p`` is ``[sink, p - window)``, cut into chunks from its
    beginning. A stage scores each chunk of what is left by a descent: of the two halves the one whose midpoint key has
    the larger product with any query of the block is entered (the left one if they are equal), until one key is left;
    the score is the largest product on the way. The best chunks stay, the lower ones if they are equal. Before that,
    adjacent queries are averaged. Products are not scaled, so query heads with large queries weigh more in a maximum
    over heads.

    A chunk at the end of the range is searched and counted as far as it lies in the range. A stage that may keep
    everything prunes nothing. Sink, window and the query block's own tokens are kept whatever the stages say, in whole
    leaves. Runs in Triton on CUDA, else in PyTorch; no device-to-host sync.

    Args:
        query: ``[chunk, query_heads, head_size]``, at the last positions of the context.
        keys: the request's keys, the chunk's included.
        stages: chunk lengths fall strictly, kept tokens do not rise.
        query_block: query tokens that share a list; 1 for a decode step.
        heads: lists of heads; divides the query heads, and divides the KV heads or is a multiple of them. Scores of
            the query heads that share a list are merged by their maximum.
        sink_tokens: first tokens, always kept, rounded up to a leaf.
        window_tokens: tokens before a query block, always kept.
        dense_tail_tokens: last queries of the chunk, whose query blocks keep everything.

    Returns:
        bool ``[heads, ceil(chunk / query_block), ceil(context / LEAF_TOKENS)]``, no leaf past a block's last query.
    """
    if query.is_cuda and isinstance(keys, PlainKeys):
        from vllm_sparse.kernels.hierarchical_descent import triton

        return triton.hierarchical_descent(
            query, keys, stages, query_block, heads, sink_tokens, window_tokens, dense_tail_tokens
        )
    return reference.hierarchical_descent(
        query, keys, stages, query_block, heads, sink_tokens, window_tokens, dense_tail_tokens
    )
