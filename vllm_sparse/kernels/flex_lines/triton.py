"""FlexPrefill's lines in Triton: one program per query block and head, over tiles of key blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.step.chunks import PromptBlocks

BLOCK_TILE = 1024


# Lengths change with every prompt chunk; specialising on them would compile in the middle of serving.
# Bands follow columns in one tensor, so their first address has any alignment.
@triton.jit(
    do_not_specialize=["chunks", "key_blocks"],
    do_not_specialize_on_alignment=["band_pointer"],
)
def line_map_kernel(
    column_pointer,
    band_pointer,
    pooled_pointer,
    map_pointer,
    first_query_pointer,
    last_query_pointer,
    chunk_pointer,
    chunks,
    key_blocks,
    BLOCK: tl.constexpr,
    HAS_POOLED: tl.constexpr,
    TILE: tl.constexpr,
):
    i_query_block = tl.program_id(0)
    i_head = tl.program_id(1).to(tl.int64)
    first = tl.load(first_query_pointer + i_query_block)
    last_block = tl.load(last_query_pointer + i_query_block) // BLOCK
    o_line = (i_head * chunks + tl.load(chunk_pointer + i_query_block)) * key_blocks
    o_row = (i_head * tl.num_programs(0) + i_query_block) * key_blocks
    for start in range(0, key_blocks, TILE):
        o_block = start + tl.arange(0, TILE)
        in_map = o_block < key_blocks
        in_reach = o_block <= last_block
        b_touched = (o_block == 0) | (o_block >= first // BLOCK)
        b_touched = b_touched | (tl.load(column_pointer + o_line + o_block, mask=in_reach, other=0) != 0)
        if HAS_POOLED:
            b_touched = b_touched | (tl.load(pooled_pointer + o_row + o_block, mask=in_reach, other=0) != 0)
        # At most three bands lead to a key block (reference.band_blocks).
        lowest = (first + 1 + BLOCK) // BLOCK - o_block - 2
        for step in tl.static_range(3):
            band = lowest + step
            valid = in_reach & (band >= 0) & (band <= last_block - o_block)
            b_touched = b_touched | (tl.load(band_pointer + o_line + band, mask=valid, other=0) != 0)
        tl.store(map_pointer + o_row + o_block, (b_touched & in_reach).to(tl.uint8), mask=in_map)


def line_map(
    columns: torch.Tensor,
    bands: torch.Tensor,
    pooled: torch.Tensor | None,
    blocks: PromptBlocks,
    key_block_tokens: int,
) -> torch.Tensor:
    """Equal to `reference.line_map`; arguments as there."""
    heads, chunks, key_blocks = columns.shape
    touched = torch.empty(heads, blocks.blocks, key_blocks, dtype=torch.bool, device=columns.device)
    line_map_kernel[(blocks.blocks, heads)](
        columns.contiguous().view(torch.uint8),
        bands.contiguous().view(torch.uint8),
        touched if pooled is None else pooled.contiguous().view(torch.uint8),
        touched.view(torch.uint8),
        blocks.first_query,
        blocks.last_query,
        blocks.chunk,
        chunks,
        key_blocks,
        BLOCK=key_block_tokens,
        HAS_POOLED=pooled is not None,
        TILE=BLOCK_TILE,
        num_warps=4,
    )
    return touched
