"""FlexPrefill's pattern switch and pooled map in Triton: one program per head and prompt chunk, or query block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.step.chunks import PromptBlocks

BLOCK_TILE = 1024


@triton.jit
def _factor(first_query_pointer, last_query_pointer, i_block, scale):
    """What turns scores of pooled queries, means times the root of their number, into logits."""
    length = tl.load(last_query_pointer + i_block) - tl.load(first_query_pointer + i_block) + 1
    return scale / tl.sqrt(length.to(tl.float32))


@triton.jit
def _normaliser(p_score, count, factor, BLOCK_TILE: tl.constexpr):
    """Logarithm of the sum of exponentials of a row's first `count` logits, of which there is one at least."""
    maximum = float("-inf")
    total = 0.0
    for start in range(0, count, BLOCK_TILE):
        o_block = start + tl.arange(0, BLOCK_TILE)
        b_logit = tl.load(p_score + o_block, mask=o_block < count, other=0.0) * factor
        b_logit = tl.where(o_block < count, b_logit, float("-inf"))
        larger = tl.maximum(maximum, tl.max(b_logit))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(b_logit - larger))
        maximum = larger
    return maximum + tl.log(total)


# Lengths change with every prompt chunk; specialising on them would compile in the middle of serving.
@triton.jit(do_not_specialize=["key_blocks"])
def pooled_distance_kernel(
    score_pointer,
    mass_pointer,
    distance_pointer,
    first_query_pointer,
    last_query_pointer,
    key_blocks,
    scale,
    GUARD_ZEROS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TILE: tl.constexpr,
):
    i_chunk = tl.program_id(1)
    i_row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + i_chunk
    # The last sampled query is the context's last.
    count = tl.load(last_query_pointer + i_chunk) // BLOCK + 1
    factor = _factor(first_query_pointer, last_query_pointer, i_chunk, scale)
    p_score = score_pointer + i_row * key_blocks
    normaliser = _normaliser(p_score, count, factor, BLOCK_TILE)

    divergence = 0.0
    undefined = 0
    for start in range(0, count, BLOCK_TILE):
        o_block = start + tl.arange(0, BLOCK_TILE)
        live = o_block < count
        b_guess = tl.exp(tl.load(p_score + o_block, mask=live, other=0.0) * factor - normaliser)
        b_guess = tl.where(live, b_guess, 0.0)
        b_mass = tl.load(mass_pointer + i_row * key_blocks + o_block, mask=live, other=0.0)
        b_middle = (b_guess + b_mass) / 2
        b_term = tl.where(b_guess > 0, b_guess * tl.log(b_guess / b_middle), 0.0)
        b_term += tl.where(b_mass > 0, b_mass * tl.log(b_mass / b_middle), 0.0)
        divergence += tl.sum(b_term)
        undefined += tl.sum((live & ((b_guess == 0) | (b_mass == 0))).to(tl.int32))
    distance = tl.sqrt(tl.maximum(divergence / 2, 0.0))
    if not GUARD_ZEROS:
        distance = tl.where(undefined > 0, float("inf"), distance)
    tl.store(distance_pointer + i_row, distance)


def pooled_distance(
    scores: torch.Tensor,
    column_mass: torch.Tensor,
    samples: PromptBlocks,
    key_block_tokens: int,
    scale: float,
    guard_zeros: bool,
) -> torch.Tensor:
    """Equal to `reference.pooled_distance` but for rounding; arguments as there."""
    heads, chunks, key_blocks = scores.shape
    distance = torch.empty(heads, chunks, dtype=torch.float32, device=scores.device)
    pooled_distance_kernel[(heads, chunks)](
        scores.contiguous(),
        column_mass.contiguous(),
        distance,
        samples.first_query,
        samples.last_query,
        key_blocks,
        scale,
        GUARD_ZEROS=guard_zeros,
        BLOCK=key_block_tokens,
        BLOCK_TILE=BLOCK_TILE,
        num_warps=4,
    )
    return distance


@triton.jit(do_not_specialize=["key_blocks"])
def pooled_attention_kernel(
    score_pointer,
    attention_pointer,
    first_query_pointer,
    last_query_pointer,
    chunk_pointer,
    chunk_start_pointer,
    key_blocks,
    scale,
    BLOCK: tl.constexpr,
    BLOCK_TILE: tl.constexpr,
):
    i_block = tl.program_id(0)
    o_row = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + i_block) * key_blocks
    p_chunk_start = chunk_start_pointer + tl.load(chunk_pointer + i_block)
    chunk_blocks = tl.load(p_chunk_start + 1) - tl.load(p_chunk_start)
    count = tl.load(last_query_pointer + i_block) // BLOCK + 1
    factor = _factor(first_query_pointer, last_query_pointer, i_block, scale)
    normaliser = _normaliser(score_pointer + o_row, count, factor, BLOCK_TILE)
    for start in range(0, key_blocks, BLOCK_TILE):
        o_block = start + tl.arange(0, BLOCK_TILE)
        in_reach = o_block < count
        b_logit = tl.load(score_pointer + o_row + o_block, mask=in_reach, other=0.0) * factor
        b_weight = tl.where(in_reach, tl.exp(b_logit - normaliser) / chunk_blocks, 0.0)
        tl.store(attention_pointer + o_row + o_block, b_weight, mask=o_block < key_blocks)


def pooled_attention(scores: torch.Tensor, blocks: PromptBlocks, key_block_tokens: int, scale: float) -> torch.Tensor:
    """Equal to `reference.pooled_attention` but for rounding; arguments as there."""
    heads, _, key_blocks = scores.shape
    attention = torch.empty_like(scores)
    pooled_attention_kernel[(blocks.blocks, heads)](
        scores.contiguous(),
        attention,
        blocks.first_query,
        blocks.last_query,
        blocks.chunk,
        blocks.chunk_start,
        key_blocks,
        scale,
        BLOCK=key_block_tokens,
        BLOCK_TILE=BLOCK_TILE,
        num_warps=4,
    )
    return attention
