"""Compaction of maps into page lists."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracle import live_pages
from vllm_sparse.kernels.page_list import blocks_to_pages, compact_pages


@given(
    context=st.integers(1, 900),
    block=st.sampled_from([32, 64, 128]),
    page=st.sampled_from([1, 16, 32, 48, 64, 128, 160, 256, 300, 512]),
    seed=st.integers(0, 1 << 30),
)
def test_a_page_is_kept_exactly_when_it_overlaps_a_kept_block(context: int, block: int, page: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.rand(3, -(-context // block), generator=generator) < 0.4
    tokens = blocks.repeat_interleave(block, dim=1)[:, :context]
    expected = torch.stack([part.any(1) for part in torch.split(tokens, page, dim=1)], dim=1)
    assert torch.equal(blocks_to_pages(blocks, block, page, context), expected)


@given(pages=st.integers(1, 70), page=st.sampled_from([1, 16, 48, 128]), seed=st.integers(0, 1 << 30))
def test_compaction_lists_the_kept_pages_in_order(pages: int, page: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = 5
    last = torch.randint(0, pages * page, (rows,), generator=generator)
    mask = torch.rand(rows, pages, generator=generator) < 0.5
    mask &= torch.arange(pages) <= (last // page).unsqueeze(1)
    mask[torch.arange(rows), last // page] = True
    lists = compact_pages(mask, last, page)
    for row in range(rows):
        expected = mask[row].nonzero().flatten().tolist()
        assert live_pages(lists, row) == expected
        assert int(lists.kept_tokens[row]) == (len(expected) - 1) * page + int(last[row]) % page + 1
        assert bool((lists.pages[row, len(expected) :] == 0).all())
