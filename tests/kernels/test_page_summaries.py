"""Page summaries against float64, and stored ones against computed ones."""

from __future__ import annotations

import pytest
import torch

from tests import oracle
from tests.oracle import PACKED, PLAIN, Paged, Platform
from vllm_sparse.kernels.page_summaries import (
    SummaryContent,
    SummaryKind,
    page_summaries,
    read_summaries,
    reference,
    store_summaries,
)
from vllm_sparse.keys import PagedKeys


@pytest.mark.parametrize("platform", PACKED)
@pytest.mark.parametrize("page_tokens", [16, 32, 128])
def test_summaries_equal_float64(platform: Platform, page_tokens: int, generator: torch.Generator) -> None:
    """Ragged last pages, pages over and under the cache's blocks; stale keys are NaN. Bounds are exact."""
    for context in (1, page_tokens - 1, page_tokens, page_tokens + 1, 999):
        data = oracle.random_paged(platform, generator, [context], 2, 32, 96 if platform.isa is None else 32)
        means = page_summaries(data.reader(0), SummaryKind(page_tokens, "mean"))
        bounds = page_summaries(data.reader(0), SummaryKind(page_tokens, "bounds"))
        keys = torch.split(data.keys[0].double().cpu(), page_tokens, dim=1)
        where = f"context {context}"
        assert means.dtype == bounds.dtype == torch.float32
        assert means.shape == (2, len(keys), 32), where
        assert oracle.relative_error(means, torch.stack([page.mean(1) for page in keys], dim=1)) < 1e-6, where
        least, largest = (torch.stack([page.aminmax(dim=1)[end] for page in keys], dim=1) for end in (0, 1))
        assert torch.equal(bounds.double().cpu(), torch.cat((least, largest), dim=2)), where


@pytest.mark.parametrize("content", ["mean", "bounds"])
def test_a_page_at_the_end_of_a_tile_is_summarised_once(
    content: SummaryContent, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = oracle.random_paged(PLAIN, generator, [300], 1, 32, 32)
    kind = SummaryKind(32, content)
    whole = page_summaries(data.reader(0), kind)
    monkeypatch.setattr(reference, "TILE_TOKENS", 64)
    assert torch.equal(page_summaries(data.reader(0), kind), whole)


def stored(data: Paged, kind: SummaryKind) -> torch.Tensor:
    """Poisoned memory for a cache's summaries."""
    blocks, kv_heads, block_size, double_head_size = data.kv_cache.shape
    shape = blocks, kv_heads, block_size // kind.page_tokens, kind.width(double_head_size // 2)
    return torch.full(shape, oracle.NAN, dtype=kind.dtype(data.kv_cache.dtype), device=data.kv_cache.device)


def reader(data: Paged, request: int, context: int, summaries: torch.Tensor) -> PagedKeys:
    """A request's first `context` keys, with summaries."""
    keys = data.platform.keys_of(data.kv_cache, data.block_table[request], context)
    keys.summaries = summaries
    return keys


@pytest.mark.parametrize("platform", PACKED)
@pytest.mark.parametrize("content", ["mean", "bounds"])
def test_steps_of_any_length_store_what_is_computed_at_once(
    platform: Platform, content: SummaryContent, generator: torch.Generator
) -> None:
    """Chunks, then single tokens, of two requests in turn; each step's pages are read back whole."""
    block_size = 96
    contexts = [500, 333]
    data = oracle.random_paged(platform, generator, contexts, 2, 32, block_size)
    for page_tokens in (16, 32):
        kind = SummaryKind(page_tokens, content)
        summaries = stored(data, kind)
        bound = oracle.TOLERANCE[platform.dtype]
        for request, context in enumerate(contexts):
            inner = torch.randperm(context - 20, generator=generator)[:4].sort().values + 1
            ends = [*inner.tolist(), *range(context - 18, context + 1)]
            for start, end in zip([0, *ends], ends, strict=False):
                keys = reader(data, request, end, summaries)
                store_summaries(keys, kind, start)
                expected = page_summaries(data.platform.keys_of(data.kv_cache, data.block_table[request], end), kind)
                found = read_summaries(keys, kind)
                assert found.dtype == platform.dtype
                assert oracle.relative_error(found, expected) <= bound, f"request {request}, {start} to {end}"
                keys.summaries = None
                assert oracle.relative_error(read_summaries(keys, kind), found) < 1e-6
        first = read_summaries(reader(data, 0, contexts[0], summaries), kind)
        assert oracle.relative_error(first, page_summaries(data.reader(0), kind)) <= bound, (
            "the other's steps wrote here"
        )


@pytest.mark.parametrize("content", ["mean", "bounds"])
def test_a_copied_block_is_summarised_from_its_first_token(content: SummaryContent, generator: torch.Generator) -> None:
    """A prefix hit in the middle of a block: its older keys were copied there without their summaries."""
    block_size, context, cached = 64, 250, 230
    data = oracle.random_paged(PLAIN, generator, [context], 2, 32, block_size)
    kind = SummaryKind(16, content)
    summaries = stored(data, kind)
    store_summaries(reader(data, 0, 192, summaries), kind, 0)
    keys = reader(data, 0, context, summaries)
    store_summaries(keys, kind, cached)
    expected = page_summaries(data.reader(0), kind)
    assert oracle.relative_error(read_summaries(keys, kind), expected) < 1e-6


@pytest.mark.parametrize("platform", PACKED)
def test_numbers_of_8_bits_are_the_nearest(platform: Platform, generator: torch.Generator) -> None:
    """And the largest that there is for those beyond it, which would become no number."""
    keys = oracle.random_tensor(platform, generator, 2, 300, 32)
    keys[:, 160:176, 5] = 1000.0
    keys[:, 160:176, 6] = -1000.0
    data = oracle.paged(platform, [keys], [keys], 96, generator)
    exact = page_summaries(data.reader(0), SummaryKind(16, "bounds"))
    kind = SummaryKind(16, "float8_bounds")
    summaries = stored(data, kind)
    request = reader(data, 0, 300, summaries)
    store_summaries(request, kind, 0)
    found = read_summaries(request, kind)
    assert found.dtype == torch.float8_e4m3fn
    assert torch.equal(found.float(), read_summaries(data.reader(0), kind).float())
    found = found.float()
    assert bool((found[:, 10, [5, 6]] == torch.tensor([448.0, -448.0], device=found.device)).all())
    inside = exact.abs() <= 448
    # Half of the last of three bits, or of the least number.
    bound = torch.maximum(exact.abs() / 16, torch.full_like(exact, 2**-10))
    assert bool(((found - exact).abs() <= bound)[inside].all())
