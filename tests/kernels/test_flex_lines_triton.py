"""FlexPrefill's lines and pattern switch in Triton equal their PyTorch specification."""

from __future__ import annotations

import random

import pytest
import torch

from tests.kernels.hopper import compile_for_hopper
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from vllm_sparse.kernels.flex_lines import BlockGrid
from vllm_sparse.kernels.flex_lines import reference as lines_reference
from vllm_sparse.kernels.flex_pattern import reference as pattern_reference

pytest.importorskip("triton")

BLOCK = 128


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=13)


@needs_triton
@pytest.mark.parametrize("pooled", [False, True], ids=["lines", "with-pooled"])
@pytest.mark.parametrize(
    ("heads", "query_tokens", "context", "query_block_tokens"),
    [(3, 700, 1500, 128), (2, 129, 129, 64), (1, 1, 1153, 64), (2, 300, 1161, 128), (1, 257, 140_000, 128)],
)
def test_lines_equal_the_reference(
    heads: int, query_tokens: int, context: int, query_block_tokens: int, pooled: bool
) -> None:
    from vllm_sparse.kernels.flex_lines import triton as lines_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-context // BLOCK)

    def chosen(*shape: int) -> torch.Tensor:
        return (torch.rand(*shape, generator=generator) < 0.2).to(DEVICE)

    pairs = chosen(heads, -(-query_tokens // query_block_tokens), blocks) if pooled else None
    arguments = (
        chosen(heads, blocks),
        chosen(heads, blocks),
        pairs,
        BlockGrid(query_tokens, context, query_block_tokens, BLOCK),
    )
    expected = lines_reference.line_map(*arguments)
    assert torch.equal(lines_triton.line_map(*arguments), expected), f"seed {seed}"


@needs_triton
@pytest.mark.parametrize(("heads", "blocks", "guard_zeros"), [(8, 1500, True), (7, 1, True), (4, 67, False)])
def test_distance_equals_the_reference(heads: int, blocks: int, guard_zeros: bool) -> None:
    from vllm_sparse.kernels.flex_pattern import triton as pattern_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(heads, blocks, generator=generator) * 3).to(DEVICE)
    mass = torch.rand(heads, blocks, generator=generator)
    # A head without mass somewhere: guarded or infinitely far.
    mass[-1, blocks // 2] = 0 if blocks > 1 else 1
    mass = (mass / mass.sum(1, keepdim=True)).to(DEVICE)
    expected = pattern_reference.distance(logits, mass, guard_zeros)
    assert torch.isinf(expected[-1]) == (not guard_zeros)
    actual = pattern_triton.distance(logits, mass, guard_zeros)
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4, msg=lambda text: f"{text} ({seed=})")


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
def test_kernels_compile_for_hopper() -> None:
    from vllm_sparse.kernels.flex_lines import triton as lines_triton
    from vllm_sparse.kernels.flex_pattern import triton as pattern_triton

    lengths = dict.fromkeys(("query_tokens", "context", "query_block_count", "key_blocks"), "i32")
    maps = dict.fromkeys(("column_pointer", "band_pointer", "pooled_pointer", "map_pointer"), "*u8")
    constants = {"QUERY_BLOCK": 128, "BLOCK": BLOCK, "HAS_POOLED": True, "TILE": lines_triton.BLOCK_TILE}
    compile_for_hopper(lines_triton.line_map_kernel, {**lengths, **maps}, constants)
    compile_for_hopper(
        pattern_triton.distance_kernel,
        {**dict.fromkeys(("logit_pointer", "mass_pointer", "distance_pointer"), "*fp32"), "blocks": "i32"},
        {"GUARD_ZEROS": True, "BLOCK_TILE": pattern_triton.BLOCK_TILE},
    )
