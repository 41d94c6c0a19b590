"""The largest entries of each row that cover a share of it, in Triton: one program per row, or head and prompt chunk.

A first search finds the threshold whose entries sum to gamma, and so their number. If the least or the most number of
entries demands another number, a second search finds the threshold for that one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.common.triton import (
    chosen_entries,
    equal_needed,
    ordered_scores,
    row_threshold,
    threshold_tile,
)
from vllm_sparse.step.chunks import PromptBlocks, one_chunk

TILE = 4096


# Lengths change with every prompt chunk; specialising on them would compile in the middle of serving.
@triton.jit(do_not_specialize=["blocks", "width", "min_count", "max_count"])
def coverage_mask_kernel(
    mass_pointer,
    gamma_pointer,
    keep_pointer,
    chunk_start_pointer,
    blocks,
    width,
    min_count,
    max_count,
    ROW_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    i_head = tl.program_id(0).to(tl.int64)
    i_chunk = tl.program_id(1)
    # The row of a head and chunk is all of the chunk's query blocks.
    first_block = tl.load(chunk_start_pointer + i_chunk)
    n = (tl.load(chunk_start_pointer + i_chunk + 1) - first_block) * width
    o_row = (i_head * blocks + first_block) * width
    p_mass = mass_pointer + o_row
    gamma = tl.load(gamma_pointer + i_head * tl.num_programs(1) + i_chunk)
    # No key is above the largest integer. Many rows want no entry, and need no search.
    threshold, above, count = 0x7FFFFFFF, 0, 0
    if gamma >= 1:
        count = n
    elif gamma > 0:
        threshold, total = row_threshold(p_mass, 0, n, gamma, True, ROW_TILE, TILE)
        reaching = 0
        for start in range(0, n, TILE):
            o_entry = start + tl.arange(0, TILE)
            b_key = ordered_scores(p_mass, o_entry, o_entry < n)
            above += tl.sum((b_key > threshold).to(tl.int32))
            reaching += tl.sum(((b_key >= threshold) & (o_entry < n)).to(tl.int32))
        equal = equal_needed(threshold, total, gamma, n)
        count = above + tl.maximum(tl.minimum(equal, reaching - above), 1)
    wanted = tl.minimum(tl.minimum(tl.maximum(count, min_count), max_count), n)
    if (wanted != count) | (gamma >= 1):
        threshold, above = row_threshold(p_mass, 0, n, wanted, False, ROW_TILE, TILE)
    # Of the entries equal to the threshold, those of lower index win.
    equal_left = wanted - above
    for start in range(0, n, TILE):
        o_entry = start + tl.arange(0, TILE)
        b_key = ordered_scores(p_mass, o_entry, o_entry < n)
        b_equal = (b_key == threshold).to(tl.int32)
        b_keep, equal_left = chosen_entries(b_key, b_equal, threshold, equal_left)
        tl.store(keep_pointer + o_row + o_entry, b_keep.to(tl.uint8), mask=o_entry < n)


def coverage_mask(mass: torch.Tensor, gamma: torch.Tensor, min_count: int, max_count: int) -> torch.Tensor:
    """Equal to `reference.coverage_mask` up to float32 rounding of the sums; arguments as there."""
    row = one_chunk(1, 1, 1, mass.device)
    return _covering(mass.unsqueeze(1), gamma, row, min_count, max_count).squeeze(1)


def chunk_coverage(mass: torch.Tensor, gamma: torch.Tensor, blocks: PromptBlocks) -> torch.Tensor:
    """Equal to `reference.chunk_coverage` up to float32 rounding of the sums; arguments as there."""
    return _covering(mass, gamma, blocks, 0, blocks.most_blocks * mass.shape[2])


def _covering(
    mass: torch.Tensor, gamma: torch.Tensor, blocks: PromptBlocks, min_count: int, max_count: int
) -> torch.Tensor:
    heads, _, width = mass.shape
    keep = torch.empty(mass.shape, dtype=torch.bool, device=mass.device)
    longest = blocks.most_blocks * width
    entries, num_warps = threshold_tile(longest)
    coverage_mask_kernel[(heads, len(blocks.spans))](
        mass.contiguous(),
        gamma.contiguous(),
        keep.view(torch.uint8),
        blocks.chunk_start,
        blocks.blocks,
        width,
        min_count,
        min(max_count, longest),
        ROW_TILE=entries,
        TILE=min(entries, TILE),
        num_warps=num_warps,
    )
    return keep
