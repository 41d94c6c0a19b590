"""FlexPrefill's sample in Triton.

The first kernel has one program per query head and run of key blocks. The sums of a block are relative to its own
maximum, so programs need nothing from one another. The query heads of a KV head run at the same time and share its keys
in the L2 cache. The second kernel has one program per tile of sampled rows and finds the normaliser of each row. The
third has one program per tile of key blocks and sums over the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.common.triton import load_key_block, product_tile, register_limit, shared_memory_kib
from vllm_sparse.kernels.flex_estimate.reference import BlockMasses, FlexEstimate
from vllm_sparse.kernels.page_summaries import SummaryKind
from vllm_sparse.kernels.page_summaries.triton import page_summaries
from vllm_sparse.keys import PlainKeys

# Key blocks that one program compares with its rows.
SEGMENT_BLOCKS = 16
LOG2_E = tl.constexpr(1.4426950408889634)


# Lengths change with every prompt chunk; specialising on them would compile in the middle of serving.
@triton.jit(do_not_specialize=["context", "rows", "blocks"])
def block_masses_kernel(
    sample_pointer,
    cache_pointer,
    block_table_pointer,
    maximum_pointer,
    total_pointer,
    nearer_pointer,
    context,
    rows,
    blocks,
    scale,
    sample_row_stride,
    sample_head_stride,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    i_head = tl.program_id(0)
    first_block = tl.program_id(1) * SEGMENT
    o_row = tl.arange(0, ROW_TILE)
    o_dim = tl.arange(0, HEAD_TILE)
    in_head = o_dim < HEAD_SIZE
    p_sample = sample_pointer + o_row[:, None] * sample_row_stride + i_head * sample_head_stride + o_dim[None, :]
    b_sample = tl.load(p_sample, mask=(o_row < rows)[:, None] & in_head[None, :], other=0.0)
    position = context - rows + o_row
    for i_block in range(first_block, tl.minimum(first_block + SEGMENT, blocks)):
        o_key = i_block * BLOCK + tl.arange(0, BLOCK)
        b_key = load_key_block(
            cache_pointer,
            block_table_pointer,
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
        # [ROW_TILE, BLOCK]; "ieee", because Triton would round float32 inputs to TF32.
        b_score = tl.dot(b_sample, tl.trans(b_key), input_precision="ieee")
        b_score = tl.where(o_key[None, :] <= position[:, None], b_score, float("-inf"))
        b_maximum = tl.max(b_score, axis=1)
        b_maximum = tl.where(b_maximum == float("-inf"), 0.0, b_maximum) * scale
        b_mass = tl.exp2(b_score * (scale * LOG2_E) - (b_maximum * LOG2_E)[:, None])
        is_nearer = (o_key % BLOCK)[None, :] <= (position % BLOCK)[:, None]
        o_out = (i_head * blocks + i_block) * rows + o_row
        tl.store(maximum_pointer + o_out, b_maximum, mask=o_row < rows)
        tl.store(total_pointer + o_out, tl.sum(b_mass, axis=1), mask=o_row < rows)
        tl.store(nearer_pointer + o_out, tl.sum(tl.where(is_nearer, b_mass, 0.0), axis=1), mask=o_row < rows)


def block_masses(sample: torch.Tensor, keys: PlainKeys, scale: float, block_size_tokens: int) -> BlockMasses:
    """Equal to `reference.block_masses`; arguments as there, `scale` positive, blocks a power of two of at least 16."""
    rows, heads, head_size = sample.shape
    blocks = -(-keys.seq_len // block_size_tokens)
    sample = sample if sample.stride(2) == 1 else sample.contiguous()
    cache, head_tile = keys.kv_cache, product_tile(head_size)
    # The rows of a block are adjacent in memory, so that a program writes whole cache lines.
    masses = torch.empty(3, heads, blocks, rows, dtype=torch.float32, device=sample.device)
    block_masses_kernel[(heads, triton.cdiv(blocks, SEGMENT_BLOCKS))](
        sample,
        cache,
        keys.block_table,
        *masses.unbind(0),
        keys.seq_len,
        rows,
        blocks,
        scale,
        sample.stride(0),
        sample.stride(1),
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        CACHE_BLOCK=keys.block_size_tokens,
        GROUP=heads // keys.num_kv_heads,
        HEAD_SIZE=head_size,
        HEAD_TILE=head_tile,
        ROW_TILE=product_tile(rows),
        BLOCK=block_size_tokens,
        SEGMENT=SEGMENT_BLOCKS,
        # Registers for two programs on a multiprocessor, so that one multiplies while the other sums.
        num_warps=8,
        # Of wide heads two blocks of keys would need 129 KiB.
        num_stages=2 if head_tile <= 128 or shared_memory_kib() > 129 else 1,
        **register_limit(128),
    )
    maximum, total, nearer = masses.transpose(2, 3).unbind(0)
    return BlockMasses(maximum, total, nearer, page_summaries(keys, SummaryKind(block_size_tokens, "mean")))


# Rows of a tile of blocks, and blocks of a tile of rows: many programs, each with all its loads in flight.
NORMALISER_TILE, COMBINE_TILE = 32, 16


@triton.jit(do_not_specialize=["rows", "blocks"])
def normaliser_kernel(
    maximum_pointer,
    total_pointer,
    normaliser_pointer,
    rows,
    blocks,
    BLOCK_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """For each sampled row, the logarithm of the sum of its masses times the number of rows."""
    i_head = tl.program_id(1).to(tl.int64)
    o_row = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
    b_maximum = tl.full([ROW_TILE], float("-inf"), tl.float32)
    b_total = tl.zeros([ROW_TILE], tl.float32)
    for start in range(0, blocks, BLOCK_TILE):
        o_block = start + tl.arange(0, BLOCK_TILE)
        o_entry = (i_head * blocks + o_block)[:, None] * rows + o_row[None, :]
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
    tl.store(normaliser_pointer + i_head * rows + o_row, b_maximum + tl.log(b_total * rows), mask=o_row < rows)


@triton.jit
def _mass(mass_pointer, maximum_pointer, total_pointer, b_normaliser, o_entry, mask):
    """Normalised entries of a mass ``[blocks, rows]`` that is stored relative to the maximum of each block."""
    b_total = tl.load(total_pointer + o_entry, mask=mask, other=0.0)
    b_maximum = tl.load(maximum_pointer + o_entry, mask=mask, other=0.0)
    b_mass = tl.load(mass_pointer + o_entry, mask=mask, other=0.0)
    return tl.where(b_total > 0, b_mass * tl.exp(b_maximum - b_normaliser), 0.0)


# Bands follow columns in one tensor, so their first address has any alignment.
@triton.jit(do_not_specialize=["context", "rows", "blocks"], do_not_specialize_on_alignment=["band_pointer"])
def combine_kernel(
    maximum_pointer,
    total_pointer,
    nearer_pointer,
    normaliser_pointer,
    column_pointer,
    band_pointer,
    context,
    rows,
    blocks,
    BLOCK: tl.constexpr,
    BLOCK_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    o_block = tl.program_id(0) * BLOCK_TILE + tl.arange(0, BLOCK_TILE)
    i_head = tl.program_id(1).to(tl.int64)
    o_head = i_head * blocks
    b_column = tl.zeros([BLOCK_TILE], dtype=tl.float32)
    b_band = tl.zeros([BLOCK_TILE], dtype=tl.float32)
    for start in range(0, rows, ROW_TILE):
        o_row = start + tl.arange(0, ROW_TILE)
        live = (o_block < blocks)[:, None] & (o_row < rows)[None, :]
        b_normaliser = tl.load(normaliser_pointer + i_head * rows + o_row, mask=o_row < rows, other=0.0)[None, :]
        o_here = (o_head + o_block)[:, None] * rows + o_row[None, :]
        b_mass = _mass(total_pointer, maximum_pointer, total_pointer, b_normaliser, o_here, live)
        b_column += tl.sum(b_mass, axis=1)
        # Band b holds the nearer part of the key block b before the query's and the farther part of the one before.
        query_block = (context - rows + o_row) // BLOCK
        near_block = query_block[None, :] - o_block[:, None]
        near = live & (near_block >= 0)
        o_near = (o_head + near_block) * rows + o_row[None, :]
        b_near = _mass(nearer_pointer, maximum_pointer, total_pointer, b_normaliser, o_near, near)
        far = live & (near_block >= 1)
        b_far = _mass(total_pointer, maximum_pointer, total_pointer, b_normaliser, o_near - rows, far)
        b_far -= _mass(nearer_pointer, maximum_pointer, total_pointer, b_normaliser, o_near - rows, far)
        b_band += tl.sum(b_near + b_far, axis=1)
    tl.store(column_pointer + o_head + o_block, b_column, mask=o_block < blocks)
    tl.store(band_pointer + o_head + o_block, b_band, mask=o_block < blocks)


def combine(masses: BlockMasses, seq_len: int, block_size_tokens: int) -> FlexEstimate:
    """Equal to `reference.combine` for what `block_masses` returns; arguments as there."""
    heads, rows, blocks = masses.total.shape
    maximum, total, nearer = (part.transpose(1, 2) for part in (masses.maximum, masses.total, masses.nearer))
    assert maximum.is_contiguous()
    normaliser = torch.empty(heads, rows, dtype=torch.float32, device=total.device)
    line_mass = torch.empty(2, heads, blocks, dtype=torch.float32, device=total.device)
    normaliser_kernel[(triton.cdiv(rows, NORMALISER_TILE), heads)](
        maximum, total, normaliser, rows, blocks, BLOCK_TILE=128, ROW_TILE=NORMALISER_TILE, num_warps=8
    )
    combine_kernel[(triton.cdiv(blocks, COMBINE_TILE), heads)](
        maximum,
        total,
        nearer,
        normaliser,
        line_mass[0],
        line_mass[1],
        seq_len,
        rows,
        blocks,
        BLOCK=block_size_tokens,
        BLOCK_TILE=COMBINE_TILE,
        ROW_TILE=128,
        num_warps=8,
    )
    return FlexEstimate(line_mass, masses.key_mean)
