"""FlexPrefill's sample in Triton.

Block masses: one program a key block and KV head, keys read once per group; a block's sums are relative to its own
maximum, so programs need nothing from one another. Then one program a sampled row finds what makes the row sum to 1,
and one a tile of blocks sums over the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.common.triton import load_keys
from vllm_sparse.kernels.flex_estimate.reference import BlockMasses, FlexEstimate
from vllm_sparse.keys import PlainKeys


# Lengths change with every chunk; specialising on them would compile in the middle of serving.
@triton.jit(do_not_specialize=["context", "rows", "blocks"])
def block_masses_kernel(
    sample_pointer,
    cache_pointer,
    block_table_pointer,
    maximum_pointer,
    total_pointer,
    nearer_pointer,
    key_mean_pointer,
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
):
    i_block = tl.program_id(0)
    i_kv_head = tl.program_id(1)
    o_key = i_block * BLOCK + tl.arange(0, BLOCK)
    o_row = tl.arange(0, ROW_TILE)
    o_dim = tl.arange(0, HEAD_TILE)
    live = o_key < context
    in_head = o_dim < HEAD_SIZE

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

    count = tl.minimum(context - i_block * BLOCK, BLOCK)
    b_mean = tl.sum(b_key.to(tl.float32), axis=0) / count
    p_mean = key_mean_pointer + (i_kv_head * blocks + i_block) * HEAD_SIZE
    tl.store(p_mean + o_dim, b_mean, mask=in_head)

    position = context - rows + o_row
    in_reach = (o_key[None, :] <= position[:, None]) & live[None, :]
    is_nearer = (o_key % BLOCK)[None, :] <= (position % BLOCK)[:, None]
    for i_head in range(i_kv_head * GROUP, (i_kv_head + 1) * GROUP):
        p_sample = sample_pointer + o_row[:, None] * sample_row_stride + i_head * sample_head_stride + o_dim[None, :]
        b_sample = tl.load(p_sample, mask=(o_row < rows)[:, None] & in_head[None, :], other=0.0)
        # [ROW_TILE, BLOCK]; float32 inputs are not to be rounded to TF32.
        b_score = tl.dot(b_sample, tl.trans(b_key), input_precision="ieee") * scale
        b_score = tl.where(in_reach, b_score, float("-inf"))
        b_maximum = tl.max(b_score, axis=1)
        b_maximum = tl.where(b_maximum == float("-inf"), 0.0, b_maximum)
        b_mass = tl.exp(b_score - b_maximum[:, None])
        o_out = (i_head * rows + o_row) * blocks + i_block
        tl.store(maximum_pointer + o_out, b_maximum, mask=o_row < rows)
        tl.store(total_pointer + o_out, tl.sum(b_mass, axis=1), mask=o_row < rows)
        tl.store(nearer_pointer + o_out, tl.sum(tl.where(is_nearer, b_mass, 0.0), axis=1), mask=o_row < rows)


def block_masses(sample: torch.Tensor, keys: PlainKeys, scale: float, block_size_tokens: int) -> BlockMasses:
    """Equal to `reference.block_masses`; arguments as there, `block_size_tokens` a power of two of at least 16."""
    rows, heads, head_size = sample.shape
    blocks = -(-keys.context_tokens // block_size_tokens)
    sample = sample.contiguous()
    cache = keys.kv_cache

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=sample.device)

    masses = BlockMasses(
        empty(heads, rows, blocks),
        empty(heads, rows, blocks),
        empty(heads, rows, blocks),
        empty(keys.num_kv_heads, blocks, head_size),
    )
    block_masses_kernel[(blocks, keys.num_kv_heads)](
        sample,
        cache,
        keys.block_table,
        masses.maximum,
        masses.total,
        masses.nearer,
        masses.key_mean,
        keys.context_tokens,
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
        HEAD_TILE=max(triton.next_power_of_2(head_size), 16),
        ROW_TILE=max(triton.next_power_of_2(rows), 16),
        BLOCK=block_size_tokens,
        num_warps=8,
    )
    return masses


BLOCK_TILE, ROW_TILE = 64, 32


@triton.jit(do_not_specialize=["rows", "blocks"])
def normaliser_kernel(maximum_pointer, total_pointer, normaliser_pointer, rows, blocks, TILE: tl.constexpr):
    """Per sampled row, the logarithm of what its masses are to be divided by, the number of rows included."""
    i_row = tl.program_id(0).to(tl.int64)
    running_maximum = float("-inf")
    running_total = 0.0
    for start in range(0, blocks, TILE):
        o_block = start + tl.arange(0, TILE)
        b_total = tl.load(total_pointer + i_row * blocks + o_block, mask=o_block < blocks, other=0.0)
        b_maximum = tl.load(maximum_pointer + i_row * blocks + o_block, mask=o_block < blocks, other=0.0)
        b_maximum = tl.where(b_total > 0, b_maximum, float("-inf"))
        # The first tile holds the first key, which every row reaches: the maximum is finite from then on.
        maximum = tl.maximum(running_maximum, tl.max(b_maximum))
        running_total = running_total * tl.exp(running_maximum - maximum)
        running_total += tl.sum(b_total * tl.exp(b_maximum - maximum))
        running_maximum = maximum
    tl.store(normaliser_pointer + i_row, running_maximum + tl.log(running_total * rows))


@triton.jit
def _mass(mass_pointer, maximum_pointer, total_pointer, b_normaliser, o_entry, mask):
    """Entries of a mass ``[rows, blocks]`` relative to their block's maximum, normalised."""
    b_total = tl.load(total_pointer + o_entry, mask=mask, other=0.0)
    b_maximum = tl.load(maximum_pointer + o_entry, mask=mask, other=0.0)
    b_mass = tl.load(mass_pointer + o_entry, mask=mask, other=0.0)
    return tl.where(b_total > 0, b_mass * tl.exp(b_maximum - b_normaliser), 0.0)


@triton.jit(do_not_specialize=["context", "rows", "blocks"])
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
    b_column = tl.zeros([BLOCK_TILE], dtype=tl.float32)
    b_band = tl.zeros([BLOCK_TILE], dtype=tl.float32)
    for start in range(0, rows, ROW_TILE):
        o_row = start + tl.arange(0, ROW_TILE)
        live = (o_row < rows)[:, None] & (o_block < blocks)[None, :]
        b_normaliser = tl.load(normaliser_pointer + i_head * rows + o_row, mask=o_row < rows, other=0.0)[:, None]
        o_start = (i_head * rows + o_row)[:, None] * blocks
        o_here = o_start + o_block[None, :]
        b_mass = _mass(total_pointer, maximum_pointer, total_pointer, b_normaliser, o_here, live)
        b_column += tl.sum(b_mass, axis=0)
        # Band b holds the nearer part of the key block b before the query's and the farther part of the one before.
        query_block = (context - rows + o_row) // BLOCK
        near_block = query_block[:, None] - o_block[None, :]
        b_near = _mass(
            nearer_pointer, maximum_pointer, total_pointer, b_normaliser, o_start + near_block, live & (near_block >= 0)
        )
        far = live & (near_block >= 1)
        o_far = o_start + near_block - 1
        b_far = _mass(total_pointer, maximum_pointer, total_pointer, b_normaliser, o_far, far)
        b_far -= _mass(nearer_pointer, maximum_pointer, total_pointer, b_normaliser, o_far, far)
        b_band += tl.sum(b_near + b_far, axis=0)
    tl.store(column_pointer + i_head * blocks + o_block, b_column, mask=o_block < blocks)
    tl.store(band_pointer + i_head * blocks + o_block, b_band, mask=o_block < blocks)


def combine(masses: BlockMasses, context_tokens: int, block_size_tokens: int) -> FlexEstimate:
    """Equal to `reference.combine`; arguments as there."""
    heads, rows, blocks = masses.total.shape
    normaliser = torch.empty(heads, rows, dtype=torch.float32, device=masses.total.device)
    line_mass = torch.empty(2, heads, blocks, dtype=torch.float32, device=masses.total.device)
    normaliser_kernel[(heads * rows,)](masses.maximum, masses.total, normaliser, rows, blocks, TILE=1024, num_warps=4)
    combine_kernel[(triton.cdiv(blocks, BLOCK_TILE), heads)](
        masses.maximum,
        masses.total,
        masses.nearer,
        normaliser,
        line_mass[0],
        line_mass[1],
        context_tokens,
        rows,
        blocks,
        BLOCK=block_size_tokens,
        BLOCK_TILE=BLOCK_TILE,
        ROW_TILE=ROW_TILE,
        num_warps=4,
    )
    return FlexEstimate(line_mass, masses.key_mean)
