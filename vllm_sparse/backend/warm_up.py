"""Compiles kernels that prompts need while the server starts, so that no request waits for a compiler."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from vllm.model_executor.warmup.jit_warmup import VllmJitKernel

from vllm_sparse.backend import prefill
from vllm_sparse.backend.layer import LayerCall
from vllm_sparse.config.request import configured_method
from vllm_sparse.config.server import server_config
from vllm_sparse.kernels.page_summaries import SummaryKind
from vllm_sparse.methods.prefill import PrefillMethod
from vllm_sparse.methods.registry import PREFILL_METHODS
from vllm_sparse.metrics import StepRecord, WorkerMetrics
from vllm_sparse.step.plan import PrefillRow, RowSpan, StepPlan

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class WarmUpChunk:
    """A prompt's last chunk; kernels for wider tiles are compiled as contexts double.

    Attributes:
        method: with the knobs that the server's configuration gives it.
        tokens: of the chunk.
        seq_len: of the prompt.
    """

    method: PrefillMethod
    tokens: int
    seq_len: int


Key = TypeVar("Key")


class _LayerWarmUp(VllmJitKernel[Key]):
    """Kernels that a layer runs once vLLM's cache is allocated (``--kernel-config.enable_jit_warmup``).

    Args:
        vllm_config: the server's configuration.
        layer_name: of an attention layer; all are alike.
    """

    def __init__(self, vllm_config: VllmConfig, layer_name: str) -> None:
        super().__init__()
        self._config = vllm_config
        self._layer_name = layer_name

    def _call(self, query_tokens: int, seq_len: int | None = None) -> LayerCall:
        """Random queries over whatever the cache holds, read as those of requests; by default over one block."""
        layer = self._config.compilation_config.static_forward_context[self._layer_name]
        kv_cache = layer.kv_cache
        blocks = -(-(seq_len or 1) // kv_cache.shape[2])
        block_table = torch.arange(blocks, dtype=torch.int32, device=kv_cache.device) % kv_cache.shape[0]
        shape = query_tokens, layer.impl.num_heads, kv_cache.shape[3] // 2
        query = torch.randn(shape, device=kv_cache.device).to(self._config.model_config.dtype)
        metadata = SimpleNamespace(block_table=block_table.unsqueeze(0))
        output = torch.empty_like(query)
        call = LayerCall(layer, 0, query, query, query, kv_cache, metadata, output, layer.impl.scale)
        as_read: LayerCall = layer.impl.as_read(call)
        return as_read


class PrefillWarmUp(_LayerWarmUp[WarmUpChunk]):
    """Serves prompt chunks as a layer will serve those of requests.

    A request that sets knobs which change a kernel's tiles, such as a query block, still waits for the compiler once.
    """

    def get_warmup_keys(self, *args: Any, **kwargs: Any) -> list[WarmUpChunk]:
        """Chunks of each method that requests may choose."""
        config = server_config(self._config)
        longest = self._config.model_config.max_model_len
        step = min(self._config.scheduler_config.max_num_batched_tokens, longest)
        methods = [configured_method(config, "prefill", name) for name in PREFILL_METHODS if name in config.methods]
        return [
            chunk
            for method in methods
            if isinstance(method, PrefillMethod)
            for form in method.forms()
            for chunk in warm_up_chunks(form, step, config.min_tokens, longest)
        ]

    def compile(self, compile_key: WarmUpChunk) -> None:
        """Serve the chunk."""
        call = self._call(compile_key.tokens, compile_key.seq_len)
        span = RowSpan(0, 0, compile_key.tokens, compile_key.seq_len)
        row = PrefillRow(span, compile_key.method)
        # Nothing of it is counted: the step never finishes.
        record = StepRecord(WorkerMetrics.get(), StepPlan(range(1), (span,), prefill=(row,)))
        impl = call.layer.impl
        prefill.serve_chunks(impl, call, prefill.plan_launches(impl, call, [row]), record)


class SummaryWarmUp(_LayerWarmUp[SummaryKind]):
    """Summarises a block, as the prompts of decode methods that read summaries are.

    Args:
        vllm_config: the server's configuration.
        layer_name: of an attention layer; all are alike.
        kinds: of summaries of the decode methods that requests may choose.
    """

    def __init__(self, vllm_config: VllmConfig, layer_name: str, kinds: Iterable[SummaryKind]) -> None:
        super().__init__(vllm_config, layer_name)
        self._kinds = list(dict.fromkeys(kinds))

    def get_warmup_keys(self, *args: Any, **kwargs: Any) -> list[SummaryKind]:
        """The kinds."""
        return self._kinds

    def compile(self, compile_key: SummaryKind) -> None:
        """Summarise the block."""
        call = self._call(1)
        impl = call.layer.impl
        keys = impl.row_keys(call, RowSpan(0, 0, 1, call.kv_cache.shape[2]))
        impl.summaries.summarise(compile_key, 0, keys, call.kv_cache)


def warm_up_chunks(method: PrefillMethod, step_tokens: int, min_tokens: int, longest_tokens: int) -> list[WarmUpChunk]:
    """Chunks that need all kernels of a method; none if all chunks run dense.

    Args:
        method: with the knobs that the server's configuration gives it.
        step_tokens: of the largest chunk.
        min_tokens: of the shortest prompt that is not left dense.
        longest_tokens: of the longest prompt.
    """
    if step_tokens <= method.min_query_tokens:
        return []
    return [
        # Sizes that 16 divides have kernels of their own, and chunks of few query blocks have smaller tiles.
        WarmUpChunk(method, tokens, context if tokens == step_tokens else context - 1)
        for context in doubling(max(step_tokens, min(min_tokens, longest_tokens)), longest_tokens)
        for tokens in (step_tokens, step_tokens - 1, method.min_query_tokens)
    ]


def doubling(first: int, last: int) -> list[int]:
    """`first`, twice that and so on below `last`, and `last`."""
    found = []
    while first < last:
        found.append(first)
        first *= 2
    return [*found, last]
