"""Page means in Triton equal their PyTorch specification."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests import oracle
from tests.kernels.hopper import compile_for_hopper, spilled_bytes
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from tests.oracle import Platform
from vllm_sparse.kernels.page_means import reference
from vllm_sparse.keys import PlainKeys

pytest.importorskip("triton")


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=8)


@needs_triton
@pytest.mark.parametrize(
    ("kv_heads", "head_size", "context", "block_size", "page_tokens"),
    [
        pytest.param(2, 64, 700, 32, 32, id="page-is-block"),
        pytest.param(3, 80, 245, 16, 128, id="page-over-blocks"),
        pytest.param(1, 96, 257, 128, 16, id="page-in-block"),
        pytest.param(2, 128, 1, 48, 64, id="one-token"),
        pytest.param(1, 256, 96, 48, 32, id="page-across-blocks"),
        pytest.param(2, 128, 256, 64, 32, id="whole-pages"),
        pytest.param(2, 128, 257, 64, 32, id="one-key-more"),
        pytest.param(1, 128, 255, 16, 16, id="one-key-less"),
    ],
)
def test_equals_reference(kv_heads: int, head_size: int, context: int, block_size: int, page_tokens: int) -> None:
    """Pages of different sign and size, so that a key in the wrong page shows; stale slots hold NaN."""
    from vllm_sparse.kernels.page_means import triton as means_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    platform = Platform("plain", DEVICE, torch.float32, None)
    keys = oracle.random_tensor(platform, generator, kv_heads, context, head_size)
    keys += (
        torch.randn(kv_heads, -(-context // page_tokens), 1, generator=generator)
        .to(DEVICE)
        .repeat_interleave(page_tokens, dim=1)[:, :context]
    )
    reader = oracle.paged(platform, [keys], [keys], block_size, generator).reader(0)
    assert isinstance(reader, PlainKeys)
    expected = reference.page_means(reader, page_tokens)
    actual = means_triton.page_means(reader, page_tokens)
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    # The short last page on its own: many others would hide it.
    assert oracle.relative_error(actual[:, -1], expected[:, -1]) < 1e-6, f"seed {seed}"
    assert oracle.relative_error(actual, expected) < 1e-6, f"seed {seed}"


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
@pytest.mark.parametrize(
    ("head_size", "cache_block", "page_tokens"), [(80, 128, 16), (128, 128, 32), (128, 16, 128), (256, 128, 128)]
)
def test_kernel_compiles_for_hopper(head_size: int, cache_block: int, page_tokens: int, tmp_path: Path) -> None:
    from vllm_sparse.kernels.page_means import triton as means_triton

    head_tile = 1 << (head_size - 1).bit_length()
    compiled = compile_for_hopper(
        means_triton.page_means_kernel,
        {
            "cache_pointer": "*bf16",
            "block_table_pointer": "*i32",
            "mean_pointer": "*fp32",
            **dict.fromkeys(("context", "pages"), "i32"),
            **dict.fromkeys(("cache_block_stride", "cache_head_stride", "cache_token_stride"), "i32"),
        },
        {
            "CACHE_BLOCK": cache_block,
            "HEAD_SIZE": head_size,
            "HEAD_TILE": head_tile,
            "PAGE": page_tokens,
        },
        num_warps=means_triton.warps(page_tokens, head_tile),
    )
    assert spilled_bytes(compiled, tmp_path) == 0
