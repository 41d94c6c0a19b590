"""Exact attention mass in Triton equals its PyTorch specification in float64: compiled on a GPU, else interpreted."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests import oracle
from tests.kernels.hopper import compile_for_hopper, spilled_bytes
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from vllm_sparse.kernels.block_mass import reference
from vllm_sparse.keys import PlainKeys

pytest.importorskip("triton")


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=8)


@needs_triton
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "chunk", "context", "cache_block", "query_block", "page"),
    [
        pytest.param(4, 2, 64, 300, 300, 128, 128, 32, id="whole-prompt"),
        pytest.param(7, 1, 128, 129, 641, 64, 128, 32, id="group-7-chunk-off-the-grid"),
        pytest.param(2, 2, 80, 70, 333, 48, 64, 16, id="odd-sizes"),
        pytest.param(2, 1, 64, 1, 127, 16, 128, 64, id="one-row"),
        pytest.param(2, 1, 64, 1, 1, 16, 128, 32, id="one-token"),
        pytest.param(2, 1, 64, 64, 65, 128, 64, 32, id="one-past-a-tile"),
        pytest.param(2, 1, 96, 200, 400, 256, 128, 128, id="page-of-two-tiles"),
        pytest.param(2, 1, 64, 100, 260, 128, 64, 256, id="page-of-four-tiles"),
    ],
)
def test_equals_the_reference(
    heads: int,
    kv_heads: int,
    head_size: int,
    chunk: int,
    context: int,
    cache_block: int,
    query_block: int,
    page: int,
) -> None:
    from vllm_sparse.kernels.block_mass import triton as block_mass_triton

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
    expected = reference.block_mass(query.double(), keys, 0.2, query_block, page)
    mass = block_mass_triton.block_mass(query, keys, 0.2, query_block, page)
    assert mass.dtype == torch.float32
    assert mass.shape == expected.shape
    error = oracle.relative_error(mass, expected)
    assert error < 1e-5, f"differs by {error} (seed {seed})"
    assert bool((mass[expected == 0] == 0).all()), "the future has no attention"


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
@pytest.mark.parametrize(("head_size", "query_block"), [(64, 128), (128, 128), (128, 64)])
def test_kernel_compiles_for_hopper(head_size: int, query_block: int, tmp_path: Path) -> None:
    from vllm_sparse.kernels.block_mass import triton as block_mass_triton

    strides = ("query_row_stride", "query_head_stride", "cache_block_stride", "cache_head_stride", "cache_token_stride")
    compiled = compile_for_hopper(
        block_mass_triton.block_mass_kernel,
        {
            **dict.fromkeys(("query_pointer", "cache_pointer"), "*bf16"),
            **dict.fromkeys(("query_tokens", "context", "blocks", "pages", *strides), "i32"),
            "block_table_pointer": "*i32",
            "mass_pointer": "*fp32",
            "scale_log2": "fp32",
        },
        {
            "CACHE_BLOCK": 128,
            "GROUP": 7,
            "HEAD_SIZE": head_size,
            "HEAD_TILE": head_size,
            "QUERY_BLOCK": query_block,
            "PAGE": 32,
            "TILE": block_mass_triton.KEY_TILE,
        },
        num_warps=8,
    )
    assert spilled_bytes(compiled, tmp_path) == 0
