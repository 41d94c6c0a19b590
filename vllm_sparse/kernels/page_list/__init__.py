"""Compaction of selection maps into page lists, and translation of these to addresses in the KV cache."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.page_list import reference
from vllm_sparse.kernels.page_list.reference import ListGrid, blocks_to_pages, compact_pages, query_blocks
from vllm_sparse.pages import PageList

__all__ = ["ListGrid", "block_lists", "blocks_to_pages", "compact_pages", "query_blocks", "to_physical"]


def block_lists(block_mask: torch.Tensor, grid: ListGrid) -> PageList:
    """The lists of a prompt chunk, or of one newest token, from a map over key blocks.

    Heads that share a list get what any of them chose. Blocks that hold a row's own positions are always kept, pages
    after its last position never. Runs in Triton on CUDA where pages divide blocks, else in PyTorch.

    Args:
        block_mask: bool ``[query_heads, query_blocks, ceil(seq_len / key_block_tokens)]`` on a key grid from token 0.
        grid: what the map covers, and the form of the lists.

    Returns:
        Lists of ``list_heads * query_blocks`` rows, head-major, as wide as the context; entries past the live part are
        0.
    """
    if block_mask.is_cuda and grid.key_block_tokens % grid.page_size_tokens == 0:
        from vllm_sparse.kernels.page_list import triton

        return triton.block_lists(block_mask, grid)
    return reference.block_lists(block_mask, grid)


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
