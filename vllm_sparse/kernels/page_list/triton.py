"""Selection maps to page lists and to addresses in Triton: one program a list, in tiles of pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.page_list.reference import ListGrid
from vllm_sparse.pages import PageList
from vllm_sparse.step.chunks import LaunchRows, PromptBlocks, one_chunk

PAGE_TILE = 1024


# Lengths change with every chunk, and the lists of one lie anywhere among those of others; specialising on them would
# compile in the middle of serving.
@triton.jit(
    do_not_specialize=["query_block_count", "key_blocks", "width"],
    do_not_specialize_on_alignment=["pages_pointer", "kept_tokens_pointer"],
)
def write_lists_kernel(
    mask_pointer,
    pages_pointer,
    kept_tokens_pointer,
    first_query_pointer,
    last_query_pointer,
    chunk_pointer,
    chunk_start_pointer,
    query_block_count,
    key_blocks,
    width,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    i_query_block = tl.program_id(0)
    i_head = tl.program_id(1)
    first = tl.load(first_query_pointer + i_query_block)
    last = tl.load(last_query_pointer + i_query_block)
    p_chunk_start = chunk_start_pointer + tl.load(chunk_pointer + i_query_block)
    start_block = tl.load(p_chunk_start)
    chunk_blocks = tl.load(p_chunk_start + 1) - start_block
    # The lists of earlier chunks, then those of earlier heads of this one.
    i_list = start_block * tl.num_programs(1) + i_head * chunk_blocks + i_query_block - start_block
    i_list = i_list.to(tl.int64)
    first_own_block = first // BLOCK
    last_page = last // PAGE
    kept_pages = 0
    for start in range(0, last_page + 1, TILE):
        o_page = start + tl.arange(0, TILE)
        o_block = o_page // (BLOCK // PAGE)
        in_reach = o_page <= last_page
        b_keep = o_block >= first_own_block
        for member in tl.static_range(GROUP):
            i_row = ((i_head * GROUP + member) * query_block_count + i_query_block).to(tl.int64)
            b_mask = tl.load(mask_pointer + i_row * key_blocks + o_block, mask=in_reach, other=0)
            b_keep = b_keep | (b_mask != 0)
        b_keep = b_keep & in_reach
        b_rank = tl.cumsum(b_keep.to(tl.int32), axis=0)
        tl.store(pages_pointer + i_list * width + kept_pages + b_rank - 1, o_page.to(tl.int32), mask=b_keep)
        kept_pages += tl.sum(b_keep.to(tl.int32), axis=0)
    tl.store(kept_tokens_pointer + i_list, ((kept_pages - 1) * PAGE + last % PAGE + 1).to(tl.int32))


def write_lists(
    block_mask: torch.Tensor, blocks: PromptBlocks, key_block_tokens: int, list_heads: int, lists: PageList
) -> None:
    """Equal to `reference.write_lists`; arguments as there, the page divides the block."""
    heads, query_block_count, key_blocks = block_mask.shape
    write_lists_kernel[(query_block_count, list_heads)](
        block_mask.contiguous().view(torch.uint8),
        lists.pages,
        lists.kept_tokens,
        blocks.first_query,
        blocks.last_query,
        blocks.chunk,
        blocks.chunk_start,
        query_block_count,
        key_blocks,
        lists.pages.stride(0),
        BLOCK=key_block_tokens,
        PAGE=lists.page_size_tokens,
        GROUP=heads // list_heads,
        TILE=PAGE_TILE,
        num_warps=4,
    )


def block_lists(block_mask: torch.Tensor, grid: ListGrid) -> PageList:
    """Equal to `reference.block_lists`; arguments as there, the page divides the block."""
    rows, width = grid.list_heads * block_mask.shape[1], -(-grid.seq_len // grid.page_size_tokens)
    pages = torch.zeros(rows, width, dtype=torch.int32, device=block_mask.device)
    kept_tokens = torch.empty(rows, dtype=torch.int32, device=block_mask.device)
    lists = PageList(pages, kept_tokens, grid.page_size_tokens)
    blocks = one_chunk(grid.query_tokens, grid.seq_len, grid.query_block_tokens, block_mask.device)
    write_lists(block_mask, blocks, grid.key_block_tokens, grid.list_heads, lists)
    return lists


@triton.jit(do_not_specialize=["width", "table_row_stride"], do_not_specialize_on_alignment=["block_table_pointer"])
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


@triton.jit(do_not_specialize=["width", "table_row_stride"], do_not_specialize_on_alignment=["block_table_pointer"])
def launch_lists_kernel(
    pages_pointer,
    kept_tokens_pointer,
    list_pointer,
    kv_head_pointer,
    table_row_pointer,
    block_table_pointer,
    physical_pointer,
    launched_tokens_pointer,
    width,
    table_row_stride,
    num_kv_heads,
    page_size,
    PAGES_PER_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_list = tl.load(list_pointer + i_row).to(tl.int64)
    kv_head = tl.load(kv_head_pointer + i_row)
    p_table = block_table_pointer + tl.load(table_row_pointer + i_row).to(tl.int64) * table_row_stride
    kept_tokens = tl.load(kept_tokens_pointer + i_list)
    tl.store(launched_tokens_pointer + i_row, kept_tokens)
    kept_pages = (kept_tokens + page_size - 1) // page_size
    for start in range(0, width, TILE):
        o_entry = start + tl.arange(0, TILE)
        live = o_entry < kept_pages
        b_page = tl.load(pages_pointer + i_list * width + o_entry, mask=live, other=0)
        b_block = tl.load(p_table + b_page // PAGES_PER_BLOCK, mask=live, other=0)
        b_physical = (b_block * num_kv_heads + kv_head) * PAGES_PER_BLOCK + b_page % PAGES_PER_BLOCK
        # Page 0, which is a valid one, past the live part.
        tl.store(physical_pointer + i_row * width + o_entry, tl.where(live, b_physical, 0), mask=o_entry < width)


def launch_lists(
    page_list: PageList, rows: LaunchRows, block_table: torch.Tensor, pages_per_block: int, num_kv_heads: int
) -> PageList:
    """Equal to `reference.launch_lists` where lists are live; 0 past it, which is a valid page."""
    count, width = page_list.pages.shape
    pages = page_list.pages.contiguous()
    physical = torch.empty_like(pages)
    kept_tokens = torch.empty_like(page_list.kept_tokens)
    launch_lists_kernel[(count,)](
        pages,
        page_list.kept_tokens,
        rows.lists,
        rows.kv_head,
        rows.table_row,
        block_table,
        physical,
        kept_tokens,
        width,
        block_table.stride(0),
        num_kv_heads,
        page_list.page_size_tokens,
        PAGES_PER_BLOCK=pages_per_block,
        TILE=PAGE_TILE,
        num_warps=4,
    )
    return PageList(physical, kept_tokens, page_list.page_size_tokens)
