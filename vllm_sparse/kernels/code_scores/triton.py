"""Scores of all cached tokens of a step's decode rows by their keys' codes, in Triton: one pass over the codes.

For heads and devices that the CUDA kernels of `top_coded_tokens` do not hold.

A key of 128 numbers takes 256 bytes in the cache and 32 in codes. Of a channel's number least + step * code the query's
product is query * least, the same for all tokens of a page, plus (query * step) * code: so steps go into the query, and
the tensor cores multiply small integers. What follows is as with exact keys: `token_scores.triton.merge_kernel` turns
products into scores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.common.triton import load_key_block, product_tile
from vllm_sparse.kernels.page_summaries import SummaryKind
from vllm_sparse.kernels.page_summaries.reference import LARGEST_CODE as MOST
from vllm_sparse.kernels.token_scores.triton import SCORE_TILE, merge_kernel
from vllm_sparse.step.rows import DecodeRows, RowScores, padded_rows

LARGEST_CODE = tl.constexpr(MOST)
# Eight programs per multiprocessor of an H200: each has the loads of one page in flight, which are few bytes.
PROGRAMS = 8 * 132


# Steps outside of graphs have room for their own rows only, and these may begin at any row of vLLM's block table.
# Specialising on either would compile in the middle of serving.
@triton.jit(do_not_specialize=["capacity"], do_not_specialize_on_alignment=["block_table_pointer"])
def code_products_kernel(
    query_pointer,
    cache_pointer,
    summary_pointer,
    block_table_pointer,
    context_pointer,
    start_pointer,
    product_pointer,
    partial_pointer,
    capacity,
    scale,
    query_row_stride,
    query_head_stride,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    table_row_stride,
    kv_heads,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    QUARTER_TILE: tl.constexpr,
    PAGE: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Products of a share of a row's pages, and each head's largest and the sum of exponentials less it."""
    quarter_size: tl.constexpr = HEAD_SIZE // 4
    i_row = tl.program_id(0) // kv_heads
    i_head = tl.program_id(0) % kv_heads
    i_split = tl.program_id(1)
    context = tl.load(context_pointer + i_row)
    if context == 0:
        return
    o_member = tl.arange(0, GROUP_TILE)
    in_group = o_member < GROUP
    o_quarter = tl.arange(0, QUARTER_TILE)
    in_quarter = o_quarter < quarter_size
    o_token = tl.arange(0, PAGE)
    o_query_head = i_head * GROUP + o_member
    p_query = query_pointer + i_row.to(tl.int64) * query_row_stride + o_query_head[:, None] * query_head_stride
    in_query = in_group[:, None] & in_quarter[None, :]
    p_product = product_pointer + o_query_head.to(tl.int64) * capacity + tl.load(start_pointer + i_row)
    p_table = block_table_pointer + i_row.to(tl.int64) * table_row_stride

    pages = tl.cdiv(context, PAGE)
    pages_of_split = tl.cdiv(pages, SPLITS)
    first_page = i_split * pages_of_split
    b_most = tl.full([GROUP_TILE], float("-inf"), tl.float32)
    b_sum = tl.zeros([GROUP_TILE], tl.float32)
    for i_page in range(first_page, tl.minimum(first_page + pages_of_split, pages)):
        block = tl.load(p_table + i_page // PAGES_PER_BLOCK).to(tl.int64)
        p_page = summary_pointer + ((block * kv_heads + i_head) * PAGES_PER_BLOCK + i_page % PAGES_PER_BLOCK) * WIDTH
        p_number = p_page.to(tl.pointer_type(tl.float16))
        live = i_page * PAGE + o_token < context
        # A last page counts by its keys until it is full.
        is_full = (i_page + 1) * PAGE <= context
        p_code = p_page + 4 * HEAD_SIZE + o_token[:, None] * quarter_size + o_quarter[None, :]
        b_packed = tl.load(p_code, mask=live[:, None] & in_quarter[None, :], other=0)
        b_product = tl.zeros([GROUP_TILE, PAGE], tl.float32)
        b_least_product = tl.zeros([GROUP_TILE], tl.float32)
        for quarter in tl.static_range(4):
            o_dim = quarter * quarter_size + o_quarter
            # The queries of a group come from the L1 cache in every page but the first.
            b_raw_query = tl.load(p_query + o_dim[None, :], mask=in_query, other=0.0)
            b_query = b_raw_query.to(tl.float32)
            if is_full:
                b_least = tl.load(p_number + o_dim, mask=in_quarter, other=0.0).to(tl.float32)
                b_step = tl.load(p_number + HEAD_SIZE + o_dim, mask=in_quarter, other=0.0).to(tl.float32)
                b_least_product += tl.sum(b_query * b_least[None, :], axis=1)
                b_code = ((b_packed >> (2 * quarter)) & LARGEST_CODE).to(tl.float32)
                b_product += tl.dot(b_query * b_step[None, :], tl.trans(b_code), input_precision="tf32")
            else:
                b_key = load_key_block(
                    cache_pointer,
                    p_table,
                    i_page * PAGE,
                    context,
                    i_head,
                    o_dim,
                    in_quarter,
                    cache_block_stride,
                    cache_head_stride,
                    cache_token_stride,
                    PAGE * PAGES_PER_BLOCK,
                    PAGE,
                )
                b_product += tl.dot(b_raw_query, tl.trans(b_key), input_precision="ieee")
        b_product = (b_product + b_least_product[:, None]) * scale
        o_key = i_page * PAGE + o_token
        tl.store(p_product[:, None] + o_key[None, :], b_product, mask=in_group[:, None] & live[None, :])
        b_product = tl.where(live[None, :], b_product, float("-inf"))
        b_more = tl.maximum(b_most, tl.max(b_product, axis=1))
        b_sum = b_sum * tl.exp(b_most - b_more) + tl.sum(tl.exp(b_product - b_more[:, None]), axis=1)
        b_most = b_more
    # A split without pages stores minus infinity and the sum 0, which change nothing in the merge.
    p_partial = partial_pointer + ((i_row * kv_heads * GROUP + o_query_head) * SPLITS + i_split) * 2
    tl.store(p_partial, b_most, mask=in_group)
    tl.store(p_partial + 1, b_sum, mask=in_group)


def code_scores_of_rows(
    rows: DecodeRows, kind: SummaryKind, summaries: torch.Tensor, starts: torch.Tensor, capacity_tokens: int
) -> RowScores:
    """Scores of each row's cached tokens, equal to those of `reference.code_scores` up to rounding.

    Args:
        rows: the rows; those with a context of 0 get no scores. Keys are read of a last page that is not full.
        kind: with codes; its pages divide the cache's blocks.
        summaries: uint8 ``[blocks, kv_heads, block_size / page_tokens, width]``, contiguous.
        starts: int64 ``[rows]`` index of each row's first score; the scores of rows with a context do not overlap.
        capacity_tokens: tokens for which there is room.

    Returns:
        Scores of single tokens, in memory of ``query_heads * capacity_tokens`` float32 numbers.
    """
    row_count, query_heads, head_size = rows.query.shape
    _, kv_heads, block_size, _ = rows.kv_cache.shape
    device = rows.query.device
    group = query_heads // kv_heads
    assert rows.query.stride(2) == 1
    assert summaries.is_contiguous()
    # A power of two, so that most batch sizes share a compiled kernel.
    splits = triton.next_power_of_2(max(PROGRAMS // (padded_rows(row_count) * kv_heads), 1))
    products = torch.empty(query_heads, capacity_tokens, dtype=torch.float32, device=device)
    partials = torch.empty(row_count, query_heads, splits, 2, dtype=torch.float32, device=device)
    grid = (row_count * kv_heads, splits)
    code_products_kernel[grid](
        rows.query,
        rows.kv_cache,
        summaries,
        rows.block_table,
        rows.seq_lens,
        starts,
        products,
        partials,
        capacity_tokens,
        rows.scale,
        rows.query.stride(0),
        rows.query.stride(1),
        rows.kv_cache.stride(0),
        rows.kv_cache.stride(1),
        rows.kv_cache.stride(2),
        rows.block_table.stride(0),
        kv_heads,
        SPLITS=splits,
        GROUP=group,
        GROUP_TILE=product_tile(group),
        HEAD_SIZE=head_size,
        QUARTER_TILE=product_tile(head_size // 4),
        PAGE=kind.page_tokens,
        PAGES_PER_BLOCK=block_size // kind.page_tokens,
        WIDTH=kind.width(head_size),
        num_warps=4,
        num_stages=3,
    )
    merge_kernel[grid](
        rows.seq_lens,
        starts,
        products,
        partials,
        capacity_tokens,
        kv_heads,
        SPLITS=splits,
        GROUP=group,
        SUM=False,
        TILE=SCORE_TILE,
        num_warps=4,
    )
    return RowScores(products, starts, group * capacity_tokens, 1)
