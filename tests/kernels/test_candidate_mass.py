"""Mass of candidate pages for sampled queries, against plain Python over float64 softmaxes."""

from __future__ import annotations

import itertools
import math

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
def test_mass_equals_a_float64_softmax_over_the_largest_of_each_group_of_listed_keys(
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
                products = key[kv_head].double() @ query[first + offset, head].double() * SCALE
                largest: dict[tuple[int, int], float] = {}
                for page in pages:
                    for token in range(page * PAGE, min(page * PAGE + PAGE, position + 1)):
                        group = page, token // 2 % reference.KEY_GROUPS
                        largest[group] = max(largest.get(group, -math.inf), float(products[token]))
                shares = torch.tensor(list(largest.values()), dtype=torch.double).softmax(0)
                expected[head, block].index_add_(0, torch.tensor([page for page, _ in largest]), shares)
    assert mass.dtype == torch.float32
    assert oracle.relative_error(mass, expected) < 1e-5
    assert torch.equal(mass == NOT_LISTED, expected == NOT_LISTED)


def test_keys_alike_within_their_groups_have_the_exact_mass(generator: torch.Generator) -> None:
    """So has what they do not share with keys that no query attends to."""
    query = torch.rand(SAMPLED_QUERIES, 4, 16, generator=generator)
    alike = torch.randn(2, 12, 1, reference.KEY_GROUPS, 1, 16, generator=generator)
    past = alike.expand(-1, -1, PAGE // (2 * reference.KEY_GROUPS), -1, 2, -1).reshape(2, 12 * PAGE, 16)
    keys = plain_keys(torch.cat([past, torch.full((2, SAMPLED_QUERIES, 16), -100.0)], dim=1))
    context = 12 * PAGE + SAMPLED_QUERIES
    _, lists = candidate_lists(2, SAMPLED_QUERIES, context, SAMPLED_QUERIES, PAGE, generator, share=1)
    exact = block_mass(query.double(), keys, SCALE, SAMPLED_QUERIES, PAGE)
    mass = candidate_mass(query, keys, SCALE, SAMPLED_QUERIES, lists)
    assert oracle.relative_error(mass, exact) < 1e-5
