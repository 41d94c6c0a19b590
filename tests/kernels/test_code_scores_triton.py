"""Codes of keys, scores by them and lists by these in Triton: equal to their specification, row by row."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch

from tests import oracle
from tests.cuda_graph import captured
from tests.kernels.hopper import compile_for_hopper, spilled_bytes
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from tests.oracle import Paged, Platform
from vllm_sparse.kernels.code_scores import code_scores
from vllm_sparse.kernels.page_summaries import SummaryKind, coded_keys, read_summaries, reference, store_summaries
from vllm_sparse.keys import PlainKeys
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.methods.token_topk import TokenTopk
from vllm_sparse.pages import to_logical
from vllm_sparse.step.rows import DecodeRows, RowsPlace, TokenLists

pytest.importorskip("triton")

PLATFORM = Platform("plain", DEVICE, torch.float32, None)
SCALE = 0.125
POISON = -7
# On a GPU the tensor cores round the scaled query to 11 bits.
LARGEST_ERROR = 1e-5 if DEVICE == "cpu" else 2e-2


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=10)


def poisoned(data: Paged, kind: SummaryKind) -> torch.Tensor:
    blocks, kv_heads, block_size, double_head_size = data.kv_cache.shape
    shape = blocks, kv_heads, block_size // kind.page_tokens, kind.width(double_head_size // 2)
    return torch.full(shape, 0xAA, dtype=torch.uint8, device=DEVICE)


@needs_triton
@pytest.mark.parametrize(
    ("head_size", "block_size", "page_tokens"), [(64, 32, 16), (80, 96, 32), (128, 128, 64), (32, 16, 16)]
)
def test_stores_what_the_reference_stores(head_size: int, block_size: int, page_tokens: int) -> None:
    """Chunks of one request, then the newest tokens of a batch, of which one row stands by: in the same places."""
    from vllm_sparse.kernels.page_summaries import triton as summaries_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    contexts = [300, 1, 257, 128, 90]
    kind = SummaryKind(page_tokens, "codes")
    data = oracle.random_paged(PLATFORM, generator, contexts, 2, head_size, block_size)
    expected, actual = poisoned(data, kind), poisoned(data, kind)
    for start, stop in ((0, 41), (41, 128), (128, 300)):
        for store, summaries in ((reference, expected), (summaries_triton, actual)):
            keys = data.platform.keys_of(data.kv_cache, data.block_table[0], stop)
            assert isinstance(keys, PlainKeys)
            keys.summaries = summaries
            store.store_summaries(keys, kind, start)
    lengths = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    lengths[3] = 0
    query = torch.full((len(contexts), 2, head_size), oracle.NAN, device=DEVICE)
    rows = DecodeRows(query, data.kv_cache, data.block_table, lengths, 1.0)
    summaries_triton.store_newest_summaries(rows, kind, actual)
    for row, context in enumerate(lengths.tolist()):
        if context:
            keys = data.reader(row)
            keys.summaries = expected
            reference.store_summaries(keys, kind, context - 1)
    # A row that stands by has written nothing, and no other row has written there.
    own = data.block_table[3, : -(-contexts[3] // block_size)].long()
    assert bool((actual[own] == 0xAA).all())
    for row, context in enumerate(lengths.tolist()):
        first = (context - 1) // block_size * block_size if row else 0
        if context:
            found, right = (
                coded_keys(read_summaries(with_summaries(data, row, summaries), kind), head_size)[:, first:context]
                for summaries in (actual, expected)
            )
            # A number between two codes may get either.
            assert oracle.relative_error(found, right) < 1e-2, f"row {row}, seed {seed}"
            assert bool(((found - right).abs() < 1e-3).float().mean() > 0.999), f"row {row}, seed {seed}"


def with_summaries(data: Paged, row: int, summaries: torch.Tensor) -> PlainKeys:
    keys = data.reader(row)
    assert isinstance(keys, PlainKeys)
    keys.summaries = summaries
    return keys


@needs_triton
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "block_size", "page"),
    [
        pytest.param(2, 2, 32, 32, 32, id="no-groups"),
        pytest.param(8, 2, 64, 128, 64, id="group-of-4"),
        pytest.param(7, 1, 80, 64, 16, id="group-of-7"),
        pytest.param(8, 1, 128, 32, 32, id="group-of-8"),
    ],
)
def test_scores_equal_the_reference(heads: int, kv_heads: int, head_size: int, block_size: int, page: int) -> None:
    """A ragged batch in permuted blocks; one row stands by and gets nothing."""
    from vllm_sparse.kernels.code_scores.triton import code_scores_of_rows

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    contexts = [1, 1000, 700, 129, 333]
    random.shuffle(contexts)
    data = oracle.random_paged(PLATFORM, generator, contexts, kv_heads, head_size, block_size)
    kind = SummaryKind(page, "codes")
    summaries = poisoned(data, kind)
    for row in range(len(contexts)):
        reference.store_summaries(with_summaries(data, row, summaries), kind, 0)
    query = oracle.random_tensor(PLATFORM, generator, len(contexts), heads, head_size, spread=2)
    seq_lens = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    idle = random.randrange(len(contexts))
    seq_lens[idle] = 0
    starts = (seq_lens.cumsum(0) - seq_lens).long()
    rows = DecodeRows(query, data.kv_cache, data.block_table, seq_lens, SCALE)
    scores = code_scores_of_rows(rows, kind, summaries, starts, int(seq_lens.sum()))
    group = heads // kv_heads
    for row, context in enumerate(contexts):
        if row == idle:
            continue
        expected = code_scores(query[row], with_summaries(data, row, summaries), kind, SCALE)
        for head in range(kv_heads):
            start = int(starts[row])
            found = scores.values[head * group, start : start + context]
            assert oracle.relative_error(found.exp(), expected[head].exp()) < LARGEST_ERROR, f"row {row}, seed {seed}"


@needs_triton
@pytest.mark.parametrize("page", [16, 64])
def test_a_method_chooses_for_rows_as_for_one_request(page: Literal[16, 64]) -> None:
    """Small integers of which every implementation finds the same products: from the newest codes to lists."""
    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    kv_heads, head_size, block_size = 2, 32, 64
    contexts = [500, 129, 1000, 77, 640]
    server = TokenTopk(page_tokens=page)
    methods = [
        TokenTopk(
            budget_tokens=random.randint(40, 120), sink_tokens=random.randint(0, 9), recent_tokens=9, page_tokens=page
        )
        for _ in contexts
    ]
    keys = [
        torch.randint(0, 4, (kv_heads, context, head_size), generator=generator).float().to(DEVICE)
        for context in contexts
    ]
    # Least number 0, largest 3 in each page of two tokens or more, so that a code is the number itself.
    for own in keys:
        own[:, ::16], own[:, 1::16] = 0, 3
    data = oracle.paged(PLATFORM, keys, keys, block_size, generator)
    query = torch.randint(-2, 3, (len(contexts), 2 * kv_heads, head_size), generator=generator).float().to(DEVICE)
    seq_lens = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    rows = DecodeRows(query, data.kv_cache, data.block_table, seq_lens, SCALE)
    summaries = poisoned(data, server.summaries)
    expected = []
    for row, method in enumerate(methods):
        # The newest token's block is not written yet.
        context = (contexts[row] - 1) // block_size * block_size
        if context:
            older = data.platform.keys_of(data.kv_cache, data.block_table[row], context)
            older.summaries = summaries
            store_summaries(older, server.summaries, 0)
        chosen = method.select(query[row], data.reader(row), SCALE, 1, LayerMemory())
        expected += [oracle.live_pages(chosen, head) for head in range(kv_heads)]
    starts = (seq_lens.cumsum(0) - seq_lens).long()
    zeros = torch.zeros_like(seq_lens)
    place = RowsPlace(starts, sum(contexts), zeros, zeros, seq_lens, 0, summaries, None)
    lists = TokenLists(
        torch.full((len(contexts) * kv_heads, 160), POISON, dtype=torch.int32, device=DEVICE),
        torch.full((len(contexts) * kv_heads,), POISON, dtype=torch.int32, device=DEVICE),
    )
    knobs = torch.tensor([method.row_knobs() for method in methods], dtype=torch.int32, device=DEVICE)
    server.choose_rows(rows, knobs, place, lists)
    for index, positions in enumerate(expected):
        row = index // kv_heads
        kept = int(lists.kept_tokens[index])
        table = data.block_table[row, : -(-contexts[row] // block_size)]
        found = to_logical(lists.slots[index : index + 1, :kept], table, block_size, kv_heads)[0].tolist()
        assert found == positions, f"{methods[row]}, seed {seed}"


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
@pytest.mark.parametrize("rows", [1, 8])
def test_a_replayed_graph_equals_eager_steps(rows: int, generator: torch.Generator) -> None:
    """One capture for all steps, from codes to lists, with rows that stand by."""
    kv_heads, head_size, longest = 2, 128, 3000
    server = TokenTopk(budget_tokens=256)
    platform = Platform("plain-bfloat16", DEVICE, torch.bfloat16, None, executes=False)
    data = oracle.random_paged(platform, generator, [longest] * rows, kv_heads, head_size, 128)
    summaries = poisoned(data, server.summaries)
    for row in range(rows):
        store_summaries(with_summaries(data, row, summaries), server.summaries, 0)
    query = torch.zeros(rows, 8, head_size, dtype=torch.bfloat16, device=DEVICE)
    seq_lens = torch.ones(rows, dtype=torch.int32, device=DEVICE)
    starts = torch.arange(rows, device=DEVICE) * longest
    own = DecodeRows(query, data.kv_cache, data.block_table, seq_lens, SCALE)
    zeros = torch.zeros_like(seq_lens)
    knobs = torch.tensor([server.row_knobs()] * rows, dtype=torch.int32, device=DEVICE)

    def make() -> tuple[TokenLists, Callable[[], None]]:
        lists = TokenLists(
            torch.full((rows * kv_heads, 300), POISON, dtype=torch.int32, device=DEVICE),
            torch.full((rows * kv_heads,), POISON, dtype=torch.int32, device=DEVICE),
        )
        place = RowsPlace(starts, rows * longest, zeros, zeros, seq_lens, 0, summaries, None)
        return lists, functools.partial(server.choose_rows, own, knobs, place, lists)

    (eager, choose), (replayed, call) = make(), make()
    replay = captured(call)
    choose()
    for _ in range(5):
        query.copy_(torch.randn(query.shape, generator=generator))
        seq_lens.copy_(torch.randint(600, longest, (rows,), generator=generator))
        seq_lens[rows // 2 + 1 :] = 0
        choose()
        replay()
        assert torch.equal(eager.kept_tokens, replayed.kept_tokens)
        for index, kept in enumerate(eager.kept_tokens.tolist()):
            assert torch.equal(eager.slots[index, :kept], replayed.slots[index, :kept])
    assert bool((eager.kept_tokens[: kv_heads * (rows // 2 + 1)] == 256).all())


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
@pytest.mark.parametrize(("head_size", "page"), [(64, 32), (128, 32), (128, 128), (256, 64)])
def test_kernels_compile_for_hopper(head_size: int, page: int, tmp_path: Path) -> None:
    """And have registers for what they hold of a page."""
    from vllm_sparse.kernels.code_scores import triton as scores
    from vllm_sparse.kernels.page_summaries import triton as summaries

    kind = SummaryKind(page, "codes")
    compiled = compile_for_hopper(
        scores.code_products_kernel,
        {
            **dict.fromkeys(("query_pointer", "cache_pointer"), "*bf16"),
            "summary_pointer": "*u8",
            **dict.fromkeys(("block_table_pointer", "context_pointer"), "*i32"),
            "start_pointer": "*i64",
            **dict.fromkeys(("product_pointer", "partial_pointer"), "*fp32"),
            **dict.fromkeys(("capacity", "query_row_stride", "query_head_stride", "table_row_stride"), "i32"),
            **dict.fromkeys(("cache_block_stride", "cache_head_stride", "cache_token_stride"), "i32"),
            "kv_heads": "i32",
            "scale": "fp32",
        },
        {
            "SPLITS": 64,
            "GROUP": 4,
            "GROUP_TILE": 16,
            "HEAD_SIZE": head_size,
            "QUARTER_TILE": head_size // 4,
            "PAGE": page,
            "PAGES_PER_BLOCK": 128 // page,
            "WIDTH": kind.width(head_size),
        },
        num_warps=4,
    )
    # A mask's eight bytes at most.
    assert spilled_bytes(compiled, tmp_path) <= 8
    cache = torch.empty(1, 8, 128, 2 * head_size, dtype=torch.bfloat16)
    constants = summaries._constants(cache, kind)
    num_warps = constants.pop("num_warps")
    compiled = compile_for_hopper(
        summaries.newest_summaries_kernel,
        {
            "cache_pointer": "*bf16",
            "summary_pointer": "*u8",
            **dict.fromkeys(("block_table_pointer", "context_pointer"), "*i32"),
            **dict.fromkeys(("table_row_stride", "cache_block_stride"), "i32"),
            **dict.fromkeys(("cache_head_stride", "cache_token_stride"), "i32"),
        },
        constants,
        num_warps=num_warps,
    )
    assert spilled_bytes(compiled, tmp_path) == 0
