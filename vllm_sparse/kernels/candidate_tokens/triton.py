"""The best tokens of pages that a first stage keeps, for all rows of a decode step, made of other kernels.

A page of the cache is a small block that holds one KV head. So the first choice, made of rows whose "tokens" are pages,
writes block tables: each list becomes a row of its own, with one KV head, as many tokens as it has candidates, and the
pages as its blocks. The exact scores of those rows and the choice among them are those of any context, and their token
lists are places in the real cache. What is left to do here is to count (`candidate_rows_kernel`), and to find where a
list ends that covers a share of the attention (`covering_budget_kernel`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.candidate_tokens.reference import COVERAGE_UNITS
from vllm_sparse.kernels.common.triton import ordered_scores, row_threshold, score_of, threshold_tile
from vllm_sparse.kernels.token_scores.triton import token_scores_of_rows
from vllm_sparse.kernels.top_tokens import top_tokens
from vllm_sparse.step.rows import DecodeRows, RowScores, TokenLists, padded_rows

UNITS = tl.constexpr(COVERAGE_UNITS)
TILE = 4096
# Scores of a list that a program holds in registers, each as a key and as a mass.
MOST_ROW_ENTRIES = 16384


@triton.jit
def candidate_rows_kernel(
    context_pointer,
    knob_pointer,
    start_pointer,
    page_context_pointer,
    page_knob_pointer,
    list_context_pointer,
    list_knob_pointer,
    list_start_pointer,
    knob_row_stride,
    KV_HEADS: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    PAGE: tl.constexpr,
):
    """How many pages a row has and keeps as candidates, and how many tokens each of its lists has of them."""
    i_row = tl.program_id(0)
    context = tl.load(context_pointer + i_row)
    p_knob = knob_pointer + i_row * knob_row_stride
    budget, sink, recent = tl.load(p_knob), tl.load(p_knob + 1), tl.load(p_knob + 2)
    factor = tl.load(p_knob + 3)
    pages = tl.cdiv(context, PAGE)
    sink_pages = tl.minimum(tl.cdiv(sink, PAGE), pages)
    first_recent = tl.maximum(tl.maximum(context - tl.maximum(recent, 1), 0) // PAGE, sink_pages)
    budget_pages = tl.cdiv(budget * factor, PAGE)
    kept = tl.minimum(tl.maximum(budget_pages, sink_pages + pages - first_recent), pages)
    tl.store(page_context_pointer + i_row, pages)
    tl.store(page_knob_pointer + i_row * 3, budget_pages)
    tl.store(page_knob_pointer + i_row * 3 + 1, sink_pages)
    tl.store(page_knob_pointer + i_row * 3 + 2, pages - first_recent)

    # The last page, which may be short, is always kept.
    tokens = tl.where(context > 0, kept * PAGE - (pages * PAGE - context), 0)
    o_head = tl.arange(0, HEAD_TILE)
    exists = o_head < KV_HEADS
    o_list = i_row * KV_HEADS + o_head
    b_zero = tl.zeros([HEAD_TILE], tl.int32)
    tl.store(list_context_pointer + o_list, b_zero + tokens, mask=exists)
    # Rows that keep no more candidates than they read, read them all.
    tl.store(list_knob_pointer + o_list * 3, b_zero + tl.where(factor == 1, tokens, budget), mask=exists)
    tl.store(list_knob_pointer + o_list * 3 + 1, b_zero + sink, mask=exists)
    tl.store(list_knob_pointer + o_list * 3 + 2, b_zero + recent, mask=exists)
    # A list has room for a score of each token of the row.
    start = tl.load(start_pointer + i_row) * KV_HEADS
    tl.store(list_start_pointer + o_list, start + o_head.to(tl.int64) * context, mask=exists)


@triton.jit
def covering_budget_kernel(
    score_pointer,
    start_pointer,
    context_pointer,
    row_knob_pointer,
    list_knob_pointer,
    row_knob_stride,
    kv_heads,
    GROUP: tl.constexpr,
    ROW_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Lower a list's budget to the fewest tokens that hold the row's share of the attention, the forced ones'
    included."""
    i_list = tl.program_id(0)
    context = tl.load(context_pointer + i_list)
    coverage = tl.load(row_knob_pointer + (i_list // kv_heads) * row_knob_stride + 4)
    if (context == 0) | (coverage >= UNITS):
        return
    p_knob = list_knob_pointer + i_list * 3
    budget, sink, recent = tl.load(p_knob), tl.load(p_knob + 1), tl.load(p_knob + 2)
    sink = tl.minimum(sink, context)
    first_recent = tl.maximum(context - tl.maximum(recent, 1), sink)
    p_score = score_pointer + tl.load(start_pointer + i_list)
    b_forced = tl.zeros([TILE], tl.float32)
    for first in range(0, context, TILE):
        o_token = first + tl.arange(0, TILE)
        forced = (o_token < context) & ((o_token < sink) | (o_token >= first_recent))
        b_forced += tl.exp(tl.load(p_score + o_token, mask=forced, other=float("-inf")))
    # The probabilities of each of the group's heads sum to 1.
    target = coverage.to(tl.float32) * (GROUP / UNITS) - tl.sum(b_forced)
    count = sink + context - first_recent
    if target > 0:
        threshold, total = row_threshold(p_score, sink, first_recent, target, True, ROW_TILE, TILE, LOGARITHMS=True)
        above, reaching = 0, 0
        for first in range(0, context, TILE):
            o_token = first + tl.arange(0, TILE)
            competes = (o_token >= sink) & (o_token < first_recent)
            b_key = ordered_scores(p_score, o_token, competes)
            above += tl.sum((competes & (b_key > threshold)).to(tl.int32))
            reaching += tl.sum((competes & (b_key >= threshold)).to(tl.int32))
        # Of the tokens equal to the threshold as many as the rest of the share needs; all if the row does not reach it.
        value = tl.exp(score_of(threshold))
        equal = tl.where(value > 0, tl.ceil((target - total) / tl.maximum(value, 1e-38)), context)
        count += above + tl.minimum(tl.maximum(equal, 1.0), reaching - above).to(tl.int32)
    tl.store(p_knob, tl.minimum(budget, count))


@dataclass(frozen=True)
class CandidateRoom:
    """What the lists of candidates are sized by, for all rows.

    Attributes:
        starts: int64 ``[rows]`` first token of each row's room for scores, as in `RowsPlace`.
        capacity_tokens: tokens that there is room for.
        most_factor: largest factor of a row.
        covers: some row may have a coverage below 1.
    """

    starts: torch.Tensor
    capacity_tokens: int
    most_factor: int
    covers: bool


def best_candidates(
    scores: RowScores, rows: DecodeRows, knobs: torch.Tensor, room: CandidateRoom, lists: TokenLists
) -> None:
    """Keep each row's best pages as candidates, and write the best tokens among them; for CUDA graphs.

    As `reference.best_candidates` chooses for pages of one token among the candidates of `top_pages`. While it runs it
    takes four bytes per query head and token for which there is room.

    Args:
        scores: of the rows' pages.
        rows: the rows. Those with a context of 0 keep their lists.
        knobs: int32 ``[rows, 5]`` the fields of each row's `TokenBudget`; how many times the budget its candidates are,
            where 1 reads them all, in whole pages; and its coverage in `COVERAGE_UNITS`.
        room: for scores and candidates.
        lists: written; at least as wide as the largest budget and two pages.
    """
    count, query_heads, head_size = rows.query.shape
    blocks, kv_heads, block_size, _ = rows.kv_cache.shape
    page, device = scores.unit_tokens, rows.query.device
    count_lists, group = count * kv_heads, query_heads // kv_heads

    def integers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    page_contexts, page_knobs = integers(count), integers(count, 3)
    list_contexts, list_knobs = integers(count_lists), integers(count_lists, 3)
    list_starts = integers(count_lists, dtype=torch.int64)
    candidate_rows_kernel[(count,)](
        rows.seq_lens,
        knobs,
        room.starts,
        page_contexts,
        page_knobs,
        list_contexts,
        list_knobs,
        list_starts,
        knobs.stride(0),
        KV_HEADS=kv_heads,
        HEAD_TILE=triton.next_power_of_2(kv_heads),
        PAGE=page,
        num_warps=1,
    )
    most_pages = triton.cdiv(room.most_factor * lists.slots.shape[1], page) + 2
    candidates = TokenLists(integers(count_lists, most_pages), integers(count_lists))
    paged = rows.kv_cache.view(blocks, kv_heads, block_size // page, -1)
    pages = replace(rows, kv_cache=paged, seq_lens=page_contexts)
    top_tokens(replace(scores, unit_tokens=1), pages, page_knobs, candidates)

    list_rows = DecodeRows(
        rows.query.reshape(count_lists, group, head_size),
        rows.kv_cache.view(-1, 1, page, rows.kv_cache.shape[3]),
        candidates.slots,
        list_contexts,
        rows.scale,
    )
    capacity = room.capacity_tokens * kv_heads
    padded_lists = padded_rows(count) * kv_heads
    exact = token_scores_of_rows(list_rows, list_starts, capacity, sum_heads=True, padded_lists=padded_lists)
    if room.covers:
        entries, num_warps = threshold_tile(min(most_pages * page, MOST_ROW_ENTRIES))
        covering_budget_kernel[(count_lists,)](
            exact.values,
            exact.starts,
            list_contexts,
            knobs,
            list_knobs,
            knobs.stride(0),
            kv_heads,
            GROUP=group,
            ROW_TILE=entries,
            TILE=min(entries, TILE),
            num_warps=num_warps,
        )
    top_tokens(exact, list_rows, list_knobs, lists)
