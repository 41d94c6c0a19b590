"""HiP's selection for prefill: prune the keys in stages, by descents that end at single keys."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.hierarchical_descent import reference
from vllm_sparse.kernels.hierarchical_descent.ranges import SearchRanges, scratch_bytes, search_ranges
from vllm_sparse.kernels.hierarchical_descent.reference import LEAF_TOKENS, DescentArguments, Stage
from vllm_sparse.keys import PlainKeys
from vllm_sparse.step.chunks import PromptChunks

__all__ = [
    "LEAF_TOKENS",
    "DescentArguments",
    "SearchRanges",
    "Stage",
    "hierarchical_descents",
    "scratch_bytes",
    "search_ranges",
]


def hierarchical_descents(
    chunks: PromptChunks, ranges: SearchRanges, arguments: DescentArguments, heads: int
) -> torch.Tensor:
    """Select the leaves of `LEAF_TOKENS` keys that each query block of prompt chunks reads.

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

    Runs in Triton on CUDA, in as many launches as one chunk needs unless the memory between them is short; else in
    PyTorch. Without a device-to-host sync.

    Args:
        chunks: the prompt chunks.
        ranges: of their query blocks.
        arguments: the stages, and what is always kept.
        heads: number of lists per query block. It divides the number of query heads, and divides the number of KV heads
            or is a multiple of it. A key's score is the largest of those of the query heads that share the list.

    Returns:
        bool ``[heads, blocks, ceil(longest context / LEAF_TOKENS)]``. No leaf begins after a query block's last query.
    """
    if chunks.query.is_cuda and isinstance(chunks.keys[0], PlainKeys):
        from vllm_sparse.kernels.hierarchical_descent import triton

        return triton.hierarchical_descents(chunks, ranges, arguments, heads)
    return reference.hierarchical_descents(chunks, arguments, heads)
