"""FlexPrefill's sample in Triton equals its PyTorch specification: compiled on a GPU, interpreted elsewhere."""

from __future__ import annotations

import random

import pytest
import torch

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
