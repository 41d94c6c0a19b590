"""FlexPrefill's pattern switch in Triton: one program a query head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_TILE, ROW_TILE = 64, 32


# Lengths change with every chunk; specialising on them would compile in the middle of serving.
@triton.jit(do_not_specialize=["rows", "blocks"])
def pooled_distance_kernel(
    sample_pointer,
    key_mean_pointer,
    column_pointer,
    logit_pointer,
    distance_pointer,
    rows,
    blocks,
    scale,
    sample_row_stride,
    sample_head_stride,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    BLOCK_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    GUARD_ZEROS: tl.constexpr,
):
    i_head = tl.program_id(0)
    o_dim = tl.arange(0, HEAD_TILE)
    in_head = o_dim < HEAD_SIZE
    b_pooled = tl.zeros([HEAD_TILE], dtype=tl.float32)
    for start in range(0, rows, ROW_TILE):
        o_row = start + tl.arange(0, ROW_TILE)
        p_sample = sample_pointer + o_row[:, None] * sample_row_stride + i_head * sample_head_stride + o_dim[None, :]
        b_sample = tl.load(p_sample, mask=(o_row < rows)[:, None] & in_head[None, :], other=0.0)
        b_pooled += tl.sum(b_sample.to(tl.float32), axis=0)
    b_pooled = b_pooled * (scale / rows)

    p_mean = key_mean_pointer + (i_head // GROUP) * blocks * HEAD_SIZE
    p_logit = logit_pointer + i_head * blocks
    maximum = float("-inf")
    total = 0.0
    for start in range(0, blocks, BLOCK_TILE):
        o_block = start + tl.arange(0, BLOCK_TILE)
        live = o_block < blocks
        o_mean = o_block[:, None] * HEAD_SIZE + o_dim[None, :]
        b_mean = tl.load(p_mean + o_mean, mask=live[:, None] & in_head[None, :], other=0.0)
        b_logit = tl.where(live, tl.sum(b_mean * b_pooled[None, :], axis=1), float("-inf"))
        tl.store(p_logit + o_block, b_logit, mask=live)
        larger = tl.maximum(maximum, tl.max(b_logit))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(b_logit - larger))
        maximum = larger
    normaliser = maximum + tl.log(total)

    # Other threads wrote what is read now.
    tl.debug_barrier()
    divergence = 0.0
    undefined = 0
    for start in range(0, blocks, BLOCK_TILE):
        o_block = start + tl.arange(0, BLOCK_TILE)
        live = o_block < blocks
        b_guess = tl.exp(tl.load(p_logit + o_block, mask=live, other=float("-inf")) - normaliser)
        b_mass = tl.load(column_pointer + i_head * blocks + o_block, mask=live, other=0.0)
        b_middle = (b_guess + b_mass) / 2
        b_term = tl.where(b_guess > 0, b_guess * tl.log(b_guess / b_middle), 0.0)
        b_term += tl.where(b_mass > 0, b_mass * tl.log(b_mass / b_middle), 0.0)
        divergence += tl.sum(b_term)
        undefined += tl.sum((live & ((b_guess == 0) | (b_mass == 0))).to(tl.int32))
    distance = tl.sqrt(tl.maximum(divergence / 2, 0.0))
    if not GUARD_ZEROS:
        distance = tl.where(undefined > 0, float("inf"), distance)
    tl.store(distance_pointer + i_head, distance)


def pooled_distance(
    sample: torch.Tensor, key_block_mean: torch.Tensor, column_mass: torch.Tensor, scale: float, guard_zeros: bool
) -> torch.Tensor:
    """Equal to `reference.pooled_distance`; arguments as there."""
    rows, heads, head_size = sample.shape
    blocks = key_block_mean.shape[1]
    sample = sample if sample.stride(2) == 1 else sample.contiguous()
    logits = torch.empty(heads, blocks, dtype=torch.float32, device=sample.device)
    distance = torch.empty(heads, dtype=torch.float32, device=sample.device)
    pooled_distance_kernel[(heads,)](
        sample,
        key_block_mean,
        column_mass,
        logits,
        distance,
        rows,
        blocks,
        scale,
        sample.stride(0),
        sample.stride(1),
        GROUP=heads // key_block_mean.shape[0],
        HEAD_SIZE=head_size,
        HEAD_TILE=triton.next_power_of_2(head_size),
        BLOCK_TILE=BLOCK_TILE,
        ROW_TILE=ROW_TILE,
        GUARD_ZEROS=guard_zeros,
        num_warps=4,
    )
    return distance
