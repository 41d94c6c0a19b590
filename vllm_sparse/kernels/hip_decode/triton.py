"""HiP's selection for all decode rows of a layer in Triton: one launch per stage and one that writes the lists.

The launches are the same at every step, so that a CUDA graph can hold them. Where a row's stage is not due, its
programs end after a few loads. At 128K tokens and with the default knobs, the three stages of a (row, KV head) read
about 8 200, 6 100 and 8 200 keys: 5.8 MB at 128 channels in bfloat16; 4 100 in the last stage if it descends. A descent
is a chain of loads that wait for one another, so the time of small batches depends on how many key blocks descend at
once; a stage that reads all keys waits once. Of the programs of a (row, KV head), the last one to finish keeps the best
key blocks, which saves a launch per stage.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.common.triton import load_keys, product_tile, readable
from vllm_sparse.kernels.hierarchical_descent.reference import LEAF_TOKENS
from vllm_sparse.kernels.hierarchical_descent.triton import (
    descent_bounds,
    enter_better_half,
    key_block_start,
    live_key_blocks,
    midpoint_keys,
    store_best_key_blocks,
)
from vllm_sparse.kernels.hip_decode.memory import ROW_KNOBS, STAGE_KNOBS, RowMemory
from vllm_sparse.step.rows import DecodeRows, TokenLists

FIRST_STAGE_KNOB = tl.constexpr(ROW_KNOBS)
KEY_BLOCK_TILE, SELECT_TILE, LIST_TILE = 32, 1024, 1024
# Most leaves that a program reads at once, and most numbers of their keys, for which it has registers.
LEAF_TILE, KEY_NUMBERS = 8, 128 * 128
# Masses that the last program to finish holds in registers.
MASS_NUMBERS = 4096
# Scores that the last program to finish holds in registers, beside what its own descents need.
LARGEST_ROW_TILE = 4096
# Programs of a launch. With few rows, many programs share each; with many rows, few do, so that few are without work.
PROGRAMS = 4096


@triton.jit
def _stage_knobs(p_knob, stage, STAGES: tl.constexpr, STAGE_KNOBS: tl.constexpr):
    """Pointer to the first knob of a stage (`memory.STAGE_KNOBS`)."""
    return p_knob + FIRST_STAGE_KNOB + (STAGES - 1 - stage) * STAGE_KNOBS


@triton.jit
def _search_range(p_knob, context, STAGES: tl.constexpr, STAGE_KNOBS: tl.constexpr, LEAF: tl.constexpr):
    """First token of a row's search range and the token after it, as `search_start` and `search_end` in PyTorch."""
    # The first stage that the row has: a row with fewer stages holds zeros for those before.
    first_refresh = 0
    for stage in tl.static_range(STAGES):
        refresh = tl.load(_stage_knobs(p_knob, stage, STAGES, STAGE_KNOBS) + 2)
        first_refresh = tl.where(first_refresh == 0, refresh, first_refresh)
    begin = tl.cdiv(tl.load(p_knob), LEAF) * LEAF
    last_search = context - context % tl.maximum(first_refresh, 1)
    return begin, tl.maximum(last_search - 1 - tl.load(p_knob + 1), 0)


@triton.jit
def _store_masses(
    cache_pointer,
    p_table,
    p_mass,
    b_query,
    i_head,
    start,
    end,
    o_key_block,
    exists,
    o_dim,
    in_head,
    key_block_tokens,
    scale,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    MEMBERS: tl.constexpr,
    CACHE_BLOCK: tl.constexpr,
    LEAF: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    LEAF_TILE: tl.constexpr,
):
    """Logarithm of the summed exponentials of each query head's products with all keys of some key blocks.

    They are stored at ``p_mass + key_block * MEMBERS + member``.
    """
    stop = tl.minimum(start + key_block_tokens, end)
    b_most = tl.full([LEAF_TILE, QUERY_TILE], float("-inf"), tl.float32)
    b_sum = tl.zeros([LEAF_TILE, QUERY_TILE], tl.float32)
    for offset in range(0, key_block_tokens, LEAF):
        position = start[:, None] + offset + tl.arange(0, LEAF)[None, :]
        live = exists[:, None] & (position < stop[:, None])
        b_key = load_keys(
            cache_pointer,
            p_table,
            tl.reshape(position, [LEAF_TILE * LEAF]),
            tl.reshape(live, [LEAF_TILE * LEAF]),
            i_head,
            o_dim,
            in_head,
            cache_block_stride,
            cache_head_stride,
            cache_token_stride,
            CACHE_BLOCK,
        )
        # "ieee", because Triton would round float32 inputs to TF32.
        b_product = tl.dot(b_key, b_query, input_precision="ieee") * scale
        b_product = tl.reshape(b_product, [LEAF_TILE, LEAF, QUERY_TILE])
        b_product = tl.where(live[:, :, None], b_product, float("-inf"))
        # The first leaf of a key block that exists has a live key.
        b_more = tl.maximum(b_most, tl.max(b_product, axis=1))
        b_sum = b_sum * tl.exp(b_most - b_more) + tl.sum(tl.exp(b_product - b_more[:, None, :]), axis=1)
        b_most = b_more
    o_member = tl.arange(0, QUERY_TILE)
    p_mass = p_mass + o_key_block[:, None] * MEMBERS + o_member[None, :]
    tl.store(p_mass, b_most + tl.log(b_sum), mask=exists[:, None] & (o_member < MEMBERS)[None, :])


@triton.jit
def _merge_masses(p_mass, p_score, live, MEMBERS: tl.constexpr, MEMBER_TILE: tl.constexpr, TILE: tl.constexpr):
    """Score each key block by the probability that the query heads give it, summed: its logarithm.

    Each head's probabilities sum to 1 over the `live` key blocks, whose logarithms are at `p_mass`.
    """
    o_member = tl.arange(0, MEMBER_TILE)
    in_group = o_member < MEMBERS
    b_most = tl.full([MEMBER_TILE], float("-inf"), tl.float32)
    b_sum = tl.zeros([MEMBER_TILE], tl.float32)
    for first in range(0, live, TILE):
        o_key_block = first + tl.arange(0, TILE)
        exists = (o_key_block < live)[:, None] & in_group[None, :]
        b_mass = tl.load(p_mass + o_key_block[:, None] * MEMBERS + o_member[None, :], mask=exists, other=float("-inf"))
        # Columns past the group hold 0 instead of minus infinity, whose difference is no number.
        b_more = tl.maximum(b_most, tl.where(in_group, tl.max(b_mass, axis=0), 0.0))
        b_sum = b_sum * tl.exp(b_most - b_more) + tl.sum(tl.exp(b_mass - b_more[None, :]), axis=0)
        b_most = b_more
    b_total = tl.where(in_group, b_most + tl.log(b_sum), 0.0)
    for first in range(0, live, TILE):
        o_key_block = first + tl.arange(0, TILE)
        exists = (o_key_block < live)[:, None] & in_group[None, :]
        b_mass = tl.load(p_mass + o_key_block[:, None] * MEMBERS + o_member[None, :], mask=exists, other=float("-inf"))
        b_share = b_mass - b_total[None, :]
        b_largest = tl.max(b_share, axis=1)
        b_score = b_largest + tl.log(tl.sum(tl.exp(b_share - b_largest[:, None]), axis=1))
        tl.store(p_score + o_key_block, b_score, mask=o_key_block < live)
    # What follows reads scores that other threads have written.
    tl.debug_barrier()


@triton.jit(
    do_not_specialize=["slots", "list_width", "score_width", "table_row_stride"],
    do_not_specialize_on_alignment=["block_table_pointer"],
)
def stage_kernel(
    query_pointer,
    cache_pointer,
    block_table_pointer,
    context_pointer,
    knobs_pointer,
    slot_pointer,
    fresh_pointer,
    seen_pointer,
    key_blocks_pointer,
    score_pointer,
    mass_pointer,
    arrived_pointer,
    slots,
    list_width,
    score_width,
    scale,
    knobs_row_stride,
    slot_stride,
    table_row_stride,
    query_row_stride,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    STAGE: tl.constexpr,
    STAGES: tl.constexpr,
    STAGE_KNOBS: tl.constexpr,
    LEAF: tl.constexpr,
    MEMBERS: tl.constexpr,
    CACHE_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    MEMBER_TILE: tl.constexpr,
    TILE: tl.constexpr,
    LEAF_TILE: tl.constexpr,
    MASS_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    SELECT_TILE: tl.constexpr,
):
    i_head = tl.program_id(1)
    i_row = tl.program_id(2)
    kv_heads = tl.num_programs(1)
    p_knob = knobs_pointer + i_row * knobs_row_stride
    p_stage = _stage_knobs(p_knob, STAGE, STAGES, STAGE_KNOBS)
    context = tl.load(context_pointer + i_row)
    key_block_tokens = tl.load(p_stage)
    # A row that does not take part may hold a slot that does not exist.
    takes_part = (context > 0) & (key_block_tokens > 0)
    slot = tl.load(slot_pointer + i_row * slot_stride, mask=takes_part, other=0).to(tl.int64)
    seen = tl.load(seen_pointer + slot, mask=takes_part, other=0)
    due = (tl.load(fresh_pointer + i_row * slot_stride) != 0) | (seen != context - 1)
    for stage in tl.static_range(STAGE + 1):
        refresh = tl.load(_stage_knobs(p_knob, stage, STAGES, STAGE_KNOBS) + 2)
        due |= (refresh > 0) & (context % tl.maximum(refresh, 1) == 0)
    if takes_part & due:
        begin, end = _search_range(p_knob, context, STAGES, STAGE_KNOBS, LEAF)
        kept_key_blocks = tl.load(p_stage + 1) // key_block_tokens
        parent_tokens = 0
        if STAGE > 0:
            parent_tokens = tl.load(p_stage + STAGE_KNOBS)
        first_stage = parent_tokens == 0
        p_kept = key_blocks_pointer + ((STAGE * slots + slot) * kv_heads + i_head) * list_width
        p_parent = p_kept - tl.cast(slots, tl.int64) * kv_heads * list_width
        live = live_key_blocks(p_parent, begin, end, parent_tokens, key_block_tokens, first_stage)
        # Where all key blocks are kept, no score is read.
        scored = tl.where(live > kept_key_blocks, live, 0)

        o_dim = tl.arange(0, HEAD_TILE)
        in_head = o_dim < HEAD_SIZE
        # Rows past the query heads of the KV head repeat the last one, which changes no maximum.
        o_query = i_head * MEMBERS + tl.minimum(tl.arange(0, QUERY_TILE), MEMBERS - 1)
        p_query = query_pointer + i_row.to(tl.int64) * query_row_stride + o_query * HEAD_SIZE
        b_query = tl.trans(tl.load(p_query[:, None] + o_dim[None, :], mask=in_head[None, :], other=0.0))
        p_table = block_table_pointer + i_row.to(tl.int64) * table_row_stride
        p_head = cache_pointer + i_head.to(tl.int64) * cache_head_stride
        i_list = i_row.to(tl.int64) * kv_heads + i_head
        p_score = score_pointer + i_list * score_width
        p_mass = mass_pointer + i_list * score_width * MEMBERS
        # Of the two loops over key blocks one has nothing to do.
        descending = scored
        if STAGE == STAGES - 1:
            descending = tl.where(tl.load(p_knob + 2) != 0, 0, scored)
        is_left = tl.arange(0, 2)[:, None] == 0
        # The binary logarithm of a power of two, from the exponent of its float32.
        steps = (key_block_tokens.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        if STAGE == STAGES - 1:
            for first in range(tl.program_id(0) * LEAF_TILE, scored - descending, tl.num_programs(0) * LEAF_TILE):
                o_key_block = first + tl.arange(0, LEAF_TILE)
                _store_masses(
                    cache_pointer,
                    p_table,
                    p_mass,
                    b_query,
                    i_head,
                    key_block_start(p_parent, o_key_block, live, begin, parent_tokens, key_block_tokens, first_stage),
                    end,
                    o_key_block,
                    o_key_block < live,
                    o_dim,
                    in_head,
                    key_block_tokens,
                    scale,
                    cache_block_stride,
                    cache_head_stride,
                    cache_token_stride,
                    MEMBERS,
                    CACHE_BLOCK,
                    LEAF,
                    QUERY_TILE,
                    LEAF_TILE,
                )
        for first in range(tl.program_id(0) * TILE, descending, tl.num_programs(0) * TILE):
            o_key_block = first + tl.arange(0, TILE)
            exists = o_key_block < live
            start = key_block_start(p_parent, o_key_block, live, begin, parent_tokens, key_block_tokens, first_stage)
            low, high, b_best = descent_bounds(start, end, exists, key_block_tokens, TILE)
            for _ in range(steps):
                middle, p_key = midpoint_keys(
                    p_head, p_table, low, high, is_left, cache_block_stride, cache_token_stride, CACHE_BLOCK, TILE
                )
                b_key = readable(tl.load(p_key[:, None] + o_dim[None, :], mask=in_head[None, :], other=0.0))
                # "ieee", because Triton would round float32 inputs to TF32.
                b_score = tl.max(tl.dot(b_key, b_query, input_precision="ieee"), axis=1)
                low, high, b_best = enter_better_half(b_score, b_best, low, middle, high, is_left, TILE)
            tl.store(p_score + o_key_block, tl.max(b_best, axis=0), mask=exists)

        # The barrier and the atomic order the writes: the last program reads scores that all threads of all programs
        # have written.
        tl.debug_barrier()
        p_arrived = arrived_pointer + i_row * kv_heads + i_head
        if tl.atomic_add(p_arrived, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
            tl.store(p_arrived, 0)
            if STAGE == STAGES - 1:
                # Nothing where a row descends.
                _merge_masses(p_mass, p_score, scored - descending, MEMBERS, MEMBER_TILE, MASS_TILE)
            store_best_key_blocks(
                p_score,
                p_parent,
                p_kept,
                p_kept,
                begin,
                end,
                live,
                parent_tokens,
                key_block_tokens,
                kept_key_blocks,
                first_stage,
                False,
                LEAF,
                ROW_TILE,
                SELECT_TILE,
            )


@triton.jit(
    do_not_specialize=["slots", "list_width", "width", "table_row_stride"],
    do_not_specialize_on_alignment=["block_table_pointer"],
)
def lists_kernel(
    block_table_pointer,
    context_pointer,
    knobs_pointer,
    slot_pointer,
    seen_pointer,
    key_blocks_pointer,
    token_pointer,
    kept_tokens_pointer,
    slots,
    list_width,
    width,
    knobs_row_stride,
    slot_stride,
    table_row_stride,
    STAGES: tl.constexpr,
    STAGE_KNOBS: tl.constexpr,
    LEAF: tl.constexpr,
    CACHE_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    i_tile = tl.program_id(0)
    i_head = tl.program_id(1)
    i_row = tl.program_id(2)
    kv_heads = tl.num_programs(1)
    context = tl.load(context_pointer + i_row)
    if context > 0:
        p_knob = knobs_pointer + i_row * knobs_row_stride
        begin, end = _search_range(p_knob, context, STAGES, STAGE_KNOBS, LEAF)
        key_block_tokens = tl.load(_stage_knobs(p_knob, STAGES - 1, STAGES, STAGE_KNOBS))
        slot = tl.load(slot_pointer + i_row * slot_stride).to(tl.int64)
        p_kept = key_blocks_pointer + (((STAGES - 1) * slots + slot) * kv_heads + i_head) * list_width
        count = tl.load(p_kept)
        # A list holds the sink, the kept key blocks and the window. Only the last key block may reach into the window.
        sink_tokens = tl.minimum(begin, context)
        window_start = tl.maximum(end // LEAF * LEAF, sink_tokens)
        last = tl.load(p_kept + count, mask=count > 0, other=0)
        beyond = tl.where(count > 0, tl.maximum(last + key_block_tokens - window_start, 0), 0)
        chosen_tokens = count * key_block_tokens - beyond
        kept_tokens = sink_tokens + chosen_tokens + context - window_start

        o_token = i_tile * TILE + tl.arange(0, TILE)
        o_chosen = o_token - sink_tokens
        is_chosen = (o_chosen >= 0) & (o_chosen < chosen_tokens)
        first = tl.load(p_kept + 1 + o_chosen // key_block_tokens, mask=is_chosen, other=0)
        position = tl.where(is_chosen, first + o_chosen % key_block_tokens, window_start + o_chosen - chosen_tokens)
        position = tl.where(o_chosen < 0, o_token, position)
        live = o_token < kept_tokens
        p_table = block_table_pointer + i_row.to(tl.int64) * table_row_stride
        physical = tl.load(p_table + position // CACHE_BLOCK, mask=live, other=0)
        token_slot = (physical * kv_heads + i_head) * CACHE_BLOCK + position % CACHE_BLOCK
        i_list = i_row * kv_heads + i_head
        tl.store(token_pointer + i_list.to(tl.int64) * width + o_token, token_slot, mask=live)
        if i_tile == 0:
            tl.store(kept_tokens_pointer + i_list, kept_tokens)
            if i_head == 0:
                tl.store(seen_pointer + slot, context)


def leaves_at_once(head_tile: int) -> int:
    """Leaves that a program reads at once."""
    return min(LEAF_TILE, KEY_NUMBERS // (LEAF_TOKENS * head_tile))


def token_lists(rows: DecodeRows, knobs: torch.Tensor, memory: RowMemory, lists: TokenLists) -> None:
    """Select tokens for all rows; arguments as in the public function."""
    slots, stage_memory, scratch = memory.slots, memory.stages, memory.scratch
    query, cache, table = rows.query, rows.kv_cache, rows.block_table
    count, query_heads, head_size = query.shape
    kv_heads, block_size = cache.shape[1:3]
    if query.stride(2) != 1 or query.stride(1) != head_size:
        query = query.contiguous()
    stages, slot_count, _, list_width = stage_memory.key_blocks.shape
    assert count <= scratch.scores.shape[0], "kernels would write past the scratch"
    assert knobs.stride(1) == 1
    assert slots.stride() == memory.fresh.stride()
    score_width, width = scratch.scores.shape[2], lists.slots.shape[1]
    members = query_heads // kv_heads
    head_tile, member_tile = product_tile(head_size), triton.next_power_of_2(members)
    leaf_tile = leaves_at_once(head_tile)
    # Of the last stage, which may read all keys.
    masses = torch.empty(count, kv_heads, score_width, members, dtype=torch.float32, device=query.device)
    for stage in range(stages):
        tiles = triton.cdiv(score_width, leaf_tile if stage == stages - 1 else KEY_BLOCK_TILE)
        stage_kernel[(min(tiles, triton.cdiv(PROGRAMS, count * kv_heads)), kv_heads, count)](
            query,
            cache,
            table,
            rows.seq_lens,
            knobs,
            slots,
            memory.fresh,
            stage_memory.seq_lens,
            stage_memory.key_blocks,
            scratch.scores,
            masses,
            scratch.arrived,
            slot_count,
            list_width,
            score_width,
            rows.scale,
            knobs.stride(0),
            slots.stride(0),
            table.stride(0),
            query.stride(0),
            cache.stride(0),
            cache.stride(1),
            cache.stride(2),
            STAGE=stage,
            STAGES=stages,
            STAGE_KNOBS=STAGE_KNOBS,
            LEAF=LEAF_TOKENS,
            MEMBERS=members,
            CACHE_BLOCK=block_size,
            HEAD_SIZE=head_size,
            HEAD_TILE=head_tile,
            QUERY_TILE=product_tile(members),
            MEMBER_TILE=member_tile,
            TILE=KEY_BLOCK_TILE,
            LEAF_TILE=leaf_tile,
            MASS_TILE=max(MASS_NUMBERS // member_tile, 16),
            ROW_TILE=min(triton.next_power_of_2(score_width), LARGEST_ROW_TILE),
            SELECT_TILE=SELECT_TILE,
            num_warps=4,
            num_stages=1,
        )
    lists_kernel[(triton.cdiv(width, LIST_TILE), kv_heads, count)](
        table,
        rows.seq_lens,
        knobs,
        slots,
        stage_memory.seq_lens,
        stage_memory.key_blocks,
        lists.slots,
        lists.kept_tokens,
        slot_count,
        list_width,
        width,
        knobs.stride(0),
        slots.stride(0),
        table.stride(0),
        STAGES=stages,
        STAGE_KNOBS=STAGE_KNOBS,
        LEAF=LEAF_TOKENS,
        CACHE_BLOCK=block_size,
        TILE=LIST_TILE,
        num_warps=4,
    )
