"""Compaction of selection maps into page lists, and translation of these to addresses in the KV cache."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.page_list import reference
from vllm_sparse.kernels.page_list.reference import ListGrid, blocks_to_pages, compact_pages, query_blocks
from vllm_sparse.pages import PageList
from vllm_sparse.step.chunks import LaunchRows, PromptBlocks

__all__ = [
    "ListGrid",
    "block_lists",
    "blocks_to_pages",
    "compact_pages",
    "launch_lists",
    "query_blocks",
    "to_physical",
    "write_lists",
]


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


def write_lists(
    block_mask: torch.Tensor, blocks: PromptBlocks, key_block_tokens: int, list_heads: int, lists: PageList
) -> None:
    """Write the lists of prompt chunks from a map over key blocks, as `block_lists` makes them, in one launch on CUDA.

    Args:
        block_mask: bool ``[query_heads, blocks, key_blocks]`` on a key grid from token 0 of each chunk's context. What
            lies past a context does not matter.
        blocks: query blocks of the chunks.
        key_block_tokens: tokens of a key block of the map.
        list_heads: heads with lists of their own; divides the query heads.
        lists: ``list_heads * blocks`` rows in the order of `PromptBlocks`, wide enough for each context, written.
            Entries past the live part are left as they are.
    """
    if block_mask.is_cuda and key_block_tokens % lists.page_size_tokens == 0:
        from vllm_sparse.kernels.page_list import triton

        triton.write_lists(block_mask, blocks, key_block_tokens, list_heads, lists)
    else:
        reference.write_lists(block_mask, blocks, key_block_tokens, list_heads, lists)


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
    pages_per_block = _pages_per_block(page_list, block_size_tokens)
    if page_list.pages.is_cuda:
        from vllm_sparse.kernels.page_list import triton

        implementation = triton.to_physical
    else:
        implementation = reference.to_physical
    return implementation(page_list, block_table, row_kv_head, pages_per_block, num_kv_heads)


def launch_lists(
    page_list: PageList, rows: LaunchRows, block_table: torch.Tensor, block_size_tokens: int, num_kv_heads: int
) -> PageList:
    """Lists in the order of execution, with page numbers as `to_physical` gives them.

    Args:
        page_list: lists of prompt chunks; the page size divides the block size.
        rows: which list, KV head and request belong to each row.
        block_table: int32 ``[batch, blocks]`` of the step.
        block_size_tokens: tokens of a KV-cache block.
        num_kv_heads: KV heads in the cache.

    Raises:
        ValueError: the page size does not divide the block size.
    """
    pages_per_block = _pages_per_block(page_list, block_size_tokens)
    if page_list.pages.is_cuda:
        from vllm_sparse.kernels.page_list import triton

        return triton.launch_lists(page_list, rows, block_table, pages_per_block, num_kv_heads)
    return reference.launch_lists(page_list, rows, block_table, pages_per_block, num_kv_heads)


def _pages_per_block(page_list: PageList, block_size_tokens: int) -> int:
    page_size = page_list.page_size_tokens
    if block_size_tokens % page_size:
        raise ValueError(
            f"a page of {page_size} tokens does not divide a KV-cache block of {block_size_tokens} tokens; "
            "choose a page size that does"
        )
    return block_size_tokens // page_size
