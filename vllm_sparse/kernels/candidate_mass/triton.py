"""Attention of sampled queries to listed pages in Triton: one program a query block and the query heads of a KV head.

Two passes over the listed keys, as `kernels.block_mass` does over all: the first finds the normaliser of each row, the
second sums the normalised weights of each page. A row is a sampled query of a head. Programs of the longest contexts
start first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.candidate_mass.reference import NOT_LISTED, SAMPLED_QUERIES
from vllm_sparse.kernels.common.triton import load_keys, product_tile
from vllm_sparse.keys import PlainKeys
from vllm_sparse.pages import PageList

KEY_TILE = 64
# More query heads of a KV head are split over programs: their rows would not fit in registers.
MOST_HEADS = 8
LOG2_E = 1.4426950408889634


@triton.jit
def _listed_products(
    b_query,
    row_position,
    cache_pointer,
    block_table_pointer,
    p_list,
    first_slot,
    listed_pages,
    context,
    i_kv_head,
    o_dim,
    in_head,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Products of the rows and the keys of some listed pages; minus infinity for what a row may not read."""
    o_token = tl.arange(0, TILE)
    o_slot = first_slot + o_token // PAGE
    listed = o_slot < listed_pages
    o_key = tl.load(p_list + o_slot, mask=listed, other=0) * PAGE + o_token % PAGE
    live = listed & (o_key < context)
    b_key = load_keys(
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
        CACHE_BLOCK,
    )
    b_product = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
    return tl.where(live[None, :] & (o_key[None, :] <= row_position[:, None]), b_product, float("-inf"))


# Lengths change with every prompt chunk, and a request's blocks begin at any row of vLLM's block table; specialising on
# them would compile in the middle of serving.
@triton.jit(
    do_not_specialize=["query_tokens", "context", "blocks", "pages", "width"],
    do_not_specialize_on_alignment=["block_table_pointer"],
)
def candidate_mass_kernel(
    query_pointer,
    cache_pointer,
    block_table_pointer,
    list_pointer,
    kept_tokens_pointer,
    mass_pointer,
    query_tokens,
    context,
    blocks,
    pages,
    width,
    scale_log2,
    query_row_stride,
    query_head_stride,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS_PER_LIST: tl.constexpr,
    HEADS: tl.constexpr,
    SAMPLES: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    i_block = blocks - 1 - tl.program_id(0)
    i_kv_head = tl.program_id(1)
    o_row = tl.arange(0, HEADS * SAMPLES)
    o_in_group = tl.program_id(2) * HEADS + o_row // SAMPLES
    live_row = o_in_group < GROUP
    queries = tl.minimum(query_tokens - i_block * QUERY_BLOCK, QUERY_BLOCK)
    o_query = i_block * QUERY_BLOCK + (2 * (o_row % SAMPLES) + 1) * queries // (2 * SAMPLES)
    o_dim = tl.arange(0, HEAD_TILE)
    in_head = o_dim < HEAD_SIZE
    p_query = query_pointer + o_query.to(tl.int64) * query_row_stride
    p_query += (i_kv_head * GROUP + o_in_group) * query_head_stride
    b_query = tl.load(p_query[:, None] + o_dim[None, :], mask=live_row[:, None] & in_head[None, :], other=0.0)
    row_position = context - query_tokens + o_query
    i_list = (i_kv_head // KV_HEADS_PER_LIST * blocks + i_block).to(tl.int64)
    p_list = list_pointer + i_list * width
    listed_pages = tl.cdiv(tl.load(kept_tokens_pointer + i_list), PAGE)

    b_most = tl.full([HEADS * SAMPLES], float("-inf"), tl.float32)
    b_sum = tl.zeros([HEADS * SAMPLES], tl.float32)
    for first_slot in range(0, listed_pages, TILE // PAGE):
        b_product = _listed_products(
            b_query,
            row_position,
            cache_pointer,
            block_table_pointer,
            p_list,
            first_slot,
            listed_pages,
            context,
            i_kv_head,
            o_dim,
            in_head,
            cache_block_stride,
            cache_head_stride,
            cache_token_stride,
            CACHE_BLOCK,
            PAGE,
            TILE,
        )
        # Finite after the first tile: lists ascend and hold the page of the first query, so their first key lies in
        # every row's past.
        b_more = tl.maximum(b_most, tl.max(b_product, axis=1) * scale_log2)
        b_sum = b_sum * tl.exp2(b_most - b_more)
        b_sum += tl.sum(tl.exp2(b_product * scale_log2 - b_more[:, None]), axis=1)
        b_most = b_more
    b_normaliser = b_most + tl.log2(b_sum)

    o_head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    p_mass = mass_pointer + ((i_kv_head * GROUP + o_head) * blocks + i_block).to(tl.int64) * pages
    for first_slot in range(0, listed_pages, TILE // PAGE):
        b_product = _listed_products(
            b_query,
            row_position,
            cache_pointer,
            block_table_pointer,
            p_list,
            first_slot,
            listed_pages,
            context,
            i_kv_head,
            o_dim,
            in_head,
            cache_block_stride,
            cache_head_stride,
            cache_token_stride,
            CACHE_BLOCK,
            PAGE,
            TILE,
        )
        b_weight = tl.exp2(b_product * scale_log2 - b_normaliser[:, None])
        b_mass = tl.sum(tl.reshape(b_weight, [HEADS, SAMPLES, TILE // PAGE, PAGE]), axis=3)
        o_slot = first_slot + tl.arange(0, TILE // PAGE)
        listed = o_slot < listed_pages
        o_page = tl.load(p_list + o_slot, mask=listed, other=0)
        tl.store(
            p_mass[:, None] + o_page[None, :],
            tl.sum(b_mass, axis=1),
            mask=(o_head < GROUP)[:, None] & listed[None, :],
        )


def candidate_mass(
    query: torch.Tensor, keys: PlainKeys, scale: float, query_block_tokens: int, candidates: PageList
) -> torch.Tensor:
    """Equal to `reference.candidate_mass` but for rounding; arguments as there, float32."""
    query_tokens, heads, head_size = query.shape
    kv_heads, cache = keys.num_kv_heads, keys.kv_cache
    page_tokens = candidates.page_size_tokens
    blocks, pages = triton.cdiv(query_tokens, query_block_tokens), triton.cdiv(keys.seq_len, page_tokens)
    group = heads // kv_heads
    at_once = min(triton.next_power_of_2(group), MOST_HEADS)
    query = query if query.stride(2) == 1 else query.contiguous()
    mass = torch.full((heads, blocks, pages), NOT_LISTED, dtype=torch.float32, device=query.device)
    candidate_mass_kernel[(blocks, kv_heads, triton.cdiv(group, at_once))](
        query,
        cache,
        keys.block_table,
        candidates.pages,
        candidates.kept_tokens,
        mass,
        query_tokens,
        keys.seq_len,
        blocks,
        pages,
        candidates.pages.shape[1],
        scale * LOG2_E,
        query.stride(0),
        query.stride(1),
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        CACHE_BLOCK=keys.block_size_tokens,
        GROUP=group,
        KV_HEADS_PER_LIST=kv_heads * blocks // candidates.pages.shape[0],
        HEADS=at_once,
        SAMPLES=SAMPLED_QUERIES,
        HEAD_SIZE=head_size,
        HEAD_TILE=product_tile(head_size),
        QUERY_BLOCK=query_block_tokens,
        PAGE=page_tokens,
        TILE=KEY_TILE,
        num_warps=8 if at_once == MOST_HEADS else 4,
    )
    return mass
