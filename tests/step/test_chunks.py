"""Tables of prompt chunks, and what is taken of them."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.chunks import SPANS, some_chunks
from vllm_sparse.step.chunks import last_blocks, parts_within


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
