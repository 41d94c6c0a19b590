"""The best units of decode rows as token lists, in Triton: one program per list, a radix select over its scores.

The threshold is found in three digits, the highest first. Each digit comes from a histogram over the entries that agree
with the threshold in the digits before. A last pass writes the list in ascending order. So a list's scores are read
four times, from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.common.triton import ordered_scores
from vllm_sparse.step.rows import DecodeRows, RowScores, TokenLists

TILE = 4096
BINS = tl.constexpr(2048)


@triton.jit
def _digit(b_key, DIGIT: tl.constexpr):
    """A digit of a key of `ordered_scores`, in the keys' order; the three digits have 11, 11 and 10 bits."""
    if DIGIT == 0:
        b_digit = (b_key >> 21) + 1024
    elif DIGIT == 1:
        b_digit = (b_key >> 10) & 2047
    else:
        b_digit = b_key & 1023
    return b_digit


# Not specialised, as the kernels that score are not: specialising would compile in the middle of serving.
@triton.jit(do_not_specialize=["head_stride"], do_not_specialize_on_alignment=["block_table_pointer"])
def top_tokens_kernel(
    score_pointer,
    start_pointer,
    context_pointer,
    knob_pointer,
    block_table_pointer,
    slot_pointer,
    kept_pointer,
    head_stride,
    knob_row_stride,
    table_row_stride,
    width,
    kv_heads,
    UNIT: tl.constexpr,
    CACHE_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    i_list = tl.program_id(0)
    i_row = i_list // kv_heads
    i_head = i_list % kv_heads
    context = tl.load(context_pointer + i_row)
    if context == 0:
        return
    budget = tl.load(knob_pointer + i_row * knob_row_stride)
    sink = tl.load(knob_pointer + i_row * knob_row_stride + 1)
    recent = tl.load(knob_pointer + i_row * knob_row_stride + 2)
    units = tl.cdiv(context, UNIT)
    sink_units = tl.minimum(tl.cdiv(sink, UNIT), units)
    first_recent = tl.maximum(tl.maximum(context - tl.maximum(recent, 1), 0) // UNIT, sink_units)
    forced = sink_units + units - first_recent
    wanted = tl.minimum(tl.maximum(tl.cdiv(budget, UNIT), forced), units) - forced
    p_score = score_pointer + tl.load(start_pointer + i_row) + i_head.to(tl.int64) * head_stride

    # The digits of the least key kept, and how many of the keys that agree with all of them are kept. Where no unit is
    # wanted, each digit is the largest possible, and no key is above the threshold.
    threshold = tl.full([], 0, tl.int32)
    remaining = wanted
    o_bin = tl.arange(0, BINS)
    for digit in tl.static_range(3):
        b_count = tl.zeros([BINS], tl.int32)
        for first in range(sink_units, first_recent, TILE):
            o_unit = first + tl.arange(0, TILE)
            competes = o_unit < first_recent
            b_key = ordered_scores(p_score, o_unit, competes)
            if digit == 1:
                competes = competes & (b_key >> 21 == threshold >> 21)
            elif digit == 2:
                competes = competes & (b_key >> 10 == threshold >> 10)
            b_count += tl.histogram(_digit(b_key, digit), BINS, mask=competes)
        b_reaching = tl.sum(b_count, axis=0) - tl.cumsum(b_count, axis=0) + b_count
        chosen = tl.max(tl.where(b_reaching >= remaining, o_bin, 0), axis=0)
        remaining -= tl.sum(tl.where(o_bin == chosen, b_reaching - b_count, 0), axis=0)
        if digit == 0:
            threshold = (chosen - 1024) << 21
        elif digit == 1:
            threshold = threshold | (chosen << 10)
        else:
            threshold = threshold | chosen

    p_table = block_table_pointer + i_row.to(tl.int64) * table_row_stride
    p_slot = slot_pointer + i_list.to(tl.int64) * width
    o_token = tl.arange(0, UNIT)
    written = tl.full([], 0, tl.int32)
    equal = tl.full([], 0, tl.int32)
    for first in range(0, units, TILE):
        o_unit = first + tl.arange(0, TILE)
        competes = (o_unit >= sink_units) & (o_unit < first_recent)
        b_key = ordered_scores(p_score, o_unit, competes)
        b_equal = competes & (b_key == threshold)
        b_before = equal + tl.cumsum(b_equal.to(tl.int32), axis=0)
        b_keep = (competes & (b_key > threshold)) | (b_equal & (b_before <= remaining))
        b_keep = (b_keep | (o_unit < sink_units) | (o_unit >= first_recent)) & (o_unit < units)
        b_rank = written + tl.cumsum(b_keep.to(tl.int32), axis=0) - 1
        o_position = o_unit[:, None] * UNIT + o_token[None, :]
        live = b_keep[:, None] & (o_position < context)
        b_block = tl.load(p_table + o_position // CACHE_BLOCK, mask=live, other=0)
        b_slot = (b_block * kv_heads + i_head) * CACHE_BLOCK + o_position % CACHE_BLOCK
        tl.store(p_slot + b_rank[:, None] * UNIT + o_token[None, :], b_slot, mask=live)
        written += tl.sum(b_keep.to(tl.int32), axis=0)
        equal += tl.sum(b_equal.to(tl.int32), axis=0)
    tl.store(kept_pointer + i_list, (written - 1) * UNIT + (context - 1) % UNIT + 1)


def top_tokens(scores: RowScores, rows: DecodeRows, knobs: torch.Tensor, lists: TokenLists) -> None:
    """Equal to `reference.top_tokens`; arguments as there, units of a power of two of tokens."""
    _, kv_heads, block_size, _ = rows.kv_cache.shape
    assert knobs.stride(1) == 1
    assert lists.slots.stride(1) == 1
    top_tokens_kernel[(rows.query.shape[0] * kv_heads,)](
        scores.values,
        scores.starts,
        rows.seq_lens,
        knobs,
        rows.block_table,
        lists.slots,
        lists.kept_tokens,
        scores.head_stride,
        knobs.stride(0),
        rows.block_table.stride(0),
        lists.slots.stride(0),
        kv_heads,
        UNIT=scores.unit_tokens,
        CACHE_BLOCK=block_size,
        TILE=max(TILE // scores.unit_tokens, 1024),
        num_warps=16,
    )
