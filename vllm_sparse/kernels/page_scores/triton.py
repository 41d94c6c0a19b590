"""Scores of the pages of all rows of a decode step in Triton: one pass over the summaries, then one over the logits.

The pages of a row are divided among programs whose number does not depend on the row's context, which only the device
knows. Each program scores tiles of pages up to the context's end. There are two launches because the normaliser of a
head's softmax is known only when all programs of the first are done.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.common.triton import product_tile
from vllm_sparse.kernels.page_summaries import SummaryKind
from vllm_sparse.step.rows import DecodeRows, RowScores, padded_rows

LOG2_E = tl.constexpr(1.4426950408889634)
# Numbers of the summaries in one tile: 16 KiB in bfloat16, for which three or four programs on a multiprocessor have
# registers.
TILE_NUMBERS = 8192
# Programs of a launch: the number of tiles of one row at 128K tokens, 8 KV heads and pages of 16 tokens.
PROGRAMS = 1024
MERGE_TILE = 512


# Steps outside of graphs have room for their own rows only, and these may begin at any row of vLLM's block table.
# Specialising on either would compile in the middle of serving.
@triton.jit(do_not_specialize=["capacity"], do_not_specialize_on_alignment=["block_table_pointer"])
def page_logits_kernel(
    query_pointer,
    summary_pointer,
    block_table_pointer,
    context_pointer,
    start_pointer,
    logit_pointer,
    largest_pointer,
    total_pointer,
    first_page_pointer,
    scale,
    capacity,
    query_row_stride,
    query_head_stride,
    table_row_stride,
    PAGE: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    BOUNDS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Logits of a share of a row's pages, and their largest and the sum of their exponentials."""
    i_share = tl.program_id(0)
    shares = tl.num_programs(0)
    i_kv_head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    i_row = tl.program_id(2).to(tl.int64)
    pages = tl.cdiv(tl.load(context_pointer + i_row), PAGE)
    o_head = tl.arange(0, GROUP_TILE)
    o_dim = tl.arange(0, HEAD_TILE)
    in_group = o_head < GROUP
    in_head = o_dim < HEAD_SIZE
    p_query = query_pointer + i_row * query_row_stride + (i_kv_head * GROUP + o_head)[None, :] * query_head_stride
    b_query = tl.load(p_query + o_dim[:, None], mask=in_head[:, None] & in_group[None, :], other=0.0)
    first_page = tl.load(start_pointer + i_row) // PAGE + i_row
    if (i_share == 0) & (i_kv_head == 0):
        tl.store(first_page_pointer + i_row, first_page)
    p_row = logit_pointer + (i_kv_head.to(tl.int64) * capacity + first_page) * GROUP
    b_largest = tl.full([GROUP_TILE], float("-inf"), tl.float32)
    b_total = tl.zeros([GROUP_TILE], tl.float32)
    for first in range(i_share * TILE, pages, shares * TILE):
        o_page = first + tl.arange(0, TILE)
        live = o_page < pages
        p_block = block_table_pointer + i_row * table_row_stride + o_page // PAGES_PER_BLOCK
        b_block = tl.load(p_block, mask=live, other=0)
        b_summary_index = (b_block * kv_heads + i_kv_head) * PAGES_PER_BLOCK + o_page % PAGES_PER_BLOCK
        p_summary = (
            summary_pointer
            + b_summary_index.to(tl.int64)[:, None] * ((2 if BOUNDS else 1) * HEAD_SIZE)
            + o_dim[None, :]
        )
        b_summary = tl.load(p_summary, mask=live[:, None] & in_head[None, :], other=0.0).to(b_query.dtype)
        if BOUNDS:
            b_most = tl.load(p_summary + HEAD_SIZE, mask=live[:, None] & in_head[None, :], other=0.0).to(b_query.dtype)
            # A negative number of the query has its largest product with the lower bound.
            b_logit = tl.dot(b_summary, tl.minimum(b_query, 0.0).to(b_query.dtype), input_precision="ieee")
            b_logit = tl.dot(b_most, tl.maximum(b_query, 0.0).to(b_query.dtype), b_logit, input_precision="ieee")
        else:
            b_logit = tl.dot(b_summary, b_query, input_precision="ieee")
        b_logit = b_logit * scale
        p_logit = p_row + o_page[:, None] * GROUP
        tl.store(p_logit + o_head[None, :], b_logit, mask=live[:, None] & in_group[None, :])
        b_logit = tl.where(live[:, None], b_logit, float("-inf"))
        b_before = b_largest
        b_largest = tl.maximum(b_before, tl.max(b_logit, axis=0))
        b_exponential = tl.exp2((b_logit - b_largest[None, :]) * LOG2_E)
        b_total = b_total * tl.exp2((b_before - b_largest) * LOG2_E) + tl.sum(b_exponential, axis=0)
    o_share = ((i_row * kv_heads + i_kv_head) * shares + i_share) * GROUP + o_head
    tl.store(largest_pointer + o_share, b_largest, mask=in_group)
    tl.store(total_pointer + o_share, b_total, mask=in_group)


@triton.jit(do_not_specialize=["capacity", "shares"])
def merge_kernel(
    logit_pointer,
    largest_pointer,
    total_pointer,
    context_pointer,
    start_pointer,
    score_pointer,
    capacity,
    shares,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    SHARE_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Logarithm of the largest probability that a head of the group gives each page."""
    i_kv_head = tl.program_id(1)
    i_row = tl.program_id(2).to(tl.int64)
    pages = tl.cdiv(tl.load(context_pointer + i_row), PAGE)
    i_list = i_row * tl.num_programs(1) + i_kv_head
    o_head = tl.arange(0, GROUP_TILE)
    in_group = o_head < GROUP
    if tl.program_id(0) * TILE < pages:
        o_share = tl.arange(0, SHARE_TILE)
        existing = (o_share < shares)[:, None] & in_group[None, :]
        o_entry = (i_list * shares + o_share)[:, None] * GROUP + o_head[None, :]
        b_largest = tl.load(largest_pointer + o_entry, mask=existing, other=float("-inf"))
        b_total = tl.load(total_pointer + o_entry, mask=existing, other=0.0)
        b_most = tl.where(in_group, tl.max(b_largest, axis=0), 0.0)
        b_sum = tl.sum(b_total * tl.exp2((b_largest - b_most[None, :]) * LOG2_E), axis=0)
        b_log_sum = b_most + tl.log2(tl.where(in_group, b_sum, 1.0)) / LOG2_E
        first_page = tl.load(start_pointer + i_row) // PAGE + i_row
        first_score = i_kv_head.to(tl.int64) * capacity + first_page
        for first in range(tl.program_id(0) * TILE, pages, tl.num_programs(0) * TILE):
            o_page = first + tl.arange(0, TILE)
            live = o_page < pages
            p_logit = logit_pointer + (first_score + o_page)[:, None] * GROUP + o_head[None, :]
            b_logit = tl.load(p_logit, mask=live[:, None] & in_group[None, :], other=float("-inf"))
            b_score = tl.max(b_logit - b_log_sum[None, :], axis=1)
            tl.store(score_pointer + first_score + o_page, b_score, mask=live)


def page_tile(kind: SummaryKind, head_tile: int) -> int:
    """Pages that a program scores at once."""
    return max(TILE_NUMBERS // kind.width(head_tile), 16)


def page_scores(
    rows: DecodeRows, kind: SummaryKind, summaries: torch.Tensor, starts: torch.Tensor, capacity_tokens: int
) -> RowScores:
    """Score all pages of each row, as `reference.page_scores` does; for CUDA graphs.

    While it runs it takes four bytes per query head and page for which there is room.

    Args:
        rows: the rows; keys are not read.
        kind: what the summaries hold.
        summaries: ``[blocks, kv_heads, block_size / page_tokens, width]``, contiguous, up to date with the
            newest tokens (`vllm_sparse.kernels.page_summaries.triton.store_newest_summaries`).
        starts: int64 ``[rows]`` first token of each row's room for scores, ascending; the rooms of rows do not overlap.
        capacity_tokens: tokens for which there is room.

    Returns:
        Scores of pages; those of rows whose `seq_len` is 0 are not written.
    """
    count, query_heads, head_size = rows.query.shape
    kv_heads, pages_per_block = summaries.shape[1:3]
    group = query_heads // kv_heads
    group_tile = triton.next_power_of_2(group)
    head_tile = product_tile(head_size)
    tile = page_tile(kind, head_tile)
    # A row's last page may be short, so each row has room for one more than its tokens fill.
    capacity = capacity_tokens // kind.page_tokens + count
    most_shares = max(PROGRAMS // (padded_rows(count) * kv_heads), 1)
    shares = min(most_shares, triton.cdiv(capacity, tile))
    device = rows.query.device
    logits = torch.empty(kv_heads, capacity, group, dtype=torch.float32, device=device)
    largest, total = (torch.empty(count, kv_heads, shares, group, dtype=torch.float32, device=device) for _ in range(2))
    scores = torch.empty(kv_heads, capacity, dtype=torch.float32, device=device)
    first_pages = torch.empty(count, dtype=torch.int64, device=device)
    page_logits_kernel[(shares, kv_heads, count)](
        rows.query,
        summaries,
        rows.block_table,
        rows.seq_lens,
        starts,
        logits,
        largest,
        total,
        first_pages,
        rows.scale,
        capacity,
        rows.query.stride(0),
        rows.query.stride(1),
        rows.block_table.stride(0),
        PAGE=kind.page_tokens,
        PAGES_PER_BLOCK=pages_per_block,
        GROUP=group,
        GROUP_TILE=max(group_tile, 16),
        HEAD_SIZE=head_size,
        HEAD_TILE=head_tile,
        BOUNDS=kind.has_bounds,
        TILE=tile,
        num_warps=4,
    )
    merge_kernel[(min(shares, triton.cdiv(capacity, MERGE_TILE)), kv_heads, count)](
        logits,
        largest,
        total,
        rows.seq_lens,
        starts,
        scores,
        capacity,
        shares,
        PAGE=kind.page_tokens,
        GROUP=group,
        GROUP_TILE=group_tile,
        SHARE_TILE=triton.next_power_of_2(most_shares),
        TILE=MERGE_TILE,
        num_warps=4,
    )
    return RowScores(scores, first_pages, capacity, kind.page_tokens)
