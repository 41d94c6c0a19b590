"""SALE's selection in CUDA equals its PyTorch specification, on a Hopper GPU; elsewhere it compiles."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from setup import ROOT, find_nvcc, nvcc_command
from tests.kernels.low_bit import PAGE, SLACK, alone, assert_chunks_keep_what_each_keeps_alone, request, several
from tests.oracle import has_hopper, relative_error
from vllm_sparse.kernels.low_bit_scores import LowBitScoring, cuda, reference, tables
from vllm_sparse.step.chunks import chunk_alone

needs_hopper = pytest.mark.skipif(not has_hopper(), reason="no Hopper GPU")
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc, or no g++ for it")


def unswizzled(rows: torch.Tensor) -> torch.Tensor:
    """Rows of 128 bytes, ``[..., rows, numbers]``, in the order of their numbers."""
    *leading, count, numbers = rows.shape
    pieces = rows.unflatten(-1, (8, numbers // 8))  # type: ignore[no-untyped-call]
    order = torch.arange(8) ^ torch.arange(count).unsqueeze(1) % 8
    index = order.to(rows.device)[..., None].expand(*leading, count, 8, numbers // 8)
    natural: torch.Tensor = pieces.gather(-2, index).flatten(-2)
    return natural


@needs_hopper
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("kv_heads", "block_size", "pages", "dtype"),
    [(2, 16, 5, torch.bfloat16), (1, 48, 33, torch.float16), (3, 128, 70, torch.bfloat16)],
)
def test_keys_equal_the_reference(bits: int, kv_heads: int, block_size: int, pages: int, dtype: torch.dtype) -> None:
    seed, query, keys = request(1, pages * PAGE + 3, kv_heads, kv_heads, 128, block_size, dtype)
    chunk, middle = alone(query, keys, 1.0, LowBitScoring(bits, True, 32, 0, 64))
    assert cuda.can_run(chunk)
    levels, mean, numbers = cuda.quantise_keys(chunk, middle, range(1), bits)
    expected = reference.quantise_keys(keys, pages, bits)
    natural = unswizzled(levels)[:, :pages]
    grouped = natural.view(kv_heads, pages, 4, 4, 2, 128).transpose(2, 3).reshape(expected.levels.shape)
    difference = grouped.int() - expected.levels.int()
    assert int(difference.abs().max()) <= 1, f"seed {seed}"
    assert float(difference.float().abs().mean()) < 1e-3, f"seed {seed}"
    means = unswizzled(mean).transpose(2, 3).reshape(kv_heads, -1, 128)[:, :pages]
    for name, part in (
        ("scale", numbers[:, :pages, :4]),
        ("mean", means),
        ("radius", numbers[:, :pages, 4]),
        ("error", numbers[:, :pages, 5]),
    ):
        wanted = getattr(expected, name)
        assert part.shape == wanted.shape
        assert relative_error(part, wanted) < 1e-3, f"{name}, seed {seed}"


@needs_hopper
@pytest.mark.parametrize(
    ("heads", "kv_heads", "query_tokens", "context", "bits", "bounds", "query_block_tokens", "dtype"),
    [
        pytest.param(4, 1, 200, 900, 8, True, 64, torch.bfloat16, id="group-4"),
        pytest.param(2, 2, 100, 500, 8, False, 128, torch.bfloat16, id="128-rows-no-bounds"),
        pytest.param(7, 1, 70, 600, 4, False, 64, torch.float16, id="group-7-4-bits-float16"),
        pytest.param(2, 1, 64, 2600, 4, True, 64, torch.bfloat16, id="several-batches"),
        pytest.param(8, 1, 333, 3001, 8, True, 128, torch.float16, id="group-8-odd-halves"),
        pytest.param(2, 1, 600, 70001, 8, False, 64, torch.bfloat16, id="several-segments"),
        pytest.param(2, 1, 600, 70001, 8, True, 128, torch.bfloat16, id="several-segments-bounds"),
    ],
)
def test_the_map_equals_the_reference(
    heads: int,
    kv_heads: int,
    query_tokens: int,
    context: int,
    bits: int,
    bounds: bool,
    query_block_tokens: int,
    dtype: torch.dtype,
) -> None:
    """It lies between the reference's maps for thresholds a little higher and a little lower."""
    seed, query, keys = request(query_tokens, context, heads, kv_heads, 128, 48, dtype)
    # Of more keys the best is better: thresholds that split the pages rise with the length.
    log_tau = torch.linspace(-0.5, 3.0, heads, device="cuda")

    scoring = LowBitScoring(bits, bounds, 32, 128, query_block_tokens)
    chunk, own = alone(query, keys, 128**-0.5, scoring)
    assert cuda.can_run(chunk)

    def expected(shift: float) -> torch.Tensor:
        return reference.kept_map(query, keys, 128**-0.5, log_tau + shift, scoring)

    kept = cuda.kept_maps(chunk, own, log_tau, scoring)
    few, many = expected(SLACK), expected(-SLACK)
    assert kept.shape == few.shape
    assert kept.dtype == torch.bool
    assert int(kept.view(torch.uint8).max()) == 1
    middle = slice(1, reference.middle_end(query_tokens, context, 128, query_block_tokens))
    lacking, extra = (few & ~kept).float().mean(), (kept & ~many)[..., middle].float().mean()
    # Bounds decide each half of a block of 128 rows for itself, on which hangs whether the margin is granted.
    allowed = 1e-3 if bounds and query_block_tokens == 128 else 0
    assert float(lacking) <= allowed, f"pages are missing: {float(lacking)}, seed {seed}"
    assert float(extra) == 0, f"pages too many: {float(extra)}, seed {seed}"
    share = float(few[..., middle].float().mean())
    assert 0 < share < 1, f"a test of nothing: {share}, seed {seed}"


@needs_hopper
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (7, 1), (8, 1)])
@pytest.mark.parametrize("query_block_tokens", [64, 128])
def test_several_chunks_keep_what_each_keeps_alone(
    heads: int, kv_heads: int, query_block_tokens: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the memory for quantised keys is short, too."""
    scoring = LowBitScoring(8, True, 32, 128, query_block_tokens)
    seed, chunks, middle = several(heads, kv_heads, 128, torch.bfloat16, scoring)
    assert cuda.can_run(chunks)
    if parts > 1:
        monkeypatch.setattr(tables, "SCRATCH_BYTES", 64 * kv_heads * tables.PAGE_BYTES)
    assert len(middle.parts(kv_heads)) == parts
    assert_chunks_keep_what_each_keeps_alone(cuda, chunks, middle, scoring, seed)


@needs_hopper
def test_other_inputs_are_left_to_triton() -> None:
    _, query, keys = request(64, 300, 2, 1, 128, 16, torch.bfloat16)

    def can_run(queries: torch.Tensor) -> bool:
        return cuda.can_run(chunk_alone(queries, keys, 1.0, 64))

    assert can_run(query)
    assert not can_run(query[..., :64])
    assert not can_run(query.float())
    assert not can_run(query.transpose(0, 2).contiguous().transpose(0, 2))


@needs_nvcc
def test_scores_stay_in_registers(tmp_path: Path) -> None:
    """But for one number that a thread needs once in 32 pages."""
    nvcc = find_nvcc()
    assert nvcc is not None
    source = ROOT / "csrc" / "sm90" / "low_bit_scores.cu"
    command = [*nvcc_command(nvcc, "sm90"), "-cubin", "-Xptxas=-v", "-o", str(tmp_path / "scores.cubin"), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    spills = [int(found) for found in re.findall(r"(\d+) bytes spill", run.stdout + run.stderr)]
    assert spills, run.stderr
    assert max(spills) <= 4, run.stderr
