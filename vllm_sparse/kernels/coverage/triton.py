"""The largest entries of each row that cover a share of it, in Triton: one program a row.

Floats that are not negative order like their bits, so a threshold is found bit by bit from the highest: once for the
sum, which gives a count, and once for the count. Rows stay in the cache meanwhile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 4096


@triton.jit
def _entries(mass_pointer, i_row, start, n, TILE: tl.constexpr):
    """A tile of a row as bits that order like the values; -1 past its end."""
    o_entry = start + tl.arange(0, TILE)
    b_mass = tl.load(mass_pointer + i_row * n + o_entry, mask=o_entry < n, other=0.0)
    return tl.where(o_entry < n, b_mass.to(tl.int32, bitcast=True), -1), b_mass, o_entry


# Lengths change with every chunk; specialising on them would compile in the middle of serving.
@triton.jit(do_not_specialize=["n", "min_count", "max_count"])
def coverage_mask_kernel(
    mass_pointer,
    gamma_pointer,
    keep_pointer,
    n,
    min_count,
    max_count,
    TILE: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    gamma = tl.load(gamma_pointer + i_row)
    count = 0
    if gamma >= 1:
        count = n
    elif gamma > 0:
        # The largest threshold that the entries from it on reach gamma with; 0 if all of them do not.
        threshold = 0
        for bit in range(30, -1, -1):
            candidate = threshold | (1 << bit)
            total = 0.0
            for start in range(0, n, TILE):
                b_bits, b_mass, _ = _entries(mass_pointer, i_row, start, n, TILE)
                total += tl.sum(tl.where(b_bits >= candidate, b_mass, 0.0))
            threshold = tl.where(total >= gamma, candidate, threshold)
        above, total = 0, 0.0
        for start in range(0, n, TILE):
            b_bits, b_mass, _ = _entries(mass_pointer, i_row, start, n, TILE)
            above += tl.sum((b_bits > threshold).to(tl.int32))
            total += tl.sum(tl.where(b_bits > threshold, b_mass, 0.0))
        value = tl.cast(threshold, tl.float32, bitcast=True)
        # Of the entries equal to the threshold, as many as the rest of gamma needs.
        equal = tl.where(value > 0, tl.ceil((gamma - total) / tl.maximum(value, 1e-38)), n)
        count = above + tl.maximum(tl.minimum(equal, n), 1).to(tl.int32)
    count = tl.minimum(tl.minimum(tl.maximum(count, min_count), max_count), n)

    # The largest threshold that at least `count` entries reach.
    threshold = 0
    if count > 0:
        for bit in range(30, -1, -1):
            candidate = threshold | (1 << bit)
            reaching = 0
            for start in range(0, n, TILE):
                b_bits, _, _ = _entries(mass_pointer, i_row, start, n, TILE)
                reaching += tl.sum((b_bits >= candidate).to(tl.int32))
            threshold = tl.where(reaching >= count, candidate, threshold)
    above = 0
    for start in range(0, n, TILE):
        b_bits, _, _ = _entries(mass_pointer, i_row, start, n, TILE)
        above += tl.sum((b_bits > threshold).to(tl.int32))
    left = count - above
    seen = 0
    for start in range(0, n, TILE):
        b_bits, _, o_entry = _entries(mass_pointer, i_row, start, n, TILE)
        b_equal = (b_bits == threshold).to(tl.int32)
        b_rank = tl.cumsum(b_equal, axis=0) + seen
        b_keep = (count > 0) & ((b_bits > threshold) | ((b_equal != 0) & (b_rank <= left)))
        tl.store(keep_pointer + i_row * n + o_entry, b_keep.to(tl.uint8), mask=o_entry < n)
        seen += tl.sum(b_equal)


def coverage_mask(mass: torch.Tensor, gamma: torch.Tensor, min_count: int, max_count: int) -> torch.Tensor:
    """Equal to `reference.coverage_mask` up to float32 rounding of the sums; arguments as there."""
    rows, n = mass.shape
    keep = torch.empty(rows, n, dtype=torch.bool, device=mass.device)
    coverage_mask_kernel[(rows,)](
        mass.contiguous(), gamma, keep.view(torch.uint8), n, min_count, min(max_count, n), TILE=TILE, num_warps=8
    )
    return keep
