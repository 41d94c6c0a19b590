"""FlexPrefill's sample in Triton equals its PyTorch specification: compiled on a GPU, interpreted elsewhere."""

from __future__ import annotations

import random

import pytest
import torch

from tests import oracle
from tests.kernels.chunks import SPANS, STEP_TOKENS, some_chunks
from tests.kernels.hopper import compile_for_hopper
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from vllm_sparse.kernels.flex_estimate import last_queries, reference, scratch
from vllm_sparse.kernels.flex_estimate.samples import SEGMENT_BLOCKS
from vllm_sparse.keys import PlainKeys
from vllm_sparse.step.chunks import PromptChunks, chunk_alone

pytest.importorskip("triton")

BLOCK = 128


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=9)


@needs_triton
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "context", "rows", "block_size"),
    [
        pytest.param(8, 2, 64, 1000, 128, 16, id="group-4"),
        pytest.param(7, 1, 128, 300, 100, 128, id="group-7-short-sample"),
        pytest.param(4, 4, 80, 129, 1, 48, id="one-row-odd-sizes"),
        pytest.param(8, 1, 64, 128, 128, 256, id="one-block"),
        pytest.param(2, 1, 64, 4099, 128, 64, id="many-blocks"),
    ],
)
def test_equals_reference(heads: int, kv_heads: int, head_size: int, context: int, rows: int, block_size: int) -> None:
    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-context // block_size)
    cache = torch.randn(blocks + 3, kv_heads, block_size, 2 * head_size, generator=generator).to(DEVICE)
    block_table = torch.randperm(blocks + 3, generator=generator)[:blocks].int().to(DEVICE)
    # What lies behind the context is stale and may be anything.
    stale = blocks * block_size - context
    if stale:
        cache[int(block_table[-1]), :, block_size - stale :] = float("nan")
    query = torch.randn(rows + 3, heads, head_size, generator=generator).to(DEVICE)[:rows]
    chunk = chunk_alone(query, PlainKeys(cache, block_table, context), 0.2, 64)
    assert_equals_reference(chunk, seed)


@needs_triton
@pytest.mark.parametrize(
    ("heads", "kv_heads", "parts", "every_tokens"), [(2, 2, 1, 0), (4, 1, 3, 0), (7, 1, 1, 0), (4, 1, 4, 512)]
)
def test_several_chunks_equal_the_reference(
    heads: int, kv_heads: int, parts: int, every_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the memory for sums is short, too, and where the third chunk has two stretches."""
    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    width = -(-max(span.seq_len for span in SPANS) // 64)
    rows = max(span.row for span in SPANS) + 1
    table = torch.randperm(rows * width, generator=generator).view(rows, width).int().to(DEVICE)
    cache = torch.randn(rows * width, kv_heads, 64, 64, generator=generator).to(DEVICE)
    query = torch.randn(STEP_TOKENS, heads + 1, 32, generator=generator).to(DEVICE)[:, 1:]
    keys = tuple(PlainKeys(cache, table[span.row], span.seq_len) for span in SPANS)
    chunks = PromptChunks(some_chunks(64, DEVICE), query, keys, table, 0.2)
    if parts > 1:
        # The first two contexts, of 8 key blocks and one; the third, of 21; the last.
        monkeypatch.setattr(scratch, "SCRATCH_BYTES", 12 * heads * BLOCK * 9)
    assert len(scratch.parts(last_queries(chunks.blocks, BLOCK, every_tokens), heads)) == parts
    assert_equals_reference(chunks, seed, every_tokens)


def assert_equals_reference(chunks: PromptChunks, seed: int, every_tokens: int = 0) -> None:
    from vllm_sparse.kernels.flex_estimate import triton as flex_triton

    samples = last_queries(chunks.blocks, BLOCK, every_tokens)
    expected = reference.flex_estimate(chunks, samples)
    actual = flex_triton.flex_estimate(chunks, samples)
    assert actual.line_mass.shape == expected.line_mass.shape
    for stretch in range(len(samples.queries.spans)):
        error = oracle.relative_error(actual.line_mass[:, :, stretch], expected.line_mass[:, :, stretch])
        assert error < 1e-5, f"line masses of stretch {stretch} differ by {error} (seed {seed})"
    for chunk, span in enumerate(chunks.blocks.spans):
        blocks = -(-span.seq_len // BLOCK)
        found, wanted = actual.key_block_mean[:, chunk, :blocks], expected.key_block_mean[:, chunk, :blocks]
        error = oracle.relative_error(found, wanted)
        assert error < 1e-5, f"mean keys of chunk {chunk} differ by {error} (seed {seed})"


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
def test_kernels_compile_for_hopper() -> None:
    from vllm_sparse.kernels.flex_estimate import triton as flex_triton

    masses = dict.fromkeys(("maximum_pointer", "total_pointer", "nearer_pointer"), "*fp32")
    spans = dict.fromkeys(("key_start_pointer", "first_query_pointer", "context_pointer"), "*i32")
    tables = ("segment_chunk_pointer", "segment_block_pointer", "first_token_pointer", "table_row_pointer")
    strides = ("query_row_stride", "query_head_stride", "cache_block_stride", "cache_head_stride", "cache_token_stride")
    part = dict.fromkeys(("first_chunk", "first_sum", "sums"), "i32")
    compile_for_hopper(
        flex_triton.block_masses_kernel,
        {
            **masses,
            **spans,
            **part,
            **dict.fromkeys(("table_row_stride", *strides), "i32"),
            **dict.fromkeys(("query_pointer", "cache_pointer"), "*bf16"),
            **dict.fromkeys(("block_table_pointer", *tables), "*i32"),
            "scale": "fp32",
        },
        {
            "CACHE_BLOCK": 128,
            "GROUP": 4,
            "HEAD_SIZE": 128,
            "HEAD_TILE": 128,
            "BLOCK": BLOCK,
            "SEGMENT": SEGMENT_BLOCKS,
        },
        num_warps=8,
        num_stages=2,
    )
    tiles = {"BLOCK": BLOCK, "BLOCK_TILE": 128, "ROW_TILE": flex_triton.NORMALISER_TILE}
    normaliser = {"normaliser_pointer": "*fp32"}
    compile_for_hopper(flex_triton.normaliser_kernel, {**masses, **spans, **part, **normaliser}, tiles, num_warps=8)
    lines = {"line_pointer": "*fp32", "chunks": "i32", "width": "i32"}
    tiles = {"BLOCK": BLOCK, "BLOCK_TILE": flex_triton.COMBINE_TILE}
    compile_for_hopper(
        flex_triton.combine_kernel, {**masses, **spans, **part, **normaliser, **lines}, tiles, num_warps=8
    )
