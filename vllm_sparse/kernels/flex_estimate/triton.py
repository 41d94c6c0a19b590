"""FlexPrefill's sample in Triton.

The first kernel has one program per query head and segment of key blocks. The sums of a block are relative to its own
maximum, so programs need nothing from one another. The query heads of a KV head run at the same time and share its keys
in the L2 cache. The second kernel has one program per tile of sampled rows and finds the normaliser of each row. The
third has one program per tile of key blocks and sums over the rows.

Sums of all stretches lie one after another, so that they take no more memory than the contexts have key blocks. A chunk
of the kernels is a stretch (`Samples`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.common.triton import load_key_block, product_tile, register_limit, shared_memory_kib
from vllm_sparse.kernels.flex_estimate.reference import FlexEstimate
from vllm_sparse.kernels.flex_estimate.samples import SEGMENT_BLOCKS, Samples
from vllm_sparse.kernels.flex_estimate.scratch import parts
from vllm_sparse.kernels.page_summaries import SummaryKind
from vllm_sparse.kernels.page_summaries.triton import chunk_summaries
from vllm_sparse.step.chunks import PromptChunks

LOG2_E = tl.constexpr(1.4426950408889634)


# Lengths change with every prompt chunk, tables begin anywhere, and so do a request's blocks in vLLM's block table;
# specialising on them would compile in the middle of serving.
@triton.jit(
    do_not_specialize=["first_sum", "sums", "table_row_stride"],
    do_not_specialize_on_alignment=["block_table_pointer", "segment_chunk_pointer", "segment_block_pointer"],
)
def block_masses_kernel(
    query_pointer,
    cache_pointer,
    block_table_pointer,
    maximum_pointer,
    total_pointer,
    nearer_pointer,
    segment_chunk_pointer,
    segment_block_pointer,
    key_start_pointer,
    first_token_pointer,
    first_query_pointer,
    context_pointer,
    table_row_pointer,
    first_sum,
    sums,
    scale,
    table_row_stride,
    query_row_stride,
    query_head_stride,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    i_head = tl.program_id(0)
    i_chunk = tl.load(segment_chunk_pointer + tl.program_id(1))
    first_block = tl.load(segment_block_pointer + tl.program_id(1))
    context = tl.load(context_pointer + i_chunk)
    first_query = tl.load(first_query_pointer + i_chunk)
    p_table = block_table_pointer + tl.load(table_row_pointer + i_chunk).to(tl.int64) * table_row_stride
    i_first_sum = i_head * sums + tl.load(key_start_pointer + i_chunk) - first_sum
    # At most as many rows as a block has keys.
    o_row = tl.arange(0, BLOCK)
    live_row = o_row < context - first_query
    o_dim = tl.arange(0, HEAD_TILE)
    in_head = o_dim < HEAD_SIZE
    o_token = (tl.load(first_token_pointer + i_chunk) + o_row).to(tl.int64)
    p_query = query_pointer + o_token[:, None] * query_row_stride + i_head * query_head_stride + o_dim[None, :]
    b_query = tl.load(p_query, mask=live_row[:, None] & in_head[None, :], other=0.0)
    position = first_query + o_row
    for i_block in range(first_block, tl.minimum(first_block + SEGMENT, tl.cdiv(context, BLOCK))):
        o_key = i_block * BLOCK + tl.arange(0, BLOCK)
        b_key = load_key_block(
            cache_pointer,
            p_table,
            i_block * BLOCK,
            context,
            i_head // GROUP,
            o_dim,
            in_head,
            cache_block_stride,
            cache_head_stride,
            cache_token_stride,
            CACHE_BLOCK,
            BLOCK,
        )
        # [rows, BLOCK]; "ieee", because Triton would round float32 inputs to TF32.
        b_score = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
        b_score = tl.where(o_key[None, :] <= position[:, None], b_score, float("-inf"))
        b_maximum = tl.max(b_score, axis=1)
        b_maximum = tl.where(b_maximum == float("-inf"), 0.0, b_maximum) * scale
        b_mass = tl.exp2(b_score * (scale * LOG2_E) - (b_maximum * LOG2_E)[:, None])
        is_nearer = tl.arange(0, BLOCK)[None, :] <= (position % BLOCK)[:, None]
        o_out = (i_first_sum + i_block) * BLOCK + o_row
        tl.store(maximum_pointer + o_out, b_maximum, mask=live_row)
        tl.store(total_pointer + o_out, tl.sum(b_mass, axis=1), mask=live_row)
        tl.store(nearer_pointer + o_out, tl.sum(tl.where(is_nearer, b_mass, 0.0), axis=1), mask=live_row)


# Rows of a tile of blocks, and blocks of a tile of rows: many programs, each with all its loads in flight.
NORMALISER_TILE, COMBINE_TILE = 32, 16


@triton.jit(do_not_specialize=["first_chunk", "first_sum", "sums"])
def normaliser_kernel(
    maximum_pointer,
    total_pointer,
    normaliser_pointer,
    key_start_pointer,
    first_query_pointer,
    context_pointer,
    first_chunk,
    first_sum,
    sums,
    BLOCK: tl.constexpr,
    BLOCK_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """For each sampled row, the logarithm of the sum of its masses times the number of rows."""
    i_head = tl.program_id(1).to(tl.int64)
    i_chunk = first_chunk + tl.program_id(2)
    first_key = tl.load(key_start_pointer + i_chunk)
    blocks = tl.load(key_start_pointer + i_chunk + 1) - first_key
    rows = tl.load(context_pointer + i_chunk) - tl.load(first_query_pointer + i_chunk)
    o_row = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
    b_maximum = tl.full([ROW_TILE], float("-inf"), tl.float32)
    b_total = tl.zeros([ROW_TILE], tl.float32)
    for start in range(0, blocks, BLOCK_TILE):
        o_block = start + tl.arange(0, BLOCK_TILE)
        o_entry = (i_head * sums + first_key - first_sum + o_block)[:, None] * BLOCK + o_row[None, :]
        live = (o_block < blocks)[:, None] & (o_row < rows)[None, :]
        b_part = tl.load(total_pointer + o_entry, mask=live, other=0.0)
        b_part_maximum = tl.load(maximum_pointer + o_entry, mask=live, other=0.0)
        b_part_maximum = tl.where(b_part > 0, b_part_maximum, float("-inf"))
        # The first tile holds the first key, which every row reads, so the maximum is finite from then on, except in
        # rows that do not exist.
        b_larger = tl.maximum(b_maximum, tl.max(b_part_maximum, axis=0))
        b_larger = tl.where(o_row < rows, b_larger, 0.0)
        b_total = b_total * tl.exp(b_maximum - b_larger)
        b_total += tl.sum(b_part * tl.exp(b_part_maximum - b_larger[None, :]), axis=0)
        b_maximum = b_larger
    o_out = (tl.program_id(2) * tl.num_programs(1) + i_head) * BLOCK + o_row
    tl.store(normaliser_pointer + o_out, b_maximum + tl.log(b_total * rows), mask=o_row < rows)


@triton.jit
def _mass(mass_pointer, maximum_pointer, total_pointer, b_normaliser, o_entry, mask):
    """Normalised entries of a mass ``[blocks, rows]`` that is stored relative to the maximum of each block."""
    b_total = tl.load(total_pointer + o_entry, mask=mask, other=0.0)
    b_maximum = tl.load(maximum_pointer + o_entry, mask=mask, other=0.0)
    b_mass = tl.load(mass_pointer + o_entry, mask=mask, other=0.0)
    return tl.where(b_total > 0, b_mass * tl.exp(b_maximum - b_normaliser), 0.0)


@triton.jit(do_not_specialize=["first_chunk", "first_sum", "sums", "chunks", "width"])
def combine_kernel(
    maximum_pointer,
    total_pointer,
    nearer_pointer,
    normaliser_pointer,
    line_pointer,
    key_start_pointer,
    first_query_pointer,
    context_pointer,
    first_chunk,
    first_sum,
    sums,
    chunks,
    width,
    BLOCK: tl.constexpr,
    BLOCK_TILE: tl.constexpr,
):
    o_block = tl.program_id(0) * BLOCK_TILE + tl.arange(0, BLOCK_TILE)
    i_head = tl.program_id(1).to(tl.int64)
    i_chunk = first_chunk + tl.program_id(2)
    first_key = tl.load(key_start_pointer + i_chunk)
    blocks = tl.load(key_start_pointer + i_chunk + 1) - first_key
    first_query = tl.load(first_query_pointer + i_chunk)
    rows = tl.load(context_pointer + i_chunk) - first_query
    o_head = i_head * sums + first_key - first_sum
    o_row = tl.arange(0, BLOCK)
    live_row = o_row < rows
    live = (o_block < blocks)[:, None] & live_row[None, :]
    p_normaliser = normaliser_pointer + (tl.program_id(2) * tl.num_programs(1) + i_head) * BLOCK
    b_normaliser = tl.load(p_normaliser + o_row, mask=live_row, other=0.0)[None, :]
    o_here = (o_head + o_block)[:, None] * BLOCK + o_row[None, :]
    b_column = tl.sum(_mass(total_pointer, maximum_pointer, total_pointer, b_normaliser, o_here, live), axis=1)
    # Band b holds the nearer part of the key block b before the query's and the farther part of the one before.
    near_block = ((first_query + o_row) // BLOCK)[None, :] - o_block[:, None]
    near = live & (near_block >= 0)
    o_near = (o_head + near_block) * BLOCK + o_row[None, :]
    b_near = _mass(nearer_pointer, maximum_pointer, total_pointer, b_normaliser, o_near, near)
    far = live & (near_block >= 1)
    b_far = _mass(total_pointer, maximum_pointer, total_pointer, b_normaliser, o_near - BLOCK, far)
    b_far -= _mass(nearer_pointer, maximum_pointer, total_pointer, b_normaliser, o_near - BLOCK, far)
    b_band = tl.sum(b_near + b_far, axis=1)
    # Past the context masses are 0.
    p_line = line_pointer + (i_head * chunks + i_chunk) * width + o_block
    tl.store(p_line, b_column, mask=o_block < width)
    tl.store(p_line + tl.num_programs(1).to(tl.int64) * chunks * width, b_band, mask=o_block < width)


def flex_estimate(chunks: PromptChunks, samples: Samples) -> FlexEstimate:
    """Equal to `reference.flex_estimate` but for rounding; arguments as there, key blocks a power of two of 16 or more.

    `key_block_mean` is not written past a context.
    """
    query, keys, queries = chunks.query, chunks.keys[0], samples.queries
    heads, head_size = query.shape[1:]
    assert query.stride(2) == 1
    cache, head_tile, block = keys.kv_cache, product_tile(head_size), samples.key_block_tokens
    stretches = len(queries.spans)
    line_mass = torch.empty(2, heads, stretches, samples.key_blocks, dtype=torch.float32, device=query.device)
    for part in parts(samples, heads):
        first_sum = samples.starts[part.start]
        sums = samples.starts[part.stop] - first_sum
        segments = slice(samples.segment_starts[part.start], samples.segment_starts[part.stop])
        # The rows of a block are adjacent in memory, so that a program writes whole cache lines.
        masses = torch.empty(3, heads, sums, block, dtype=torch.float32, device=query.device).unbind(0)
        normaliser = torch.empty(len(part), heads, block, dtype=torch.float32, device=query.device)
        block_masses_kernel[(heads, segments.stop - segments.start)](
            query,
            cache,
            chunks.block_table,
            *masses,
            samples.segment_stretch[segments],
            samples.segment_block[segments],
            samples.key_start,
            queries.first_token,
            queries.first_query,
            queries.seq_len,
            queries.table_row,
            first_sum,
            sums,
            chunks.scale,
            chunks.block_table.stride(0),
            query.stride(0),
            query.stride(1),
            cache.stride(0),
            cache.stride(1),
            cache.stride(2),
            CACHE_BLOCK=keys.block_size_tokens,
            GROUP=heads // keys.num_kv_heads,
            HEAD_SIZE=head_size,
            HEAD_TILE=head_tile,
            BLOCK=block,
            SEGMENT=SEGMENT_BLOCKS,
            # Registers for two programs on a multiprocessor, so that one multiplies while the other sums.
            num_warps=8,
            # Of wide heads two blocks of keys would need 129 KiB.
            num_stages=2 if head_tile <= 128 or shared_memory_kib() > 129 else 1,
            **register_limit(128),
        )
        spans = samples.key_start, queries.first_query, queries.seq_len, part.start, first_sum, sums
        normaliser_kernel[(triton.cdiv(block, NORMALISER_TILE), heads, len(part))](
            *masses[:2], normaliser, *spans, BLOCK=block, BLOCK_TILE=128, ROW_TILE=NORMALISER_TILE, num_warps=8
        )
        combine_kernel[(triton.cdiv(samples.key_blocks, COMBINE_TILE), heads, len(part))](
            *masses,
            normaliser,
            line_mass,
            *spans,
            stretches,
            samples.key_blocks,
            BLOCK=block,
            BLOCK_TILE=COMBINE_TILE,
            num_warps=8,
        )
    return FlexEstimate(line_mass, chunk_summaries(chunks, SummaryKind(block, "mean")))
