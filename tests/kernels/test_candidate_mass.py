"""Attention of sampled queries to candidate pages, against plain Python over float64 softmaxes."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle
from tests.kernels.candidates import candidate_lists
from vllm_sparse.kernels.block_mass import block_mass
from vllm_sparse.kernels.candidate_mass import NOT_LISTED, SAMPLED_QUERIES, candidate_mass, reference
from vllm_sparse.keys import plain_keys

SCALE, PAGE = 0.2, 32


@given(queries=st.integers(1, 128))
def test_sampled_queries_are_spread_over_their_block(queries: int) -> None:
    """Gaps differ by one at most, the ends are half a gap away at most; a block as long as the sample votes whole."""
    offsets = reference.sampled_offsets(queries)
    gaps = {later - sooner for sooner, later in itertools.pairwise(offsets)}
    assert max(gaps) - min(gaps) <= 1
    assert len(offsets) == SAMPLED_QUERIES
    assert offsets[0] == queries // (2 * SAMPLED_QUERIES)
    assert 0 <= queries - 1 - offsets[-1] <= offsets[0]
    assert queries != SAMPLED_QUERIES or offsets == list(range(SAMPLED_QUERIES))


@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    shared=st.booleans(),
    chunk=st.integers(1, 140),
    past=st.integers(0, 150),
    query_block=st.sampled_from([64, 128]),
    seed=st.integers(0, 1 << 30),
)
def test_mass_equals_a_float64_softmax_over_the_listed_keys(
    heads: tuple[int, int], shared: bool, chunk: int, past: int, query_block: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query_heads, kv_heads = heads
    context = past + chunk
    query = torch.randn(chunk, query_heads, 16, generator=generator) * 3
    key = torch.randn(kv_heads, context, 16, generator=generator)
    listed, lists = candidate_lists(1 if shared else kv_heads, chunk, context, query_block, PAGE, generator)
    mass = candidate_mass(query, plain_keys(key), SCALE, query_block, lists)
    expected = torch.full(mass.shape, NOT_LISTED, dtype=torch.double)
    for head in range(query_heads):
        kv_head = head * kv_heads // query_heads
        for block in range(mass.shape[1]):
            first = block * query_block
            length = min(query_block, chunk - first)
            pages = listed[kv_head * listed.shape[0] // kv_heads, block].nonzero().flatten().tolist()
            expected[head, block, pages] = 0
            for offset in reference.sampled_offsets(length):
                position = past + first + offset
                in_pages = (token for page in pages for token in range(page * PAGE, page * PAGE + PAGE))
                tokens = [token for token in in_pages if token <= position]
                products = key[kv_head, tokens].double() @ query[first + offset, head].double() * SCALE
                expected[head, block].index_add_(0, torch.tensor(tokens) // PAGE, products.softmax(0))
    assert mass.dtype == torch.float32
    assert oracle.relative_error(mass, expected) < 1e-5
    assert torch.equal(mass == NOT_LISTED, expected == NOT_LISTED)


def test_a_block_of_as_many_queries_with_all_pages_listed_has_the_exact_mass(generator: torch.Generator) -> None:
    query = torch.randn(64, 4, 16, generator=generator)
    keys = plain_keys(torch.randn(2, 400, 16, generator=generator))
    _, lists = candidate_lists(2, 64, 400, SAMPLED_QUERIES, PAGE, generator, share=1)
    exact = block_mass(query.double(), keys, SCALE, SAMPLED_QUERIES, PAGE)
    mass = candidate_mass(query, keys, SCALE, SAMPLED_QUERIES, lists)
    assert oracle.relative_error(mass.clamp(min=0), exact) < 1e-5
