"""Exact attention mass against a float64 softmax."""

from __future__ import annotations

import pytest
import torch

from tests import oracle
from tests.oracle import PACKED, Platform
from vllm_sparse.kernels.block_mass import block_mass


def expected_mass(query: torch.Tensor, key: torch.Tensor, scale: float, query_block: int, page: int) -> torch.Tensor:
    """float64 ``[heads, query_blocks, pages]`` from whole rows of probabilities."""
    chunk, context = query.shape[0], key.shape[1]
    weight = oracle.probabilities(query, key, scale, oracle.causal_mask(chunk, context))
    padded = torch.nn.functional.pad(weight, (0, -context % page, 0, -chunk % query_block))
    return padded.view(len(weight), -1, query_block, padded.shape[2] // page, page).sum((2, 4))


@pytest.mark.parametrize("platform", PACKED)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (7, 1)])
@pytest.mark.parametrize(
    ("chunk", "context", "query_block", "page"),
    [(1, 1, 128, 32), (300, 1000, 128, 32), (700, 700, 64, 16), (129, 641, 128, 128), (512, 1024, 64, 64)],
)
def test_mass_equals_a_float64_softmax(
    platform: Platform,
    heads: int,
    kv_heads: int,
    chunk: int,
    context: int,
    query_block: int,
    page: int,
    generator: torch.Generator,
) -> None:
    data = oracle.random_paged(platform, generator, [context], kv_heads, 32, 32)
    query = oracle.random_tensor(platform, generator, chunk, heads, 32, spread=3)
    expected = expected_mass(query, data.keys[0], 0.2, query_block, page)
    mass = block_mass(query, data.reader(0), 0.2, query_block, page)
    assert mass.dtype == torch.float32
    assert mass.shape == expected.shape
    assert oracle.relative_error(mass, expected) < 1e-5
    queries = torch.full((mass.shape[1],), float(query_block), device=mass.device)
    queries[-1] = (chunk - 1) % query_block + 1
    assert torch.allclose(mass.sum(2), queries.expand(heads, -1), rtol=1e-5)
    precise = block_mass(query.double(), data.reader(0), 0.2, query_block, page)
    assert precise.dtype == torch.float64
    assert oracle.relative_error(precise, expected) < 1e-12
