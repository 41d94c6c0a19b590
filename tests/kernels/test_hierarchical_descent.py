"""HiP's selection as an operation: query blocks of any size, cache layouts, means of queries, ties and memory."""

from __future__ import annotations

import pytest
import torch

from tests import oracle
from tests.kernels.test_flex_estimate import Largest, long_keys
from tests.oracle import PACKED, PLAIN, Platform
from vllm_sparse.kernels.hierarchical_descent import (
    LEAF_TOKENS,
    DescentArguments,
    Stage,
    hierarchical_descents,
    search_ranges,
)
from vllm_sparse.kernels.hierarchical_descent.reference import averaged_queries
from vllm_sparse.keys import PagedKeys
from vllm_sparse.step.chunks import chunk_alone

STAGES = [Stage(64, 256, 1), Stage(16, 64, 1)]


def descent(query: torch.Tensor, keys: PagedKeys, query_block_tokens: int = 64, heads: int = 1) -> torch.Tensor:
    arguments = DescentArguments(STAGES, query_block_tokens, 16, 40, 0)
    chunk = chunk_alone(query, keys, 1.0, query_block_tokens)
    return hierarchical_descents(chunk, search_ranges(chunk.blocks, arguments), arguments, heads).cpu()


@pytest.mark.parametrize("platform", PACKED)
def test_every_layout_of_the_cache_gives_the_same_leaves(platform: Platform, generator: torch.Generator) -> None:
    """Small whole numbers are exact in every dtype."""
    query_tokens, context = 130, 1001
    keys = torch.randint(-2, 3, (2, context, 32), generator=generator).float()
    query = torch.randint(-2, 3, (query_tokens, 4, 32), generator=generator).float()
    expected = descent(query, oracle.paged(PLAIN, [keys], [keys], 16, generator).reader(0), heads=2)
    packed = keys.to(platform.dtype).to(platform.device)
    data = oracle.paged(platform, [packed], [packed], 32, generator)
    actual = descent(query.to(platform.dtype).to(platform.device), data.reader(0), heads=2)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(("heads", "lists"), [(1, 1), (7, 1), (8, 2), (8, 8), (8, 1)])
def test_query_blocks_of_one_choose_as_one_query_at_a_time(heads: int, lists: int, generator: torch.Generator) -> None:
    """As decoding asks, from the first token of a context to its last."""
    context, kv_heads = 500, 2 if heads == 8 else 1
    keys = torch.randint(-2, 3, (kv_heads, context, 32), generator=generator).float()
    query = torch.randint(-2, 3, (context, heads, 32), generator=generator).float()
    data = oracle.paged(PLAIN, [keys], [keys], 64, generator)
    rows = descent(query, data.reader(0), query_block_tokens=1, heads=lists)
    for position in (0, 15, 16, 17, 55, 56, 57, 311, 312, 313, 499):
        reader = PLAIN.keys_of(data.kv_cache, data.block_table[0], position + 1)
        alone = descent(query[position : position + 1], reader, query_block_tokens=1, heads=lists)
        assert alone.shape == (lists, 1, position // LEAF_TOKENS + 1)
        assert torch.equal(rows[:, position : position + 1, : alone.shape[2]], alone), f"position {position}"
        assert not bool(rows[:, position, alone.shape[2] :].any())


@pytest.mark.parametrize("stride", [1, 2, 4, 64])
@pytest.mark.parametrize("query_tokens", [1, 63, 64, 130])
def test_means_of_adjacent_queries_equal_float64(stride: int, query_tokens: int, generator: torch.Generator) -> None:
    query = torch.randn(query_tokens, 3, 32, generator=generator)
    expected = torch.stack([part.double().mean(0) for part in torch.split(query, stride)])
    assert oracle.relative_error(averaged_queries(query, stride), expected) < 1e-6
    rounded = averaged_queries(query.bfloat16(), stride)
    assert rounded.dtype == torch.bfloat16
    assert oracle.relative_error(rounded, expected) < 8e-3


def test_equal_scores_go_to_the_lower_chunk() -> None:
    keys = torch.ones(1, 1000, 32)
    data = oracle.paged(PLAIN, [keys], [keys], 64, torch.Generator())
    mask = descent(torch.ones(64, 1, 32), data.reader(0))[0, 0]
    # The sink, then four of the leaves behind it, then those from 40 tokens before the queries.
    assert mask.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, *range((1000 - 64 - 40) // 16, 63)]


def test_tokens_behind_the_context_are_ignored(generator: torch.Generator) -> None:
    keys = torch.randn(1, 1000, 32, generator=generator)
    query = torch.randn(300, 2, 32, generator=generator)
    whole = oracle.paged(PLAIN, [keys], [keys], 64, generator)
    part = oracle.paged(PLAIN, [keys[:, :777]], [keys[:, :777]], 64, generator)
    reader = PLAIN.keys_of(whole.kv_cache, whole.block_table[0], 777)
    assert torch.equal(descent(query, reader), descent(query, part.reader(0)))


@pytest.mark.parametrize("stages", [STAGES, [Stage(16, 2048, 1)], [Stage(256, 32768, 4), Stage(16, 2048, 1)]], ids=str)
def test_no_score_matrix_is_held(stages: list[Stage]) -> None:
    """At 128K, no tensor near ``[heads, query_tokens, context]``, not of the gathered keys either."""
    query_tokens, context, head_size = 512, 131072, 16
    query = torch.randn(query_tokens, 1, head_size).bfloat16()
    chunk, arguments = (
        chunk_alone(query, long_keys(context, head_size), 1.0, 64),
        DescentArguments(stages, 64, 256, 1024, 0),
    )
    with Largest() as largest:
        hierarchical_descents(chunk, search_ranges(chunk.blocks, arguments), arguments, 1)
    assert 0 < largest.bytes <= 4 * query_tokens * context // 16
