"""FlexPrefill's lines, pattern switch and pooled map in Triton equal their PyTorch specification."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from tests.kernels.chunks import some_chunks
from tests.kernels.hopper import compile_for_hopper
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from vllm_sparse.kernels.flex_lines import reference as lines_reference
from vllm_sparse.kernels.flex_pattern import reference as pattern_reference
from vllm_sparse.step.chunks import PromptBlocks, last_blocks, one_chunk

pytest.importorskip("triton")

BLOCK = 128


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=23)


def in_context(blocks: PromptBlocks) -> torch.Tensor:
    """Key blocks of each chunk's context: bool ``[chunks, key_blocks]``."""
    lengths = torch.tensor([-(-span.seq_len // BLOCK) for span in blocks.spans])
    return (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).to(DEVICE)


@needs_triton
@pytest.mark.parametrize("pooled", [False, True], ids=["lines", "with-pooled"])
@pytest.mark.parametrize(
    ("heads", "query_tokens", "context", "query_block_tokens"),
    [(3, 700, 1500, 128), (2, 129, 129, 64), (1, 1, 1153, 64), (2, 300, 1161, 128), (1, 257, 140_000, 128)],
)
def test_lines_equal_the_reference(
    heads: int, query_tokens: int, context: int, query_block_tokens: int, pooled: bool
) -> None:
    blocks = one_chunk(query_tokens, context, query_block_tokens, torch.device(DEVICE))
    assert_lines_equal_the_reference(heads, blocks, pooled)


@needs_triton
@pytest.mark.parametrize("query_block_tokens", [64, 128])
def test_lines_of_several_chunks_equal_the_reference(query_block_tokens: int) -> None:
    assert_lines_equal_the_reference(3, some_chunks(query_block_tokens, DEVICE), pooled=True)


def assert_lines_equal_the_reference(heads: int, blocks: PromptBlocks, pooled: bool) -> None:
    """Past a context lines may be anything."""
    from vllm_sparse.kernels.flex_lines import triton as lines_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    live = in_context(blocks)

    def chosen(*shape: int) -> torch.Tensor:
        return (torch.rand(*shape, generator=generator) < 0.2).to(DEVICE)

    pairs = chosen(heads, blocks.blocks, live.shape[1]) if pooled else None
    columns, bands = chosen(2, heads, *live.shape)
    expected = lines_reference.line_map(columns & live, bands & live, pairs, blocks, BLOCK)
    assert torch.equal(lines_triton.line_map(columns, bands, pairs, blocks, BLOCK), expected), f"seed {seed}"


@needs_triton
@pytest.mark.parametrize("guard_zeros", [True, False])
@pytest.mark.parametrize(("heads", "query_tokens", "context"), [(8, 70, 192_000), (7, 1, 1), (4, 300, 8500)])
def test_distance_equals_the_reference(heads: int, query_tokens: int, context: int, guard_zeros: bool) -> None:
    blocks = one_chunk(query_tokens, context, 128, torch.device(DEVICE))
    assert_distance_equals_the_reference(heads, blocks, guard_zeros)


@needs_triton
def test_distances_of_several_chunks_equal_the_reference() -> None:
    assert_distance_equals_the_reference(3, some_chunks(64, DEVICE), guard_zeros=True)


def assert_distance_equals_the_reference(heads: int, blocks: PromptBlocks, guard_zeros: bool) -> None:
    """A head without mass somewhere is guarded or infinitely far."""
    from vllm_sparse.kernels.flex_pattern import triton as pattern_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    live, samples = in_context(blocks), last_blocks(blocks, BLOCK)
    scores = (torch.randn(heads, *live.shape, generator=generator) * 30).to(DEVICE)
    mass = torch.rand(heads, *live.shape, generator=generator).to(DEVICE) * live
    mass[-1, :, live.shape[1] // 2] = 0 if live.shape[1] > 1 else 1
    mass = mass / mass.sum(2, keepdim=True)
    expected = pattern_reference.pooled_distance(scores, mass, samples, BLOCK, 0.1, guard_zeros)
    if not guard_zeros and live.shape[1] > 1:
        assert bool(torch.isinf(expected[-1]).all())
    actual = pattern_triton.pooled_distance(scores, mass, samples, BLOCK, 0.1, guard_zeros)
    # A distance is a square root: where both maps are equal, of a rounding error.
    torch.testing.assert_close(actual, expected, atol=5e-4, rtol=1e-4, msg=lambda text: f"{text} ({seed=})")


@needs_triton
@pytest.mark.parametrize("query_block_tokens", [64, 128])
@pytest.mark.parametrize("several", [False, True])
def test_pooled_attention_equals_the_reference(several: bool, query_block_tokens: int) -> None:
    from vllm_sparse.kernels.flex_pattern import triton as pattern_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    alone = one_chunk(300, 150_000, query_block_tokens, torch.device(DEVICE))
    blocks = some_chunks(query_block_tokens, DEVICE) if several else alone
    scores = (torch.randn(3, blocks.blocks, in_context(blocks).shape[1], generator=generator) * 30).to(DEVICE)
    expected = pattern_reference.pooled_attention(scores, blocks, BLOCK, 0.1)
    actual = pattern_triton.pooled_attention(scores, blocks, BLOCK, 0.1)
    torch.testing.assert_close(actual, expected, atol=1e-7, rtol=1e-4, msg=lambda text: f"{text} ({seed=})")
    sums = torch.stack([actual[:, first:stop].sum((1, 2)) for first, stop in itertools.pairwise(blocks.starts)])
    torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
def test_kernels_compile_for_hopper() -> None:
    from vllm_sparse.kernels.flex_lines import triton as lines_triton
    from vllm_sparse.kernels.flex_pattern import triton as pattern_triton

    tables = dict.fromkeys(("first_query_pointer", "last_query_pointer"), "*i32")
    chunk_tables = dict.fromkeys(("chunk_pointer", "chunk_start_pointer"), "*i32")
    maps = dict.fromkeys(("column_pointer", "band_pointer", "pooled_pointer", "map_pointer"), "*u8")
    compile_for_hopper(
        lines_triton.line_map_kernel,
        {**tables, "chunk_pointer": "*i32", "chunks": "i32", "key_blocks": "i32", **maps},
        {"BLOCK": BLOCK, "HAS_POOLED": True, "TILE": lines_triton.BLOCK_TILE},
    )
    numbers = {"key_blocks": "i32", "scale": "fp32"}
    tiles = {"BLOCK": BLOCK, "BLOCK_TILE": pattern_triton.BLOCK_TILE}
    compile_for_hopper(
        pattern_triton.pooled_distance_kernel,
        {**dict.fromkeys(("score_pointer", "mass_pointer", "distance_pointer"), "*fp32"), **tables, **numbers},
        {"GUARD_ZEROS": True, **tiles},
    )
    compile_for_hopper(
        pattern_triton.pooled_attention_kernel,
        {**dict.fromkeys(("score_pointer", "attention_pointer"), "*fp32"), **tables, **chunk_tables, **numbers},
        tiles,
    )
