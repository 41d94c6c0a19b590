"""What every method promises, over the shared matrix: well-formed lists, exact attention over them, the dense limit."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests import oracle
from tests.methods import matrix
from tests.methods.matrix import DecodeCase, PrefillCase
from tests.oracle import EXECUTING, PLAIN, SELECTING, Paged, Platform
from vllm_sparse.backend.impl import chunk_launch
from vllm_sparse.backend.plan import RowSpan
from vllm_sparse.executors import Launch
from vllm_sparse.methods.base import DecodeMethod, PrefillMethod
from vllm_sparse.pages import PageList, to_physical

SCALE = 0.11
# (chunk, context): whole prompts, chunks that start anywhere, rows of one token, ragged ends.
CHUNKS = [(1, 1), (127, 127), (129, 129), (1000, 1000), (300, 1000), (257, 4099), (1, 700), (129, 641), (512, 1024)]


def draw_block_sizes(platform: Platform, head_size: int, generator: torch.Generator) -> list[int]:
    """The platform's block sizes in random order; a test takes the first few, and all come up over the matrix."""
    sizes = [size for size in (16, 32, 48, 64, 128, 256) if platform.allows(size, head_size)]
    return [sizes[pick] for pick in torch.randperm(len(sizes), generator=generator).tolist()]


def attend_chunk(case_pages: PageList, data: Paged, request: int, query: torch.Tensor) -> torch.Tensor:
    """Run a prefill list through the platform's stock kernel: ``[chunk, heads, head_size]``."""
    chunk, heads, head_size = query.shape
    span = RowSpan(request, 0, chunk, data.keys[request].shape[1])
    row_heads, starts = chunk_launch(span, case_pages.pages.shape[0], 128, heads, query.device)
    pages = to_physical(
        case_pages,
        data.block_table[request],
        row_heads * data.num_kv_heads // heads,
        data.block_size,
        data.num_kv_heads,
    )
    launch = Launch(starts, 128, pages, case_pages.kept_tokens, case_pages.page_size_tokens)
    flat = query.transpose(0, 1).reshape(-1, 1, head_size)
    output = torch.full_like(flat, oracle.NAN)
    data.platform.executor().run(launch, flat, output, data.kv_cache, SCALE)
    return output.view(heads, chunk, head_size).transpose(0, 1)


def attend_newest(lists: PageList, data: Paged, request: int, query: torch.Tensor) -> torch.Tensor:
    """Run a decode list through the platform's stock kernel: ``[heads, head_size]``."""
    rows, heads = lists.pages.shape[0], query.shape[0]
    row_heads = torch.arange(rows, device=query.device) // (rows // data.num_kv_heads)
    table = data.block_table[request].expand(rows, -1)
    pages = to_physical(lists, table, row_heads, data.block_size, data.num_kv_heads)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=query.device)
    launch = Launch(starts, 1, pages, lists.kept_tokens, lists.page_size_tokens)
    grouped = query.view(rows, heads // rows, -1)
    output = torch.full_like(grouped, oracle.NAN)
    data.platform.executor().run(launch, grouped, output, data.kv_cache, SCALE)
    return output.view(heads, -1)


def chunk_allowed(lists: PageList, chunk: int, context: int, heads: int) -> torch.Tensor:
    """Bool ``[heads, chunk, context]``: what a prefill list lets each query read."""
    lists = PageList(lists.pages.cpu(), lists.kept_tokens.cpu(), lists.page_size_tokens)
    blocks = -(-chunk // 128)
    assert lists.pages.shape[0] == heads * blocks
    rows = torch.stack([oracle.kept_positions(lists, row, context) for row in range(heads * blocks)])
    by_query = rows.view(heads, blocks, context).repeat_interleave(128, dim=1)[:, :chunk]
    return by_query & oracle.causal_mask(chunk, context)


def select_chunk(method: PrefillMethod, data: Paged, request: int, query: torch.Tensor, page: int) -> PageList:
    return method.select(query, data.reader(request), SCALE, page)


def check_list(lists: PageList, page: int, context: int, first: int, last: int, row: int, width: int) -> list[int]:
    """The invariants of `PageList` for one row whose queries sit at positions `first` to `last`."""
    live = oracle.live_pages(lists, row)
    where = f"row {row}, queries {first} to {last}: {live}"
    assert live, where
    assert all(low < high for low, high in itertools.pairwise(live)), f"not strictly ascending: {where}"
    assert live[0] >= 0, where
    assert live[-1] == last // page, f"does not end with the newest query's page: {where}"
    own = list(range(first // page, last // page + 1))
    assert live[-len(own) :] == own, f"does not end with its own pages {own}: {where}"
    assert int(lists.kept_tokens[row]) == (len(live) - 1) * page + last % page + 1, where
    entries = lists.pages[row]
    assert int(entries.min()) >= 0, "padding is no valid page"
    assert int(entries.max()) < width, "padding is no valid page"
    return live


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
        blocks = -(-chunk // 128)
        assert lists.pages.shape[0] == 4 * blocks
        for row in range(4 * blocks):
            first = context - chunk + row % blocks * 128
            last = min(first + 127, context - 1)
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
        lists = case.method.select(query, data.reader(request), SCALE, page)
        assert lists.page_size_tokens == page
        assert lists.pages.dtype == lists.kept_tokens.dtype == torch.int32
        assert lists.pages.shape[0] == (kv_heads if case.lists_per_kv_head else heads)
        for row in range(lists.pages.shape[0]):
            check_list(lists, page, context, context - 1, context - 1, row, -(-context // page))
            kept = oracle.kept_positions(lists, row, context)
            assert bool(kept[: case.sink_tokens].all()), "a promised first token is missing"
            assert bool(kept[-case.recent_tokens :].all()), "a promised last token is missing"
            # Whole pages round the budget up; forced pages may exceed it, by one page at each end.
            assert int(kept.sum()) <= case.method.budget_tokens + 2 * page
            assert int(kept.sum()) >= min(context, case.method.budget_tokens - page)


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
            output = attend_chunk(lists, data, request, query)
            allowed = chunk_allowed(lists, chunk, context, heads)
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
                lists = case.method.select(query, data.reader(request), SCALE, page)
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
                    lists = case.method.select(chunk, reader, SCALE, page)
                    part = Paged(platform, data.kv_cache, data.block_table, [keys[:, :stop]], [values[:, :stop]])
                    output = attend_chunk(lists, part, 0, chunk)
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
            lists = case.method.select(query, data.reader(0), SCALE, page)
            oracle.assert_close(attend_newest(lists, data, 0, query), dense[0], f"context {context}, page {page}")


ALL_METHODS = [*(case.method for case in matrix.PREFILL), *(case.method for case in matrix.DECODE)]


def same_lists(first: PageList, second: PageList) -> bool:
    """Equal bit for bit where they are live."""
    rows = range(first.pages.shape[0])
    return bool(torch.equal(first.kept_tokens, second.kept_tokens)) and all(
        oracle.live_pages(first, row) == oracle.live_pages(second, row) for row in rows
    )


@pytest.mark.parametrize("method", ALL_METHODS, ids=repr)
@pytest.mark.parametrize("platform", SELECTING)
def test_lists_do_not_depend_on_the_cache(
    method: PrefillMethod | DecodeMethod, platform: Platform, generator: torch.Generator
) -> None:
    """Other physical blocks, other block sizes and other requests leave the logical list unchanged bit for bit."""
    keys = oracle.random_tensor(platform, generator, 2, 777, 32)
    chunk = oracle.random_tensor(platform, generator, 333, 8, 32, spread=2)
    query = chunk if isinstance(method, PrefillMethod) else chunk[-1]
    expected: PageList | None = None
    for block_size, neighbours in ((16, 0), (16, 2), (48, 1), (128, 0), (256, 3)):
        others = [oracle.random_tensor(platform, generator, 2, 100 + 77 * n, 32) for n in range(neighbours)]
        requests = [*others, keys]
        data = oracle.paged(platform, requests, requests, block_size, generator)
        lists = method.select(query, data.reader(neighbours), SCALE, 16)
        expected = expected or lists
        assert same_lists(expected, lists), f"block size {block_size}, {neighbours} other requests"


@matrix.prefill_cases
def test_prefill_page_sizes_keep_the_same_tokens(case: PrefillCase, generator: torch.Generator) -> None:
    """Pages that divide a selection block keep the same tokens; coarser ones keep a superset."""
    context, chunk, heads = 1000, 389, 4
    data = oracle.random_paged(PLAIN, generator, [context], 2, 32, 16)
    query = oracle.random_tensor(PLAIN, generator, chunk, heads, 32, spread=2)
    fine = chunk_allowed(select_chunk(case.method, data, 0, query, 1), chunk, context, heads)
    for page in (16, 32, 64, 128):
        lists = select_chunk(case.method, data, 0, query, page)
        assert torch.equal(chunk_allowed(lists, chunk, context, heads), fine), f"page {page}"
    for page in (48, 256, 384):
        coarse = chunk_allowed(select_chunk(case.method, data, 0, query, page), chunk, context, heads)
        assert bool((coarse | ~fine).all()), f"page {page} lost tokens"
