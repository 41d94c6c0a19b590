"""Compaction of selection maps into page lists."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.page_list import reference
from vllm_sparse.kernels.page_list.reference import blocks_to_pages, compact_pages, query_blocks
from vllm_sparse.pages import PageList

__all__ = ["blocks_to_pages", "chunk_lists", "compact_pages", "query_blocks"]


def chunk_lists(
    block_mask: torch.Tensor,
    block_size_tokens: int,
    chunk: int,
    context: int,
    query_block: int,
    page_size_tokens: int,
    list_heads: int,
) -> PageList:
    """The lists of a prefill chunk from its map over key blocks.

    Heads that share a list get what any of them chose. Blocks that hold a row's own positions are always kept, pages
    after its last position never. Runs in Triton on CUDA where pages divide blocks, else in PyTorch.

    Args:
        block_mask: bool ``[query_heads, ceil(chunk / query_block), ceil(context / block)]`` on a key grid from token 0.
        block_size_tokens: tokens of a selection block.
        chunk: tokens of the chunk, which ends the context.
        context: tokens in the request's cache.
        query_block: query tokens that share a list.
        page_size_tokens: page size of the executor.
        list_heads: heads with lists of their own; divides the query heads.

    Returns:
        Lists of ``list_heads * ceil(chunk / query_block)`` rows, head-major, as wide as the context; entries past the
        live part are 0.
    """
    if block_mask.is_cuda and block_size_tokens % page_size_tokens == 0:
        from vllm_sparse.kernels.page_list import triton

        implementation = triton.chunk_lists
    else:
        implementation = reference.chunk_lists
    return implementation(block_mask, block_size_tokens, chunk, context, query_block, page_size_tokens, list_heads)
