"""Coverage in Triton keeps what its PyTorch specification keeps, up to float32 rounding of the sums."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.kernels.chunks import some_chunks
from tests.kernels.hopper import compile_for_hopper, spilled_bytes
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from vllm_sparse.kernels.coverage import reference

pytest.importorskip("triton")

SLACK = 1e-5


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=14)


@needs_triton
@pytest.mark.parametrize(
    ("rows", "n", "low", "high"),
    [(7, 1024, 8, 1 << 20), (3, 1, 1, 5), (4, 5000, 0, 5000), (5, 333, 1, 20), (2, 64, 100, 200), (4, 40000, 0, 40000)],
)
def test_keeps_what_the_reference_keeps(rows: int, n: int, low: int, high: int) -> None:
    """The widest rows do not fit the registers of a program."""
    from vllm_sparse.kernels.coverage import triton as coverage_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(rows, n, generator=generator) ** 8
    mass = mass / mass.sum(1, keepdim=True)
    gamma = torch.rand(rows, generator=generator) * 0.98 + 0.01
    gamma[0] = 0.0
    gamma[-1] = 1.0
    keep = coverage_triton.coverage_mask(mass.to(DEVICE), gamma.to(DEVICE), low, high).cpu()
    least = reference.coverage_mask(mass, torch.where(gamma < 1, gamma - SLACK, gamma), low, high)
    most = reference.coverage_mask(mass, torch.where(gamma > 0, gamma + SLACK, gamma), low, high)
    assert not bool((least & ~keep).any()), f"too little (seed {seed})"
    assert not bool((keep & ~most).any()), f"too much (seed {seed})"
    assert bool((keep.sum(1) >= min(low, n)).all())
    assert bool((keep.sum(1) <= high).all())


@needs_triton
@pytest.mark.parametrize("entries", [256, 512, 1024])
@pytest.mark.parametrize("gamma", [0.3, 0.5])
def test_ties_go_to_the_lower_index(gamma: float, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of powers of two are exact, so both implementations agree to the last entry.

    Registers hold all of a row, or the first 256 or 512 of its 900 entries.
    """
    from vllm_sparse.kernels.common import triton as common_triton
    from vllm_sparse.kernels.coverage import triton as coverage_triton

    monkeypatch.setattr(common_triton, "LARGEST_ROW_TILE", entries)
    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    mass = 2.0 ** -torch.randint(3, 12, (4, 900), generator=generator).float()
    mass[1] = 1 / 1024
    mass[2] = 0
    rows_gamma = torch.full((4,), gamma)
    expected = reference.coverage_mask(mass, rows_gamma, 3, 700)
    keep = coverage_triton.coverage_mask(mass.to(DEVICE), rows_gamma.to(DEVICE), 3, 700).cpu()
    assert torch.equal(keep, expected), f"seed {seed}"


@needs_triton
@pytest.mark.parametrize("entries", [256, 1024])
def test_chunks_keep_what_the_reference_keeps(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its own number of query blocks; sums of powers of two are exact."""
    from vllm_sparse.kernels.common import triton as common_triton
    from vllm_sparse.kernels.coverage import triton as coverage_triton

    monkeypatch.setattr(common_triton, "LARGEST_ROW_TILE", entries)
    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    blocks = some_chunks(64, DEVICE)
    mass = 2.0 ** -torch.randint(5, 14, (3, blocks.blocks, 111), generator=generator).float()
    gamma = torch.tensor([[0.1, 1.0, 0.3, 0.02], [0.5, 0.0, 0.01, 0.1], [0.2, 0.2, 0.0, 1.0]])
    expected = reference.chunk_coverage(mass, gamma, blocks)
    keep = coverage_triton.chunk_coverage(mass.to(DEVICE), gamma.to(DEVICE), blocks).cpu()
    assert torch.equal(keep, expected), f"seed {seed}"


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
@pytest.mark.parametrize("n", [1024, 8192, 16384, 65536])
def test_kernel_compiles_for_hopper(n: int, tmp_path: Path) -> None:
    from vllm_sparse.kernels.common.triton import threshold_tile
    from vllm_sparse.kernels.coverage import triton as coverage_triton

    entries, num_warps = threshold_tile(n)
    lengths = dict.fromkeys(("blocks", "width", "min_count", "max_count"), "i32")
    numbers = {"mass_pointer": "*fp32", "gamma_pointer": "*fp32"}
    pointers = {**numbers, "keep_pointer": "*u8", "chunk_start_pointer": "*i32"}
    compiled = compile_for_hopper(
        coverage_triton.coverage_mask_kernel,
        {**lengths, **pointers},
        {"ROW_TILE": entries, "TILE": min(entries, coverage_triton.TILE)},
        num_warps=num_warps,
    )
    # Of the widest rows Triton 3.9 spills six registers. Half a tile would spill none, and wait longer.
    assert spilled_bytes(compiled, tmp_path) <= (24 if n > entries else 0)
