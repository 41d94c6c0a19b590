"""DHSA's adaptive chunks in Triton equal their PyTorch specification."""

from __future__ import annotations

import random

import pytest
import torch

from tests import oracle
from tests.kernels.hopper import compile_for_hopper
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from tests.oracle import Platform
from vllm_sparse.kernels.adaptive_blocks import reference
from vllm_sparse.keys import PlainKeys

pytest.importorskip("triton")


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=5)


@needs_triton
@pytest.mark.parametrize(
    ("kv_heads", "head_size", "context", "block_size"),
    [
        pytest.param(2, 64, 700, 32, id="two-heads"),
        pytest.param(3, 80, 245, 16, id="odd-sizes"),
        pytest.param(1, 128, 12, 128, id="one-score"),
        pytest.param(2, 32, 5, 48, id="no-score"),
        pytest.param(1, 256, 129, 64, id="wide"),
    ],
)
def test_equals_reference(kv_heads: int, head_size: int, context: int, block_size: int) -> None:
    from vllm_sparse.kernels.adaptive_blocks import triton as adaptive_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    platform = Platform("plain", DEVICE, torch.float32, None)
    # Stale slots behind the context hold NaN.
    data = oracle.random_paged(platform, generator, [context], kv_heads, head_size, block_size)
    keys = data.reader(0)
    assert isinstance(keys, PlainKeys)
    scores, expected = adaptive_triton.boundary_scores(keys), reference.boundary_scores(keys)
    assert torch.equal(scores.isinf(), expected.isinf()), f"seed {seed}"
    assert float((scores - expected).nan_to_num(0).abs().max()) < 1e-5, f"seed {seed}"
    start = reference.block_starts(expected, 0.1)
    representations = adaptive_triton.representations(keys, start)
    error = oracle.relative_error(representations, reference.representations(keys, start))
    assert error < 1e-6, f"representations differ by {error} (seed {seed})"


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
@pytest.mark.parametrize("head_size", [80, 128, 256])
def test_kernels_compile_for_hopper(head_size: int) -> None:
    from vllm_sparse.kernels.adaptive_blocks import triton as adaptive_triton

    cache = {
        "cache_pointer": "*bf16",
        "block_table_pointer": "*i32",
        **dict.fromkeys(("cache_block_stride", "cache_head_stride", "cache_token_stride"), "i32"),
    }
    compile_for_hopper(
        adaptive_triton.boundary_scores_kernel,
        {**cache, "score_pointer": "*fp32", "context": "i32"},
        {
            "CACHE_BLOCK": 128,
            "KV_HEADS": 8,
            "HEAD_SIZE": head_size,
            "DIM_TILE": 64,
            "WINDOW": 4,
            "SHORTEST": 8,
            "TILE": adaptive_triton.SCORE_TILE,
        },
        num_warps=8,
    )
    compile_for_hopper(
        adaptive_triton.representations_kernel,
        {**cache, "start_pointer": "*i64", "representation_pointer": "*fp32", "key_blocks": "i32"},
        {
            "CACHE_BLOCK": 128,
            "HEAD_SIZE": head_size,
            "HEAD_TILE": 1 << (head_size - 1).bit_length(),
            "TILE": adaptive_triton.MEAN_TILE,
        },
    )
