"""Kernels of prefill methods are compiled at start-up, through vLLM's own registry."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.backend.conftest import HEAD_SIZE, KV_HEADS, Engine
from vllm_sparse.backend import prefill
from vllm_sparse.backend.executors.cpu import CpuExecutor
from vllm_sparse.backend.summaries import StoredSummaries
from vllm_sparse.backend.warm_up import PrefillWarmUp, SummaryWarmUp, doubling
from vllm_sparse.kernels.page_summaries import SummaryKind, page_summaries
from vllm_sparse.methods.registry import DEFAULT_METHODS, PREFILL_METHODS
from vllm_sparse.step.launch import Launch
from vllm_sparse.step.plan import PrefillRow

BLOCK, BLOCKS = 32, 40


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [(8192, 8192, [8192]), (8192, 30000, [8192, 16384, 30000]), (4096, 16384, [4096, 8192, 16384]), (9000, 100, [100])],
)
def test_contexts_double_up_to_the_longest(first: int, last: int, expected: list[int]) -> None:
    assert doubling(first, last) == expected


def test_each_method_serves_a_chunk_of_each_length(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a cache of fewer blocks than the longest prompt has, and with what a request reads for real."""
    from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry

    layer = engine.layers[3]
    shape = BLOCKS, KV_HEADS, BLOCK, 2 * HEAD_SIZE
    monkeypatch.setattr(layer, "kv_cache", torch.randn(shape))
    monkeypatch.setattr(engine.config.scheduler_config, "max_num_batched_tokens", 1024)
    monkeypatch.setattr(engine.config.model_config, "max_model_len", 2500)
    served: Counter[tuple[str, int, int]] = Counter()
    attended: list[int] = []
    run = CpuExecutor.run

    def counted(self: CpuExecutor, launch: Launch, *args: Any) -> None:
        attended.append(int(launch.kept_tokens.sum()))
        run(self, launch, *args)

    monkeypatch.setattr(CpuExecutor, "run", counted)
    prepare = prefill.plan_launches

    def noted(platform: Any, call: Any, rows: list[PrefillRow]) -> list[prefill.ChunkLaunch]:
        served.update((row.method.name, row.span.query_tokens, row.span.seq_len) for row in rows)
        return prepare(platform, call, rows)

    monkeypatch.setattr(prefill, "plan_launches", noted)
    registry = JitWarmupRegistry(engine.config)
    PrefillWarmUp(engine.config, layer.layer_name).register_warmup()
    assert len(registry) == 0, "only while vLLM asks for what to warm up"
    with registry.activate():
        PrefillWarmUp(engine.config, layer.layer_name).register_warmup()
    registry.warmup()
    assert served == {
        (name, tokens, context - (tokens < 1024)): len(method().forms())
        for name, method in PREFILL_METHODS.items()
        if name in DEFAULT_METHODS
        for context in (1024, 2048, 2500)
        for tokens in (1024, 1023, method().min_query_tokens)
    }
    assert len(attended) == served.total()
    assert all(kept > 0 for kept in attended)


def test_chunks_that_always_run_dense_are_left_out(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.config.scheduler_config, "max_num_batched_tokens", 200)
    keys = PrefillWarmUp(engine.config, engine.layers[0].layer_name).get_warmup_keys()
    assert {key.method.name for key in keys} == {
        name for name, method in PREFILL_METHODS.items() if method().min_query_tokens < 200
    }


def test_each_kind_of_summary_is_stored_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the prompts of requests that decode by them are summarised: into what the layer reads later."""
    from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry

    layer = engine.layers[3]
    kv_cache = torch.randn(BLOCKS, KV_HEADS, BLOCK, 2 * HEAD_SIZE)
    monkeypatch.setattr(layer, "kv_cache", kv_cache)
    monkeypatch.setattr(layer.impl, "summaries", StoredSummaries())
    kinds = [SummaryKind(BLOCK, "mean"), SummaryKind(BLOCK, "codes"), SummaryKind(BLOCK, "mean")]
    registry = JitWarmupRegistry(engine.config)
    with registry.activate():
        SummaryWarmUp(engine.config, layer.layer_name, kinds).register_warmup()
    registry.warmup()
    stored = layer.impl.summaries.by_kind
    assert set(stored) == set(kinds)
    keys = layer.impl.keys_of(layer, kv_cache, torch.zeros(1, dtype=torch.int32), BLOCK)
    expected = page_summaries(keys, kinds[0])
    assert torch.allclose(stored[kinds[0]][0].float(), expected, rtol=1e-2, atol=1e-2)


def test_summaries_are_of_the_cache_as_it_is_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An FP8 cache is bytes to vLLM; summaries of these would be kept, and read, in the wrong dtype."""
    layer = engine.layers[3]
    monkeypatch.setattr(layer, "kv_cache", torch.randn(BLOCKS, KV_HEADS, BLOCK, 2 * HEAD_SIZE).view(torch.int32))
    monkeypatch.setattr(layer.impl, "summaries", StoredSummaries())
    monkeypatch.setattr(layer.impl, "as_read", lambda call: replace(call, kv_cache=call.kv_cache.view(torch.float32)))
    kind = SummaryKind(BLOCK, "mean")
    SummaryWarmUp(engine.config, layer.layer_name, [kind]).compile(kind)
    assert layer.impl.summaries.by_kind[kind].dtype == torch.float32
