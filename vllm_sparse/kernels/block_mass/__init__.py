"""Exact attention of the query blocks of a prompt chunk to the pages of the context."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.block_mass import reference
from vllm_sparse.keys import PagedKeys, PlainKeys

__all__ = ["block_mass"]


def block_mass(
    query: torch.Tensor, keys: PagedKeys, scale: float, query_block_tokens: int, page_tokens: int
) -> torch.Tensor:
    """Attention mass of each page: its keys' softmax probabilities, summed over the queries of a query block.

    Attention is causal, and takes as many products as dense attention does: for what knows the truth, such as the
    method `oracle` and measures of recall. Runs in Triton on CUDA, else in PyTorch.

    Args:
        query: ``[query_tokens, query_heads, head_size]`` of a prompt chunk, at the last positions of the context.
        keys: the request's keys, the chunk's included.
        scale: softmax scale of the model; positive.
        query_block_tokens: query tokens of a query block; a power of two of at least 16.
        page_tokens: tokens of a page; a power of two.

    Returns:
        float32 ``[query_heads, ceil(query_tokens / query_block_tokens), ceil(context / page_tokens)]`` on a key grid
        from token 0; those of a query block add up to its number of queries. float64 for queries of that dtype,
        which run in PyTorch.
    """
    # Triton has no product of float64 matrices.
    if query.is_cuda and isinstance(keys, PlainKeys) and query.dtype != torch.float64:
        from vllm_sparse.kernels.block_mass import triton

        return triton.block_mass(query, keys, scale, query_block_tokens, page_tokens)
    return reference.block_mass(query, keys, scale, query_block_tokens, page_tokens)
