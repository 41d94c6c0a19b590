"""Scores of all cached tokens of a step's decode rows, in Triton: one pass over the keys, one over their products.

Merging heads by probability needs the normaliser of each head before any token can be scored. So the first kernel
stores the products, and the second turns them into scores in place. With four query heads per KV head the products take
16 bytes per token and KV head, where the key has 256. Grids depend on shapes only; contexts are read on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.common.triton import load_key_block, product_tile
from vllm_sparse.step.rows import DecodeRows, RowScores, padded_rows

KEY_TILE = 64
SCORE_TILE = 2048
# Four programs per multiprocessor of an H200 keep enough loads in flight.
PROGRAMS = 4 * 132


# Steps outside of graphs have room for their own rows only, and these may begin at any row of vLLM's block table.
# Specialising on either would compile in the middle of serving.
@triton.jit(do_not_specialize=["capacity"], do_not_specialize_on_alignment=["block_table_pointer"])
def products_kernel(
    query_pointer,
    cache_pointer,
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
    HEAD_TILE: tl.constexpr,
    CACHE_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    i_row = tl.program_id(0) // kv_heads
    i_head = tl.program_id(0) % kv_heads
    i_split = tl.program_id(1)
    context = tl.load(context_pointer + i_row)
    if context == 0:
        return
    o_member = tl.arange(0, GROUP_TILE)
    o_dim = tl.arange(0, HEAD_TILE)
    in_group, in_head = o_member < GROUP, o_dim < HEAD_SIZE
    o_query_head = i_head * GROUP + o_member
    p_query = query_pointer + i_row.to(tl.int64) * query_row_stride + o_query_head[:, None] * query_head_stride
    b_query = tl.load(p_query + o_dim[None, :], mask=in_group[:, None] & in_head[None, :], other=0.0)
    p_product = product_pointer + o_query_head.to(tl.int64) * capacity + tl.load(start_pointer + i_row)

    tiles = tl.cdiv(context, TILE)
    tiles_of_split = tl.cdiv(tiles, SPLITS)
    first_tile = i_split * tiles_of_split
    b_most = tl.full([GROUP_TILE], float("-inf"), tl.float32)
    b_sum = tl.zeros([GROUP_TILE], tl.float32)
    for i_tile in range(first_tile, tl.minimum(first_tile + tiles_of_split, tiles)):
        first_key = i_tile * TILE
        b_key = load_key_block(
            cache_pointer,
            block_table_pointer + i_row.to(tl.int64) * table_row_stride,
            first_key,
            context,
            i_head,
            o_dim,
            in_head,
            cache_block_stride,
            cache_head_stride,
            cache_token_stride,
            CACHE_BLOCK,
            TILE,
        )
        o_key = first_key + tl.arange(0, TILE)
        live = o_key < context
        b_product = tl.dot(b_query, tl.trans(b_key), input_precision="ieee") * scale
        tl.store(p_product[:, None] + o_key[None, :], b_product, mask=in_group[:, None] & live[None, :])
        b_product = tl.where(live[None, :], b_product, float("-inf"))
        b_more = tl.maximum(b_most, tl.max(b_product, axis=1))
        b_sum = b_sum * tl.exp(b_most - b_more) + tl.sum(tl.exp(b_product - b_more[:, None]), axis=1)
        b_most = b_more
    # A split without keys stores minus infinity and the sum 0, which change nothing in the merge.
    p_partial = partial_pointer + ((i_row * kv_heads * GROUP + o_query_head) * SPLITS + i_split) * 2
    tl.store(p_partial, b_most, mask=in_group)
    tl.store(p_partial + 1, b_sum, mask=in_group)


@triton.jit(do_not_specialize=["capacity"])
def merge_kernel(
    context_pointer,
    start_pointer,
    product_pointer,
    partial_pointer,
    capacity,
    kv_heads,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    SUM: tl.constexpr,
    TILE: tl.constexpr,
):
    i_row = tl.program_id(0) // kv_heads
    i_head = tl.program_id(0) % kv_heads
    context = tl.load(context_pointer + i_row)
    o_split = tl.arange(0, SPLITS)
    start = tl.load(start_pointer + i_row)
    for first in range(tl.program_id(1) * TILE, context, tl.num_programs(1) * TILE):
        o_key = first + tl.arange(0, TILE)
        live = o_key < context
        b_score = tl.full([TILE], float("-inf"), tl.float32)
        for member in tl.static_range(GROUP):
            i_query_head = i_head * GROUP + member
            p_partial = partial_pointer + ((i_row * kv_heads * GROUP + i_query_head) * SPLITS + o_split) * 2
            b_most = tl.load(p_partial)
            most = tl.max(b_most, axis=0)
            total = tl.sum(tl.load(p_partial + 1) * tl.exp(b_most - most), axis=0)
            p_product = product_pointer + i_query_head.to(tl.int64) * capacity + start
            b_product = tl.load(p_product + o_key, mask=live, other=0.0)
            b_logarithm = (b_product - most) - tl.log(total)
            b_larger = tl.maximum(b_score, b_logarithm)
            if SUM:
                b_larger += tl.log(1.0 + tl.exp(tl.minimum(b_score, b_logarithm) - b_larger))
            b_score = b_larger
        p_score = product_pointer + (i_head * GROUP).to(tl.int64) * capacity + start
        tl.store(p_score + o_key, b_score, mask=live)


def token_scores_of_rows(
    rows: DecodeRows,
    starts: torch.Tensor,
    capacity_tokens: int,
    sum_heads: bool = False,
    padded_lists: int | None = None,
) -> RowScores:
    """Scores of each row's cached tokens, equal to those of `reference.token_scores` with merged heads.

    Args:
        rows: the rows; those with a context of 0 get no scores.
        starts: int64 ``[rows]`` index of each row's first score; the scores of rows with a context do not overlap.
        capacity_tokens: tokens for which there is room.
        sum_heads: merge the query heads of a KV head by the sum of their probabilities instead of the maximum.
        padded_lists: rows times KV heads of the smallest graph that holds the step; None: as these rows are padded.

    Returns:
        Scores of single tokens, in memory of ``query_heads * capacity_tokens`` float32 numbers.
    """
    row_count, query_heads, head_size = rows.query.shape
    _, kv_heads, block_size, _ = rows.kv_cache.shape
    device = rows.query.device
    group = query_heads // kv_heads
    # A power of two, so that most batch sizes share a compiled kernel.
    padded_lists = padded_lists or padded_rows(row_count) * kv_heads
    splits = triton.next_power_of_2(max(PROGRAMS // padded_lists, 1))
    products = torch.empty(query_heads, capacity_tokens, dtype=torch.float32, device=device)
    partials = torch.empty(row_count, query_heads, splits, 2, dtype=torch.float32, device=device)
    assert rows.query.stride(2) == 1
    grid = (row_count * kv_heads, splits)
    products_kernel[grid](
        rows.query,
        rows.kv_cache,
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
        HEAD_TILE=product_tile(head_size),
        CACHE_BLOCK=block_size,
        TILE=KEY_TILE,
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
        SUM=sum_heads,
        TILE=SCORE_TILE,
        num_warps=4,
    )
    return RowScores(products, starts, group * capacity_tokens, 1)
