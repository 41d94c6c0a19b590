"""DHSA's scores and selection in Triton: pooled queries, scores per page, and an exact top-k per row.

Scores go through memory once: at 128K tokens, 32 heads and 64 query blocks they are 34 MB, where one program per row
that computed its own would read all chunk representations 64 times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.common.triton import (
    chosen_entries,
    ordered_scores,
    product_tile,
    row_threshold,
    threshold_tile,
)

BLOCK_TILE, PAGE_TILE = 64, 64
# Small, for registers: the split into TF32 parts holds its operands in them.
DIM_TILE = 16
SELECT_TILE = 1024


# Lengths change with every chunk; specialising on them would compile in the middle of serving.
@triton.jit(do_not_specialize=["chunk", "blocks"])
def pooled_queries_kernel(
    query_pointer,
    pooled_pointer,
    chunk,
    blocks,
    query_row_stride,
    query_head_stride,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_block = tl.program_id(0)
    i_head = tl.program_id(1)
    o_row = i_block * BLOCK + tl.arange(0, BLOCK)
    o_dim = tl.arange(0, HEAD_TILE)
    in_head = o_dim < HEAD_SIZE
    p_query = query_pointer + o_row.to(tl.int64)[:, None] * query_row_stride + i_head * query_head_stride
    b_query = tl.load(p_query + o_dim[None, :], mask=(o_row < chunk)[:, None] & in_head[None, :], other=0.0)
    length = tl.minimum(chunk - i_block * BLOCK, BLOCK).to(tl.float32)
    b_pooled = tl.sum(b_query.to(tl.float32), axis=0) / tl.sqrt(length)
    tl.store(pooled_pointer + (i_head * blocks + i_block) * HEAD_SIZE + o_dim, b_pooled, mask=in_head)


def pooled_queries(query: torch.Tensor, query_block: int) -> torch.Tensor:
    """Equal to `reference.pooled_queries`; arguments as there, `query_block` a power of two."""
    chunk, heads, head_size = query.shape
    blocks = -(-chunk // query_block)
    pooled = torch.empty(heads, blocks, head_size, dtype=torch.float32, device=query.device)
    assert query.stride(2) == 1
    pooled_queries_kernel[(blocks, heads)](
        query,
        pooled,
        chunk,
        blocks,
        query.stride(0),
        query.stride(1),
        HEAD_SIZE=head_size,
        HEAD_TILE=product_tile(head_size),
        BLOCK=query_block,
        num_warps=8,
    )
    return pooled


# The last chunks lie behind the first ones in one tensor, and begin anywhere.
@triton.jit(
    do_not_specialize=["blocks", "chunks", "pages"],
    do_not_specialize_on_alignment=["first_chunk_pointer", "last_chunk_pointer"],
)
def page_scores_kernel(
    query_pointer,
    representation_pointer,
    first_chunk_pointer,
    last_chunk_pointer,
    score_pointer,
    blocks,
    chunks,
    pages,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK_TILE: tl.constexpr,
    PAGE_TILE: tl.constexpr,
):
    i_head = tl.program_id(1)
    o_page = tl.program_id(0) * PAGE_TILE + tl.arange(0, PAGE_TILE)
    o_block = tl.program_id(2) * BLOCK_TILE + tl.arange(0, BLOCK_TILE)
    b_first = tl.load(first_chunk_pointer + o_page, mask=o_page < pages, other=0)
    b_last = tl.load(last_chunk_pointer + o_page, mask=o_page < pages, other=0)
    p_query = query_pointer + (i_head * blocks + o_block)[:, None] * HEAD_SIZE
    p_representation = representation_pointer + (i_head // GROUP).to(tl.int64) * chunks * HEAD_SIZE
    b_best = tl.full([BLOCK_TILE, PAGE_TILE], float("-inf"), tl.float32)
    for step in range(tl.max(b_last - b_first) + 1):
        o_chunk = tl.minimum(b_first + step, b_last)
        p_chunk = p_representation + o_chunk[:, None] * HEAD_SIZE
        b_score = tl.zeros([BLOCK_TILE, PAGE_TILE], tl.float32)
        for first_dim in range(0, HEAD_SIZE, DIM_TILE):
            o_dim = first_dim + tl.arange(0, DIM_TILE)[None, :]
            b_query = tl.load(p_query + o_dim, mask=(o_block < blocks)[:, None] & (o_dim < HEAD_SIZE), other=0.0)
            b_chunk = tl.load(p_chunk + o_dim, mask=o_dim < HEAD_SIZE, other=0.0)
            # Three TF32 products have the accuracy of a float32 one on tensor cores.
            b_score = tl.dot(b_query, tl.trans(b_chunk), b_score, input_precision="tf32x3")
        b_best = tl.maximum(b_best, b_score)
    p_score = score_pointer + (i_head * blocks + o_block).to(tl.int64)[:, None] * pages + o_page[None, :]
    tl.store(p_score, b_best, mask=(o_block < blocks)[:, None] & (o_page < pages)[None, :])


def page_scores(
    queries: torch.Tensor, representation: torch.Tensor, first_chunk: torch.Tensor, last_chunk: torch.Tensor
) -> torch.Tensor:
    """Equal to `reference.page_scores` but for rounding; arguments as there, all contiguous."""
    heads, blocks, head_size = queries.shape
    key_heads, chunks, _ = representation.shape
    pages = first_chunk.shape[0]
    scores = torch.empty(heads, blocks, pages, dtype=torch.float32, device=queries.device)
    page_scores_kernel[(triton.cdiv(pages, PAGE_TILE), heads, triton.cdiv(blocks, BLOCK_TILE))](
        queries,
        representation,
        first_chunk,
        last_chunk,
        scores,
        blocks,
        chunks,
        pages,
        GROUP=heads // key_heads,
        HEAD_SIZE=head_size,
        DIM_TILE=DIM_TILE,
        BLOCK_TILE=BLOCK_TILE,
        PAGE_TILE=PAGE_TILE,
        num_warps=4,
    )
    return scores


@triton.jit(do_not_specialize=["blocks", "pages", "sink_pages", "budget_pages"])
def select_pages_kernel(
    score_pointer,
    band_page_pointer,
    last_page_pointer,
    kept_pointer,
    blocks,
    pages,
    sink_pages,
    budget_pages,
    ROW_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    last = tl.load(last_page_pointer + i_row % blocks)
    band = tl.load(band_page_pointer + i_row % blocks)
    p_score = score_pointer + i_row * pages
    p_kept = kept_pointer + i_row * pages
    # Pages from `first` to `stop` compete for what the forced ones leave of the budget.
    first = tl.minimum(sink_pages, last + 1)
    stop = tl.maximum(tl.minimum(band, last + 1), first)
    free = tl.maximum(budget_pages - (first + last + 1 - stop), 0)

    least, above = row_threshold(p_score, first, stop, free, False, ROW_TILE, TILE)
    # Of the keys equal to the threshold, the lower pages win.
    equal_left = free - above
    for start in range(0, pages, TILE):
        o_page = start + tl.arange(0, TILE)
        competes = (o_page >= first) & (o_page < stop)
        b_key = ordered_scores(p_score, o_page, competes)
        b_equal = ((b_key == least) & competes).to(tl.int32)
        b_chosen, equal_left = chosen_entries(b_key, b_equal, least, equal_left)
        b_forced = ((o_page < sink_pages) | (o_page >= band)) & (o_page <= last)
        tl.store(p_kept + o_page, ((b_chosen & competes) | b_forced).to(tl.uint8), mask=o_page < pages)


def select_pages(
    scores: torch.Tensor, sink_pages: int, band_page: torch.Tensor, last_page: torch.Tensor, budget_pages: int
) -> torch.Tensor:
    """Equal to `reference.select_pages` for the same scores; arguments as there, all contiguous."""
    heads, blocks, pages = scores.shape
    kept = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    entries, num_warps = threshold_tile(pages)
    select_pages_kernel[(heads * blocks,)](
        scores,
        band_page,
        last_page,
        kept.view(torch.uint8),
        blocks,
        pages,
        sink_pages,
        budget_pages,
        ROW_TILE=entries,
        TILE=SELECT_TILE,
        num_warps=num_warps,
    )
    return kept
