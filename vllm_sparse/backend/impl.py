"""Layer forward, shared by both platforms: dense rows through the stock kernel, sparse rows through page lists."""

from __future__ import annotations

import logging
from abc import abstractmethod
from functools import lru_cache
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank

from vllm_sparse.backend.chunk import attend_chunk
from vllm_sparse.backend.decode import DecodeStep
from vllm_sparse.kernels.page_summaries import SummaryKind, store_summaries
from vllm_sparse.keys import PagedKeys
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.methods.prefill import Layer
from vllm_sparse.metrics import WorkerMetrics
from vllm_sparse.step.launch import Executor
from vllm_sparse.step.plan import DecodeLaunch, LayerWork, PrefillRow, RowSpan, StepPlan

logger = logging.getLogger("vllm.sparse")


class SparseAttentionImpl:
    """Mixin before a stock implementation. Without a plan the stock forward runs and nothing else."""

    num_heads: int
    num_kv_heads: int
    scale: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self, "alibi_slopes", None) is not None:
            raise ValueError("attention backend sparse does not support ALiBi; serve this model without it")
        if getattr(self, "logits_soft_cap", 0):
            raise ValueError(
                "attention backend sparse does not support a soft cap on attention logits; serve this model without it"
            )
        self._sparse_executor: Executor | None = None
        self._summaries: dict[SummaryKind, torch.Tensor] = {}
        self._first_query_head = get_tensor_model_parallel_rank() * self.num_heads

    @abstractmethod
    def make_executor(self, layer: Any) -> Executor:
        """The platform's executor for this layer."""

    @abstractmethod
    def keys_of(self, layer: Any, kv_cache: torch.Tensor, block_table: torch.Tensor, context_tokens: int) -> PagedKeys:
        """A request's keys, read in the platform's packing."""

    @abstractmethod
    def prefill_page_size(self, wanted_tokens: int, block_size_tokens: int) -> int:
        """Page size of the executor for a method that chooses `wanted_tokens` at a time, given the cache's block."""

    @abstractmethod
    def decode_page_size(self, block_size_tokens: int) -> int:
        """Page size of the executor in decoding, given the cache's block size."""

    @abstractmethod
    def dense_subset(self, layer: Any, query: torch.Tensor, metadata: Any, spans: list[RowSpan]) -> Any:
        """Stock metadata for some rows of the step, whose query tokens are gathered in that order."""

    def dense_rows(self, metadata: Any, context_tokens: torch.Tensor, step: DecodeStep) -> Any:
        """Stock metadata for decode rows that are served at once, with lengths of their own.

        Args:
            metadata: of the whole step.
            context_tokens: int32 ``[rows]``.
            step: the rows.
        """
        raise NotImplementedError(f"{type(self).__name__} serves decode rows one by one")

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend. Shapes and dtypes are vLLM's: query and output ``[tokens, query_heads, head_size]``."""
        plan: StepPlan | None = getattr(attn_metadata, "sparse_plan", None)
        if plan is None:
            return super().forward(  # type: ignore[misc, no-any-return]
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        executor = self._executor(layer)
        layer_index = _layer_index(layer.layer_name)
        work = plan.work(layer_index)
        if work.dense and len(work.dense) == len(plan.spans):
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output)  # type: ignore[misc]
        elif work.dense:
            self._forward_dense(work, layer, query, key, value, kv_cache, attn_metadata, output)

        heads = output.view(-1, self.num_heads, query.shape[-1])
        block_table = attn_metadata.block_table
        for summarised in work.summarising:
            span, kind = summarised.span, summarised.kind
            keys = self.keys_of(layer, kv_cache, block_table[span.row], span.context_tokens)
            keys.summaries = self._stored_summaries(kind, kv_cache)
            store_summaries(keys, kind, span.context_tokens - span.query_tokens)
        if plan.batch or plan.batch_step is not None:
            self.forward_batch(plan, layer, layer_index, query, key, value, kv_cache, attn_metadata, heads)
        for chunk in work.prefill:
            self.forward_chunk(plan, chunk, layer, layer_index, query, kv_cache, block_table, heads)
        for row in work.choosing:
            keys = self.keys_of(layer, kv_cache, block_table[row.span.row], row.span.context_tokens)
            if row.method.summaries is not None:
                keys.summaries = self._stored_summaries(row.method.summaries, kv_cache)
            page_size = self.decode_page_size(kv_cache.shape[2])
            memory = row.memory.setdefault(layer_index, LayerMemory())
            with plan.timer.serving("decode", [row.method.name]):
                lists = row.method.select(query[row.span.query_start], keys, self.scale, page_size, memory)
            plan.choose(row, lists)
        for row in work.reading:
            assert row.pages is not None, "a layer that reads a list follows one that chose it, or chose it itself"
            row.density.add(layer_index, row.pages.kept_tokens, row.span, 1, row.pages.kept_tokens.shape[0])
            if row.recall_layer == layer_index:
                keys = self.keys_of(layer, kv_cache, block_table[row.span.row], row.span.context_tokens)
                newest = query[row.span.query_start].unsqueeze(0)
                plan.metrics.observe_recall("decode", row.method.name, newest, keys, row.pages, 1, self.scale)
        if work.reading:
            with plan.timer.serving("decode", [row.method.name for row in work.reading]):
                launches = plan.decode_launches(work, block_table, self.num_kv_heads, kv_cache.shape[2])
                self._forward_reading(launches, plan.timer.executor(executor), query, heads, kv_cache)
        if layer_index == plan.num_layers - 1:
            densities = [row.density for row in plan.prefill] + [row.density for row in plan.decode]
            plan.metrics.finish_step(densities, plan.timer)
            plan.metrics.observe_batch(plan.batch)
        return output

    def forward_batch(
        self,
        plan: StepPlan,
        layer: Any,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        heads: torch.Tensor,
    ) -> None:
        """The decode rows that are served at once; arguments as in `forward`, `heads` being its output."""
        batch = plan.start_batch(attn_metadata.seq_lens, attn_metadata.block_table)

        def dense(rows_query: torch.Tensor, context_tokens: torch.Tensor, rows_output: torch.Tensor) -> None:
            metadata = self.dense_rows(attn_metadata, context_tokens, batch.step)
            # As in `_forward_dense`, keys and values are only passed through.
            super(SparseAttentionImpl, self).forward(  # type: ignore[misc]
                layer, rows_query, key, value, kv_cache, metadata, rows_output
            )

        for method in batch.step.methods:
            if method.summaries is not None:
                self._stored_summaries(method.summaries, kv_cache)
        in_place = isinstance(batch.tokens, slice)
        rows_query, target = query[batch.tokens], heads[batch.tokens]
        batch.step.attend(
            layer_index,
            rows_query,
            kv_cache,
            self.scale,
            target,
            self._executor(layer),
            dense,
            self._summaries,
            plan.timer.marks(layer_index, plan.batch_methods),
        )
        if not in_place:
            heads[batch.tokens] = target
        if plan.recall is not None and plan.recall.layer == layer_index:
            plan.recall.take(batch.step, rows_query, kv_cache, self.scale)

    def _executor(self, layer: Any) -> Executor:
        if self._sparse_executor is None:
            self._sparse_executor = self.make_executor(layer)
        return self._sparse_executor

    def _stored_summaries(self, kind: SummaryKind, kv_cache: torch.Tensor) -> torch.Tensor:
        """Summaries of the layer's pages, by physical block; memory is taken when the first request needs them."""
        blocks, kv_heads, block_size, double_head_size = kv_cache.shape
        shape = blocks, kv_heads, block_size // kind.page_tokens, kind.width(double_head_size // 2)
        stored = self._summaries.get(kind)
        # vLLM profiles with a smaller cache than it serves with.
        if stored is None or stored.shape != shape:
            former_bytes = 0 if stored is None else stored.nbytes
            stored = torch.empty(shape, dtype=kv_cache.dtype, device=kv_cache.device)
            self._summaries[kind] = stored
            memory = WorkerMetrics.get().memory
            if memory is not None:
                memory.change_side_data(stored.nbytes - former_bytes)
            _log_memory(kind, stored.nbytes, kv_cache.nbytes)
        return stored

    def _forward_reading(
        self,
        launches: list[DecodeLaunch],
        executor: Executor,
        query: torch.Tensor,
        heads: torch.Tensor,
        kv_cache: torch.Tensor,
    ) -> None:
        """Decode rows that read their lists."""
        head_size = query.shape[-1]
        for part in launches:
            rows = part.launch.kept_tokens.shape[0]
            gathered = query[part.tokens]
            gathered = gathered.reshape(rows, -1, head_size)
            if isinstance(part.tokens, slice):
                # Adjacent rows: the kernel writes in place.
                target = heads[part.tokens].view(rows, -1, head_size)
                executor.run(part.launch, gathered, target, kv_cache, self.scale)
            else:
                target = torch.empty_like(gathered)
                executor.run(part.launch, gathered, target, kv_cache, self.scale)
                heads[part.tokens] = target.view(-1, self.num_heads, head_size)

    def forward_chunk(
        self,
        plan: StepPlan,
        row: PrefillRow,
        layer: Any,
        layer_index: int,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        heads: torch.Tensor,
    ) -> None:
        """One request's chunk: choose, translate, attend; arguments as in `forward_batch`."""
        span, method = row.span, row.method
        block_size = kv_cache.shape[2]
        request_blocks = block_table[span.row]
        chunk = query[span.query_start : span.query_start + span.query_tokens]
        keys = self.keys_of(layer, kv_cache, request_blocks, span.context_tokens)
        page_size = self.prefill_page_size(method.page_tokens, block_size)
        output = heads[span.query_start : span.query_start + span.query_tokens]
        with plan.timer.serving("prefill", [method.name]):
            lists = method.select(chunk, keys, self.scale, page_size, Layer(layer_index, self._first_query_head))
            executor = plan.timer.executor(self._executor(layer))
            attend_chunk(executor, method, lists, chunk, output, kv_cache, request_blocks, self.scale)
        list_heads = method.list_heads(self.num_heads, self.num_kv_heads)
        row.density.add(layer_index, lists.kept_tokens, span, method.query_block_tokens, list_heads)
        if row.recall_layer == layer_index:
            plan.metrics.observe_recall(
                "prefill", method.name, chunk, keys, lists, method.query_block_tokens, self.scale
            )

    def _forward_dense(
        self,
        work: LayerWork,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
    ) -> None:
        """The dense rows of a mixed step, gathered, through the stock kernel."""
        if work.dense_metadata is None:
            ranges = [torch.arange(span.query_start, span.query_start + span.query_tokens) for span in work.dense]
            tokens = torch.cat(ranges).to(query.device, non_blocking=True)
            work.dense_metadata = tokens, self.dense_subset(layer, query, attn_metadata, work.dense)
        tokens, metadata = work.dense_metadata
        gathered = torch.empty((tokens.shape[0], *output.shape[1:]), dtype=output.dtype, device=output.device)
        # The stock paged kernel reads keys and values from the cache; the arguments are only passed through.
        super().forward(layer, query[tokens], key, value, kv_cache, metadata, gathered)  # type: ignore[misc]
        output[tokens] = gathered


@lru_cache(maxsize=4096)
def _layer_index(layer_name: str) -> int:
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(layer_name))


@lru_cache
def _log_memory(kind: SummaryKind, summary_bytes: int, cache_bytes: int) -> None:
    """Once, not for each layer."""
    logger.info(
        "Page summaries (%s of %d tokens) take %.1f MiB in each layer that chooses by them, beside its KV cache of "
        "%.1f MiB; vLLM's memory settings do not count them.",
        "bounds" if kind.bounds else "means",
        kind.page_tokens,
        summary_bytes / 2**20,
        cache_bytes / 2**20,
    )
