"""SALE's selection in Triton equals its PyTorch specification: compiled on a GPU, interpreted elsewhere."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.hopper import compile_for_hopper
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from tests.kernels.low_bit import PAGE, SLACK, alone, assert_chunks_keep_what_each_keeps_alone, request, several
from vllm_sparse.kernels.low_bit_scores import LowBitScoring, reference, tables

pytest.importorskip("triton")


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=16)


@needs_triton
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("kv_heads", "head_size", "block_size"), [(2, 64, 16), (1, 80, 48), (3, 128, 128)])
def test_keys_equal_the_reference(bits: int, kv_heads: int, head_size: int, block_size: int) -> None:
    from vllm_sparse.kernels.low_bit_scores import triton as sale_triton

    seed, query, keys = request(1, 5 * PAGE + 3, kv_heads, kv_heads, head_size, block_size, torch.float32)
    chunk, middle = alone(query, keys, 1.0, LowBitScoring(bits, True, 32, 0, 64))
    stored = sale_triton.quantise_keys(chunk, middle, range(1), bits)
    levels, mean, numbers = stored[0][:, :5], stored[1][:, :5], stored[2][..., :5]
    expected = reference.quantise_keys(keys, 5, bits)
    assert bool((levels[..., head_size:] == 0).all())
    difference = levels[..., :head_size].int() - expected.levels.int()
    assert int(difference.abs().max()) <= 1, f"seed {seed}"
    assert float(difference.float().abs().mean()) < 1e-3, f"seed {seed}"
    for name, part in (
        ("scale", numbers[:, :4].transpose(1, 2)),
        ("mean", mean[..., :head_size]),
        ("radius", numbers[:, 4]),
        ("error", numbers[:, 5]),
    ):
        wanted = getattr(expected, name)
        assert part.shape == wanted.shape
        assert float((part - wanted).norm() / wanted.norm()) < 1e-3, f"{name}, seed {seed}"


@needs_triton
@pytest.mark.parametrize(
    ("query_tokens", "context", "bits", "sink", "local", "query_block_tokens"),
    [(1, 1, 8, 32, 128, 64), (200, 500, 8, 64, 100, 64), (150, 400, 4, 32, 0, 128)],
)
def test_rows_equal_the_reference(
    query_tokens: int, context: int, bits: int, sink: int, local: int, query_block_tokens: int
) -> None:
    from vllm_sparse.kernels.low_bit_scores import triton as sale_triton

    heads, head_size = 4, 80
    seed, query, keys = request(query_tokens, context, heads, 2, head_size, 48, torch.float32)
    log_tau = torch.tensor([-1.0, 0.0, 2.0, float("-inf")], device=DEVICE)
    scoring = LowBitScoring(bits, True, sink, local, query_block_tokens)
    levels, numbers = sale_triton.quantise_rows(alone(query, keys, 0.1, scoring)[0], log_tau, scoring)
    rows = query.transpose(0, 1).contiguous()
    expected = reference.quantise_queries(rows, bits)
    least = reference.thresholds(rows, keys, 0.1, log_tau, scoring)
    assert torch.allclose(numbers[0], least, atol=2e-3), f"seed {seed}"
    assert bool((levels[..., head_size:] == 0).all())
    assert int((levels[..., :head_size].int() - expected.levels.int()).abs().max()) <= 1, f"seed {seed}"
    for name, part in zip(("scale", "norm", "error"), numbers[1:], strict=True):
        assert torch.allclose(part, getattr(expected, name), rtol=1e-3, atol=1e-6), f"{name}, seed {seed}"


@needs_triton
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "query_tokens", "context", "bits", "bounds", "query_block_tokens"),
    [
        pytest.param(4, 1, 64, 200, 900, 8, True, 64, id="group-4"),
        pytest.param(2, 2, 80, 100, 500, 8, False, 128, id="128-rows-no-bounds"),
        pytest.param(1, 1, 128, 70, 600, 4, False, 64, id="4-bits"),
        pytest.param(2, 1, 32, 64, 2600, 4, True, 64, id="more-than-a-page-tile"),
    ],
)
def test_the_map_equals_the_reference(
    heads: int,
    kv_heads: int,
    head_size: int,
    query_tokens: int,
    context: int,
    bits: int,
    bounds: bool,
    query_block_tokens: int,
) -> None:
    """It lies between the reference's maps for thresholds a little higher and a little lower."""
    from vllm_sparse.kernels.low_bit_scores import triton as sale_triton

    seed, query, keys = request(query_tokens, context, heads, kv_heads, head_size, 16, torch.float32)
    scale, log_tau = head_size**-0.5, torch.linspace(-0.5, 3.0, heads, device=DEVICE)

    scoring = LowBitScoring(bits, bounds, 32, 128, query_block_tokens)

    def expected(shift: float) -> torch.Tensor:
        return reference.kept_map(query, keys, scale, log_tau + shift, scoring)

    kept = sale_triton.kept_maps(*alone(query, keys, scale, scoring), log_tau, scoring)
    few, many = expected(SLACK), expected(-SLACK)
    assert kept.shape == few.shape
    assert kept.dtype == torch.bool
    assert bool((kept | ~few).all()), f"pages are missing, seed {seed}"
    assert bool((many | ~kept).all()), f"pages too many, seed {seed}"
    middle = few[..., 1 : reference.middle_end(query_tokens, context, 128, query_block_tokens)]
    share = float(middle.float().mean())
    assert 0 < share < 1, f"a test of nothing: {share}, seed {seed}"


@needs_triton
@pytest.mark.parametrize(
    ("heads", "kv_heads", "bits", "query_block_tokens", "parts"),
    [(2, 2, 8, 64, 1), (4, 1, 4, 128, 2), (7, 1, 8, 64, 2)],
)
def test_several_chunks_keep_what_each_keeps_alone(
    heads: int, kv_heads: int, bits: int, query_block_tokens: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the memory for quantised keys is short, too."""
    from vllm_sparse.kernels.low_bit_scores import triton as sale_triton

    scoring = LowBitScoring(bits, True, 32, 128, query_block_tokens)
    seed, chunks, middle = several(heads, kv_heads, 32, torch.float32, scoring)
    if parts > 1:
        monkeypatch.setattr(tables, "SCRATCH_BYTES", 64 * kv_heads * tables.PAGE_BYTES)
    assert len(middle.parts(kv_heads)) == parts
    assert_chunks_keep_what_each_keeps_alone(sale_triton, chunks, middle, scoring, seed)


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
@pytest.mark.parametrize(("head_size", "query_block_tokens"), [(80, 64), (128, 64), (128, 128), (256, 64)])
def test_kernels_compile_for_hopper(head_size: int, query_block_tokens: int) -> None:
    from vllm_sparse.kernels.low_bit_scores import triton as sale_triton

    constants = {
        "CACHE_BLOCK": 128,
        "HEAD_SIZE": head_size,
        "HEAD_TILE": 1 << (head_size - 1).bit_length(),
        "PAGE": PAGE,
        "BATCH": tables.BATCH_PAGES,
        "TILES": tables.TILE_ROWS // sale_triton.SCORED_ROWS,
        "GROUPS": 4,
        "TOP_LEVEL": 127,
        "MARGIN": True,
        "TINY": reference.TINY,
        "ROUNDING": reference.ROUNDING,
        "ROUNDING_NATS": reference.ROUNDING_NATS,
        "GROUP": 4,
        "QUERY_BLOCK": query_block_tokens,
        "ROW_TILE": 16,
        "BLOCKS": sale_triton.SCORED_ROWS // query_block_tokens,
        "PAGE_TILE": sale_triton.PAGE_TILE,
        "SEGMENT": sale_triton.SEGMENT_PAGES,
        "PAGE_BOUNDS": True,
    }
    pointers = {
        **dict.fromkeys(("query_pointer", "cache_pointer", "mean_pointer"), "*bf16"),
        **dict.fromkeys(("levels_pointer", "query_levels_pointer", "key_levels_pointer"), "*i8"),
        **dict.fromkeys(("number_pointer", "row_number_pointer", "page_number_pointer", "log_tau_pointer"), "*fp32"),
        "kept_pointer": "*u8",
        "scale": "fp32",
    }
    for kernel, num_warps in (
        (sale_triton.quantise_keys_kernel, 4),
        (sale_triton.rows_kernel, query_block_tokens // 16),
        (sale_triton.scores_kernel, 8),
    ):
        names = kernel.arg_names
        table = {name: "*i32" for name in names if name.endswith("_pointer")}
        types = {name: {**table, **pointers}.get(name, "i32") for name in names if name not in constants}
        compile_for_hopper(kernel, types, {name: constants[name] for name in names if name in constants}, num_warps)
