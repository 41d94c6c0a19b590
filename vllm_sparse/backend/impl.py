"""Layer forward, shared by both platforms: which rows of a step go through which path."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank

from vllm_sparse.backend import decode_batch, decode_single, prefill
from vllm_sparse.backend.execution import LayerWork, StepExecution
from vllm_sparse.backend.host_copy import to_device
from vllm_sparse.backend.layer import LayerCall, LayerPlatform
from vllm_sparse.backend.summaries import StoredSummaries
from vllm_sparse.backend.support import check_layer


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
            return super().forward(  # type: ignore[misc, no-any-return]
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        index = self.layer_number
        heads = output.view(-1, self.num_heads, query.shape[-1])
        call = LayerCall(layer, index, query, key, value, kv_cache, attn_metadata, heads)
        work = step.work(index, call.block_table)
        if work.dense and len(work.dense) == len(step.plan.spans):
            self.stock_forward(call, query, attn_metadata, output)
        elif work.dense:
            self._forward_dense(call, work)
        for summary in work.summarising:
            self.summaries.summarise(summary, self.row_keys(call, summary.span), kv_cache)
        if step.serves_at_once:
            batch = step.batch(attn_metadata.seq_lens, attn_metadata.block_table)
            decode_batch.serve_rows(self, call, batch, step.record, step.guard)
        for row in work.prefill:
            prefill.serve_row(self, call, row, step.record, step.guard)
        decode_single.serve_rows(self, call, step, work)
        if index == step.plan.num_layers - 1:
            step.record.finish()
        return output

    def stock_forward(self, call: LayerCall, query: torch.Tensor, metadata: Any, output: torch.Tensor) -> None:
        super().forward(  # type: ignore[misc]
            call.layer, query, call.key, call.value, call.kv_cache, metadata, output
        )

    def _forward_dense(self, call: LayerCall, work: LayerWork) -> None:
        """The dense rows of a mixed step, gathered, through the stock kernel."""
        if work.dense_metadata is None:
            ranges = [torch.arange(span.query_start, span.query_start + span.query_tokens) for span in work.dense]
            tokens = to_device(torch.cat(ranges), call.query.device)
            work.dense_metadata = tokens, self.dense_subset(call.layer, call.query, call.metadata, work.dense)
        tokens, metadata = work.dense_metadata
        queries = call.query[tokens]
        gathered = torch.empty_like(queries, dtype=call.output.dtype)
        self.stock_forward(call, queries, metadata, gathered)
        call.output[tokens] = gathered
