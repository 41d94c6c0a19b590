"""Sparse prompt chunks on a GPU: the host never waits for the device, and each chunk gets what it gets alone."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import oracle
from vllm_sparse.backend import prefill
from vllm_sparse.backend.layer import LayerCall, LayerPlatform
from vllm_sparse.keys import PagedKeys, PlainKeys
from vllm_sparse.methods.dhsa import Dhsa
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.hip import Hip
from vllm_sparse.methods.prefill import PrefillMethod
from vllm_sparse.methods.sale import Sale
from vllm_sparse.methods.streaming import Streaming
from vllm_sparse.metrics import StepRecord, WorkerMetrics
from vllm_sparse.step.launch import Executor
from vllm_sparse.step.plan import PrefillRow, RowSpan, StepPlan

HEADS, KV_HEADS, HEAD_SIZE, BLOCK, LAYERS = 14, 2, 64, 128, 3
# Tokens of each chunk and its context: whole prompts, later chunks, ragged ends.
SIZES = [(1000, 1000), (512, 6000), (2048, 9001), (700, 3333)]
# About half a second of an H200.
SLEEP_CYCLES = 1_000_000_000

METHODS: dict[str, list[PrefillMethod]] = {
    "dhsa": [Dhsa()],
    "dhsa, first stage": [Dhsa(bound_weight=0.0, candidate_factor=1.0)],
    "dhsa, covering": [Dhsa(density=0.5, coverage=0.9)],
    "dhsa, adaptive": [Dhsa(key_blocks="adaptive", bound_weight=0.0)],
    "flexprefill": [FlexPrefill(min_budget_tokens=128)],
    "flexprefill, faithful": [FlexPrefill(min_budget_tokens=128, faithful=True)],
    "sale": [Sale(tau=0.02)],
    "hip": [Hip(stage_block_tokens=(64, 16), stage_budget_tokens=(1024, 512), query_stride=(4, 4))],
    "streaming": [Streaming(recent_tokens=500)],
    "all": [Dhsa(), FlexPrefill(min_budget_tokens=128), Sale(tau=0.02), Streaming(recent_tokens=500)],
}


# Chunks and layers of those that launch more than the thousand that a sleeping device takes before the host waits.
MANY_LAUNCHES = {"dhsa, adaptive": (4, 1), "flexprefill, faithful": (2, 1)}


class OneLayer(LayerPlatform):
    """A layer of the CUDA backend, without vLLM's configuration."""

    num_heads, num_kv_heads, scale, first_query_head = HEADS, KV_HEADS, 0.125, 0
    logits_soft_cap = 0.0

    def make_executor(self, layer: Any) -> Executor:
        from vllm_sparse.backend.executors.flash_attention import FlashAttentionExecutor

        return FlashAttentionExecutor(3)

    def keys_of(self, layer: Any, kv_cache: torch.Tensor, block_table: torch.Tensor, seq_len: int) -> PagedKeys:
        return PlainKeys(kv_cache, block_table, seq_len)

    def prefill_page_size(self, wanted_tokens: int, block_size_tokens: int) -> int:
        return min(wanted_tokens, block_size_tokens)

    def decode_page_size(self, block_size_tokens: int) -> int:
        raise NotImplementedError

    def dense_subset(self, layer: Any, query: torch.Tensor, metadata: Any, spans: list[RowSpan]) -> Any:
        raise NotImplementedError

    def stock_forward(self, call: LayerCall, query: torch.Tensor, metadata: Any, output: torch.Tensor) -> None:
        raise NotImplementedError


def make_call(seed: int) -> LayerCall:
    """A layer of random keys and queries; the requests' blocks lie anywhere in the cache."""
    generator = torch.Generator("cuda").manual_seed(seed)
    width = max(-(-seq_len // BLOCK) for _, seq_len in SIZES)
    table = torch.randperm(len(SIZES) * width, generator=generator, device="cuda").view(len(SIZES), width).int()
    shape = table.numel(), KV_HEADS, BLOCK, 2 * HEAD_SIZE
    cache = torch.randn(shape, generator=generator, device="cuda").bfloat16()
    tokens = sum(tokens for tokens, _ in SIZES)
    # Beside keys and values, as a fused projection leaves them.
    projected = torch.randn(tokens, HEADS + 2 * KV_HEADS, HEAD_SIZE, generator=generator, device="cuda").bfloat16() * 2
    query = projected[:, :HEADS]
    output = torch.full(query.shape, oracle.NAN, dtype=query.dtype, device="cuda")
    metadata = SimpleNamespace(block_table=table)
    return LayerCall(None, 0, query, query, query, cache, metadata, output, HEAD_SIZE**-0.5)


def make_rows(methods: list[PrefillMethod]) -> list[PrefillRow]:
    starts = itertools.accumulate((tokens for tokens, _ in SIZES), initial=0)
    return [
        PrefillRow(RowSpan(row, start, *size), method)
        for row, (start, size, method) in enumerate(zip(starts, SIZES, itertools.cycle(methods), strict=False))
    ]


def serve(call: LayerCall, rows: list[PrefillRow], layers: int) -> None:
    """The rows of a step through some layers, as `SparseAttentionImpl.forward` does."""
    platform = OneLayer()
    record = StepRecord(
        WorkerMetrics(recording=False), StepPlan(range(layers), tuple(row.span for row in rows), prefill=tuple(rows))
    )
    launches = prefill.plan_launches(platform, call, rows)
    for _ in range(layers):
        prefill.serve_chunks(platform, call, launches, record)


@oracle.needs_cuda
@pytest.mark.parametrize("name", METHODS)
def test_no_chunk_blocks_the_host(name: str) -> None:
    """Neither by an operation that torch knows to wait, nor by any other way."""
    call, rows = make_call(random.randrange(1 << 30)), make_rows(METHODS[name])
    chunks, layers = MANY_LAUNCHES.get(name, (len(rows), LAYERS))
    rows = rows[:chunks]
    # Memory is allocated and kernels are compiled and loaded by then, which does wait.
    serve(call, rows, LAYERS)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
    asleep = torch.cuda.current_stream().record_event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        serve(call, rows, layers)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not asleep.query(), "the host went on only when the device was done"
    torch.cuda.synchronize()


@oracle.needs_cuda
@pytest.mark.parametrize("name", METHODS)
def test_each_of_several_chunks_gets_what_it_gets_alone(name: str) -> None:
    """But for the splits of the kernel, which depend on its batch."""
    seed = random.randrange(1 << 30)
    call, rows = make_call(seed), make_rows(METHODS[name])
    serve(call, rows, 1)
    together = call.output.clone()
    assert not bool(together.isnan().any())
    call.output.fill_(oracle.NAN)
    for row in rows:
        serve(call, [row], 1)
    for row in rows:
        tokens = slice(row.span.query_start, row.span.query_start + row.span.query_tokens)
        error = oracle.relative_error(together[tokens], call.output[tokens])
        assert error < 5e-3, f"row {row.span.row}: {error} (seed {seed})"
