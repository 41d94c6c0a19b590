"""Token scores against float64 probabilities."""

from __future__ import annotations

import pytest
import torch

from tests import oracle
from tests.oracle import PACKED, Platform
from vllm_sparse.kernels.token_scores import token_scores


@pytest.mark.parametrize("platform", PACKED)
@pytest.mark.parametrize("context", [1, 127, 129, 1000, 16384, 17001])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (7, 1)])
def test_scores_equal_float64_probabilities(
    platform: Platform, context: int, heads: int, kv_heads: int, generator: torch.Generator
) -> None:
    data = oracle.random_paged(platform, generator, [context], kv_heads, 32, 32)
    query = oracle.random_tensor(platform, generator, heads, 32, spread=2)
    everything = torch.ones(context, dtype=torch.bool)
    expected = oracle.probabilities(query.unsqueeze(0), data.keys[0], 0.2, everything)[:, 0]
    per_head = token_scores(query, data.reader(0), 0.2, merge_heads=False)
    assert per_head.dtype == torch.float32
    assert oracle.relative_error(per_head.exp(), expected) < 1e-5
    merged = token_scores(query, data.reader(0), 0.2, merge_heads=True)
    assert oracle.relative_error(merged.exp(), expected.view(kv_heads, -1, context).amax(1)) < 1e-5
