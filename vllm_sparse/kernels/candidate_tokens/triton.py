"""The best tokens of pages that a first stage keeps, for all rows of a decode step: one launch for the second stage.

The first stage's choice is that of any page scores, with the budget of the candidates (`top_tokens`), and lists places
of tokens in the cache. Here the programs of a list share its candidates: each stores products of its keys with the
queries, and the last one to finish turns them into scores, finds where the list ends and writes it. That saves three
launches, each of which would wait for the one before it. With four query heads per KV head of 128 channels a candidate
takes 256 bytes of key, 4 of its place in the cache and 16 of products, which come back from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.candidate_tokens.memory import CandidateMemory
from vllm_sparse.kernels.candidate_tokens.reference import COVERAGE_UNITS
from vllm_sparse.kernels.common.triton import (
    LEAST_KEY,
    chosen_entries,
    ordered_scores,
    product_tile,
    row_threshold,
    score_of,
)
from vllm_sparse.kernels.top_tokens import top_tokens
from vllm_sparse.step.rows import DecodeRows, RowScores, TokenLists, padded_rows

UNITS = tl.constexpr(COVERAGE_UNITS)
# Most keys that a program reads at once, and most numbers of them, for which it has registers and shared memory.
KEY_TILE, KEY_NUMBERS = 128, 128 * 128
# Two programs of eight warps per multiprocessor of an H200.
PROGRAMS = 2 * 132
# Scores of a list that its last program holds in registers. It reads those of a longer list again, from its L1 cache.
ROW_TILE, SCORE_TILE = 8192, 2048


@triton.jit
def _store_scores(p_product, p_partial, count, width, SPLITS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr):
    """Logarithms of the probabilities that the query heads of a group give each candidate, summed.

    Args:
        p_product: the first head's products, which scores replace; another head's follow `width` numbers later.
        p_partial: of each head and split, the largest product and the sum of exponentials less it.
        count: candidates.
        width: of the products.
    """
    o_split = tl.arange(0, SPLITS)
    for first in range(0, count, TILE):
        o_token = first + tl.arange(0, TILE)
        live = o_token < count
        b_score = tl.full([TILE], float("-inf"), tl.float32)
        for member in tl.static_range(GROUP):
            b_most = tl.load(p_partial + (member * SPLITS + o_split) * 2)
            most = tl.max(b_most, axis=0)
            total = tl.sum(tl.load(p_partial + (member * SPLITS + o_split) * 2 + 1) * tl.exp(b_most - most), axis=0)
            b_product = tl.load(p_product + member * width + o_token, mask=live, other=0.0)
            b_logarithm = (b_product - most) - tl.log(total)
            b_larger = tl.maximum(b_score, b_logarithm)
            b_score = b_larger + tl.log(1.0 + tl.exp(tl.minimum(b_score, b_logarithm) - b_larger))
        tl.store(p_product + o_token, b_score, mask=live)
    # What follows reads scores that other threads have written.
    tl.debug_barrier()


@triton.jit
def _covering(
    p_score, count, sink, first_recent, coverage, GROUP: tl.constexpr, ROW_TILE: tl.constexpr, TILE: tl.constexpr
):
    """Where a list ends that holds a share of the attention, the forced tokens' included.

    Returns:
        The key of `ordered_scores` of the last token that competes, how many keys are above it, and how many tokens
        that compete are kept.
    """
    b_forced = tl.zeros([TILE], tl.float32)
    for first in range(0, count, TILE):
        o_token = first + tl.arange(0, TILE)
        forced = (o_token < count) & ((o_token < sink) | (o_token >= first_recent))
        b_forced += tl.exp(tl.load(p_score + o_token, mask=forced, other=float("-inf")))
    # The probabilities of each of the group's heads sum to 1.
    target = coverage.to(tl.float32) * (GROUP / UNITS) - tl.sum(b_forced)
    # No key is above the largest integer.
    threshold, above, kept = 0x7FFFFFFF, 0, 0
    if target > 0:
        threshold, total = row_threshold(p_score, sink, first_recent, target, True, ROW_TILE, TILE, LOGARITHMS=True)
        reaching = 0
        for first in range(0, count, TILE):
            o_token = first + tl.arange(0, TILE)
            competes = (o_token >= sink) & (o_token < first_recent)
            b_key = ordered_scores(p_score, o_token, competes)
            above += tl.sum((competes & (b_key > threshold)).to(tl.int32))
            reaching += tl.sum((competes & (b_key >= threshold)).to(tl.int32))
        # Of the tokens equal to the threshold as many as the rest of the share needs; all if the row does not reach it.
        value = tl.exp(score_of(threshold))
        equal = tl.where(value > 0, tl.ceil((target - total) / tl.maximum(value, 1e-38)), count)
        kept = above + tl.minimum(tl.maximum(equal, 1.0), reaching - above).to(tl.int32)
    return threshold, above, kept


# Steps outside of graphs may have lists of other widths; specialising on them would compile in the middle of serving.
@triton.jit(do_not_specialize=["width", "list_width"])
def best_candidates_kernel(
    query_pointer,
    cache_pointer,
    context_pointer,
    knob_pointer,
    candidate_pointer,
    count_pointer,
    product_pointer,
    partial_pointer,
    arrived_pointer,
    slot_pointer,
    kept_pointer,
    scale,
    width,
    list_width,
    knob_row_stride,
    query_row_stride,
    query_head_stride,
    cache_token_stride,
    kv_heads,
    COVERS: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    SCORE_TILE: tl.constexpr,
):
    i_list = tl.program_id(0)
    i_split = tl.program_id(1)
    i_row = i_list // kv_heads
    if tl.load(context_pointer + i_row) == 0:
        return
    count = tl.load(count_pointer + i_list)
    o_member = tl.arange(0, GROUP_TILE)
    o_dim = tl.arange(0, HEAD_TILE)
    in_group, in_head = o_member < GROUP, o_dim < HEAD_SIZE
    o_query_head = i_list % kv_heads * GROUP + o_member
    p_query = query_pointer + i_row.to(tl.int64) * query_row_stride + o_query_head[:, None] * query_head_stride
    b_query = tl.load(p_query + o_dim[None, :], mask=in_group[:, None] & in_head[None, :], other=0.0)
    p_candidate = candidate_pointer + i_list.to(tl.int64) * width
    p_product = product_pointer + i_list.to(tl.int64) * GROUP * width
    p_partial = partial_pointer + i_list.to(tl.int64) * GROUP * SPLITS * 2

    tiles = tl.cdiv(count, KEY_TILE)
    tiles_of_split = tl.cdiv(tiles, SPLITS)
    first_tile = i_split * tiles_of_split
    b_most = tl.full([GROUP_TILE], float("-inf"), tl.float32)
    b_sum = tl.zeros([GROUP_TILE], tl.float32)
    for i_tile in range(first_tile, tl.minimum(first_tile + tiles_of_split, tiles)):
        o_token = i_tile * KEY_TILE + tl.arange(0, KEY_TILE)
        live = o_token < count
        b_place = tl.load(p_candidate + o_token, mask=live, other=0).to(tl.int64)
        p_key = cache_pointer + b_place[:, None] * cache_token_stride + o_dim[None, :]
        b_key = tl.load(p_key, mask=live[:, None] & in_head[None, :], other=0.0)
        # "ieee", because Triton would round float32 inputs to TF32.
        b_product = tl.dot(b_query, tl.trans(b_key), input_precision="ieee") * scale
        p_products = p_product + o_member[:, None] * width + o_token[None, :]
        tl.store(p_products, b_product, mask=in_group[:, None] & live[None, :])
        b_product = tl.where(live[None, :], b_product, float("-inf"))
        b_more = tl.maximum(b_most, tl.max(b_product, axis=1))
        b_sum = b_sum * tl.exp(b_most - b_more) + tl.sum(tl.exp(b_product - b_more[:, None]), axis=1)
        b_most = b_more
    # A split without keys stores minus infinity and the sum 0, which change nothing in the merge.
    tl.store(p_partial + (o_member * SPLITS + i_split) * 2, b_most, mask=in_group)
    tl.store(p_partial + (o_member * SPLITS + i_split) * 2 + 1, b_sum, mask=in_group)

    # The barrier and the atomic order the writes: the last program reads what all threads of all programs have written.
    tl.debug_barrier()
    p_arrived = arrived_pointer + i_list
    if tl.atomic_add(p_arrived, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
        tl.store(p_arrived, 0)
        _store_scores(p_product, p_partial, count, width, SPLITS, GROUP, SCORE_TILE)
        p_knob = knob_pointer + i_row * knob_row_stride
        sink = tl.minimum(tl.load(p_knob + 1), count)
        first_recent = tl.maximum(count - tl.maximum(tl.load(p_knob + 2), 1), sink)
        competing = first_recent - sink
        most = tl.minimum(tl.maximum(tl.load(p_knob + 3) - (count - competing), 0), competing)
        threshold, above, wanted = 0x7FFFFFFF, 0, competing
        if COVERS:
            coverage = tl.load(p_knob + 4)
            if coverage < UNITS:
                threshold, above, wanted = _covering(
                    p_product, count, sink, first_recent, coverage, GROUP, ROW_TILE, SCORE_TILE
                )
        if wanted > most:
            wanted = most
            threshold, above = row_threshold(p_product, sink, first_recent, wanted, False, ROW_TILE, SCORE_TILE)
        elif wanted == competing:
            # Every key is above the least integer.
            threshold, above = LEAST_KEY, competing

        p_slot = slot_pointer + i_list.to(tl.int64) * list_width
        written = 0
        # Of equal scores the first win.
        equal_left = wanted - above
        for first in range(0, count, SCORE_TILE):
            o_token = first + tl.arange(0, SCORE_TILE)
            competes = (o_token >= sink) & (o_token < first_recent)
            b_key = ordered_scores(p_product, o_token, competes)
            b_equal = (competes & (b_key == threshold)).to(tl.int32)
            b_chosen, equal_left = chosen_entries(b_key, b_equal, threshold, equal_left)
            b_kept = (o_token < count) & ((competes & b_chosen) | ~competes)
            b_rank = written + tl.cumsum(b_kept.to(tl.int32), axis=0) - 1
            tl.store(p_slot + b_rank, tl.load(p_candidate + o_token, mask=b_kept, other=0), mask=b_kept)
            written += tl.sum(b_kept.to(tl.int32))
        tl.store(kept_pointer + i_list, written)


def best_candidates(
    scores: RowScores,
    rows: DecodeRows,
    knobs: torch.Tensor,
    memory: CandidateMemory,
    lists: TokenLists,
    most_factor: int,
    covers: bool,
) -> None:
    """Keep each row's best pages as candidates, and write the best tokens among them; for CUDA graphs.

    As `reference.best_candidates` chooses for pages of one token among the candidates of `top_pages`. While it runs it
    takes, for each list, four bytes per candidate that there is room for, and four per query head and candidate.

    Args:
        scores: of the rows' pages.
        rows: the rows. Those with a context of 0 keep their lists.
        knobs: int32 ``[rows, 5]`` tokens of the pages that a row keeps as candidates, first tokens and last tokens that
            it always reads, most tokens that it reads, and its coverage in `COVERAGE_UNITS`.
        memory: for at least as many lists.
        lists: written; at least as wide as the largest budget and two pages.
        most_factor: how many times as many candidates as a list has room for there may be.
        covers: some row may have a coverage below 1.
    """
    count, query_heads, head_size = rows.query.shape
    kv_heads = rows.kv_cache.shape[1]
    count_lists, group = count * kv_heads, query_heads // kv_heads
    page, device = scores.unit_tokens, rows.query.device
    assert count_lists <= memory.arrived.shape[0], "kernels would write past the memory"
    # A token's place times the stride of a token is where its key lies.
    assert rows.kv_cache.is_contiguous()
    assert rows.query.stride(2) == 1

    width = (triton.cdiv(most_factor * lists.slots.shape[1], page) + 2) * page
    candidates = TokenLists(
        torch.empty(count_lists, width, dtype=torch.int32, device=device),
        torch.empty(count_lists, dtype=torch.int32, device=device),
    )
    top_tokens(scores, rows, knobs, candidates)

    # A power of two, so that most batch sizes share a compiled kernel.
    splits = triton.next_power_of_2(max(PROGRAMS // (padded_rows(count) * kv_heads), 1))
    products = torch.empty(count_lists, group, width, dtype=torch.float32, device=device)
    partials = torch.empty(count_lists, group, splits, 2, dtype=torch.float32, device=device)
    head_tile = product_tile(head_size)
    best_candidates_kernel[(count_lists, splits)](
        rows.query,
        rows.kv_cache,
        rows.seq_lens,
        knobs,
        candidates.slots,
        candidates.kept_tokens,
        products,
        partials,
        memory.arrived,
        lists.slots,
        lists.kept_tokens,
        rows.scale,
        width,
        lists.slots.stride(0),
        knobs.stride(0),
        rows.query.stride(0),
        rows.query.stride(1),
        rows.kv_cache.stride(2),
        kv_heads,
        COVERS=covers,
        SPLITS=splits,
        GROUP=group,
        GROUP_TILE=product_tile(group),
        HEAD_SIZE=head_size,
        HEAD_TILE=head_tile,
        KEY_TILE=keys_at_once(head_tile),
        ROW_TILE=ROW_TILE,
        SCORE_TILE=SCORE_TILE,
        num_warps=8,
        num_stages=3,
    )


def keys_at_once(head_tile: int) -> int:
    """Keys that a program reads at once."""
    return max(min(KEY_TILE, KEY_NUMBERS // head_tile), 16)
