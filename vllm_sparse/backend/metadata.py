"""What the sparse metadata builders of both platforms share: a planned step beside the stock backend's metadata."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_sparse.backend.execution import StepExecution
from vllm_sparse.backend.guard import RecallGuard
from vllm_sparse.backend.support import check_server, check_summaries
from vllm_sparse.config.server import server_config
from vllm_sparse.metrics import Geometry, Sampling, WorkerMetrics
from vllm_sparse.step.plan import PlanLimits, plan_step
from vllm_sparse.step.requests import TABLE

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_sparse.backend.decode_buffers import DecodeBuffers
    from vllm_sparse.methods.decode import DecodeMethod
    from vllm_sparse.step.costs import StepCosts
    from vllm_sparse.step.requests import SparseRequest


class SparseMetadataBuilder:
    """Mixin before a stock builder. A step without sparse rows gets the stock metadata and nothing else.

    The step's execution is attached to the stock metadata object as ``sparse_step``; dense steps do not have it.
    """

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        check_server(vllm_config, layer_names)
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        # Checked here too: a configuration need not come from vLLM's arguments.
        check_summaries(vllm_config, kv_cache_spec.block_size)
        self._sparse_num_layers = vllm_config.model_config.get_total_num_hidden_layers()
        self._sparse_speculative = vllm_config.speculative_config is not None
        self._sparse_metrics = WorkerMetrics.get(
            vllm_config.parallel_config.data_parallel_index, vllm_config.model_config.served_model_name
        )
        self._sparse_guard = RecallGuard(self._sparse_metrics)
        token_bytes = kv_cache_spec.page_size_bytes // (kv_cache_spec.block_size * kv_cache_spec.num_kv_heads)
        query_heads = vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
        config = server_config(vllm_config)
        self._sparse_metrics.start_serving(
            Geometry(self._sparse_num_layers, query_heads, kv_cache_spec.num_kv_heads, token_bytes),
            Sampling(config.timing_interval_steps, config.recall_interval_steps),
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        """The stock metadata, with a plan if a row of the step is sparse."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        metrics = self._sparse_metrics
        metrics.collect_finished()
        self._sparse_guard.collect()
        sparse_rows = TABLE.sparse_rows(common_attn_metadata.req_idx, common_attn_metadata.num_reqs)
        if sparse_rows:
            plan = plan_step(common_attn_metadata, sparse_rows, self._plan_limits())
            metrics.count_fallbacks(plan.fallbacks)
            metrics.observe_dense_steps(plan.dense_steps)
            if not plan.is_dense:
                record, guard = metrics.start_step(plan), self._sparse_guard.start_step(plan)
                step = StepExecution(plan, record, self.decode_buffers, guard=guard)
                metadata.sparse_step = step
                self.step_starts(step)
        return metadata

    def step_starts(self, step: StepExecution) -> None:
        """A step with sparse rows is about to run."""

    def _plan_limits(self) -> PlanLimits:
        # Asked in each step: how much the cache holds is known only after this builder is made.
        buffers = self.decode_buffers
        return PlanLimits(
            self._sparse_num_layers,
            self._sparse_speculative,
            self.batch_capacity_tokens,
            _served_alone if buffers is None else buffers.serves,
            self.step_costs,
            TABLE.full_graph,
            self.graphs_hold,
            self.kv_cache_spec.block_size,  # type: ignore[attr-defined]
        )

    step_costs: StepCosts | None = None
    """What the server's GPU costs; None: nothing is known, and rows are sparse as requests ask."""

    def graphs_hold(self, requests: Sequence[SparseRequest], rows: int) -> bool:
        """Whether CUDA graphs hold decode rows of requests in a step of so many rows; True where there are none."""
        return True

    decode_buffers: DecodeBuffers | None = None
    """What the server keeps for decode rows that are served at once; None: all are served one by one."""

    @property
    def batch_capacity_tokens(self) -> int:
        """Tokens that there is room to score of decode rows that are served at once."""
        return 0

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """vLLM's own graphs hold dense attention only, whatever slots held requests before."""
        return super().build(0, common_attn_metadata)  # type: ignore[misc]


def _served_alone(method: DecodeMethod) -> bool:
    """No rows are served at once."""
    return False
