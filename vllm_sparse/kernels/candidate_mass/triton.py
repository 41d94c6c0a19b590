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
from vllm_sparse.step.chunks import PromptChunks, one_chunk

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
    do_not_specialize=["blocks", "pages", "width", "table_row_stride"],
    do_not_specialize_on_alignment=["block_table_pointer"],
)
def candidate_mass_kernel(
    query_pointer,
    cache_pointer,
    block_table_pointer,
    list_pointer,
    kept_tokens_pointer,
    mass_pointer,
    first_query_pointer,
    last_query_pointer,
    first_token_pointer,
    chunk_pointer,
    chunk_start_pointer,
    table_row_pointer,
    blocks,
    pages,
    width,
    scale_log2,
    table_row_stride,
    query_row_stride,
    query_head_stride,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    LIST_HEADS: tl.constexpr,
    KV_HEADS_PER_LIST: tl.constexpr,
    HEADS: tl.constexpr,
    SAMPLES: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    i_block = blocks - 1 - tl.program_id(0)
    first = tl.load(first_query_pointer + i_block)
    # Later keys are in no row's past.
    context = tl.load(last_query_pointer + i_block) + 1
    i_chunk = tl.load(chunk_pointer + i_block)
    start_block = tl.load(chunk_start_pointer + i_chunk)
    chunk_blocks = tl.load(chunk_start_pointer + i_chunk + 1) - start_block
    p_table = block_table_pointer + tl.load(table_row_pointer + i_chunk).to(tl.int64) * table_row_stride
    i_kv_head = tl.program_id(1)
    o_row = tl.arange(0, HEADS * SAMPLES)
    o_in_group = tl.program_id(2) * HEADS + o_row // SAMPLES
    live_row = o_in_group < GROUP
    o_query = (2 * (o_row % SAMPLES) + 1) * (context - first) // (2 * SAMPLES)
    o_dim = tl.arange(0, HEAD_TILE)
    in_head = o_dim < HEAD_SIZE
    p_query = query_pointer + (tl.load(first_token_pointer + i_block) + o_query).to(tl.int64) * query_row_stride
    p_query += (i_kv_head * GROUP + o_in_group) * query_head_stride
    b_query = tl.load(p_query[:, None] + o_dim[None, :], mask=live_row[:, None] & in_head[None, :], other=0.0)
    row_position = first + o_query
    # The lists of earlier chunks, then those of earlier heads of this one.
    i_list = start_block * LIST_HEADS + i_kv_head // KV_HEADS_PER_LIST * chunk_blocks + i_block - start_block
    i_list = i_list.to(tl.int64)
    p_list = list_pointer + i_list * width
    listed_pages = tl.cdiv(tl.load(kept_tokens_pointer + i_list), PAGE)

    b_most = tl.full([HEADS * SAMPLES], float("-inf"), tl.float32)
    b_sum = tl.zeros([HEADS * SAMPLES], tl.float32)
    for first_slot in range(0, listed_pages, TILE // PAGE):
        b_product = _listed_products(
            b_query,
            row_position,
            cache_pointer,
            p_table,
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
            p_table,
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


def chunk_mass(chunks: PromptChunks, candidates: PageList) -> torch.Tensor:
    """Equal to `reference.chunk_mass` but for rounding; arguments as there, float32."""
    query, cache, blocks = chunks.query, chunks.keys[0].kv_cache, chunks.blocks
    heads, head_size = query.shape[1:]
    kv_heads = cache.shape[1]
    page_tokens = candidates.page_size_tokens
    pages = triton.cdiv(blocks.longest_seq_len, page_tokens)
    group = heads // kv_heads
    at_once = min(triton.next_power_of_2(group), MOST_HEADS)
    list_heads = candidates.pages.shape[0] // blocks.blocks
    query = query if query.stride(2) == 1 else query.contiguous()
    mass = torch.full((heads, blocks.blocks, pages), NOT_LISTED, dtype=torch.float32, device=query.device)
    candidate_mass_kernel[(blocks.blocks, kv_heads, triton.cdiv(group, at_once))](
        query,
        cache,
        chunks.block_table,
        candidates.pages,
        candidates.kept_tokens,
        mass,
        blocks.first_query,
        blocks.last_query,
        blocks.first_token,
        blocks.chunk,
        blocks.chunk_start,
        blocks.table_row,
        blocks.blocks,
        pages,
        candidates.pages.shape[1],
        chunks.scale * LOG2_E,
        chunks.block_table.stride(0),
        query.stride(0),
        query.stride(1),
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        CACHE_BLOCK=cache.shape[2],
        GROUP=group,
        LIST_HEADS=list_heads,
        KV_HEADS_PER_LIST=kv_heads // list_heads,
        HEADS=at_once,
        SAMPLES=SAMPLED_QUERIES,
        HEAD_SIZE=head_size,
        HEAD_TILE=product_tile(head_size),
        PAGE=page_tokens,
        TILE=KEY_TILE,
        num_warps=8 if at_once == MOST_HEADS else 4,
    )
    return mass


def candidate_mass(
    query: torch.Tensor, keys: PlainKeys, scale: float, query_block_tokens: int, candidates: PageList
) -> torch.Tensor:
    """Equal to `reference.candidate_mass` but for rounding; arguments as there, float32."""
    blocks = one_chunk(query.shape[0], keys.seq_len, query_block_tokens, query.device)
    return chunk_mass(PromptChunks(blocks, query, (keys,), keys.block_table.unsqueeze(0), scale), candidates)
