"""Layer forward, shared by both platforms: which rows of a step go through which path."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank

from vllm_sparse.backend import decode_batch, decode_single, prefill
from vllm_sparse.backend.execution import LayerWork, StepExecution
from vllm_sparse.backend.layer import LayerCall, LayerPlatform
from vllm_sparse.backend.summaries import StoredSummaries
from vllm_sparse.backend.support import check_layer
from vllm_sparse.host_copy import to_device
from vllm_sparse.step.plan import RowSpan


class SparseAttentionImpl(LayerPlatform):
    """Mixin before a stock implementation. Without sparse rows the stock forward runs and nothing else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_layer(self)
        self.summaries = StoredSummaries()
        self.first_query_head = get_tensor_model_parallel_rank() * self.num_heads

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
        """Attend. The arguments are vLLM's: query and output ``[tokens, query_heads, head_size]``."""
        step: StepExecution | None = getattr(attn_metadata, "sparse_step", None)
        if step is None:
            if attn_metadata is None and kv_cache.numel() == 0:
                self.take_selection_memory(query)
            return super().forward(  # type: ignore[misc, no-any-return]
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        index = self.layer_number
        heads = output.view(-1, self.num_heads, query.shape[-1])
        call = self.as_read(LayerCall(layer, index, query, key, value, kv_cache, attn_metadata, heads, self.scale))
        work = step.work(index, call.block_table)
        if work.dense and len(work.dense) == len(step.plan.spans):
            self.stock_forward(call, call.query, attn_metadata, output)
        elif work.dense:
            self._forward_dense(call, work)
        for summary in work.summarising:
            keys = self.row_keys(call, summary.span)
            self.summaries.summarise(summary.kind, summary.first_token, keys, call.kv_cache)
        if step.serves_at_once:
            batch = step.batch(attn_metadata.seq_lens, attn_metadata.block_table)
            decode_batch.serve_rows(self, call, batch, step.record, step.guard)
        if work.prefill:
            if work.chunk_launches is None:
                work.chunk_launches = prefill.plan_launches(self, call, work.prefill)
            prefill.serve_chunks(self, call, work.chunk_launches, step.record, step.guard)
        decode_single.serve_rows(self, call, step, work)
        if index == step.plan.layers[-1]:
            step.record.finish()
        return output

    def stock_forward(self, call: LayerCall, query: torch.Tensor, metadata: Any, output: torch.Tensor) -> None:
        super().forward(  # type: ignore[misc]
            call.layer, query, call.key, call.value, call.kv_cache, metadata, output
        )

    def _forward_dense(self, call: LayerCall, work: LayerWork) -> None:
        """The dense rows of a mixed step, gathered, through the stock kernel."""
        if work.dense_metadata is None:
            tokens = gather_tokens(work.dense, call.query.device)
            work.dense_metadata = tokens, self.dense_subset(call.layer, call.query, call.metadata, work.dense)
        tokens, metadata = work.dense_metadata
        queries = call.query[tokens]
        if isinstance(tokens, slice):
            # Adjacent rows: the kernel writes in place.
            self.stock_forward(call, queries, metadata, call.output[tokens])
            return
        gathered = torch.empty_like(queries, dtype=call.output.dtype)
        self.stock_forward(call, queries, metadata, gathered)
        call.output[tokens] = gathered


def gather_tokens(spans: Sequence[RowSpan], device: torch.device) -> slice | torch.Tensor:
    """Tokens of some rows, to gather by: a slice where the rows are adjacent, which copies nothing, else int64."""
    ranges = [range(span.query_start, span.query_start + span.query_tokens) for span in spans]
    if all(first.stop == second.start for first, second in itertools.pairwise(ranges)):
        return slice(ranges[0].start, ranges[-1].stop)
    return to_device(torch.cat([torch.arange(tokens.start, tokens.stop) for tokens in ranges]), device)
