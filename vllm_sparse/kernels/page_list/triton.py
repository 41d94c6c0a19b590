"""Selection maps to page lists and to addresses in Triton: one program a list, in tiles of pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.page_list.reference import ListGrid
from vllm_sparse.pages import PageList

PAGE_TILE = 1024


# Lengths change with every chunk; specialising on them would compile in the middle of serving.
@triton.jit(do_not_specialize=["chunk", "context", "query_block_count", "key_blocks", "width"])
def block_lists_kernel(
    mask_pointer,
    pages_pointer,
    kept_tokens_pointer,
    chunk,
    context,
    query_block_count,
    key_blocks,
    width,
    QUERY_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    i_list = tl.program_id(0).to(tl.int64)
    i_query_block = i_list % query_block_count
    first = context - chunk + i_query_block * QUERY_BLOCK
    last = tl.minimum(first + QUERY_BLOCK, context) - 1
    first_own_block = first // BLOCK
    last_page = last // PAGE
    kept_pages = 0
    for start in range(0, last_page + 1, TILE):
        o_page = start + tl.arange(0, TILE)
        o_block = o_page // (BLOCK // PAGE)
        in_reach = o_page <= last_page
        b_keep = o_block >= first_own_block
        for member in tl.static_range(GROUP):
            i_row = ((i_list // query_block_count) * GROUP + member) * query_block_count + i_query_block
            b_mask = tl.load(mask_pointer + i_row * key_blocks + o_block, mask=in_reach, other=0)
            b_keep = b_keep | (b_mask != 0)
        b_keep = b_keep & in_reach
        b_rank = tl.cumsum(b_keep.to(tl.int32), axis=0)
        tl.store(pages_pointer + i_list * width + kept_pages + b_rank - 1, o_page.to(tl.int32), mask=b_keep)
        kept_pages += tl.sum(b_keep.to(tl.int32), axis=0)
    tl.store(kept_tokens_pointer + i_list, ((kept_pages - 1) * PAGE + last % PAGE + 1).to(tl.int32))


def block_lists(block_mask: torch.Tensor, grid: ListGrid) -> PageList:
    """Equal to `reference.block_lists`; arguments as there, the page divides the block."""
    heads, query_block_count, key_blocks = block_mask.shape
    rows, width = grid.list_heads * query_block_count, -(-grid.seq_len // grid.page_size_tokens)
    pages = torch.zeros(rows, width, dtype=torch.int32, device=block_mask.device)
    kept_tokens = torch.empty(rows, dtype=torch.int32, device=block_mask.device)
    block_lists_kernel[(rows,)](
        block_mask.contiguous().view(torch.uint8),
        pages,
        kept_tokens,
        grid.query_tokens,
        grid.seq_len,
        query_block_count,
        key_blocks,
        width,
        QUERY_BLOCK=grid.query_block_tokens,
        BLOCK=grid.key_block_tokens,
        PAGE=grid.page_size_tokens,
        GROUP=heads // grid.list_heads,
        TILE=PAGE_TILE,
        num_warps=4,
    )
    return PageList(pages, kept_tokens, grid.page_size_tokens)


@triton.jit(do_not_specialize=["width", "table_row_stride"])
def to_physical_kernel(
    pages_pointer,
    kept_tokens_pointer,
    block_table_pointer,
    kv_head_pointer,
    physical_pointer,
    width,
    table_row_stride,
    num_kv_heads,
    page_size,
    PAGES_PER_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    i_list = tl.program_id(0).to(tl.int64)
    kept_pages = (tl.load(kept_tokens_pointer + i_list) + page_size - 1) // page_size
    kv_head = tl.load(kv_head_pointer + i_list).to(tl.int32)
    for start in range(0, kept_pages, TILE):
        o_entry = start + tl.arange(0, TILE)
        live = o_entry < kept_pages
        b_page = tl.load(pages_pointer + i_list * width + o_entry, mask=live, other=0)
        p_block = block_table_pointer + i_list * table_row_stride + b_page // PAGES_PER_BLOCK
        b_block = tl.load(p_block, mask=live, other=0)
        b_physical = (b_block * num_kv_heads + kv_head) * PAGES_PER_BLOCK + b_page % PAGES_PER_BLOCK
        tl.store(physical_pointer + i_list * width + o_entry, b_physical, mask=live)


def to_physical(
    page_list: PageList, block_table: torch.Tensor, row_kv_head: torch.Tensor, pages_per_block: int, num_kv_heads: int
) -> torch.Tensor:
    """Equal to `reference.to_physical` where lists are live; 0 past it, which is a valid page."""
    rows, width = page_list.pages.shape
    pages = page_list.pages.contiguous()
    physical = torch.zeros_like(pages)
    to_physical_kernel[(rows,)](
        pages,
        page_list.kept_tokens,
        block_table,
        row_kv_head,
        physical,
        width,
        0 if block_table.dim() == 1 else block_table.stride(0),
        num_kv_heads,
        page_list.page_size_tokens,
        PAGES_PER_BLOCK=pages_per_block,
        TILE=PAGE_TILE,
        num_warps=4,
    )
    return physical
