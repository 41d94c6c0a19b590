"""Page summaries against float64."""

from __future__ import annotations

import pytest
import torch

from tests import oracle
from tests.oracle import PACKED, PLAIN, Platform
from vllm_sparse.kernels.page_summaries import page_summaries, reference


@pytest.mark.parametrize("platform", PACKED)
@pytest.mark.parametrize("page_tokens", [16, 32, 128])
def test_summaries_equal_float64(platform: Platform, page_tokens: int, generator: torch.Generator) -> None:
    """Ragged last pages, pages over and under the cache's blocks; stale keys are NaN."""
    for context in (1, page_tokens - 1, page_tokens, page_tokens + 1, 999):
        data = oracle.random_paged(platform, generator, [context], 2, 32, 96 if platform.isa is None else 32)
        summaries = page_summaries(data.reader(0), page_tokens)
        keys = torch.split(data.keys[0].double().cpu(), page_tokens, dim=1)
        where = f"context {context}"
        assert summaries.mean.dtype == summaries.minimum.dtype == summaries.maximum.dtype == torch.float32
        assert summaries.mean.shape == (2, len(keys), 32), where
        assert oracle.relative_error(summaries.mean, torch.stack([page.mean(1) for page in keys], dim=1)) < 1e-6, where
        # Least and largest values are copies.
        assert torch.equal(summaries.minimum.double().cpu(), torch.stack([page.amin(1) for page in keys], dim=1)), where
        assert torch.equal(summaries.maximum.double().cpu(), torch.stack([page.amax(1) for page in keys], dim=1)), where


def test_a_page_at_the_end_of_a_tile_is_summarised_once(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = oracle.random_paged(PLAIN, generator, [300], 1, 32, 32)
    whole = page_summaries(data.reader(0), 32)
    monkeypatch.setattr(reference, "TILE_TOKENS", 64)
    tiled = page_summaries(data.reader(0), 32)
    for name in ("mean", "minimum", "maximum"):
        assert torch.equal(getattr(tiled, name), getattr(whole, name)), name
