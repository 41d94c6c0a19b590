"""Page summaries in Triton equal their PyTorch specification."""

from __future__ import annotations

import random

import pytest
import torch

from tests import oracle
from tests.kernels.hopper import compile_for_hopper
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from tests.oracle import Platform
from vllm_sparse.kernels.page_summaries import reference
from vllm_sparse.keys import PlainKeys

pytest.importorskip("triton")


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=5)


@needs_triton
@pytest.mark.parametrize(
    ("kv_heads", "head_size", "context", "block_size", "page_tokens"),
    [
        pytest.param(2, 64, 700, 32, 32, id="page-is-block"),
        pytest.param(3, 80, 245, 16, 128, id="page-over-blocks"),
        pytest.param(1, 96, 257, 128, 16, id="page-in-block"),
        pytest.param(2, 128, 1, 48, 64, id="one-token"),
        pytest.param(1, 256, 96, 48, 32, id="page-across-blocks"),
    ],
)
def test_equals_reference(kv_heads: int, head_size: int, context: int, block_size: int, page_tokens: int) -> None:
    from vllm_sparse.kernels.page_summaries import triton as summaries_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    platform = Platform("plain", DEVICE, torch.float32, None)
    # All positive or all negative keys show a padding of 0 in the extremes; stale slots hold NaN.
    keys = oracle.random_tensor(platform, generator, kv_heads, context, head_size)
    keys[:, :, ::2] = keys[:, :, ::2].abs() + 1
    keys[:, :, 1::2] = -keys[:, :, 1::2].abs() - 1
    reader = oracle.paged(platform, [keys], [keys], block_size, generator).reader(0)
    assert isinstance(reader, PlainKeys)
    expected = reference.page_summaries(reader, page_tokens)
    actual = summaries_triton.page_summaries(reader, page_tokens)
    assert oracle.relative_error(actual.mean, expected.mean) < 1e-6, f"seed {seed}"
    assert torch.equal(actual.minimum, expected.minimum), f"seed {seed}"
    assert torch.equal(actual.maximum, expected.maximum), f"seed {seed}"


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
@pytest.mark.parametrize(("head_size", "page_tokens"), [(80, 16), (128, 32), (256, 128)])
def test_kernel_compiles_for_hopper(head_size: int, page_tokens: int) -> None:
    from vllm_sparse.kernels.page_summaries import triton as summaries_triton

    compile_for_hopper(
        summaries_triton.page_summaries_kernel,
        {
            "cache_pointer": "*bf16",
            "block_table_pointer": "*i32",
            **dict.fromkeys(("mean_pointer", "minimum_pointer", "maximum_pointer"), "*fp32"),
            **dict.fromkeys(("context", "pages"), "i32"),
            **dict.fromkeys(("cache_block_stride", "cache_head_stride", "cache_token_stride"), "i32"),
        },
        {
            "CACHE_BLOCK": 128,
            "HEAD_SIZE": head_size,
            "HEAD_TILE": 1 << (head_size - 1).bit_length(),
            "PAGE": page_tokens,
        },
        num_warps=8 if head_size == 256 else 4,
    )
