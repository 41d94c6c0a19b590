"""Attention of sampled queries to listed pages in Triton: one program a query block and the query heads of a KV head.

A row is a sampled query of a head. So few rows share the keys of a program that reading these is what takes the time.
They are read once: the mass of each row and page is kept until the row's normaliser is known, as a logarithm, in a
few hundred bytes where the page's keys have several thousand. Programs of the longest contexts start first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.candidate_mass.reference import (
    KEY_GROUPS,
    NOT_LISTED,
    SAMPLED_QUERIES,
    SCRATCH_BYTES,
    kept_masses,
)
from vllm_sparse.kernels.common.triton import largest_of_groups, load_keys, product_tile, shared_memory_kib
from vllm_sparse.keys import PlainKeys
from vllm_sparse.pages import PageList
from vllm_sparse.step.chunks import PromptChunks, one_chunk

# The fastest on an H200 of tiles of 32, 64 and 128 keys, 4 and 8 warps, 2 to 4 stages (loadtest/RESULTS.md).
KEY_TILE, WARPS = 128, 4
# Of wide heads, and where shared memory has no room for three tiles of 32 KiB.
SMALL_KEY_TILE = 64
# Listed pages whose kept masses are read at once.
PAGE_TILE = 16
# More query heads of a KV head are split over programs: keys are then read again, but rows fit in registers.
MOST_HEADS = 4
LOG2_E = 1.4426950408889634


# Lengths change with every prompt chunk, and a request's blocks begin at any row of vLLM's block table; specialising on
# them would compile in the middle of serving.
@triton.jit(
    do_not_specialize=["first_block", "blocks", "pages", "width", "table_row_stride"],
    do_not_specialize_on_alignment=["block_table_pointer"],
)
def candidate_mass_kernel(
    query_pointer,
    cache_pointer,
    block_table_pointer,
    list_pointer,
    kept_tokens_pointer,
    mass_pointer,
    kept_mass_pointer,
    first_query_pointer,
    last_query_pointer,
    first_token_pointer,
    chunk_pointer,
    chunk_start_pointer,
    table_row_pointer,
    first_block,
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
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    PAGE_TILE: tl.constexpr,
):
    rows: tl.constexpr = HEADS * SAMPLES
    i_block = first_block + tl.num_programs(0) - 1 - tl.program_id(0)
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

    i_program = (tl.program_id(0) * tl.num_programs(1) + i_kv_head) * tl.num_programs(2) + tl.program_id(2)
    p_kept_mass = kept_mass_pointer + i_program.to(tl.int64) * width * rows
    b_most = tl.full([rows], float("-inf"), tl.float32)
    b_sum = tl.zeros([rows], tl.float32)
    o_token = tl.arange(0, TILE)
    for first_slot in range(0, listed_pages, TILE // PAGE):
        o_slot = first_slot + o_token // PAGE
        listed = o_slot < listed_pages
        o_key = tl.load(p_list + o_slot, mask=listed, other=0) * PAGE + o_token % PAGE
        live = listed & (o_key < context)
        b_key = load_keys(
            cache_pointer,
            p_table,
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
        b_product = tl.dot(b_query, tl.trans(b_key), input_precision="ieee") * scale_log2
        b_product = tl.where(live[None, :] & (o_key[None, :] <= row_position[:, None]), b_product, float("-inf"))
        b_largest = largest_of_groups(b_product, PAGE, GROUPS)
        b_tile_most = tl.max(tl.max(b_largest, axis=2), axis=1)
        # Finite after the first tile: lists ascend and hold the page of the first query, so their first key lies in
        # every row's past. Later tiles may lie in a row's future.
        b_more = tl.maximum(b_most, b_tile_most)
        b_page = tl.sum(tl.exp2(b_largest - b_more[:, None, None]), axis=2)
        b_sum = b_sum * tl.exp2(b_most - b_more) + tl.sum(b_page, axis=1)
        b_most = b_more
        o_page_slot = first_slot + tl.arange(0, TILE // PAGE)
        tl.store(
            p_kept_mass + o_page_slot[None, :] * rows + o_row[:, None],
            tl.log2(b_page) + b_more[:, None],
            mask=(o_page_slot < listed_pages)[None, :],
        )
    b_normaliser = b_most + tl.log2(b_sum)

    # What other threads of this program have kept is read.
    tl.debug_barrier()
    o_head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    p_mass = mass_pointer + ((i_kv_head * GROUP + o_head) * blocks + i_block).to(tl.int64) * pages
    for first_slot in range(0, listed_pages, PAGE_TILE):
        o_slot = first_slot + tl.arange(0, PAGE_TILE)
        listed = o_slot < listed_pages
        p_kept = p_kept_mass + o_slot[None, :] * rows + o_row[:, None]
        b_kept = tl.load(p_kept, mask=listed[None, :], other=float("-inf"))
        b_weight = tl.exp2(b_kept - b_normaliser[:, None])
        b_mass = tl.sum(tl.reshape(b_weight, [HEADS, SAMPLES, PAGE_TILE]), axis=1)
        o_page = tl.load(p_list + o_slot, mask=listed, other=0)
        tl.store(p_mass[:, None] + o_page[None, :], b_mass, mask=(o_head < GROUP)[:, None] & listed[None, :])


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
    key_tile = KEY_TILE if head_size <= 128 and shared_memory_kib() > 128 else SMALL_KEY_TILE
    width, splits = candidates.pages.shape[1], triton.cdiv(group, at_once)
    of_a_block = kept_masses(width, heads, kv_heads)
    at_a_time = min(max(SCRATCH_BYTES // (4 * of_a_block), 1), blocks.blocks)
    kept_mass = torch.empty(at_a_time * of_a_block, dtype=torch.float32, device=query.device)
    for first_block in range(0, blocks.blocks, at_a_time):
        candidate_mass_kernel[(min(at_a_time, blocks.blocks - first_block), kv_heads, splits)](
            query,
            cache,
            chunks.block_table,
            candidates.pages,
            candidates.kept_tokens,
            mass,
            kept_mass,
            blocks.first_query,
            blocks.last_query,
            blocks.first_token,
            blocks.chunk,
            blocks.chunk_start,
            blocks.table_row,
            first_block,
            blocks.blocks,
            pages,
            width,
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
            GROUPS=KEY_GROUPS,
            TILE=key_tile,
            PAGE_TILE=PAGE_TILE,
            num_warps=WARPS,
        )
    return mass


def candidate_mass(
    query: torch.Tensor, keys: PlainKeys, scale: float, query_block_tokens: int, candidates: PageList
) -> torch.Tensor:
    """Equal to `reference.candidate_mass` but for rounding; arguments as there, float32."""
    blocks = one_chunk(query.shape[0], keys.seq_len, query_block_tokens, query.device)
    return chunk_mass(PromptChunks(blocks, query, (keys,), keys.block_table.unsqueeze(0), scale), candidates)
