"""What every method promises, over the shared matrix: well-formed lists, exact attention over them, the dense limit."""

from __future__ import annotations

import pytest
import torch

from tests import oracle
from tests.methods import matrix
from tests.methods.lists import (
    CHUNKS,
    FIRST_LAYER,
    SCALE,
    attend_chunk,
    attend_newest,
    check_list,
    chunk_allowed,
    draw_block_sizes,
    same_lists,
    select_chunk,
)
from tests.methods.matrix import DecodeCase, PrefillCase
from tests.oracle import EXECUTING, PLAIN, SELECTING, Paged, Platform
from vllm_sparse.methods.decode import DecodeMethod, LayerMemory
from vllm_sparse.methods.prefill import PrefillMethod
from vllm_sparse.pages import PageList


@matrix.prefill_cases
@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("page", [1, 16, 48, 64, 128, 256])
def test_prefill_lists_are_well_formed(
    case: PrefillCase, platform: Platform, page: int, generator: torch.Generator
) -> None:
    chunks = [(1, 1), (127, 127), (700, 700), (129, 641)]
    data = oracle.random_paged(platform, generator, [context for _, context in chunks], 2, 32, max(page, 16))
    for request, (chunk, context) in enumerate(chunks):
        query = oracle.random_tensor(platform, generator, chunk, 4, 32, spread=2)
        lists = select_chunk(case.method, data, request, query, page)
        assert lists.page_size_tokens == page
        assert lists.pages.dtype == lists.kept_tokens.dtype == torch.int32
        query_block = case.method.query_block_tokens
        blocks = -(-chunk // query_block)
        rows = case.method.list_heads(4, 2) * blocks
        assert lists.pages.shape[0] == rows
        for row in range(rows):
            first = context - chunk + row % blocks * query_block
            last = min(first + query_block - 1, context - 1)
            live = check_list(lists, page, context, first, last, row, -(-context // page))
            if case.keeps_sink:
                assert live[0] == 0


@matrix.decode_cases
@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("page", [1, 16, 48, 64, 128])
def test_decode_lists_are_well_formed(
    case: DecodeCase, platform: Platform, page: int, generator: torch.Generator
) -> None:
    contexts = [1, 16, 127, 129, 1000, 4099]
    kv_heads, heads = 2, 8
    data = oracle.random_paged(platform, generator, contexts, kv_heads, 32, max(page, 16))
    for request, context in enumerate(contexts):
        query = oracle.random_tensor(platform, generator, heads, 32, spread=2)
        lists = case.method.select(query, data.reader(request), SCALE, page, LayerMemory())
        assert lists.page_size_tokens == page
        assert lists.pages.dtype == lists.kept_tokens.dtype == torch.int32
        assert lists.pages.shape[0] == (kv_heads if case.lists_per_kv_head else heads)
        for row in range(lists.pages.shape[0]):
            check_list(lists, page, context, context - 1, context - 1, row, -(-context // page))
            kept = oracle.kept_positions(lists, row, context)
            assert bool(kept[: case.sink_tokens].all()), "a promised first token is missing"
            assert bool(kept[-case.recent_tokens :].all()), "a promised last token is missing"
            # Whole units round the budget up; forced units may exceed it, by one at each end.
            unit = max(page, case.unit_tokens)
            rounding = max(page // (case.choice_tokens or page), 1)
            assert int(kept.sum()) <= case.method.budget_tokens * rounding + 2 * unit
            assert int(kept.sum()) >= min(context, case.method.budget_tokens - case.slack_tokens - unit)


@matrix.prefill_cases
@pytest.mark.parametrize("platform", EXECUTING)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (7, 1), (8, 1)], ids=lambda value: str(value))
def test_prefill_equals_the_oracle_over_its_list(
    case: PrefillCase, platform: Platform, heads: int, kv_heads: int, generator: torch.Generator
) -> None:
    """Given the exported list, the output is the float64 softmax over exactly those tokens."""
    head_size = 64
    block_size = draw_block_sizes(platform, head_size, generator)[0]
    chunks = [CHUNKS[pick] for pick in torch.randperm(len(CHUNKS), generator=generator)[:2].tolist()]
    data = oracle.random_paged(platform, generator, [context for _, context in chunks], kv_heads, head_size, block_size)
    for request, (chunk, context) in enumerate(chunks):
        query = oracle.random_tensor(platform, generator, chunk, heads, head_size, spread=2)
        for page in platform.page_sizes(block_size):
            lists = select_chunk(case.method, data, request, query, page)
            output = attend_chunk(case.method, lists, data, request, query)
            allowed = chunk_allowed(case.method, lists, data, request, query)
            reference = oracle.attention(query, data.keys[request], data.values[request], SCALE, allowed)
            oracle.assert_close(output, reference, f"chunk {chunk} of {context}, block {block_size}, page {page}")


@matrix.decode_cases
@pytest.mark.parametrize("platform", EXECUTING)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (7, 1), (8, 1)], ids=lambda value: str(value))
def test_decode_equals_the_oracle_over_its_list(
    case: DecodeCase, platform: Platform, heads: int, kv_heads: int, generator: torch.Generator
) -> None:
    head_size = 64
    contexts = [1, 127, 129, 1000, 4099]
    for block_size in draw_block_sizes(platform, head_size, generator)[:1]:
        data = oracle.random_paged(platform, generator, contexts, kv_heads, head_size, block_size)
        for request, context in enumerate(contexts):
            query = oracle.random_tensor(platform, generator, heads, head_size, spread=2)
            for page in platform.page_sizes(block_size):
                lists = case.method.select(query, data.reader(request), SCALE, page, LayerMemory())
                output = attend_newest(lists, data, request, query)
                rows = lists.pages.shape[0]
                allowed = torch.stack([oracle.kept_positions(lists, row, context) for row in range(rows)])
                allowed = allowed.repeat_interleave(heads // rows, dim=0).unsqueeze(1)
                reference = oracle.attention(
                    query.unsqueeze(0), data.keys[request], data.values[request], SCALE, allowed
                )
                oracle.assert_close(output, reference[0], f"context {context}, block {block_size}, page {page}")


@pytest.mark.parametrize("case", matrix.PREFILL_DENSE, ids=lambda case: case.name)
@pytest.mark.parametrize("platform", EXECUTING)
def test_prefill_dense_limit(case: PrefillCase, platform: Platform, generator: torch.Generator) -> None:
    """At the exact end of its knobs a method is dense, for any chunking and page size."""
    head_size, heads, kv_heads = 64, 4, 2
    context = 700
    for block_size in draw_block_sizes(platform, head_size, generator)[:2]:
        data = oracle.random_paged(platform, generator, [context], kv_heads, head_size, block_size)
        query = oracle.random_tensor(platform, generator, context, heads, head_size, spread=2)
        keys, values = data.keys[0], data.values[0]
        dense = oracle.attention(query, keys, values, SCALE, oracle.causal_mask(context, context))
        for starts in ([0], [0, 300, 571], [0, 128, 513, 699]):
            for start, stop in zip(starts, [*starts[1:], context], strict=True):
                chunk = query[start:stop]
                reader = platform.keys_of(data.kv_cache, data.block_table[0], stop)
                for page in platform.page_sizes(block_size):
                    lists = case.method.select(chunk, reader, SCALE, page, FIRST_LAYER)
                    part = Paged(platform, data.kv_cache, data.block_table, [keys[:, :stop]], [values[:, :stop]])
                    output = attend_chunk(case.method, lists, part, 0, chunk)
                    oracle.assert_close(output, dense[start:stop], f"{start}:{stop}, block {block_size}, page {page}")


@pytest.mark.parametrize("case", matrix.DECODE_DENSE, ids=lambda case: case.name)
@pytest.mark.parametrize("platform", EXECUTING)
def test_decode_dense_limit(case: DecodeCase, platform: Platform, generator: torch.Generator) -> None:
    heads, kv_heads, head_size = 8, 2, 64
    for context in (1, 127, 129, 1000):
        data = oracle.random_paged(platform, generator, [context], kv_heads, head_size, 64)
        query = oracle.random_tensor(platform, generator, heads, head_size, spread=2)
        everything = torch.ones(context, dtype=torch.bool)
        dense = oracle.attention(query.unsqueeze(0), data.keys[0], data.values[0], SCALE, everything)
        for page in platform.page_sizes(64):
            lists = case.method.select(query, data.reader(0), SCALE, page, LayerMemory())
            oracle.assert_close(attend_newest(lists, data, 0, query), dense[0], f"context {context}, page {page}")


ALL_METHODS = [*(case.method for case in matrix.PREFILL), *(case.method for case in matrix.DECODE)]


@pytest.mark.parametrize("method", ALL_METHODS, ids=repr)
@pytest.mark.parametrize("platform", SELECTING)
def test_lists_do_not_depend_on_the_cache(
    method: PrefillMethod | DecodeMethod, platform: Platform, generator: torch.Generator
) -> None:
    """Other physical blocks, other block sizes and other requests leave the logical list unchanged bit for bit."""
    keys = oracle.random_tensor(platform, generator, 2, 777, 32)
    chunk = oracle.random_tensor(platform, generator, 333, 8, 32, spread=2)
    expected: PageList | None = None
    for block_size, neighbours in ((16, 0), (16, 2), (48, 1), (128, 0), (256, 3)):
        others = [oracle.random_tensor(platform, generator, 2, 100 + 77 * n, 32) for n in range(neighbours)]
        requests = [*others, keys]
        data = oracle.paged(platform, requests, requests, block_size, generator)
        if isinstance(method, PrefillMethod):
            lists = select_chunk(method, data, neighbours, chunk, 16)
        else:
            lists = method.select(chunk[-1], data.reader(neighbours), SCALE, 16, LayerMemory())
        expected = expected or lists
        assert same_lists(expected, lists), f"block size {block_size}, {neighbours} other requests"


@matrix.prefill_cases
def test_prefill_page_sizes_keep_the_same_tokens(case: PrefillCase, generator: torch.Generator) -> None:
    """Pages that divide a selection block keep the same tokens; coarser ones keep a superset."""
    context, chunk, heads = 1000, 389, 4
    data = oracle.random_paged(PLAIN, generator, [context], 2, 32, 16)
    query = oracle.random_tensor(PLAIN, generator, chunk, heads, 32, spread=2)

    def kept(page: int) -> torch.Tensor:
        lists = select_chunk(case.method, data, 0, query, page)
        return chunk_allowed(case.method, lists, data, 0, query)

    fine = kept(1)
    for page in (16, 32, 64, 128):
        if page <= case.method.page_tokens:
            assert torch.equal(kept(page), fine), f"page {page}"
    for page in (48, 64, 128, 256, 384):
        assert bool((kept(page) | ~fine).all()), f"page {page} lost tokens"
