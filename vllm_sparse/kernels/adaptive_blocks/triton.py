"""DHSA's adaptive key blocks in Triton: one pass over the keys for the scores of all positions, one for the means."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.adaptive_blocks.reference import SHORTEST_TOKENS, WINDOW_TOKENS
from vllm_sparse.kernels.common.triton import READABLE, load_keys, product_tile
from vllm_sparse.keys import PlainKeys

SCORE_TILE, MEAN_TILE = 128, 32


# Lengths change with every prompt chunk; specialising on them would compile in the middle of serving.
@triton.jit(do_not_specialize=["context"], do_not_specialize_on_alignment=["block_table_pointer"])
def boundary_scores_kernel(
    cache_pointer,
    block_table_pointer,
    score_pointer,
    context,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    DIM_TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SHORTEST: tl.constexpr,
    TILE: tl.constexpr,
):
    # Row r compares the keys r to r + WINDOW - 1 of the tile with the WINDOW keys after them. The last 2 * WINDOW rows
    # are not stored, because the tile lacks keys for them.
    o_row = tl.arange(0, TILE)
    rows = TILE - 2 * WINDOW
    o_position = tl.program_id(0) * rows + o_row
    o_key = o_position - WINDOW
    live = (o_key >= 0) & (o_key < context)
    ahead = o_row[None, :] - o_row[:, None]
    # Sums of keys are products with matrices of zeros and ones, which tensor cores compute exactly.
    dtype = READABLE if cache_pointer.dtype.element_ty == tl.float8e4nv else cache_pointer.dtype.element_ty
    b_before = ((ahead >= 0) & (ahead < WINDOW)).to(dtype)
    b_after = ((ahead >= WINDOW) & (ahead < 2 * WINDOW)).to(dtype)
    b_product = tl.zeros([TILE], tl.float32)
    b_square_before = tl.zeros([TILE], tl.float32)
    b_square_after = tl.zeros([TILE], tl.float32)
    for i_kv_head in range(KV_HEADS):
        for first_dim in range(0, HEAD_SIZE, DIM_TILE):
            o_dim = first_dim + tl.arange(0, DIM_TILE)
            b_key = load_keys(
                cache_pointer,
                block_table_pointer,
                o_key,
                live,
                i_kv_head,
                o_dim,
                o_dim < HEAD_SIZE,
                cache_block_stride,
                cache_head_stride,
                cache_token_stride,
                CACHE_BLOCK,
            )
            b_sum_before = tl.dot(b_before, b_key, input_precision="ieee")
            b_sum_after = tl.dot(b_after, b_key, input_precision="ieee")
            b_product += tl.sum(b_sum_before * b_sum_after, axis=1)
            b_square_before += tl.sum(b_sum_before * b_sum_before, axis=1)
            b_square_after += tl.sum(b_sum_after * b_sum_after, axis=1)
    b_norms = tl.sqrt(b_square_before) * tl.sqrt(b_square_after)
    b_score = 1.0 - b_product / tl.maximum(b_norms, 1.1754944e-38)
    b_score = tl.where((o_position >= SHORTEST) & (o_position + WINDOW <= context), b_score, float("-inf"))
    tl.store(score_pointer + o_position, b_score, mask=(o_row < rows) & (o_position < context))


def boundary_scores(keys: PlainKeys) -> torch.Tensor:
    """Equal to `reference.boundary_scores` but for rounding; arguments as there."""
    cache, context = keys.kv_cache, keys.seq_len
    scores = torch.empty(context, dtype=torch.float32, device=cache.device)
    boundary_scores_kernel[(triton.cdiv(context, SCORE_TILE - 2 * WINDOW_TOKENS),)](
        cache,
        keys.block_table,
        scores,
        context,
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        CACHE_BLOCK=keys.block_size_tokens,
        KV_HEADS=keys.num_kv_heads,
        HEAD_SIZE=keys.head_size,
        DIM_TILE=min(product_tile(keys.head_size), 64),
        WINDOW=WINDOW_TOKENS,
        SHORTEST=SHORTEST_TOKENS,
        TILE=SCORE_TILE,
        num_warps=8,
    )
    return scores


@triton.jit(do_not_specialize=["key_blocks"], do_not_specialize_on_alignment=["block_table_pointer"])
def representations_kernel(
    cache_pointer,
    block_table_pointer,
    start_pointer,
    representation_pointer,
    key_blocks,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    i_key_block = tl.program_id(0)
    i_kv_head = tl.program_id(1)
    begin = tl.load(start_pointer + i_key_block).to(tl.int32)
    end = tl.load(start_pointer + i_key_block + 1).to(tl.int32)
    o_dim = tl.arange(0, HEAD_TILE)
    in_head = o_dim < HEAD_SIZE
    b_sum = tl.zeros([HEAD_TILE], tl.float32)
    for first in range(begin, end, TILE):
        o_key = first + tl.arange(0, TILE)
        b_key = load_keys(
            cache_pointer,
            block_table_pointer,
            o_key,
            o_key < end,
            i_kv_head,
            o_dim,
            in_head,
            cache_block_stride,
            cache_head_stride,
            cache_token_stride,
            CACHE_BLOCK,
        )
        b_sum += tl.sum(b_key.to(tl.float32), axis=0)
    length = tl.maximum(end - begin, 1).to(tl.float32)
    o_out = (i_kv_head.to(tl.int64) * key_blocks + i_key_block) * HEAD_SIZE + o_dim
    tl.store(representation_pointer + o_out, b_sum / tl.sqrt(length), mask=in_head)


def representations(keys: PlainKeys, start: torch.Tensor) -> torch.Tensor:
    """Equal to `reference.representations` but for rounding; arguments as there."""
    cache = keys.kv_cache
    key_blocks = start.shape[0] - 1
    shape = (keys.num_kv_heads, key_blocks, keys.head_size)
    representation = torch.empty(shape, dtype=torch.float32, device=cache.device)
    representations_kernel[(key_blocks, keys.num_kv_heads)](
        cache,
        keys.block_table,
        start,
        representation,
        key_blocks,
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        CACHE_BLOCK=keys.block_size_tokens,
        HEAD_SIZE=keys.head_size,
        HEAD_TILE=product_tile(keys.head_size),
        TILE=MEAN_TILE,
        num_warps=4,
    )
    return representation
