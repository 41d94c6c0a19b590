"""Mass of all pages in Triton equals its PyTorch specification: compiled on a GPU, else interpreted."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests import oracle
from tests.kernels.chunks import STEP_TOKENS, Span, some_chunks
from tests.kernels.hopper import compile_for_hopper, spilled_bytes
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from vllm_sparse.kernels.candidate_mass.reference import KEY_GROUPS, SAMPLED_QUERIES
from vllm_sparse.kernels.sampled_mass import reference
from vllm_sparse.keys import PlainKeys
from vllm_sparse.step.chunks import PromptBlocks, PromptChunks, prompt_blocks

pytest.importorskip("triton")

# Masses are kept in 16 bits, less the largest product of their row by then.
MOST_ERROR = 5e-4


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=19)


@needs_triton
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "chunk", "context", "cache_block", "query_block", "page"),
    [
        pytest.param(4, 2, 64, 300, 300, 128, 128, 32, id="whole-prompt"),
        pytest.param(7, 1, 128, 129, 641, 64, 128, 32, id="group-7-chunk-off-the-grid"),
        pytest.param(2, 2, 80, 70, 333, 48, 64, 16, id="odd-sizes"),
        pytest.param(2, 1, 64, 1, 127, 16, 128, 64, id="one-row"),
        pytest.param(2, 1, 64, 1, 1, 16, 128, 32, id="one-token"),
        pytest.param(1, 1, 64, 700, 765, 128, 64, 32, id="one-head-eleven-blocks"),
        pytest.param(24, 2, 64, 130, 400, 256, 128, 32, id="group-12-of-two-programs"),
        pytest.param(2, 1, 256, 200, 400, 32, 64, 32, id="wide-heads"),
    ],
)
@pytest.mark.parametrize("segment", [128, 8192])
def test_equals_the_reference(
    heads: int,
    kv_heads: int,
    head_size: int,
    chunk: int,
    context: int,
    cache_block: int,
    query_block: int,
    page: int,
    segment: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm_sparse.kernels.sampled_mass import triton as sampled_mass_triton

    monkeypatch.setattr(sampled_mass_triton, "SEGMENT", segment)
    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-context // cache_block)
    cache = torch.randn(blocks + 3, kv_heads, cache_block, 2 * head_size, generator=generator).to(DEVICE)
    block_table = torch.randperm(blocks + 3, generator=generator)[:blocks].int().to(DEVICE)
    # What lies behind the context is stale and may be anything.
    stale = blocks * cache_block - context
    if stale:
        cache[int(block_table[-1]), :, cache_block - stale :] = float("nan")
    # Queries lie in a wider row, as a fused projection leaves them, and their scores differ enough to move the maximum.
    query = torch.randn(chunk, heads + 2, head_size, generator=generator).to(DEVICE)[:, 1:-1] * 3
    keys = PlainKeys(cache, block_table, context)
    expected = reference.sampled_mass(query.double(), keys, 0.2, query_block, page)
    mass = sampled_mass_triton.sampled_mass(query, keys, 0.2, query_block, page)
    assert mass.dtype == torch.float32
    assert mass.shape == expected.shape
    error = oracle.relative_error(mass, expected)
    assert error < MOST_ERROR, f"differs by {error} (seed {seed})"


# Several of one query block each, so that a program has some of each.
SHORT = prompt_blocks(
    [Span(3, 0, 50, 90), Span(0, 50, 64, 64), Span(7, 114, 1, 33), Span(1, 115, 65, 200)], 64, torch.device(DEVICE)
)


@needs_triton
@pytest.mark.parametrize(
    ("blocks", "heads", "kv_heads", "scratch_bytes", "segment"),
    [
        pytest.param(some_chunks(64, DEVICE), 4, 2, 1 << 29, 1024, id="long"),
        pytest.param(some_chunks(64, DEVICE), 6, 2, 1 << 17, 1024, id="little-scratch"),
        pytest.param(SHORT, 2, 2, 1 << 29, 128, id="chunks-in-one-program"),
    ],
)
def test_several_chunks_equal_the_reference(
    blocks: PromptBlocks,
    heads: int,
    kv_heads: int,
    scratch_bytes: int,
    segment: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each with its own keys; also where what is kept of them has room for some query blocks at a time."""
    from vllm_sparse.kernels.sampled_mass import triton as sampled_mass_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    width = -(-blocks.longest_seq_len // 64)
    table = torch.randperm(8 * width, generator=generator).view(8, width).int()
    cache = torch.randn(8 * width, kv_heads, 64, 64, generator=generator).to(DEVICE)
    query = (torch.randn(STEP_TOKENS, heads, 32, generator=generator) * 3).to(DEVICE)
    keys = tuple(PlainKeys(cache, table[span.row].to(DEVICE), span.seq_len) for span in blocks.spans)
    chunks = PromptChunks(blocks, query, keys, table.to(DEVICE), 0.2)
    monkeypatch.setattr(sampled_mass_triton, "SCRATCH_BYTES", scratch_bytes)
    monkeypatch.setattr(sampled_mass_triton, "SEGMENT", segment)
    mass = sampled_mass_triton.chunk_sampled_mass(chunks, 32)
    expected = reference.chunk_sampled_mass(chunks, 32)
    assert mass.shape == expected.shape
    error = oracle.relative_error(mass, expected)
    assert error < MOST_ERROR, f"differs by {error} (seed {seed})"


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
@pytest.mark.parametrize(("head_size", "group"), [(64, 7), (128, 4), (128, 1)])
def test_kernels_compile_for_hopper(head_size: int, group: int, tmp_path: Path) -> None:
    from vllm_sparse.kernels.sampled_mass import triton as sampled_mass_triton

    heads, blocks, _ = reference.programs(2 * group, 2)
    constants = {
        "GROUP": group,
        "BLOCKS": blocks,
        "HEADS": heads,
        "SAMPLES": SAMPLED_QUERIES,
        "PAGE": 32,
        "TILE": reference.KEY_TILE,
        "SEGMENT": sampled_mass_triton.SEGMENT,
    }
    strides = ("query_row_stride", "query_head_stride", "cache_block_stride", "cache_head_stride", "cache_token_stride")
    kept = {
        "kept_mass_pointer": "*fp16",
        **dict.fromkeys(("kept_most_pointer", "partial_pointer"), "*fp32"),
        **dict.fromkeys(("first_query_pointer", "last_query_pointer"), "*i32"),
    }
    read = {
        **dict.fromkeys(("query_pointer", "cache_pointer"), "*bf16"),
        **dict.fromkeys(("first_token_pointer", "chunk_pointer", "table_row_pointer"), "*i32"),
        **dict.fromkeys(strides, "i32"),
    }
    sizes = dict.fromkeys(("first_group", "segments", "kv_heads", "blocks", "pages"), "i32")
    products = compile_for_hopper(
        sampled_mass_triton.segment_masses_kernel,
        {**kept, **read, **sizes, "block_table_pointer": "*i32", "table_row_stride": "i32", "scale_log2": "fp32"},
        {**constants, "GROUPS": KEY_GROUPS, "CACHE_BLOCK": 128, "HEAD_SIZE": head_size, "HEAD_TILE": head_size},
        num_warps=sampled_mass_triton.WARPS,
        num_stages=sampled_mass_triton.STAGES,
        aligned={**kept, **read},
    )
    masses = compile_for_hopper(
        sampled_mass_triton.page_masses_kernel,
        {**kept, **sizes, "mass_pointer": "*fp32"},
        {
            **constants,
            "PAGE_TILE": sampled_mass_triton.PAGE_TILE,
            "PAGE_TILES": sampled_mass_triton.PAGE_TILES,
        },
        num_warps=sampled_mass_triton.WARPS,
        aligned=kept,
    )
    assert spilled_bytes(products, tmp_path) == spilled_bytes(masses, tmp_path) == 0
