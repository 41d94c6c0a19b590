"""Page scores of a decode step in Triton equal their PyTorch specification, request by request."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests import oracle
from tests.kernels.hopper import compile_for_hopper, spilled_bytes
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from tests.oracle import Platform
from vllm_sparse.kernels.page_scores import reference
from vllm_sparse.kernels.page_summaries import SummaryContent, SummaryKind, read_summaries, store_summaries
from vllm_sparse.step.rows import DecodeRows

pytest.importorskip("triton")

POISON = 7.0e7


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=16)


@needs_triton
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "block_size", "page_tokens"),
    [
        pytest.param(8, 2, 64, 64, 16, id="group-of-4"),
        pytest.param(7, 1, 80, 48, 16, id="group-of-7"),
        pytest.param(3, 3, 96, 32, 32, id="no-groups"),
        pytest.param(16, 2, 32, 128, 64, id="group-of-8"),
        pytest.param(20, 1, 32, 64, 32, id="group-of-20"),
    ],
)
@pytest.mark.parametrize("content", ["mean", "bounds", "float8_bounds"])
def test_equals_reference(
    heads: int,
    kv_heads: int,
    head_size: int,
    block_size: int,
    page_tokens: int,
    content: SummaryContent,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A ragged batch with a row that stands by; several tiles for a program, programs without a tile."""
    from vllm_sparse.kernels.page_scores import triton as scores_triton

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    monkeypatch.setattr(scores_triton, "TILE_NUMBERS", 0)
    monkeypatch.setattr(scores_triton, "MERGE_TILE", 16)
    contexts = [1500, 1, 257, 128, 90, 700]
    monkeypatch.setattr(scores_triton, "PROGRAMS", random.choice([1, 3, 4, 16]) * len(contexts) * kv_heads)
    platform = Platform("plain", DEVICE, torch.float32, None)
    data = oracle.random_paged(platform, generator, contexts, kv_heads, head_size, block_size)
    query = oracle.random_tensor(platform, generator, len(contexts), heads, head_size, spread=2)
    kind = SummaryKind(page_tokens, content)
    shape = data.kv_cache.shape[0], kv_heads, block_size // page_tokens, kind.width(head_size)
    summaries = torch.full(shape, oracle.NAN, dtype=kind.dtype(torch.float32), device=DEVICE)
    for request in range(len(contexts)):
        keys = data.reader(request)
        keys.summaries = summaries
        store_summaries(keys, kind, 0)
    lengths = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    lengths[3] = 0
    rows = DecodeRows(query, data.kv_cache, data.block_table, lengths, 0.15)
    # Rows lie side by side: what one wrote past its pages would be another's.
    taken = int(lengths.sum())
    starts = (lengths.cumsum(0) - lengths).long()
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(POISON))
    scores = scores_triton.page_scores(rows, kind, summaries, starts, taken)
    assert scores.unit_tokens == page_tokens
    for row, context in enumerate(lengths.tolist()):
        pages = -(-context // page_tokens)
        if context:
            expected = reference.page_scores(query[row], read_summaries(data.reader(row), kind), 0.15)
            first = int(scores.starts[row])
            firsts = [first + head * scores.head_stride for head in range(kv_heads)]
            found = torch.stack([scores.values.flatten()[place : place + pages] for place in firsts])
            where = f"seed {seed}, row {row}"
            assert oracle.relative_error(found.exp(), expected.exp()) < 2e-5, where
            assert bool((found - expected).abs().max() < 1e-4 * (1 + expected.abs().max())), where


@needs_triton
def test_a_sharp_head_still_ranks_its_small_scores(generator: torch.Generator) -> None:
    """Probabilities that underflow float32 to 0 keep their order, whichever program's share holds the largest."""
    from vllm_sparse.kernels.page_scores import triton as scores_triton

    platform = Platform("plain", DEVICE, torch.float32, None)
    context, page_tokens = 16 * 500, 16
    keys = torch.zeros(1, context, 16)
    order = torch.randperm(context // page_tokens, generator=generator)
    keys[0, :, 0] = order.float().repeat_interleave(page_tokens)
    data = oracle.paged(platform, [keys.to(DEVICE)], [keys.to(DEVICE)], 64, generator)
    kind = SummaryKind(page_tokens, "mean")
    reader = data.reader(0)
    reader.summaries = torch.full((data.kv_cache.shape[0], 1, 4, 16), oracle.NAN, device=DEVICE)
    store_summaries(reader, kind, 0)
    query = torch.zeros(1, 2, 16, device=DEVICE)
    query[:, :, 0] = 4
    lengths = torch.tensor([context], dtype=torch.int32, device=DEVICE)
    rows = DecodeRows(query, data.kv_cache, data.block_table, lengths, 1.0)
    starts = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    scores = scores_triton.page_scores(rows, kind, reader.summaries, starts, context).values.flatten()
    scores = scores[: context // page_tokens]
    assert torch.equal(scores.cpu().argsort(), order.argsort())
    assert abs(float(scores.max())) < 0.1


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
@pytest.mark.parametrize(("head_size", "group"), [(64, 7), (80, 4), (128, 4), (128, 8), (256, 16)])
@pytest.mark.parametrize(
    ("content", "summary"), [("mean", "*bf16"), ("bounds", "*bf16"), ("float8_bounds", "*fp8e4nv")]
)
def test_kernels_compile_for_hopper(
    head_size: int, group: int, content: SummaryContent, summary: str, tmp_path: Path
) -> None:
    from vllm_sparse.kernels.page_scores import triton as scores_triton

    group_tile = 1 << (group - 1).bit_length()
    head_tile = 1 << (head_size - 1).bit_length()
    buffers = dict.fromkeys(("logit_pointer", "largest_pointer", "total_pointer"), "*fp32")
    logits = compile_for_hopper(
        scores_triton.page_logits_kernel,
        {
            "query_pointer": "*bf16",
            "summary_pointer": summary,
            "block_table_pointer": "*i32",
            "context_pointer": "*i32",
            "start_pointer": "*i64",
            **buffers,
            "first_page_pointer": "*i64",
            "scale": "fp32",
            **dict.fromkeys(("capacity", "query_row_stride", "query_head_stride", "table_row_stride"), "i32"),
        },
        {
            "PAGE": 16,
            "PAGES_PER_BLOCK": 8,
            "GROUP": group,
            "GROUP_TILE": max(group_tile, 16),
            "HEAD_SIZE": head_size,
            "HEAD_TILE": head_tile,
            "BOUNDS": content != "mean",
            "TILE": scores_triton.page_tile(SummaryKind(16, content), head_tile),
        },
    )
    merge = compile_for_hopper(
        scores_triton.merge_kernel,
        {
            **buffers,
            "context_pointer": "*i32",
            "start_pointer": "*i64",
            "score_pointer": "*fp32",
            "capacity": "i32",
            "shares": "i32",
        },
        {
            "PAGE": 16,
            "GROUP": group,
            "GROUP_TILE": group_tile,
            "SHARE_TILE": 128,
            "TILE": scores_triton.MERGE_TILE,
        },
    )
    assert spilled_bytes(logits, tmp_path) == 0
    assert spilled_bytes(merge, tmp_path) == 0
