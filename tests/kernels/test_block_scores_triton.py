"""DHSA's scores and selection in Triton equal their PyTorch specification; of the same scores, to the last page."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.kernels.chunks import STEP_TOKENS, some_chunks
from tests.kernels.hopper import compile_for_hopper, spilled_bytes
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from vllm_sparse.kernels.block_scores import reference

pytest.importorskip("triton")


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=33)


def fresh() -> tuple[int, torch.Generator]:
    """A seed and its random numbers."""
    seed = random.randrange(1 << 30)
    return seed, torch.Generator().manual_seed(seed)


@needs_triton
@pytest.mark.parametrize(
    ("query_tokens", "heads", "head_size", "query_block_tokens"), [(300, 3, 128, 128), (1, 1, 80, 64), (64, 7, 96, 64)]
)
def test_pooled_queries_equal_the_reference(
    query_tokens: int, heads: int, head_size: int, query_block_tokens: int
) -> None:
    """Of queries that lie in a wider row, as a fused projection leaves them."""
    from vllm_sparse.kernels.block_scores import triton as scores_triton

    seed, generator = fresh()
    query = torch.randn(query_tokens, heads + 2, head_size, generator=generator).to(DEVICE)[:, 1:-1]
    pooled = scores_triton.pooled_queries(query, query_block_tokens)
    expected = reference.pooled_queries(query, query_block_tokens)
    assert pooled.shape == expected.shape
    assert float((pooled - expected).norm() / expected.norm()) < 1e-6, f"seed {seed}"


@needs_triton
@pytest.mark.parametrize(
    ("heads", "key_heads", "query_block_count", "key_blocks", "pages", "head_size"),
    [
        (8, 2, 5, 200, 70, 64),
        (3, 1, 66, 33, 129, 128),
        (1, 1, 1, 1, 1, 80),
        (4, 4, 64, 300, 64, 96),
        (2, 1, 3, 9, 40, 256),
    ],
)
def test_page_scores_equal_the_reference(
    heads: int, key_heads: int, query_block_count: int, key_blocks: int, pages: int, head_size: int
) -> None:
    from vllm_sparse.kernels.block_scores import triton as scores_triton

    seed, generator = fresh()
    queries = torch.randn(heads, query_block_count, head_size, generator=generator).to(DEVICE)
    representation = torch.randn(key_heads, key_blocks, head_size, generator=generator).to(DEVICE)
    first = torch.randint(0, key_blocks, (pages,), generator=generator).sort().values.int()
    last = (first + torch.randint(0, 5, (pages,), generator=generator)).clamp(max=key_blocks - 1).int()
    edges = first.to(DEVICE), last.to(DEVICE)
    scores = scores_triton.page_scores(queries, representation, *edges)
    expected = reference.page_scores(queries, representation, *edges)
    assert scores.shape == expected.shape
    assert float((scores - expected).norm() / expected.norm()) < 1e-5, f"seed {seed}"


@needs_triton
@pytest.mark.parametrize("query_block_tokens", [64, 128])
def test_pooled_queries_of_several_chunks_equal_the_reference(query_block_tokens: int) -> None:
    from vllm_sparse.kernels.block_scores import triton as scores_triton

    seed, generator = fresh()
    query = torch.randn(STEP_TOKENS, 5, 80, generator=generator).to(DEVICE)[:, 1:-1]
    blocks = some_chunks(query_block_tokens, DEVICE)
    pooled = scores_triton.chunk_queries(query, blocks)
    expected = reference.chunk_queries(query, blocks)
    assert pooled.shape == expected.shape
    assert float((pooled - expected).norm() / expected.norm()) < 1e-6, f"seed {seed}"


@needs_triton
@pytest.mark.parametrize(("heads", "key_heads", "tile"), [(4, 2, 64), (3, 1, 16)])
def test_page_scores_of_several_chunks_equal_the_reference(
    heads: int, key_heads: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Key blocks past a context may be anything; with small tiles, a chunk has more than one and others have fewer."""
    from vllm_sparse.kernels.block_scores import triton as scores_triton

    monkeypatch.setattr(scores_triton, "BLOCK_TILE", tile)
    seed, generator = fresh()
    blocks = some_chunks(16, DEVICE)
    pages = -(-blocks.longest_seq_len // 32)
    queries = torch.randn(heads, blocks.blocks, 48, generator=generator).to(DEVICE)
    shape = key_heads, len(blocks.spans), 2 * pages, 48
    representation = torch.randn(shape, generator=generator)
    edges = torch.empty(2, len(blocks.spans), pages, dtype=torch.int32)
    edges[0], edges[1] = 1, 0
    for chunk, span in enumerate(blocks.spans):
        start = torch.arange(0, span.seq_len, 32)
        edges[0, chunk, : start.shape[0]] = start // 16
        edges[1, chunk, : start.shape[0]] = (start + 31).clamp(max=span.seq_len - 1) // 16
        representation[:, chunk, -(-span.seq_len // 16) :] = float("nan")
    rows = queries, representation.to(DEVICE), *edges.to(DEVICE), blocks
    scores, expected = scores_triton.chunk_scores(*rows), reference.chunk_scores(*rows)
    reached = expected > float("-inf")
    assert not bool(scores.isnan().any()), f"seed {seed}"
    assert float((scores - expected)[reached].norm() / expected[reached].norm()) < 1e-5, f"seed {seed}"


@needs_triton
@pytest.mark.parametrize(
    ("pages", "sink_pages", "budget_pages"),
    [(1, 0, 1), (60, 4, 20), (60, 100, 3), (70, 1, 1 << 19), (2500, 0, 300), (40000, 9, 11000)],
)
def test_selection_equals_the_reference(pages: int, sink_pages: int, budget_pages: int) -> None:
    """Rows full of ties, of both zeros, of extremes; the widest does not fit the registers of a program."""
    assert_selection_equals_the_reference(pages, sink_pages, budget_pages)


@needs_triton
@pytest.mark.parametrize(("pages", "sink_pages", "budget_pages"), [(1027, 0, 300), (1028, 0, 300), (3000, 1500, 1700)])
def test_selection_where_a_row_leaves_the_registers(
    pages: int, sink_pages: int, budget_pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registers for 1024 pages: all that compete, which the last three do not; all but one of them; none."""
    from vllm_sparse.kernels.common import triton as common_triton

    monkeypatch.setattr(common_triton, "LARGEST_ROW_TILE", 1024)
    assert_selection_equals_the_reference(pages, sink_pages, budget_pages)


def assert_selection_equals_the_reference(pages: int, sink_pages: int, budget_pages: int) -> None:
    """To the last page."""
    from vllm_sparse.kernels.block_scores import triton as scores_triton

    seed, generator = fresh()
    scores = torch.randn(4, 3, pages, generator=generator)
    # The best at the end, where one that is missed shows.
    scores[1] = (scores[1] * 2).round()
    scores[1, :, -4:] = 9.0
    scores[2] = 0.0
    scores[2, :, ::3] = -0.0
    scores[3, :, ::2] *= 1e-38
    scores[3, :, ::7] *= 1e38
    scores[3, :, 1::7] = float("-inf")
    # A row in the middle, one with all of it forced, one with all of it but its end free.
    last = torch.tensor([int(torch.randint(0, pages, (), generator=generator)), pages - 1, pages - 1]).int()
    band = torch.tensor([int(last[0]) * 2 // 3, 0, max(pages - 3, 0)]).int()
    # Each row has a budget of its own.
    budgets = torch.tensor([budget_pages, budget_pages // 2, budget_pages + 1]).int()
    rows = scores.to(DEVICE), sink_pages, band.to(DEVICE), last.to(DEVICE), budgets.to(DEVICE)
    assert torch.equal(scores_triton.select_pages(*rows), reference.select_pages(*rows)), f"seed {seed}"


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
@pytest.mark.parametrize("head_size", [80, 128, 256])
def test_kernels_compile_for_hopper(head_size: int) -> None:
    from vllm_sparse.kernels.block_scores import triton as scores_triton

    compile_for_hopper(
        scores_triton.pooled_queries_kernel,
        {
            "query_pointer": "*bf16",
            "pooled_pointer": "*fp32",
            **dict.fromkeys(("first_token_pointer", "first_query_pointer", "last_query_pointer"), "*i32"),
            **dict.fromkeys(("query_block_count", "query_row_stride", "query_head_stride"), "i32"),
        },
        {"HEAD_SIZE": head_size, "HEAD_TILE": 1 << (head_size - 1).bit_length(), "BLOCK": 128},
        num_warps=8,
    )
    compile_for_hopper(
        scores_triton.page_scores_kernel,
        {
            **dict.fromkeys(("query_pointer", "representation_pointer", "score_pointer"), "*fp32"),
            **dict.fromkeys(("first_key_block_pointer", "last_key_block_pointer", "chunk_start_pointer"), "*i32"),
            **dict.fromkeys(("chunks", "query_block_count", "key_blocks", "pages"), "i32"),
        },
        {
            "HEAD_SIZE": head_size,
            "GROUP": 4,
            "BLOCK_TILE": scores_triton.BLOCK_TILE,
            "PAGE_TILE": scores_triton.PAGE_TILE,
            "DIM_TILE": scores_triton.DIM_TILE,
            "PRECISION": "tf32x3",
        },
    )


@needs_triton
@pytest.mark.parametrize("entries", [1024, 1 << 15])
@pytest.mark.parametrize(
    ("pages", "sink_pages", "budget_pages", "share"),
    [
        pytest.param(1, 0, 1, 0.5, id="one-page"),
        pytest.param(60, 4, 20, 0.8, id="some-forced"),
        pytest.param(2500, 2, 1 << 19, 0.9, id="no-budget"),
        pytest.param(2500, 0, 300, 0.97, id="budget-and-mass"),
        pytest.param(2500, 0, 1200, 1.5, id="never-enough"),
        pytest.param(1500, 0, 1200, 0.001, id="nearly-nothing"),
    ],
)
def test_selection_of_covering_pages_equals_the_reference(
    pages: int, sink_pages: int, budget_pages: int, share: float, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of powers of two are exact, so both agree to the last page; negative masses count as nothing."""
    from vllm_sparse.kernels.block_scores import triton as scores_triton
    from vllm_sparse.kernels.common import triton as common_triton

    monkeypatch.setattr(common_triton, "LARGEST_ROW_TILE", entries)
    seed, generator = fresh()
    mass = 2.0 ** -torch.randint(1, 9, (4, 3, pages), generator=generator).float()
    mass[1] = 1 / 1024
    mass[2][torch.rand(3, pages, generator=generator) < 0.6] = -1.0
    mass[3] = 0.0
    last = torch.tensor([int(torch.randint(0, pages, (), generator=generator)), pages - 1, pages - 1]).int()
    band = torch.tensor([int(last[0]) * 2 // 3, max(pages - 3, 0), max(pages - 40, 0)]).int()
    budgets = torch.tensor([budget_pages, budget_pages // 2, budget_pages + 1]).int()
    rows = mass.to(DEVICE), sink_pages, band.to(DEVICE), last.to(DEVICE), budgets.to(DEVICE)
    covered_mass = share * float(mass[0, 1].sum())
    expected = reference.select_pages(*rows, covered_mass)
    assert torch.equal(scores_triton.select_pages(*rows, covered_mass), expected), f"seed {seed}"


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
@pytest.mark.parametrize("covering", [False, True])
@pytest.mark.parametrize("pages", [1000, 8192, 16384, 40000])
def test_selection_compiles_for_hopper(pages: int, covering: bool, tmp_path: Path) -> None:
    from vllm_sparse.kernels.block_scores import triton as scores_triton
    from vllm_sparse.kernels.common.triton import threshold_tile

    entries, num_warps = threshold_tile(min(pages, scores_triton.MOST_COVERED_PAGES) if covering else pages)
    compiled = compile_for_hopper(
        scores_triton.select_pages_kernel,
        {
            "score_pointer": "*fp32",
            "kept_pointer": "*u8",
            **dict.fromkeys(("band_page_pointer", "last_page_pointer", "budget_pages_pointer"), "*i32"),
            **dict.fromkeys(("query_block_count", "pages", "sink_pages"), "i32"),
            "covered_mass": "fp32",
        },
        {"COVERING": covering, "ROW_TILE": entries, "TILE": scores_triton.SELECT_TILE},
        num_warps=num_warps,
    )
    assert spilled_bytes(compiled, tmp_path) == 0
