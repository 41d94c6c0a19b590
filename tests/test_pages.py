"""Page lists and their translation to addresses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracle import live_pages
from vllm_sparse.kernels.page_list import to_physical
from vllm_sparse.pages import PageList, concatenate, to_logical


@given(
    heads=st.integers(1, 8),
    pages_per_block=st.sampled_from([1, 2, 4, 8]),
    page=st.sampled_from([1, 16, 48]),
    shared_table=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_a_physical_page_holds_the_tokens_of_its_logical_page(
    heads: int, pages_per_block: int, page: int, shared_table: bool, seed: int
) -> None:
    """Checked in a cache whose entries name their own block, head and position."""
    generator = torch.Generator().manual_seed(seed)
    block_size, blocks, rows, width = page * pages_per_block, 9, 6, 5
    cache = torch.arange(blocks * heads * block_size).view(blocks, heads, block_size)
    table = torch.stack([torch.randperm(blocks, generator=generator) for _ in range(rows)]).int()
    if shared_table:
        table = table[0]
    logical = torch.randint(0, blocks * pages_per_block, (rows, width), generator=generator).int()
    row_head = torch.randint(0, heads, (rows,), generator=generator)
    lists = PageList(logical, torch.full((rows,), width * page, dtype=torch.int32), page)
    physical = to_physical(lists, table, row_head, block_size, heads)
    assert physical.dtype == torch.int32
    views = cache.view(-1, page)
    for row in range(rows):
        own = table if shared_table else table[row]
        sequence = cache[own.long(), row_head[row]].flatten()
        for column in range(width):
            start = int(logical[row, column]) * page
            assert torch.equal(views[physical[row, column]], sequence[start : start + page])
        if page == 1:
            # The rows of places that were left over are anything.
            left_over = torch.tensor([[1 << 30, 0]], dtype=torch.int32)
            places = torch.cat([left_over, physical[row : row + 1]], dim=1)
            assert torch.equal(to_logical(places, own, block_size, heads)[0, 2:], logical[row].long())


def test_a_page_must_divide_a_block() -> None:
    lists = PageList(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32), 32)
    with pytest.raises(ValueError, match="page of 32 tokens does not divide a KV-cache block of 48 tokens"):
        to_physical(lists, torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64), 48, 1)


def test_concatenate_keeps_the_live_parts() -> None:
    first = PageList(torch.tensor([[0, 2, 3]]).int(), torch.tensor([33]).int(), 16)
    second = PageList(torch.tensor([[5], [7]]).int(), torch.tensor([1, 16]).int(), 16)
    both = concatenate([first, second])
    assert [live_pages(both, row) for row in range(3)] == [[0, 2, 3], [5], [7]]
    assert both.kept_tokens.tolist() == [33, 1, 16]
    assert concatenate([first]) is first


def test_concatenate_refuses_mixed_page_sizes() -> None:
    lists = [PageList(torch.zeros(1, 1).int(), torch.ones(1).int(), size) for size in (16, 32)]
    with pytest.raises(ValueError, match=r"\[16, 32\]"):
        concatenate(lists)
    with pytest.raises(ValueError, match=r"\[\]"):
        concatenate([])
