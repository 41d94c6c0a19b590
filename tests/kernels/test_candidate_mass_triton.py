"""Mass of candidate pages in Triton equals its PyTorch specification: compiled on a GPU, else interpreted."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests import oracle
from tests.kernels.candidates import candidate_lists
from tests.kernels.chunks import STEP_TOKENS, some_chunks
from tests.kernels.hopper import compile_for_hopper, spilled_bytes
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from vllm_sparse.kernels.candidate_mass import NOT_LISTED, SAMPLED_QUERIES, reference
from vllm_sparse.keys import PlainKeys
from vllm_sparse.pages import PageList
from vllm_sparse.step.chunks import PromptChunks

pytest.importorskip("triton")


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=10)


@needs_triton
@pytest.mark.parametrize(
    ("heads", "kv_heads", "list_heads", "head_size", "chunk", "context", "cache_block", "query_block", "page"),
    [
        pytest.param(4, 2, 2, 64, 300, 300, 128, 128, 32, id="whole-prompt"),
        pytest.param(7, 1, 1, 128, 129, 641, 64, 128, 32, id="group-7-chunk-off-the-grid"),
        pytest.param(2, 2, 1, 80, 70, 333, 48, 64, 16, id="odd-sizes-one-list"),
        pytest.param(2, 1, 1, 64, 1, 127, 16, 128, 64, id="one-row"),
        pytest.param(2, 1, 1, 64, 1, 1, 16, 128, 32, id="one-token"),
        pytest.param(1, 1, 1, 64, 64, 65, 128, 64, 32, id="one-head"),
        pytest.param(24, 2, 2, 64, 130, 400, 256, 128, 32, id="group-12-of-two-programs"),
        pytest.param(4, 4, 2, 96, 200, 400, 32, 64, 32, id="lists-of-two-kv-heads"),
    ],
)
def test_equals_the_reference(
    heads: int,
    kv_heads: int,
    list_heads: int,
    head_size: int,
    chunk: int,
    context: int,
    cache_block: int,
    query_block: int,
    page: int,
) -> None:
    from vllm_sparse.kernels.candidate_mass import triton as candidate_mass_triton

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
    _, lists = candidate_lists(list_heads, chunk, context, query_block, page, generator)
    # Entries past a list's end are never read.
    beyond = torch.arange(lists.pages.shape[1]) >= lists.kept_pages.unsqueeze(1)
    lists = PageList(lists.pages.masked_fill(beyond, 1 << 30).to(DEVICE), lists.kept_tokens.to(DEVICE), page)
    expected = reference.candidate_mass(query.double(), keys, 0.2, query_block, lists)
    mass = candidate_mass_triton.candidate_mass(query, keys, 0.2, query_block, lists)
    assert mass.dtype == torch.float32
    assert mass.shape == expected.shape
    assert torch.equal(mass == NOT_LISTED, expected == NOT_LISTED), f"seed {seed}"
    error = oracle.relative_error(mass, expected)
    assert error < 1e-5, f"differs by {error} (seed {seed})"


@needs_triton
@pytest.mark.parametrize(("heads", "kv_heads", "list_heads", "scratch_bytes"), [(4, 2, 2, 1 << 29), (6, 2, 1, 1 << 17)])
def test_several_chunks_equal_the_reference(
    heads: int, kv_heads: int, list_heads: int, scratch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with its own keys and lists; also where what is kept of them has room for some query blocks at a time."""
    from vllm_sparse.kernels.candidate_mass import triton as candidate_mass_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    blocks = some_chunks(64, DEVICE)
    width = -(-blocks.longest_seq_len // 64)
    table = torch.randperm(8 * width, generator=generator).view(8, width).int()
    cache = torch.randn(8 * width, kv_heads, 64, 64, generator=generator).to(DEVICE)
    query = (torch.randn(STEP_TOKENS, heads, 32, generator=generator) * 3).to(DEVICE)
    keys = tuple(PlainKeys(cache, table[span.row].to(DEVICE), span.seq_len) for span in blocks.spans)
    pages = torch.full((list_heads * blocks.blocks, 2 * width), 1 << 30, dtype=torch.int32)
    kept = torch.empty(pages.shape[0], dtype=torch.int32)
    for chunk, span in enumerate(blocks.spans):
        _, lists = candidate_lists(list_heads, span.query_tokens, span.seq_len, 64, 32, generator)
        rows = blocks.lists_of(chunk, list_heads)
        live = torch.arange(lists.pages.shape[1]) < lists.kept_pages.unsqueeze(1)
        pages[rows, : lists.pages.shape[1]] = lists.pages.masked_fill(~live, 1 << 30)
        kept[rows] = lists.kept_tokens
    candidates = PageList(pages.to(DEVICE), kept.to(DEVICE), 32)
    chunks = PromptChunks(blocks, query, keys, table.to(DEVICE), 0.2)
    monkeypatch.setattr(candidate_mass_triton, "SCRATCH_BYTES", scratch_bytes)
    mass = candidate_mass_triton.chunk_mass(chunks, candidates)
    expected = reference.chunk_mass(chunks, candidates)
    assert torch.equal(mass == NOT_LISTED, expected == NOT_LISTED), f"seed {seed}"
    error = oracle.relative_error(mass, expected)
    assert error < 1e-5, f"differs by {error} (seed {seed})"


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
@pytest.mark.parametrize(("head_size", "group"), [(64, 7), (128, 4), (128, 8)])
def test_kernel_compiles_for_hopper(head_size: int, group: int, tmp_path: Path) -> None:
    from vllm_sparse.kernels.candidate_mass import triton as candidate_mass_triton

    heads = min(1 << (group - 1).bit_length(), candidate_mass_triton.MOST_HEADS)
    strides = ("query_row_stride", "query_head_stride", "cache_block_stride", "cache_head_stride", "cache_token_stride")
    compiled = compile_for_hopper(
        candidate_mass_triton.candidate_mass_kernel,
        {
            **dict.fromkeys(("query_pointer", "cache_pointer"), "*bf16"),
            **dict.fromkeys(("first_block", "blocks", "pages", "width", "table_row_stride", *strides), "i32"),
            **dict.fromkeys(("block_table_pointer", "list_pointer", "kept_tokens_pointer"), "*i32"),
            **dict.fromkeys(("first_query_pointer", "last_query_pointer", "first_token_pointer"), "*i32"),
            **dict.fromkeys(("chunk_pointer", "chunk_start_pointer", "table_row_pointer"), "*i32"),
            **dict.fromkeys(("mass_pointer", "kept_mass_pointer"), "*fp32"),
            "scale_log2": "fp32",
        },
        {
            "CACHE_BLOCK": 128,
            "GROUP": group,
            "LIST_HEADS": 2,
            "KV_HEADS_PER_LIST": 1,
            "HEADS": heads,
            "SAMPLES": SAMPLED_QUERIES,
            "HEAD_SIZE": head_size,
            "HEAD_TILE": head_size,
            "PAGE": 32,
            "GROUPS": reference.KEY_GROUPS,
            "TILE": candidate_mass_triton.KEY_TILE,
            "PAGE_TILE": candidate_mass_triton.PAGE_TILE,
        },
        num_warps=candidate_mass_triton.WARPS,
    )
    assert spilled_bytes(compiled, tmp_path) == 0
