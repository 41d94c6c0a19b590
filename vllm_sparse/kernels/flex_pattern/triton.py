"""FlexPrefill's pattern switch in Triton: one program per query head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_TILE = 1024


# Lengths change with every prompt chunk; specialising on them would compile in the middle of serving.
@triton.jit(do_not_specialize=["blocks"])
def distance_kernel(
    logit_pointer,
    mass_pointer,
    distance_pointer,
    blocks,
    GUARD_ZEROS: tl.constexpr,
    BLOCK_TILE: tl.constexpr,
):
    i_head = tl.program_id(0)
    p_logit = logit_pointer + i_head * blocks
    maximum = float("-inf")
    total = 0.0
    for start in range(0, blocks, BLOCK_TILE):
        o_block = start + tl.arange(0, BLOCK_TILE)
        b_logit = tl.load(p_logit + o_block, mask=o_block < blocks, other=float("-inf"))
        larger = tl.maximum(maximum, tl.max(b_logit))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(b_logit - larger))
        maximum = larger
    normaliser = maximum + tl.log(total)

    divergence = 0.0
    undefined = 0
    for start in range(0, blocks, BLOCK_TILE):
        o_block = start + tl.arange(0, BLOCK_TILE)
        live = o_block < blocks
        b_guess = tl.exp(tl.load(p_logit + o_block, mask=live, other=float("-inf")) - normaliser)
        b_mass = tl.load(mass_pointer + i_head * blocks + o_block, mask=live, other=0.0)
        b_middle = (b_guess + b_mass) / 2
        b_term = tl.where(b_guess > 0, b_guess * tl.log(b_guess / b_middle), 0.0)
        b_term += tl.where(b_mass > 0, b_mass * tl.log(b_mass / b_middle), 0.0)
        divergence += tl.sum(b_term)
        undefined += tl.sum((live & ((b_guess == 0) | (b_mass == 0))).to(tl.int32))
    distance = tl.sqrt(tl.maximum(divergence / 2, 0.0))
    if not GUARD_ZEROS:
        distance = tl.where(undefined > 0, float("inf"), distance)
    tl.store(distance_pointer + i_head, distance)


def distance(logits: torch.Tensor, mass: torch.Tensor, guard_zeros: bool) -> torch.Tensor:
    """Equal to `reference.distance`; arguments as there."""
    heads, blocks = logits.shape
    found = torch.empty(heads, dtype=torch.float32, device=logits.device)
    distance_kernel[(heads,)](
        logits.contiguous(),
        mass.contiguous(),
        found,
        blocks,
        GUARD_ZEROS=guard_zeros,
        BLOCK_TILE=BLOCK_TILE,
        num_warps=4,
    )
    return found
