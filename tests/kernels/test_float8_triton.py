"""An FP8 cache is read as its numbers stand: lists are those of a wider cache that holds the same numbers.

Both go through the Triton kernels, which have tests of their own against float64. Where there is no GPU they are
interpreted, in float32 instead of bfloat16, which the interpreter does not multiply. What a layer's scales do lies in
the softmax scale, of which no kernel knows more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.interpreter import CAN_RUN, DEVICE, as_on_a_gpu, needs_triton, run_under_the_interpreter
from tests.kernels.launches import BLOCK_TOKENS, DecodeRoom, choose_for_chunks, served_at_once
from vllm_sparse.backend.decode_buffers import DecodeBuffers
from vllm_sparse.kernels.page_summaries import SummaryKind
from vllm_sparse.methods.block_topk import BlockTopk
from vllm_sparse.methods.dhsa import Dhsa
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.hip import Hip, HipDecode
from vllm_sparse.methods.oracle import Oracle
from vllm_sparse.methods.prefill import PrefillMethod
from vllm_sparse.methods.sale import Sale
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.methods.token_topk import TokenTopk
from vllm_sparse.step.plan import layer_roles
from vllm_sparse.step.requests import RowSetting
from vllm_sparse.step.rows import ServerSize

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 64
QUERY_TOKENS, SEQ_LEN, LAYERS, LIST_TOKENS = 130, 700, 3, 512
WIDE = torch.bfloat16 if DEVICE == "cuda" else torch.float32

BLOCKS: dict[str, Any] = {"budget_tokens": 96, "sink_tokens": 5, "recent_tokens": 20, "dense_layers": 0}
STAGES: dict[str, Any] = {
    "stage_block_tokens": (64, 32),
    "stage_budget_tokens": (256, 64),
    "refresh_steps": (4, 2),
    "sink_tokens": 16,
    "recent_tokens": 20,
    "dense_layers": 0,
}
PREFILL: dict[str, Any] = {
    "sale": Sale(tau=0.25),
    "dhsa": Dhsa(
        key_blocks="adaptive", bound_weight=0.0, budget_tokens=200, sink_tokens=0, recent_tokens=0, dense_tail_tokens=16
    ),
    "dhsa, all pages weighed": Dhsa(coverage=0.8, sink_tokens=0, recent_tokens=0, dense_tail_tokens=16),
    "dhsa, lists of candidates": Dhsa(density=0.2, sink_tokens=0, recent_tokens=0, dense_tail_tokens=16),
    "flexprefill": FlexPrefill(gamma=0.4, min_budget_tokens=0),
    "hip": Hip(),
    "oracle": Oracle(),
}


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=len(PREFILL) + 5)


@pytest.fixture(autouse=True)
def multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that the interpreter multiplies."""
    if not CAN_RUN or DEVICE == "cuda":
        return
    import triton.language as tl

    from vllm_sparse.kernels.adaptive_blocks import triton as adaptive_blocks
    from vllm_sparse.kernels.common import triton as common
    from vllm_sparse.kernels.low_bit_scores import triton as low_bit_scores

    for module in (common, adaptive_blocks):
        monkeypatch.setattr(module, "READABLE", tl.constexpr(tl.float32))
    monkeypatch.setattr(low_bit_scores, "readable_dtype", lambda _: torch.float32)


def caches(generator: torch.Generator, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache in FP8, and the same numbers in `WIDE`."""
    shape = blocks, KV_HEADS, BLOCK_TOKENS, 2 * HEAD_SIZE
    float8 = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    return float8.to(DEVICE), float8.to(WIDE).to(DEVICE)


@needs_triton
@pytest.mark.parametrize("name", PREFILL)
def test_prompt_chunks(name: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    method: PrefillMethod = PREFILL[name]
    float8, wide = caches(generator, -(-SEQ_LEN // BLOCK_TOKENS))
    query = torch.randn(QUERY_TOKENS, HEADS, HEAD_SIZE, generator=generator).to(WIDE).to(DEVICE)
    # So that methods take their Triton kernels.
    as_on_a_gpu(monkeypatch)
    lists = choose_for_chunks(method, query, float8, [(QUERY_TOKENS, SEQ_LEN)])
    expected = choose_for_chunks(method, query, wide, [(QUERY_TOKENS, SEQ_LEN)])
    assert torch.equal(lists.kept_tokens, expected.kept_tokens)
    assert int(lists.kept_tokens.sum()) > 0
    for row, pages in enumerate(lists.kept_pages.tolist()):
        assert torch.equal(lists.pages[row, :pages], expected.pages[row, :pages]), f"row {row}"


@needs_triton
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(Tidal(budget_tokens=64, dense_layers=0, sink_tokens=4, recent_tokens=8), id="tidal"),
        pytest.param(TokenTopk(budget_tokens=64, sink_tokens=4, recent_tokens=8), id="tokentopk"),
        pytest.param(BlockTopk(**BLOCKS), id="blocktopk"),
        pytest.param(HipDecode(**STAGES), id="hip"),
    ],
)
def test_decode_rows(method: Any, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 2
    blocks = -(-SEQ_LEN // BLOCK_TOKENS)
    both = caches(generator, rows * blocks)
    query = torch.randn(rows, HEADS, HEAD_SIZE, generator=generator).to(WIDE).to(DEVICE)
    contexts = torch.tensor([SEQ_LEN, SEQ_LEN - 150], dtype=torch.int32, device=DEVICE)
    table = torch.randperm(rows * blocks, generator=generator).int().view(rows, blocks).to(DEVICE)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    read = []
    for cache in both:
        (served,) = served_at_once([method])
        size = ServerSize(rows, SEQ_LEN, LAYERS, KV_HEADS)
        buffers = DecodeBuffers(rows, size, [served], LIST_TOKENS, torch.device(DEVICE))
        settings = [RowSetting(served, 0, layer_roles(served, LAYERS), slot, True) for slot in range(rows)]
        buffers.tell(settings)
        room = DecodeRoom(buffers, cache, HEADS, query.dtype, contexts, table)
        room.serve(buffers.launches(settings, all_sparse=True), slice(0, rows), rows * SEQ_LEN, query)
        read.append((buffers.contexts.kept_tokens[-1].clone(), buffers.lists.slots.clone()))
    (kept, slots), (expected_kept, expected_slots) = read
    assert torch.equal(kept, expected_kept)
    assert int(kept.min()) > 0
    # On a GPU another kernel chooses from wide keys, whose sums are rounded otherwise.
    most_others = 2 if torch.cuda.is_available() else 0
    for row, count in enumerate(kept.tolist()):
        others = set(slots[row, :count].tolist()) - set(expected_slots[row, :count].tolist())
        assert len(others) <= most_others, f"list {row}: {others}"


def test_summaries_beside_an_fp8_cache() -> None:
    """Bounds of its numbers are among them; means are not."""
    assert SummaryKind(16, "bounds").dtype(torch.float8_e4m3fn) == torch.float8_e4m3fn
    assert SummaryKind(16, "mean").dtype(torch.float8_e4m3fn) == torch.bfloat16
    assert SummaryKind(16, "mean").bytes_per_token(64, 1) == SummaryKind(16, "mean").bytes_per_token(64, 2)
