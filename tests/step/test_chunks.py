"""Tables of prompt chunks, and what is taken of them."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.chunks import SPANS, Span, some_chunks
from vllm_sparse.step.chunks import PromptBlocks, last_blocks, parts_within, prompt_blocks, stretches


@given(held=st.lists(st.integers(0, 40), min_size=1, max_size=12), most=st.integers(0, 100))
def test_parts_cover_all_chunks_and_hold_no_more_than_they_may(held: list[int], most: int) -> None:
    starts = [0, *itertools.accumulate(held)]
    parts = parts_within(starts, most)
    assert [chunk for part in parts for chunk in part] == list(range(len(held)))
    for part in parts:
        holding = [held[chunk] for chunk in part if held[chunk]]
        assert sum(holding) <= most or len(holding) == 1
        assert holding or not any(held)


def test_the_last_queries_of_each_chunk_are_a_query_block() -> None:
    last = last_blocks(some_chunks(64, "cpu"), 128)
    assert last.starts == tuple(range(len(SPANS) + 1))
    for chunk, span in enumerate(SPANS):
        tokens = min(span.query_tokens, 128)
        assert int(last.first_query[chunk]) == span.seq_len - tokens
        assert int(last.last_query[chunk]) == span.seq_len - 1
        assert int(last.first_token[chunk]) == span.query_start + span.query_tokens - tokens
    assert torch.equal(last.table_row, torch.tensor([span.row for span in SPANS], dtype=torch.int32))


@given(
    sizes=st.lists(st.tuples(st.integers(1, 1500), st.integers(0, 2000)), min_size=1, max_size=4),
    query_block=st.sampled_from([64, 128]),
    every=st.sampled_from([128, 512, 640, 1 << 24]),
)
def test_stretches_hold_the_query_blocks_that_end_between_two_cuts(
    sizes: list[tuple[int, int]], query_block: int, every: int
) -> None:
    spans = [Span(row, 2000 * row, tokens, before + tokens) for row, (tokens, before) in enumerate(sizes)]
    blocks = prompt_blocks(spans, query_block, torch.device("cpu"))
    cut, chunk = stretches(blocks, every)
    _assert_same_tables(cut, blocks)
    assert sorted(set(chunk.tolist())) == list(range(len(spans)))
    assert len(chunk) == len(cut.spans) == len(cut.starts) - 1
    found = set()
    for number, (of_chunk, span) in enumerate(zip(chunk.tolist(), cut.spans, strict=True)):
        rows = slice(*cut.starts[number : number + 2])
        whole, first = spans[of_chunk], int(cut.first_query[rows][0])
        ends = (cut.last_query[rows] // every).tolist()
        assert len(set(ends)) == 1
        assert (of_chunk, ends[0]) not in found, "all of them"
        found.add((of_chunk, ends[0]))
        assert span.seq_len == min((ends[0] + 1) * every, whole.seq_len)
        assert first == span.seq_len - span.query_tokens
        assert span.query_start == int(cut.first_token[rows][0])
        assert (span.row, span.seq_len) == (whole.row, int(cut.seq_len[number]))
        assert int(cut.table_row[number]) == whole.row
        assert cut.chunk[rows].tolist() == [number] * len(ends)
    assert cut.chunk_start.tolist() == list(cut.starts)


def _assert_same_tables(found: PromptBlocks, wanted: PromptBlocks) -> None:
    for name in ("first_query", "last_query", "first_token"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
