"""FlexPrefill's lines and pattern switch in Triton equal their PyTorch specification."""

from __future__ import annotations

import random

import pytest
import torch

from tests.kernels.hopper import compile_for_hopper
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from vllm_sparse.kernels.flex_lines import reference as lines_reference
from vllm_sparse.kernels.flex_pattern import reference as pattern_reference

pytest.importorskip("triton")

BLOCK = 128


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=14)


@needs_triton
@pytest.mark.parametrize("pooled", [False, True], ids=["lines", "with-pooled"])
@pytest.mark.parametrize(
    ("heads", "chunk", "context", "query_block"),
    [(3, 700, 1500, 128), (2, 129, 129, 64), (1, 1, 1153, 64), (2, 300, 1161, 128), (1, 257, 140_000, 128)],
)
def test_lines_equal_the_reference(heads: int, chunk: int, context: int, query_block: int, pooled: bool) -> None:
    from vllm_sparse.kernels.flex_lines import triton as lines_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-context // BLOCK)

    def chosen(*shape: int) -> torch.Tensor:
        return (torch.rand(*shape, generator=generator) < 0.2).to(DEVICE)

    pairs = chosen(heads, -(-chunk // query_block), blocks) if pooled else None
    arguments = (chosen(heads, blocks), chosen(heads, blocks), pairs, chunk, context, query_block, BLOCK)
    expected = lines_reference.line_map(*arguments)
    assert torch.equal(lines_triton.line_map(*arguments), expected), f"seed {seed}"


@needs_triton
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "rows", "blocks", "guard_zeros"),
    [(8, 2, 64, 128, 200, True), (7, 1, 80, 1, 1, True), (4, 4, 128, 100, 67, False), (2, 1, 96, 128, 64, False)],
)
def test_distance_equals_the_reference(
    heads: int, kv_heads: int, head_size: int, rows: int, blocks: int, guard_zeros: bool
) -> None:
    from vllm_sparse.kernels.flex_pattern import triton as pattern_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(rows, heads, head_size, generator=generator).to(DEVICE)
    means = torch.randn(kv_heads, blocks, head_size, generator=generator).to(DEVICE)
    mass = torch.rand(heads, blocks, generator=generator)
    # A head without mass somewhere: guarded or infinitely far.
    mass[-1, blocks // 2] = 0 if blocks > 1 else 1
    mass = (mass / mass.sum(1, keepdim=True)).to(DEVICE)
    arguments = (sample, means, mass, 0.3, guard_zeros)
    expected = pattern_reference.pooled_distance(*arguments)
    assert torch.isinf(expected[-1]) == (not guard_zeros)
    torch.testing.assert_close(
        pattern_triton.pooled_distance(*arguments), expected, atol=2e-4, rtol=1e-4, msg=lambda text: f"{text} ({seed=})"
    )


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
def test_kernels_compile_for_hopper() -> None:
    from vllm_sparse.kernels.flex_lines import triton as lines_triton
    from vllm_sparse.kernels.flex_pattern import triton as pattern_triton

    lengths = dict.fromkeys(("chunk", "context", "query_block_count", "key_blocks"), "i32")
    maps = dict.fromkeys(("column_pointer", "band_pointer", "pooled_pointer", "map_pointer"), "*u8")
    constants = {"QUERY_BLOCK": 128, "BLOCK": BLOCK, "HAS_POOLED": True, "TILE": lines_triton.BLOCK_TILE}
    compile_for_hopper(lines_triton.line_map_kernel, {**lengths, **maps}, constants)
    floats = ("key_mean_pointer", "column_pointer", "logit_pointer", "distance_pointer")
    compile_for_hopper(
        pattern_triton.pooled_distance_kernel,
        {
            **dict.fromkeys(floats, "*fp32"),
            **dict.fromkeys(("rows", "blocks", "sample_row_stride", "sample_head_stride"), "i32"),
            "sample_pointer": "*bf16",
            "scale": "fp32",
        },
        {
            "GROUP": 4,
            "HEAD_SIZE": 128,
            "HEAD_TILE": 128,
            "GUARD_ZEROS": True,
            "BLOCK_TILE": pattern_triton.BLOCK_TILE,
            "ROW_TILE": pattern_triton.ROW_TILE,
        },
    )
