"""DHSA's scores and selection against float64 and against plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle
from tests.kernels.test_flex_estimate import Largest
from vllm_sparse.kernels.block_scores import KeyBlocks, PageSelection, best_pages, page_scores, reference


@pytest.mark.parametrize(
    ("query_tokens", "query_block_tokens"), [(1, 128), (127, 64), (128, 128), (1000, 128), (577, 64)]
)
def test_pooled_queries_equal_float64(query_tokens: int, query_block_tokens: int, generator: torch.Generator) -> None:
    query = (torch.randn(query_tokens, 3, 80, generator=generator) + 1).bfloat16()
    pooled = reference.pooled_queries(query, query_block_tokens)
    blocks = torch.split(query.double(), query_block_tokens)
    expected = torch.stack([block.mean(0) * block.shape[0] ** 0.5 for block in blocks], dim=1)
    assert pooled.dtype == torch.float32
    assert pooled.shape == expected.shape
    assert oracle.relative_error(pooled, expected) < 1e-6


@given(heads=st.sampled_from([(1, 1), (4, 1), (7, 7), (8, 2)]), blocks=st.integers(1, 5), seed=st.integers(0, 1 << 30))
def test_page_scores_are_the_largest_of_the_chunks_in_a_page(heads: tuple[int, int], blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    key_blocks, pages = 40, 9
    # Pages that hold one chunk, many, or parts of two; neighbours may share one.
    first = torch.randint(0, key_blocks, (pages,), generator=generator).sort().values.int()
    last = torch.minimum(first + torch.randint(0, 6, (pages,), generator=generator), torch.tensor(key_blocks - 1)).int()
    queries = torch.randn(heads[0], blocks, 33, generator=generator)
    keys = torch.randn(heads[1], key_blocks, 33, generator=generator)
    scores = reference.page_scores(queries, keys, first, last)
    products = torch.einsum("hqd,hcd->hqc", queries.double(), oracle.expand(keys, heads[0]))
    ranges = zip(first.tolist(), last.tolist(), strict=True)
    expected = torch.stack([products[..., low : high + 1].amax(2) for low, high in ranges], dim=2)
    assert oracle.relative_error(scores, expected) < 1e-6


INFINITY = float("inf")
# Few values, so that rows are full of ties; both zeros, which are equal.
VALUES = [-INFINITY, -3e38, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1.0000001, 3e38, INFINITY]


def expected_row(scores: list[float], sink: int, band: int, last: int, budget: int) -> list[bool]:
    """One row in plain Python."""
    forced = {page for page in range(last + 1) if page < sink or page >= band}
    others = sorted(set(range(last + 1)) - forced, key=lambda page: (-scores[page], page))
    chosen = set(others[: max(budget - len(forced), 0)])
    return [page in forced | chosen for page in range(len(scores))]


@given(
    rows=st.lists(st.lists(st.sampled_from(VALUES), min_size=23, max_size=23), min_size=4, max_size=4),
    sink=st.integers(0, 23),
    ends=st.tuples(st.integers(0, 22), st.integers(0, 22)),
    widths=st.tuples(st.integers(0, 22), st.integers(0, 22)),
    budgets=st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
def test_selection_equals_plain_python(
    rows: list[list[float]], sink: int, ends: tuple[int, int], widths: tuple[int, int], budgets: tuple[int, int]
) -> None:
    scores = torch.tensor(rows).view(2, 2, 23)
    bands = [max(end - width, 0) for end, width in zip(ends, widths, strict=True)]
    first, last, most = (torch.tensor(numbers, dtype=torch.int32) for numbers in (bands, ends, budgets))
    kept = reference.select_pages(scores, sink, first, last, most)
    for head in range(2):
        for row in range(2):
            expected = expected_row(scores[head, row].tolist(), sink, bands[row], ends[row], budgets[row])
            assert kept[head, row].tolist() == expected


@given(
    rows=st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.125, 0.25, 0.5, 2.0]), min_size=17, max_size=17), min_size=2),
    sink=st.integers(0, 17),
    end=st.integers(0, 16),
    width=st.integers(0, 16),
    budget=st.integers(0, 20),
    covered_mass=st.sampled_from([0.0, 0.125, 0.3, 1.0, 2.5, 7.0, 100.0]),
)
def test_a_list_ends_where_the_largest_masses_are_enough(
    rows: list[list[float]], sink: int, end: int, width: int, budget: int, covered_mass: float
) -> None:
    """In plain Python: forced pages, and of those that the budget allows the fewest largest with that mass."""
    band = max(end - width, 0)
    masses = torch.tensor(rows).unsqueeze(1)
    first, last, most = (torch.tensor([number], dtype=torch.int32) for number in (band, end, budget))
    kept = reference.select_pages(masses, sink, first, last, most, covered_mass)
    for row, found in zip(rows, kept.squeeze(1).tolist(), strict=True):
        within_budget = expected_row(row, sink, band, end, budget)
        enough: set[int] = set()
        mass = 0.0
        for page in sorted(range(end + 1), key=lambda page: (-max(row[page], 0), page)):
            if mass < covered_mass or not enough:
                enough.add(page)
            mass += max(row[page], 0)
        expected = [
            allowed and (page in enough or page < sink or page >= band) for page, allowed in enumerate(within_budget)
        ]
        assert found == expected


def test_zeros_of_both_signs_tie() -> None:
    end = torch.tensor([3], dtype=torch.int32)
    kept = reference.select_pages(
        torch.tensor([[[-1.0, -0.0, 0.0, 5.0]]]), 0, end, end, torch.tensor([2], dtype=torch.int32)
    )
    assert kept.tolist() == [[[False, True, False, True]]]


def test_selection_of_many_pages_equals_a_stable_sort(generator: torch.Generator) -> None:
    scores = torch.randn(3, 1, 5000, generator=generator).mul(50).round()
    scores[..., -1] = 1000
    end = torch.tensor([4999], dtype=torch.int32)
    kept = reference.select_pages(scores, 0, end, end, torch.tensor([777], dtype=torch.int32))
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :777]
    assert torch.equal(kept, torch.zeros_like(kept).scatter_(-1, order, True))


def test_selection_holds_no_score_per_token() -> None:
    """At 128K, for one head that stands for 32, buffers grow with query blocks times pages, not with tokens."""
    context, query_tokens, head_size = 131072, 8192, 16
    start = torch.arange(0, context + 1, 32)
    key_blocks = KeyBlocks(torch.randn(1, context // 32, head_size), start, 0)
    query = torch.randn(query_tokens, 1, head_size).bfloat16()
    band_start = torch.arange(context - query_tokens, context, 128)
    selection = PageSelection(128, 32, 1, 128)
    with Largest() as largest:
        scores = page_scores(query, key_blocks, context, selection)
        kept = best_pages(scores, band_start, band_start + 127, torch.full((64,), 512), selection)
    assert bool((kept.sum(2) == 512).all())
    # Eight bytes for each pair of a query block and a page, 512 times fewer than pairs of tokens.
    assert 0 < largest.bytes <= 8 * (query_tokens // 128) * (context // 32)


def test_selection_sees_chunks_that_straddle_pages() -> None:
    """A chunk of the best score over parts of three pages brings in all three, and a shorter one in a page its page."""
    context = 320
    start = torch.tensor([0, 40, 100, 140, 150, 300, 320])
    representation = torch.tensor([0.0, 5.0, 1.0, 3.0, 0.0, 0.0]).view(1, 6, 1)
    query = torch.ones(1, 1, 1)
    # Three pages tie for the first places; the lower ones win.
    selection, last = PageSelection(64, 32, 1, 0), torch.tensor([context - 1])
    scores = page_scores(query, KeyBlocks(representation, start, 0), context, selection)
    for budget, expected in ((3, [1, 2, 9]), (4, [1, 2, 3, 9]), (5, [1, 2, 3, 4, 9])):
        kept = best_pages(scores, last, last, torch.tensor([budget]), selection)
        assert kept[0, 0].nonzero().flatten().tolist() == expected


def test_heads_that_share_scores_share_mean_representations(generator: torch.Generator) -> None:
    query, keys = torch.randn(6, 8, 16, generator=generator), torch.randn(2, 5, 16, generator=generator)
    pooled = reference.pooled_queries(query, 64)
    merged = reference.merge_heads(pooled, 2)
    expected = torch.stack([query[:, :4].double().mean((0, 1)), query[:, 4:].double().mean((0, 1))]) * 6**0.5
    assert oracle.relative_error(merged[:, 0], expected) < 1e-6
    assert reference.merge_heads(pooled, 8) is pooled
    assert oracle.relative_error(reference.merge_heads(keys, 1)[0], keys.double().mean(0)) < 1e-6


@given(heads=st.sampled_from([(1, 1), (4, 2)]), seed=st.integers(0, 1 << 30))
def test_scores_of_bounds_are_the_largest_products_that_the_bounds_allow(heads: tuple[int, int], seed: int) -> None:
    """Of the mean query with any key whose numbers lie between them, so with every key of the block too."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(100, heads[0], 20, generator=generator)
    keys = torch.randn(heads[1], 4, 32, 20, generator=generator)
    least, largest = keys.amin(2), keys.amax(2)
    blocks = KeyBlocks(torch.cat((least, largest), dim=2), torch.arange(0, 129, 32), 0)
    scores = page_scores(query, blocks, 128, PageSelection(64, 32, heads[0], 0))
    mean = torch.stack([block.double().sum(0) / block.shape[0] ** 0.5 for block in torch.split(query, 64)], dim=1)
    corner = torch.maximum(
        mean.unsqueeze(2) * oracle.expand(least, heads[0]).unsqueeze(1),
        mean.unsqueeze(2) * oracle.expand(largest, heads[0]).unsqueeze(1),
    ).sum(3)
    assert oracle.relative_error(scores, corner) < 1e-6
    by_block = oracle.expand(keys.flatten(1, 2), heads[0]).view(heads[0], 4, 32, 20)
    products = torch.einsum("hqd,hptd->hqpt", mean, by_block)
    assert bool((scores + 1e-4 >= products.amax(3)).all())
