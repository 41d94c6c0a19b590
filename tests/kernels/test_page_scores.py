"""Page scores against float64 probabilities."""

from __future__ import annotations

import pytest
import torch

from tests import oracle
from tests.oracle import SELECTING, Platform
from vllm_sparse.kernels.page_scores import page_scores
from vllm_sparse.kernels.page_summaries import SummaryContent, SummaryKind, read_summaries


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("context", [1, 16, 127, 1000])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (7, 1), (8, 1)])
def test_scores_equal_float64_probabilities(
    platform: Platform, context: int, heads: int, kv_heads: int, generator: torch.Generator
) -> None:
    scale, page_tokens = 0.2, 16
    data = oracle.random_paged(platform, generator, [context], kv_heads, 32, 64)
    query = oracle.random_tensor(platform, generator, heads, 32, spread=2)
    pages = torch.split(oracle.expand(data.keys[0], heads), page_tokens, dim=1)
    product = query.double().cpu().unsqueeze(1)
    logits: dict[SummaryContent, list[torch.Tensor]] = {
        "mean": [(product * page.mean(1, keepdim=True)).sum(2) for page in pages],
        "bounds": [
            torch.maximum(product * page.amin(1, keepdim=True), product * page.amax(1, keepdim=True)).sum(2)
            for page in pages
        ],
    }
    for content, columns in logits.items():
        probabilities = (torch.cat(columns, dim=1) * scale).softmax(1)
        scores = page_scores(query, read_summaries(data.reader(0), SummaryKind(page_tokens, content)), scale)
        assert scores.dtype == torch.float32
        expected = probabilities.view(kv_heads, -1, len(pages)).amax(1)
        # Means are kept in the cache's dtype.
        bound = 1e-5 if platform.dtype == torch.float32 or content == "bounds" else 3e-2
        assert oracle.relative_error(scores.exp(), expected) < bound, content
