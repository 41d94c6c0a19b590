"""FlexPrefill's sample in Triton equals its PyTorch specification: compiled on a GPU, interpreted elsewhere."""

from __future__ import annotations

import random

import pytest
import torch

from tests import oracle
from tests.kernels.hopper import compile_for_hopper
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from vllm_sparse.kernels.flex_estimate import reference
from vllm_sparse.keys import PlainKeys

pytest.importorskip("triton")

BLOCK = 128


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=5)


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
    from vllm_sparse.kernels.flex_estimate import triton as flex_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-context // block_size)
    cache = torch.randn(blocks + 3, kv_heads, block_size, 2 * head_size, generator=generator).to(DEVICE)
    block_table = torch.randperm(blocks + 3, generator=generator)[:blocks].int().to(DEVICE)
    # What lies behind the context is stale and may be anything.
    stale = blocks * block_size - context
    if stale:
        cache[int(block_table[-1]), :, block_size - stale :] = float("nan")
    sample = torch.randn(rows, heads, head_size, generator=generator).to(DEVICE)
    keys = PlainKeys(cache, block_table, context)
    expected = reference.block_masses(sample, keys, 0.2, BLOCK)
    actual = flex_triton.block_masses(sample, keys, 0.2, BLOCK)
    for name, reference_part in vars(expected).items():
        error = (getattr(actual, name) - reference_part).norm() / reference_part.norm()
        assert error < 1e-5, f"{name} differs by {error} (seed {seed})"
    combined = flex_triton.combine(actual, context, BLOCK)
    error = oracle.relative_error(combined.line_mass, reference.combine(expected, context, BLOCK).line_mass)
    assert error < 1e-5, f"line masses differ by {error} (seed {seed})"


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
def test_kernels_compile_for_hopper() -> None:
    from vllm_sparse.kernels.flex_estimate import triton as flex_triton

    masses = dict.fromkeys(("maximum_pointer", "total_pointer", "nearer_pointer"), "*fp32")
    lengths = dict.fromkeys(("context", "rows", "blocks"), "i32")
    strides = ("sample_row_stride", "sample_head_stride", "cache_block_stride", "cache_head_stride")
    compile_for_hopper(
        flex_triton.block_masses_kernel,
        {
            **masses,
            **lengths,
            **dict.fromkeys((*strides, "cache_token_stride"), "i32"),
            **dict.fromkeys(("sample_pointer", "cache_pointer"), "*bf16"),
            "block_table_pointer": "*i32",
            "scale": "fp32",
        },
        {
            "CACHE_BLOCK": 128,
            "GROUP": 4,
            "HEAD_SIZE": 128,
            "HEAD_TILE": 128,
            "ROW_TILE": 128,
            "BLOCK": BLOCK,
            "SEGMENT": flex_triton.SEGMENT_BLOCKS,
        },
        num_warps=8,
        num_stages=2,
    )
    tiles = {"BLOCK_TILE": 128, "ROW_TILE": flex_triton.NORMALISER_TILE}
    compile_for_hopper(
        flex_triton.normaliser_kernel, {**masses, **lengths, "normaliser_pointer": "*fp32"}, tiles, num_warps=8
    )
    lines = dict.fromkeys(("normaliser_pointer", "column_pointer", "band_pointer"), "*fp32")
    tiles = {"BLOCK_TILE": flex_triton.COMBINE_TILE, "ROW_TILE": 128}
    compile_for_hopper(
        flex_triton.combine_kernel, {**masses, **lengths, **lines}, {"BLOCK": BLOCK, **tiles}, num_warps=8
    )
