"""Exact attention of query blocks to pages in Triton: one program a query block and head, two passes over the keys.

The first pass finds the normaliser of each query row, as FlashAttention does; the second sums the normalised weights of
each page over the rows. Doing the products twice costs less than storing them. Programs of the longest contexts start
first, because the others finish sooner.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.common.triton import load_key_block, product_tile
from vllm_sparse.keys import PlainKeys

KEY_TILE = 64
LOG2_E = 1.4426950408889634


@triton.jit
def _products(
    b_query,
    position,
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
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Products of the rows and a tile of keys; minus infinity for keys of a row's future, if `MASKED`."""
    b_key = load_key_block(
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
        CACHE_BLOCK,
        TILE,
    )
    b_product = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
    if MASKED:
        o_key = first_key + tl.arange(0, TILE)
        b_product = tl.where(o_key[None, :] <= position[:, None], b_product, float("-inf"))
    return b_product


# Lengths change with every prompt chunk, and a request's blocks begin at any row of vLLM's block table; specialising on
# them would compile in the middle of serving.
@triton.jit(
    do_not_specialize=["query_tokens", "context", "blocks", "pages"],
    do_not_specialize_on_alignment=["block_table_pointer"],
)
def block_mass_kernel(
    query_pointer,
    cache_pointer,
    block_table_pointer,
    mass_pointer,
    query_tokens,
    context,
    blocks,
    pages,
    scale_log2,
    query_row_stride,
    query_head_stride,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    i_block = blocks - 1 - tl.program_id(0)
    i_head = tl.program_id(1)
    i_kv_head = i_head // GROUP
    o_row = i_block * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    o_dim = tl.arange(0, HEAD_TILE)
    in_head = o_dim < HEAD_SIZE
    live_row = o_row < query_tokens
    p_query = query_pointer + o_row.to(tl.int64)[:, None] * query_row_stride + i_head * query_head_stride
    b_query = tl.load(p_query + o_dim[None, :], mask=live_row[:, None] & in_head[None, :], other=0.0)
    position = context - query_tokens + o_row
    first = context - query_tokens + i_block * QUERY_BLOCK
    stop = tl.minimum(first + QUERY_BLOCK, context)

    # Tiles before this one lie in the past of all rows; only those from it on are masked.
    diagonal = (first + 1) // TILE * TILE
    b_most = tl.full([QUERY_BLOCK], float("-inf"), tl.float32)
    b_sum = tl.zeros([QUERY_BLOCK], tl.float32)
    for masked in tl.static_range(2):
        for first_key in range(masked * diagonal, stop if masked else diagonal, TILE):
            b_product = _products(
                b_query,
                position,
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
                CACHE_BLOCK,
                TILE,
                masked,
            )
            # Finite after the first tile, which holds key 0.
            b_more = tl.maximum(b_most, tl.max(b_product, axis=1) * scale_log2)
            b_sum = b_sum * tl.exp2(b_most - b_more)
            b_sum += tl.sum(tl.exp2(b_product * scale_log2 - b_more[:, None]), axis=1)
            b_most = b_more
    # Rows that do not exist weigh nothing.
    b_normaliser = tl.where(live_row, b_most + tl.log2(b_sum), float("inf"))

    p_mass = mass_pointer + (i_head * blocks + i_block).to(tl.int64) * pages
    for masked in tl.static_range(2):
        for first_key in range(masked * diagonal, stop if masked else diagonal, TILE):
            b_product = _products(
                b_query,
                position,
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
                CACHE_BLOCK,
                TILE,
                masked,
            )
            b_weight = tl.sum(tl.exp2(b_product * scale_log2 - b_normaliser[:, None]), axis=0)
            o_page = first_key // PAGE + tl.arange(0, TILE // PAGE)
            b_mass = tl.sum(tl.reshape(b_weight, [TILE // PAGE, PAGE]), axis=1)
            tl.store(p_mass + o_page, b_mass, mask=o_page < pages)


def block_mass(
    query: torch.Tensor, keys: PlainKeys, scale: float, query_block_tokens: int, page_tokens: int
) -> torch.Tensor:
    """Equal to `reference.block_mass` but for rounding; arguments as there, float32."""
    query_tokens, heads, head_size = query.shape
    blocks = triton.cdiv(query_tokens, query_block_tokens)
    # Pages longer than a tile are summed from its pages.
    page = min(page_tokens, KEY_TILE)
    pages = triton.cdiv(keys.seq_len, page)
    cache = keys.kv_cache
    query = query if query.stride(2) == 1 else query.contiguous()
    # Pages of a query block's future stay 0.
    mass = torch.zeros(heads, blocks, pages, dtype=torch.float32, device=query.device)
    block_mass_kernel[(blocks, heads)](
        query,
        cache,
        keys.block_table,
        mass,
        query_tokens,
        keys.seq_len,
        blocks,
        pages,
        scale * LOG2_E,
        query.stride(0),
        query.stride(1),
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        CACHE_BLOCK=keys.block_size_tokens,
        GROUP=heads // keys.num_kv_heads,
        HEAD_SIZE=head_size,
        HEAD_TILE=product_tile(head_size),
        QUERY_BLOCK=query_block_tokens,
        PAGE=page,
        TILE=KEY_TILE,
        num_warps=8,
        num_stages=3,
    )
    if page == page_tokens:
        return mass
    longer = page_tokens // page
    return torch.nn.functional.pad(mass, (0, -pages % longer)).view(heads, blocks, -1, longer).sum(3)
