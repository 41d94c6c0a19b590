"""Keys behind the first 2^31 numbers of a cache are found: compiled on a GPU, else interpreted.

A cache of a million tokens has more numbers than that. The interpreter's 32-bit integers overflow as a GPU's do. Only
blocks that are written take memory on a CPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import oracle
from tests.kernels.interpreter import CAN_RUN, DEVICE, as_on_a_gpu, needs_triton, run_under_the_interpreter
from tests.methods.together import differing_lists, random_step, select_together
from tests.oracle import Paged, Platform
from vllm_sparse.kernels.page_summaries import store_summaries
from vllm_sparse.methods.block_topk import BlockTopk
from vllm_sparse.methods.decode import BatchDecodeMethod
from vllm_sparse.methods.dhsa import Dhsa
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.hip import Hip, HipDecode
from vllm_sparse.methods.oracle import Oracle
from vllm_sparse.methods.prefill import PrefillMethod
from vllm_sparse.methods.sale import Sale
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.methods.token_topk import TokenTopk
from vllm_sparse.step.rows import DecodeRows, RowsPlace, ServerSize, TokenLists

pytest.importorskip("triton")

PLATFORM = Platform("plain", DEVICE, torch.float32, None)
KV_HEADS, BLOCK = 2, 64
SCALE = 0.13
SIZES = [(140, 300), (70, 700)]
PREFILL: dict[str, PrefillMethod] = {
    "dhsa": Dhsa(recent_tokens=0, sink_tokens=0, dense_tail_tokens=0),
    "dhsa, lists": Dhsa(density=0.2, recent_tokens=0, sink_tokens=0, dense_tail_tokens=0),
    "dhsa, one stage": Dhsa(density=0.2, candidate_factor=1, recent_tokens=0, sink_tokens=0, dense_tail_tokens=0),
    "dhsa, adaptive": Dhsa(density=0.2, key_blocks="adaptive", bound_weight=0, candidate_factor=1, dense_tail_tokens=0),
    "flexprefill": FlexPrefill(gamma=0.5, min_budget_tokens=0),
    "hip": Hip((64, 16), (192, 64), (4, 1), sink_tokens=16, recent_tokens=40, dense_tail_tokens=1),
    "sale": Sale(tau=0.3, recent_tokens=64),
    "oracle": Oracle(density=0.3),
}
DECODE: dict[str, BatchDecodeMethod] = {
    "tidal": Tidal(budget_tokens=64, sink_tokens=8, recent_tokens=8),
    "hip": HipDecode(),
    "blocktopk": BlockTopk(budget_tokens=64, sink_tokens=8, recent_tokens=16, page_tokens=16),
    "blocktopk, two stages": BlockTopk(budget_tokens=64, sink_tokens=8, recent_tokens=16, candidate_factor=2),
    "tokentopk": TokenTopk(budget_tokens=64, sink_tokens=8, recent_tokens=8, page_tokens=64),
}


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=len(PREFILL) + len(DECODE))


@pytest.fixture
def kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the reference, on a CPU too."""
    if DEVICE == "cpu":
        as_on_a_gpu(monkeypatch)


def far(data: Paged) -> tuple[Paged, int]:
    """The same requests behind 2^31 numbers of the cache, and how many blocks these are."""
    cache = data.kv_cache
    blocks = (1 << 31) // cache[0].numel() + 1
    moved = torch.empty(blocks + cache.shape[0], *cache.shape[1:], dtype=cache.dtype, device=cache.device)
    moved[blocks:] = cache
    return replace(data, kv_cache=moved, block_table=data.block_table + blocks), blocks


@needs_triton
@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize("name", PREFILL)
def test_prompt_chunks_choose_the_same(name: str, generator: torch.Generator) -> None:
    step = random_step(PLATFORM, generator, SIZES, 2 * KV_HEADS, KV_HEADS)
    moved, _ = far(step.data)
    near = select_together(PREFILL[name], step, PREFILL[name].page_tokens)
    found = select_together(PREFILL[name], replace(step, data=moved), PREFILL[name].page_tokens)
    for of_chunk, wanted in zip(found, near, strict=True):
        assert differing_lists(of_chunk, wanted) == 0


def chosen(method: BatchDecodeMethod, data: Paged, query: torch.Tensor, contexts: list[int]) -> TokenLists:
    """Lists of decode rows, those of what they keep of pages included."""
    kind, summaries = method.summaries, None
    if kind is not None:
        blocks, kv_heads, block, double_head_size = data.kv_cache.shape
        shape = blocks, kv_heads, block // kind.page_tokens, kind.width(double_head_size // 2)
        summaries = torch.empty(shape, dtype=kind.dtype(data.kv_cache.dtype), device=DEVICE)
        for row in range(len(contexts)):
            keys = data.reader(row)
            keys.summaries = summaries
            store_summaries(keys, kind, 0)
    seq_lens = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    starts = (seq_lens.cumsum(0) - seq_lens).long()
    numbers = torch.arange(len(contexts), dtype=torch.int32, device=DEVICE)
    memory = method.allocate(ServerSize(len(contexts), max(contexts), 2, KV_HEADS), torch.device(DEVICE))
    place = RowsPlace(starts, sum(contexts), numbers, numbers * 0 + 1, seq_lens, 0, summaries, memory)
    width = max(int(method.longest_list_tokens), max(contexts))
    slots = torch.zeros(len(contexts) * KV_HEADS, width, dtype=torch.int32, device=DEVICE)
    lists = TokenLists(slots, torch.zeros(len(contexts) * KV_HEADS, dtype=torch.int32, device=DEVICE))
    knobs = torch.tensor([method.row_knobs() for _ in contexts], dtype=torch.int32, device=DEVICE)
    rows = DecodeRows(query, data.kv_cache, data.block_table, seq_lens, SCALE)
    method.choose_rows(rows, knobs, place, lists)
    return lists


@needs_triton
@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize("name", DECODE)
def test_decode_rows_choose_the_same(name: str, generator: torch.Generator) -> None:
    contexts = [700, 333]
    data = oracle.random_paged(PLATFORM, generator, contexts, KV_HEADS, 64, BLOCK)
    query = oracle.random_tensor(PLATFORM, generator, len(contexts), 2 * KV_HEADS, 64, spread=3)
    moved, blocks = far(data)
    near, found = (chosen(DECODE[name], where, query, contexts) for where in (data, moved))
    assert torch.equal(found.kept_tokens, near.kept_tokens)
    for wanted, of_list, kept in zip(near.slots, found.slots, near.kept_tokens.tolist(), strict=True):
        assert kept > 0
        assert torch.equal(of_list[:kept], wanted[:kept] + blocks * KV_HEADS * BLOCK)
