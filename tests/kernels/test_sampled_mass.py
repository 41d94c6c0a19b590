"""Attention of sampled queries to all pages, against that to lists of all pages."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle
from tests.kernels.candidates import candidate_lists
from vllm_sparse.kernels.candidate_mass import candidate_mass
from vllm_sparse.kernels.sampled_mass import sampled_mass
from vllm_sparse.keys import plain_keys

SCALE, PAGE = 0.2, 32


@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    chunk=st.integers(1, 140),
    past=st.integers(0, 150),
    query_block=st.sampled_from([64, 128]),
    seed=st.integers(0, 1 << 30),
)
def test_equals_the_mass_of_candidates_that_are_all_pages(
    heads: tuple[int, int], chunk: int, past: int, query_block: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query_heads, kv_heads = heads
    context = past + chunk
    query = torch.randn(chunk, query_heads, 16, generator=generator, dtype=torch.double) * 3
    keys = plain_keys(torch.randn(kv_heads, context, 16, generator=generator))
    _, lists = candidate_lists(kv_heads, chunk, context, query_block, PAGE, generator, share=1)
    expected = candidate_mass(query, keys, SCALE, query_block, lists).clamp(min=0)
    assert oracle.relative_error(sampled_mass(query.float(), keys, SCALE, query_block, PAGE), expected) < 1e-5
