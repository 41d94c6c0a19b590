"""Compaction and translation in Triton equal their PyTorch specification: compiled on a GPU, interpreted elsewhere."""

from __future__ import annotations

import random

import pytest
import torch

from tests.kernels.chunks import some_chunks
from tests.kernels.hopper import compile_for_hopper
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from tests.oracle import live_pages
from vllm_sparse.kernels.page_list import reference
from vllm_sparse.pages import PageList, empty_lists
from vllm_sparse.step.chunks import launch_rows

pytest.importorskip("triton")


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=9)


@needs_triton
@pytest.mark.parametrize(
    ("heads", "list_heads", "chunk", "context", "query_block", "block", "page"),
    [
        pytest.param(4, 4, 300, 1000, 128, 128, 16, id="pages-finer-than-blocks"),
        pytest.param(8, 2, 257, 4099, 64, 16, 16, id="group-4-several-tiles"),
        pytest.param(7, 1, 1, 700, 64, 32, 1, id="group-7-one-row-token-pages"),
        pytest.param(3, 3, 129, 129, 128, 64, 32, id="whole-prompt"),
    ],
)
def test_lists_equal_the_reference(
    heads: int, list_heads: int, chunk: int, context: int, query_block: int, block: int, page: int
) -> None:
    from vllm_sparse.kernels.page_list import triton as page_list_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    shape = (heads, -(-chunk // query_block), -(-context // block))
    mask = (torch.rand(*shape, generator=generator) < 0.3).to(DEVICE)
    grid = reference.ListGrid(chunk, context, query_block, block, page, list_heads)
    expected, actual = reference.block_lists(mask, grid), page_list_triton.block_lists(mask, grid)
    assert torch.equal(actual.kept_tokens, expected.kept_tokens), f"seed {seed}"
    assert torch.equal(actual.pages, expected.pages), f"seed {seed}"


@needs_triton
@pytest.mark.parametrize(
    ("heads", "list_heads", "query_block", "block", "page"), [(4, 4, 64, 32, 32), (7, 1, 128, 64, 16)]
)
def test_lists_of_several_chunks_equal_the_reference(
    heads: int, list_heads: int, query_block: int, block: int, page: int
) -> None:
    """Those of the map's other rows and columns stay out, and nothing is written past the live part."""
    from vllm_sparse.kernels.page_list import triton as page_list_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    blocks = some_chunks(query_block, DEVICE)
    pages = -(-blocks.longest_seq_len // block)
    mask = (torch.rand(heads, blocks.blocks, pages, generator=generator) < 0.3).to(DEVICE)
    lists = [empty_lists(list_heads * blocks.blocks, pages * block // page, page, mask.device) for _ in range(2)]
    for one in lists:
        one.pages.fill_(-1)
    reference.write_lists(mask, blocks, block, list_heads, lists[0])
    page_list_triton.write_lists(mask, blocks, block, list_heads, lists[1])
    assert torch.equal(lists[1].kept_tokens, lists[0].kept_tokens), f"seed {seed}"
    live = torch.arange(lists[0].pages.shape[1], device=mask.device) < lists[0].kept_pages.unsqueeze(1)
    assert torch.equal(lists[1].pages, lists[0].pages.masked_fill(~live, -1)), f"seed {seed}"
    # In the order of execution.
    rows = launch_rows([blocks], list_heads, list_heads, mask.device)
    table = torch.randint(0, 1 << 20, (9, 100), generator=generator).int().to(DEVICE)
    launched = [
        implementation.launch_lists(lists[1], rows, table, 2, list_heads)
        for implementation in (reference, page_list_triton)
    ]
    assert torch.equal(launched[1].kept_tokens, launched[0].kept_tokens), f"seed {seed}"
    live = torch.arange(lists[0].pages.shape[1], device=mask.device) < launched[0].kept_pages.unsqueeze(1)
    assert torch.equal(launched[1].pages, launched[0].pages.masked_fill(~live, 0)), f"seed {seed}"


@needs_triton
@pytest.mark.parametrize(("pages_per_block", "shared_table"), [(1, True), (8, False), (4, True)])
def test_translation_equals_the_reference(pages_per_block: int, shared_table: bool) -> None:
    from vllm_sparse.kernels.page_list import triton as page_list_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    rows, width, blocks, kv_heads, page = 5, 1500, 400, 3, 16
    pages = torch.randint(0, blocks * pages_per_block, (rows, width), generator=generator).int()
    kept = torch.tensor([1, 16, 17, width * page, 1024 * page]).int()
    table = torch.randint(0, 1 << 20, (rows, blocks), generator=generator).int()
    lists = PageList(pages.to(DEVICE), kept.to(DEVICE), page)
    table = (table[0] if shared_table else table).to(DEVICE)
    heads = torch.randint(0, kv_heads, (rows,), generator=generator).to(DEVICE)
    expected = reference.to_physical(lists, table, heads, pages_per_block, kv_heads)
    actual = page_list_triton.to_physical(lists, table, heads, pages_per_block, kv_heads)
    for row in range(rows):
        live = len(live_pages(lists, row))
        assert torch.equal(actual[row, :live], expected[row, :live]), f"row {row}, seed {seed}"
        assert not bool(actual[row, live:].any()), "what lies behind the live part must be a valid page"


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
def test_kernels_compile_for_hopper() -> None:
    from vllm_sparse.kernels.page_list import triton as page_list_triton

    compile_for_hopper(
        page_list_triton.write_lists_kernel,
        {
            **dict.fromkeys(("query_block_count", "key_blocks", "width"), "i32"),
            "mask_pointer": "*u8",
            **dict.fromkeys(
                (
                    "pages_pointer",
                    "kept_tokens_pointer",
                    "first_query_pointer",
                    "last_query_pointer",
                    "chunk_pointer",
                    "chunk_start_pointer",
                ),
                "*i32",
            ),
        },
        {"BLOCK": 128, "PAGE": 128, "GROUP": 4, "TILE": page_list_triton.PAGE_TILE},
    )
    compile_for_hopper(
        page_list_triton.launch_lists_kernel,
        {
            **dict.fromkeys(("width", "table_row_stride", "num_kv_heads", "page_size"), "i32"),
            **dict.fromkeys(
                (
                    "pages_pointer",
                    "kept_tokens_pointer",
                    "list_pointer",
                    "kv_head_pointer",
                    "table_row_pointer",
                    "block_table_pointer",
                    "physical_pointer",
                    "launched_tokens_pointer",
                ),
                "*i32",
            ),
        },
        {"PAGES_PER_BLOCK": 8, "TILE": page_list_triton.PAGE_TILE},
    )
    compile_for_hopper(
        page_list_triton.to_physical_kernel,
        {
            **dict.fromkeys(("width", "table_row_stride", "num_kv_heads", "page_size"), "i32"),
            **dict.fromkeys(
                ("pages_pointer", "kept_tokens_pointer", "block_table_pointer", "physical_pointer"), "*i32"
            ),
            "kv_head_pointer": "*i64",
        },
        {"PAGES_PER_BLOCK": 8, "TILE": page_list_triton.PAGE_TILE},
    )
