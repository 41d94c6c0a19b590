"""Page means against float64."""

from __future__ import annotations

import pytest
import torch

from tests import oracle
from tests.oracle import PACKED, PLAIN, Platform
from vllm_sparse.kernels.page_means import page_means, reference


@pytest.mark.parametrize("platform", PACKED)
@pytest.mark.parametrize("page_tokens", [16, 32, 128])
def test_means_equal_float64(platform: Platform, page_tokens: int, generator: torch.Generator) -> None:
    """Ragged last pages, pages over and under the cache's blocks; stale keys are NaN."""
    for context in (1, page_tokens - 1, page_tokens, page_tokens + 1, 999):
        data = oracle.random_paged(platform, generator, [context], 2, 32, 96 if platform.isa is None else 32)
        means = page_means(data.reader(0), page_tokens)
        keys = torch.split(data.keys[0].double().cpu(), page_tokens, dim=1)
        where = f"context {context}"
        assert means.dtype == torch.float32
        assert means.shape == (2, len(keys), 32), where
        assert oracle.relative_error(means, torch.stack([page.mean(1) for page in keys], dim=1)) < 1e-6, where


def test_a_page_at_the_end_of_a_tile_is_averaged_once(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = oracle.random_paged(PLAIN, generator, [300], 1, 32, 32)
    whole = page_means(data.reader(0), 32)
    monkeypatch.setattr(reference, "TILE_TOKENS", 64)
    assert torch.equal(page_means(data.reader(0), 32), whole)
