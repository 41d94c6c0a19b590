"""HiP's selection in Triton equals its PyTorch specification: compiled on a GPU, interpreted elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels.chunks import SPANS, STEP_TOKENS, some_chunks
from tests.kernels.hopper import compile_for_hopper, spilled_bytes
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from vllm_sparse.kernels.hierarchical_descent import reference, search_ranges
from vllm_sparse.kernels.hierarchical_descent.ranges import entries_of_search, search_bytes
from vllm_sparse.kernels.hierarchical_descent.reference import DescentArguments, Stage
from vllm_sparse.keys import PlainKeys
from vllm_sparse.step.chunks import PromptChunks, chunk_alone

pytest.importorskip("triton")


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=17)


def assert_equals_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    lists: int,
    query_block_tokens: int,
    forced: tuple[int, int, int],
    *stages: Stage,
) -> None:
    """Both choose alike for queries ``[query_tokens, heads, head_size]`` and keys ``[kv_heads, context, head_size]``.

    The keys lie in a paged cache, which holds NaN wherever no key does.
    """
    from vllm_sparse.kernels.hierarchical_descent import triton as hierarchical_triton

    kv_heads, context, head_size = keys.shape
    block_size = 48
    blocks = -(-context // block_size)
    padded = torch.nn.functional.pad(keys, (0, head_size, 0, blocks * block_size - context), value=float("nan"))
    cache = torch.full((blocks + 3, kv_heads, block_size, 2 * head_size), float("nan"))
    block_table = torch.randperm(blocks + 3)[:blocks].int()
    cache[block_table.long()] = padded.view(kv_heads, blocks, block_size, -1).transpose(0, 1)
    paged = PlainKeys(cache.to(DEVICE), block_table.to(DEVICE), context)
    chunk = chunk_alone(query.to(DEVICE), paged, 1.0, query_block_tokens)
    arguments = DescentArguments(stages, query_block_tokens, *forced)
    expected = reference.hierarchical_descents(chunk, arguments, lists)
    ranges = search_ranges(chunk.blocks, arguments)
    actual = hierarchical_triton.hierarchical_descents(chunk, ranges, arguments, lists)
    assert torch.equal(actual, expected), f"{int((actual != expected).sum())} leaves differ"


def whole_numbers(
    generator: torch.Generator, query_tokens: int, context: int, heads: int, kv_heads: int, head_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys with exact scores of which many are equal, also where means are of fewer queries."""
    query = 12.0 * torch.randint(-2, 3, (query_tokens, heads, head_size), generator=generator)
    return query, torch.randint(-2, 3, (kv_heads, context, head_size), generator=generator).float()


@needs_triton
@pytest.mark.parametrize(
    ("heads", "kv_heads", "lists", "head_size", "query_tokens", "context", "query_block_tokens", "forced", "stages"),
    [
        pytest.param(
            4, 2, 2, 64, 70, 700, 64, (20, 50, 0), [Stage(64, 256, 4), Stage(16, 96, 1)], id="kv-head-two-stages"
        ),
        pytest.param(
            7, 1, 1, 80, 65, 500, 64, (0, 0, 1), [Stage(128, 256, 4), Stage(64, 128, 2), Stage(32, 96, 4)], id="group-7"
        ),
        pytest.param(2, 1, 2, 32, 130, 400, 128, (5, 100, 0), [Stage(32, 96, 64), Stage(16, 48, 4)], id="query-head"),
        pytest.param(4, 2, 1, 16, 70, 500, 64, (16, 17, 70), [Stage(64, 128, 2), Stage(16, 96, 1)], id="layer"),
        pytest.param(8, 1, 1, 16, 1, 900, 1, (16, 30, 0), [Stage(256, 512, 1), Stage(16, 96, 1)], id="decode"),
        pytest.param(1, 1, 1, 16, 64, 700, 64, (700, 0, 0), [Stage(16, 32, 4)], id="nothing-to-search"),
        pytest.param(2, 1, 1, 16, 129, 200, 64, (0, 300, 0), [Stage(16, 32, 4)], id="nothing-prunes"),
    ],
)
def test_equals_reference(
    heads: int,
    kv_heads: int,
    lists: int,
    head_size: int,
    query_tokens: int,
    context: int,
    query_block_tokens: int,
    forced: tuple[int, int, int],
    stages: list[Stage],
    generator: torch.Generator,
) -> None:
    query, keys = whole_numbers(generator, query_tokens, context, heads, kv_heads, head_size)
    assert_equals_reference(query, keys, lists, query_block_tokens, forced, *stages)


@needs_triton
@pytest.mark.parametrize("stages", [[Stage(128, 256, 4)], [Stage(128, 256, 4), Stage(16, 128, 4)]], ids=len)
def test_chunks_at_the_end_of_a_range_end_there(stages: list[Stage]) -> None:
    """Scores that grow with the position: the last chunk is kept, and what lies behind it would be even better."""
    keys = torch.zeros(1, 600, 16)
    keys[0, :, 0] = torch.arange(600)
    assert_equals_reference(torch.ones(200, 1, 16), keys, 1, 64, (0, 0, 0), *stages)


@needs_triton
def test_queries_too_wide_to_stay_pass_in_tiles(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    from vllm_sparse.kernels.hierarchical_descent import triton as hierarchical_triton

    monkeypatch.setattr(hierarchical_triton, "RESIDENT_NUMBERS", 16 * 32)
    monkeypatch.setattr(hierarchical_triton, "PASSING_NUMBERS", 16 * 32)
    query, keys = whole_numbers(generator, 70, 300, 2, 1, 32)
    assert_equals_reference(query, keys, 1, 64, (0, 0, 0), Stage(16, 32, 4))


@needs_triton
def test_selection_in_several_tiles(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    """Rows of scores beyond the registers, ties across the edges of tiles; programs that score several tiles."""
    from vllm_sparse.kernels.common import triton as common_triton
    from vllm_sparse.kernels.hierarchical_descent import triton as hierarchical_triton

    monkeypatch.setattr(common_triton, "LARGEST_ROW_TILE", 16)
    monkeypatch.setattr(hierarchical_triton, "SELECT_TILE", 8)
    monkeypatch.setattr(hierarchical_triton, "KEY_BLOCK_TILE", 16)
    monkeypatch.setattr(hierarchical_triton, "LEAST_PROGRAMS", 2)
    query, keys = whole_numbers(generator, 65, 900, 2, 1, 16)
    assert_equals_reference(query, keys, 1, 64, (30, 40, 0), Stage(32, 640, 4), Stage(16, 160, 1))


@needs_triton
@pytest.mark.parametrize("stride", [4, 64])
def test_means_equal_reference(stride: int, generator: torch.Generator) -> None:
    """Of query blocks of several chunks, the last of which are short."""
    from vllm_sparse.kernels.hierarchical_descent import triton as hierarchical_triton

    blocks = some_chunks(64, DEVICE)
    query = torch.randn(STEP_TOKENS, 3, 80, generator=generator).to(DEVICE)
    means = hierarchical_triton.averaged_queries(query, blocks, stride).view(blocks.blocks, 64 // stride, 3, 80)
    for chunk, span in enumerate(SPANS):
        of_chunk = query[span.query_start : span.query_start + span.query_tokens]
        expected = reference.averaged_queries(of_chunk, stride)
        actual = means[blocks.starts[chunk] : blocks.starts[chunk + 1]].flatten(0, 1)[: expected.shape[0]]
        assert float((actual - expected).abs().max()) < 1e-6


@needs_triton
@pytest.mark.parametrize(
    ("heads", "kv_heads", "lists", "searched_at_once"), [(2, 2, 2, 100), (4, 2, 1, 3), (7, 1, 1, 100), (8, 2, 4, 4)]
)
def test_chunks_of_several_requests_equal_reference(
    heads: int,
    kv_heads: int,
    lists: int,
    searched_at_once: int,
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
) -> None:
    """Chunks with less to search than a stage keeps, and with nothing; all query blocks at once, and a few."""
    from vllm_sparse.kernels.hierarchical_descent import triton as hierarchical_triton

    query, keys = whole_numbers(generator, STEP_TOKENS, 2600, heads, kv_heads, 16)
    table = torch.stack([torch.randperm(80, generator=generator)[:55] for _ in range(8)]).int()
    cache = torch.full((80, kv_heads, 48, 32), float("nan"))
    cache[:55, ..., :16] = torch.nn.functional.pad(keys, (0, 0, 0, 40)).view(kv_heads, 55, 48, 16).transpose(0, 1)
    cache[55:, ..., :16] = cache[:25, ..., :16]
    cache, table, query = cache.to(DEVICE), table.to(DEVICE), query.to(DEVICE)
    blocks = some_chunks(64, DEVICE)
    readers = tuple(PlainKeys(cache, table[span.row], span.seq_len) for span in SPANS)
    chunks = PromptChunks(blocks, query, readers, table, 1.0)
    arguments = DescentArguments([Stage(128, 1024, 4), Stage(64, 512, 1), Stage(16, 96, 2)], 64, 20, 50, 1)
    ranges = search_ranges(blocks, arguments)
    of_a_block = lists * search_bytes(*entries_of_search(ranges.stages, ranges.range_tokens))
    monkeypatch.setattr(hierarchical_triton, "SCRATCH_BYTES", searched_at_once * of_a_block)
    actual = hierarchical_triton.hierarchical_descents(chunks, ranges, arguments, lists)
    expected = reference.hierarchical_descents(chunks, arguments, lists)
    assert torch.equal(actual, expected), f"{int((actual != expected).sum())} leaves differ"


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    from vllm_sparse.kernels.common.triton import threshold_tile
    from vllm_sparse.kernels.hierarchical_descent import triton as hierarchical_triton

    integers = (
        "first_block",
        "begin",
        "parent_tokens",
        "key_block_tokens",
        "kept_key_blocks",
        "list_width",
        "score_width",
    )
    tables = "parent_pointer", "last_query_pointer", "end_pointer"
    types = {**dict.fromkeys(integers, "i32"), **dict.fromkeys(tables, "*i32"), "score_pointer": "*fp32"}
    more_tables = (
        "first_query_pointer",
        "first_token_pointer",
        "chunk_pointer",
        "table_row_pointer",
        "block_table_pointer",
    )
    strides = ("query_row_stride", "cache_block_stride", "cache_head_stride", "cache_token_stride")
    heads = {"QUERY_BLOCK": 64, "MEMBERS": 4, "PARTS": 1, "LISTS_PER_KV_HEAD": 1, "CACHE_BLOCK": 128}
    sizes = {"HEAD_SIZE": 128, "HEAD_TILE": 128, "TILE": hierarchical_triton.KEY_BLOCK_TILE}
    # The first and the last of the default stages.
    for first, block_rows in ((True, 16), (False, 64)):
        compile_for_hopper(
            hierarchical_triton.key_block_scores_kernel,
            {
                **types,
                **dict.fromkeys(("steps", "table_row_stride", *strides), "i32"),
                **dict.fromkeys(("query_pointer", "cache_pointer"), "*bf16"),
                **dict.fromkeys(more_tables, "*i32"),
            },
            {"FIRST": first, "BLOCK_ROWS": block_rows, "ROW_TILE": 4 * block_rows, **heads, **sizes},
            num_stages=1,
        )
    sizes = {"LEAF": 16, "TILE": hierarchical_triton.SELECT_TILE}
    for last, width in ((False, 512), (True, 512), (False, 40000), (True, 8192)):
        entries, num_warps = threshold_tile(width)
        compiled = compile_for_hopper(
            hierarchical_triton.best_key_blocks_kernel,
            {**types, "kept_pointer": "*i32", "mask_pointer": "*u8", "blocks": "i32", "leaves": "i32"},
            {"FIRST": not last, "LAST": last, "ROW_TILE": entries, **sizes},
            num_warps=num_warps,
        )
        assert spilled_bytes(compiled, tmp_path) == 0, f"{width} chunks"
    compile_for_hopper(
        hierarchical_triton.averaged_queries_kernel,
        {
            **dict.fromkeys(("query_pointer", "averaged_pointer"), "*bf16"),
            **dict.fromkeys(("first_query_pointer", "last_query_pointer", "first_token_pointer"), "*i32"),
            **dict.fromkeys(("width", "query_row_stride"), "i32"),
        },
        {"BLOCK_ROWS": 16, "STRIDE": 4, "TILE": hierarchical_triton.AVERAGE_TILE},
    )
