"""Compaction of selection maps into page lists, and translation of these to addresses in the KV cache."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.page_list import reference
from vllm_sparse.kernels.page_list.reference import blocks_to_pages, compact_pages, query_blocks
from vllm_sparse.pages import PageList

__all__ = ["blocks_to_pages", "chunk_lists", "compact_pages", "query_blocks", "to_physical"]


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


def to_physical(
    page_list: PageList,
    block_table: torch.Tensor,
    row_kv_head: torch.Tensor,
    block_size_tokens: int,
    num_kv_heads: int,
) -> torch.Tensor:
    """Translate logical pages to page numbers of the per-head view of a head-major (LBHNC) KV cache.

    The cache ``[blocks, kv_heads, block_size, 2 * head_size]`` is a plain view of
    ``blocks * kv_heads * (block_size / page_size)`` pages of one head each.

    Args:
        page_list: lists of ``rows`` rows; the page size divides the block size.
        block_table: int32 ``[blocks]`` of the one request that all rows belong to, or ``[rows, blocks]``.
        row_kv_head: integer ``[rows]`` KV head that the row reads.
        block_size_tokens: tokens of a KV-cache block.
        num_kv_heads: KV heads in the cache.

    Returns:
        ``[rows, width]`` int32. Entries past a row's live part are valid page numbers or never read.

    Raises:
        ValueError: the page size does not divide the block size.
    """
    page_size = page_list.page_size_tokens
    if block_size_tokens % page_size:
        raise ValueError(
            f"a page of {page_size} tokens does not divide a KV-cache block of {block_size_tokens} tokens; "
            "choose a page size that does"
        )
    if page_list.pages.is_cuda:
        from vllm_sparse.kernels.page_list import triton

        implementation = triton.to_physical
    else:
        implementation = reference.to_physical
    return implementation(page_list, block_table, row_kv_head, block_size_tokens // page_size, num_kv_heads)
