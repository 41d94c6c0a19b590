"""Pieces of Triton kernels: keys of the paged cache, and scores in an order that integers have."""

from __future__ import annotations

import triton
import triton.language as tl

LEAST_KEY = tl.constexpr(-(1 << 31))


@triton.jit
def key_pointers(
    p_head, block_table_pointer, o_key, live, cache_block_stride, cache_token_stride, CACHE_BLOCK: tl.constexpr
):
    """Where the keys of one head at live positions begin, through the block table; `p_head` is the head's first."""
    physical = tl.load(block_table_pointer + o_key // CACHE_BLOCK, mask=live, other=0).to(tl.int64)
    return p_head + physical * cache_block_stride + (o_key % CACHE_BLOCK) * cache_token_stride


@triton.jit
def load_keys(
    cache_pointer,
    block_table_pointer,
    o_key,
    live,
    i_kv_head,
    o_dim,
    in_head,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
):
    """Keys of one head at live positions; 0 for others: ``[positions, dimensions]``."""
    p_head = cache_pointer + i_kv_head * cache_head_stride
    p_key = key_pointers(p_head, block_table_pointer, o_key, live, cache_block_stride, cache_token_stride, CACHE_BLOCK)
    return tl.load(p_key[:, None] + o_dim[None, :], mask=live[:, None] & in_head[None, :], other=0.0)


@triton.jit
def load_key_block(
    cache_pointer,
    block_table_pointer,
    first_key,
    context,
    i_kv_head,
    o_dim,
    in_head,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """As `load_keys` for a run of keys that begins at a multiple of its length; one look-up where a block holds it."""
    o_offset = tl.arange(0, TOKENS)
    live = first_key + o_offset < context
    if CACHE_BLOCK % TOKENS == 0:
        physical = tl.load(block_table_pointer + first_key // CACHE_BLOCK).to(tl.int64)
        p_key = cache_pointer + physical * cache_block_stride + i_kv_head * cache_head_stride
        p_key += first_key % CACHE_BLOCK * cache_token_stride
        p_key = p_key + o_offset[:, None] * cache_token_stride + o_dim[None, :]
        b_key = tl.load(p_key, mask=live[:, None] & in_head[None, :], other=0.0)
    else:
        b_key = load_keys(
            cache_pointer,
            block_table_pointer,
            first_key + o_offset,
            live,
            i_kv_head,
            o_dim,
            in_head,
            cache_block_stride,
            cache_head_stride,
            cache_token_stride,
            CACHE_BLOCK,
        )
    return b_key


@triton.jit
def ordered_scores(p_score, o_entry, competes):
    """Scores as integers of the same order; the least integer for entries that do not compete."""
    b_score = tl.load(p_score + o_entry, mask=competes, other=0.0)
    # Adding zero makes a negative zero positive: the two are equal and must tie.
    b_bits = (b_score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(competes, b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF), LEAST_KEY)
