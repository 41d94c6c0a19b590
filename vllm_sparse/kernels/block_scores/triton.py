"""DHSA's scores and selection in Triton: pooled queries, scores per page, and an exact top-k per (head, query block).

The scores are written to memory and read again: 34 MB at 128K tokens, 32 heads and 64 query blocks. If instead each
program computed the scores of its own query block, it would read all representations again, 64 times in total.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.common.triton import (
    chosen_entries,
    equal_needed,
    float32_precision,
    ordered_scores,
    product_tile,
    row_threshold,
    threshold_tile,
)
from vllm_sparse.step.chunks import PromptBlocks, one_chunk

BLOCK_TILE, PAGE_TILE = 64, 64
# Small, because the split of operands into TF32 parts takes registers.
DIM_TILE = 16
SELECT_TILE = 1024
# Of rows of masses, which are searched twice: no more pages are held in registers, or some spill.
MOST_COVERED_PAGES = 16384


# Lengths change with every prompt chunk; specialising on them would compile in the middle of serving.
@triton.jit(do_not_specialize=["query_block_count"])
def pooled_queries_kernel(
    query_pointer,
    pooled_pointer,
    first_token_pointer,
    first_query_pointer,
    last_query_pointer,
    query_block_count,
    query_row_stride,
    query_head_stride,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_block = tl.program_id(0)
    i_head = tl.program_id(1)
    length = tl.load(last_query_pointer + i_block) - tl.load(first_query_pointer + i_block) + 1
    o_offset = tl.arange(0, BLOCK)
    o_token = (tl.load(first_token_pointer + i_block) + o_offset).to(tl.int64)
    o_dim = tl.arange(0, HEAD_TILE)
    in_head = o_dim < HEAD_SIZE
    p_query = query_pointer + o_token[:, None] * query_row_stride + i_head * query_head_stride
    b_query = tl.load(p_query + o_dim[None, :], mask=(o_offset < length)[:, None] & in_head[None, :], other=0.0)
    b_pooled = tl.sum(b_query.to(tl.float32), axis=0) / tl.sqrt(length.to(tl.float32))
    tl.store(pooled_pointer + (i_head * query_block_count + i_block) * HEAD_SIZE + o_dim, b_pooled, mask=in_head)


def chunk_queries(query: torch.Tensor, blocks: PromptBlocks) -> torch.Tensor:
    """Equal to `reference.chunk_queries`; arguments as there, query blocks a power of two."""
    heads, head_size = query.shape[1:]
    pooled = torch.empty(heads, blocks.blocks, head_size, dtype=torch.float32, device=query.device)
    assert query.stride(2) == 1
    pooled_queries_kernel[(blocks.blocks, heads)](
        query,
        pooled,
        blocks.first_token,
        blocks.first_query,
        blocks.last_query,
        blocks.blocks,
        query.stride(0),
        query.stride(1),
        HEAD_SIZE=head_size,
        HEAD_TILE=product_tile(head_size),
        BLOCK=blocks.query_block_tokens,
        num_warps=8,
    )
    return pooled


def pooled_queries(query: torch.Tensor, query_block_tokens: int) -> torch.Tensor:
    """Equal to `reference.pooled_queries`; arguments as there, `query_block_tokens` a power of two."""
    tokens = query.shape[0]
    return chunk_queries(query, one_chunk(tokens, tokens, query_block_tokens, query.device))


# `last_key_block` follows `first_key_block` in one tensor, so its first address has any alignment.
@triton.jit(
    do_not_specialize=["chunks", "query_block_count", "key_blocks", "pages"],
    do_not_specialize_on_alignment=["first_key_block_pointer", "last_key_block_pointer"],
)
def page_scores_kernel(
    query_pointer,
    representation_pointer,
    first_key_block_pointer,
    last_key_block_pointer,
    score_pointer,
    chunk_start_pointer,
    chunks,
    query_block_count,
    key_blocks,
    pages,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK_TILE: tl.constexpr,
    PAGE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_head = tl.program_id(1)
    # Tiles of all chunks lie side by side; a tile holds query blocks of one chunk.
    i_chunk = tl.program_id(2) % chunks
    first_block = tl.load(chunk_start_pointer + i_chunk) + tl.program_id(2) // chunks * BLOCK_TILE
    end_block = tl.load(chunk_start_pointer + i_chunk + 1)
    o_page = tl.program_id(0) * PAGE_TILE + tl.arange(0, PAGE_TILE)
    o_block = first_block + tl.arange(0, BLOCK_TILE)
    b_first = tl.load(first_key_block_pointer + i_chunk * pages + o_page, mask=o_page < pages, other=1)
    b_last = tl.load(last_key_block_pointer + i_chunk * pages + o_page, mask=o_page < pages, other=0)
    p_query = query_pointer + (i_head * query_block_count + o_block)[:, None] * HEAD_SIZE
    p_representation = representation_pointer
    p_representation += ((i_head // GROUP) * chunks + i_chunk).to(tl.int64) * key_blocks * HEAD_SIZE
    b_best = tl.full([BLOCK_TILE, PAGE_TILE], float("-inf"), tl.float32)
    # Tiles past a chunk's context or its query blocks have nothing to do; pages past it read the first key block.
    steps = tl.where(first_block < end_block, tl.max(b_last - b_first) + 1, 0)
    for step in range(steps):
        o_key_block = tl.minimum(b_first + step, b_last)
        p_key_block = p_representation + o_key_block[:, None] * HEAD_SIZE
        b_score = tl.zeros([BLOCK_TILE, PAGE_TILE], tl.float32)
        for first_dim in range(0, HEAD_SIZE, DIM_TILE):
            o_dim = first_dim + tl.arange(0, DIM_TILE)[None, :]
            b_query = tl.load(p_query + o_dim, mask=(o_block < end_block)[:, None] & (o_dim < HEAD_SIZE), other=0.0)
            b_key_block = tl.load(p_key_block + o_dim, mask=o_dim < HEAD_SIZE, other=0.0)
            b_score = tl.dot(b_query, tl.trans(b_key_block), b_score, input_precision=PRECISION)
        b_best = tl.maximum(b_best, b_score)
    p_score = score_pointer + (i_head * query_block_count + o_block).to(tl.int64)[:, None] * pages + o_page[None, :]
    tl.store(p_score, b_best, mask=(o_block < end_block)[:, None] & (o_page < pages)[None, :])


def chunk_scores(
    queries: torch.Tensor,
    representation: torch.Tensor,
    first_key_block: torch.Tensor,
    last_key_block: torch.Tensor,
    blocks: PromptBlocks,
) -> torch.Tensor:
    """Equal to `reference.chunk_scores` in each context but for rounding; arguments as there, all contiguous."""
    heads, query_block_count, head_size = queries.shape
    key_heads, chunks, key_blocks, _ = representation.shape
    pages = first_key_block.shape[1]
    scores = torch.empty(heads, query_block_count, pages, dtype=torch.float32, device=queries.device)
    tiles = triton.cdiv(blocks.most_blocks, BLOCK_TILE)
    page_scores_kernel[(triton.cdiv(pages, PAGE_TILE), heads, chunks * tiles)](
        queries,
        representation,
        first_key_block,
        last_key_block,
        scores,
        blocks.chunk_start,
        chunks,
        query_block_count,
        key_blocks,
        pages,
        GROUP=heads // key_heads,
        HEAD_SIZE=head_size,
        DIM_TILE=DIM_TILE,
        BLOCK_TILE=BLOCK_TILE,
        PAGE_TILE=PAGE_TILE,
        PRECISION=float32_precision(),
        num_warps=4,
    )
    return scores


def page_scores(
    queries: torch.Tensor, representation: torch.Tensor, first_key_block: torch.Tensor, last_key_block: torch.Tensor
) -> torch.Tensor:
    """Equal to `reference.page_scores` but for rounding; arguments as there, all contiguous."""
    blocks = one_chunk(queries.shape[1], queries.shape[1], 1, queries.device)
    edges = first_key_block.unsqueeze(0), last_key_block.unsqueeze(0)
    return chunk_scores(queries, representation.unsqueeze(1), *edges, blocks)


@triton.jit(do_not_specialize=["query_block_count", "pages", "sink_pages"])
def select_pages_kernel(
    score_pointer,
    band_page_pointer,
    last_page_pointer,
    budget_pages_pointer,
    kept_pointer,
    query_block_count,
    pages,
    sink_pages,
    covered_mass,
    COVERING: tl.constexpr,
    ROW_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    last = tl.load(last_page_pointer + i_row % query_block_count)
    band = tl.load(band_page_pointer + i_row % query_block_count)
    budget = tl.load(budget_pages_pointer + i_row % query_block_count)
    p_score = score_pointer + i_row * pages
    p_kept = kept_pointer + i_row * pages
    # Pages from `first` to `stop` compete for what the forced ones leave of the budget.
    first = tl.minimum(sink_pages, last + 1)
    stop = tl.maximum(tl.minimum(band, last + 1), first)
    free = tl.maximum(budget - (first + last + 1 - stop), 0)

    least, above = row_threshold(p_score, first, stop, free, False, ROW_TILE, TILE)
    # Of the pages whose score equals the threshold, the lower ones win.
    equal_left = free - above
    if COVERING:
        least_mass, mass_above = row_threshold(p_score, 0, last + 1, covered_mass, True, ROW_TILE, TILE)
        covering_left = equal_needed(least_mass, mass_above, covered_mass, pages)
    for start in range(0, pages, TILE):
        o_page = start + tl.arange(0, TILE)
        competes = (o_page >= first) & (o_page < stop)
        b_key = ordered_scores(p_score, o_page, o_page <= last)
        b_equal = ((b_key == least) & competes).to(tl.int32)
        b_chosen, equal_left = chosen_entries(b_key, b_equal, least, equal_left)
        if COVERING:
            b_equal = ((b_key == least_mass) & (o_page <= last)).to(tl.int32)
            b_covering, covering_left = chosen_entries(b_key, b_equal, least_mass, covering_left)
            b_chosen &= b_covering
        b_forced = ((o_page < sink_pages) | (o_page >= band)) & (o_page <= last)
        tl.store(p_kept + o_page, ((b_chosen & competes) | b_forced).to(tl.uint8), mask=o_page < pages)


def select_pages(
    scores: torch.Tensor,
    sink_pages: int,
    band_page: torch.Tensor,
    last_page: torch.Tensor,
    budget_pages: torch.Tensor,
    covered_mass: float | None = None,
) -> torch.Tensor:
    """Equal to `reference.select_pages` for the same scores, up to float32 rounding of sums; all contiguous."""
    heads, query_block_count, pages = scores.shape
    kept = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    entries, num_warps = threshold_tile(pages if covered_mass is None else min(pages, MOST_COVERED_PAGES))
    select_pages_kernel[(heads * query_block_count,)](
        scores,
        band_page,
        last_page,
        budget_pages,
        kept.view(torch.uint8),
        query_block_count,
        pages,
        sink_pages,
        0.0 if covered_mass is None else covered_mass,
        COVERING=covered_mass is not None,
        ROW_TILE=entries,
        TILE=SELECT_TILE,
        num_warps=num_warps,
    )
    return kept
