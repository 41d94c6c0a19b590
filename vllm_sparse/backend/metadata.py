"""What the sparse metadata builders of both platforms share: a planned step beside the stock backend's metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_sparse.backend.execution import StepExecution
from vllm_sparse.backend.guard import RecallGuard
from vllm_sparse.backend.layer_table import log_layer_table, sparse_layer_names
from vllm_sparse.backend.support import check_server, check_summaries
from vllm_sparse.config.model_layers import held_layers, sparse_layers
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


@dataclass(frozen=True)
class StartedStep:
    """The last step of a model whose sparse layers lie in several cache groups.

    Attributes:
        builder: of the group that started it.
        query_starts: of vLLM's description of the step, which tells it from other steps.
        step: its execution; None if all its rows are dense.
    """

    builder: SparseMetadataBuilder
    query_starts: torch.Tensor
    step: StepExecution | None


class SparseMetadataBuilder:
    """Mixin before a stock builder. A step without sparse rows gets the stock metadata and nothing else.

    The step's execution is attached to the stock metadata object as ``sparse_step``; dense steps do not have it.
    Layers that may be sparse can lie in several cache groups, each with a builder; they share a step's execution.
    """

    _started: ClassVar[StartedStep | None] = None

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        check_server(vllm_config)
        layers = sparse_layer_names(vllm_config)
        forward_context = vllm_config.compilation_config.static_forward_context
        impls = {number: forward_context[name].impl for number, name in layers.items()}
        for number, impl in impls.items():
            impl.layer_number = number
        self._sparse_soft_cap = any(impl.logits_soft_cap for impl in impls.values())
        self._sparse_num_layers = sparse_layers(vllm_config.model_config)
        self._sparse_held = held_layers(vllm_config)
        self._sparse_one_group = set(layers.values()) <= set(layer_names)
        log_layer_table(vllm_config)
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        # Checked here too: a configuration need not come from vLLM's arguments.
        check_summaries(vllm_config, kv_cache_spec.block_size)
        self._sparse_speculative = vllm_config.speculative_config is not None
        # Each rank has heads of its own, whose lists the guard judges.
        self._sparse_judged_apart = vllm_config.parallel_config.tensor_parallel_size > 1
        self._sparse_metrics = WorkerMetrics.get(
            vllm_config.parallel_config.data_parallel_index, vllm_config.model_config.served_model_name
        )
        self._sparse_guard = RecallGuard(self._sparse_metrics)
        token_bytes = kv_cache_spec.page_size_bytes // (kv_cache_spec.block_size * kv_cache_spec.num_kv_heads)
        query_heads = vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
        config = server_config(vllm_config)
        self._sparse_prompt_cost = config.prompt_cost
        self._sparse_metrics.start_serving(
            Geometry(self._sparse_held, query_heads, kv_cache_spec.num_kv_heads, token_bytes),
            Sampling(config.timing_interval_steps, config.recall_interval_steps),
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        """The stock metadata, with a plan if a row of the step is sparse."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        step = self._start_step(common_attn_metadata) if self._sparse_one_group else self._shared(common_attn_metadata)
        if step is not None:
            metadata.sparse_step = step
        return metadata

    def _shared(self, common: CommonAttentionMetadata) -> StepExecution | None:
        """The step, which the builder of the first of several cache groups starts for those of the others."""
        started = SparseMetadataBuilder._started
        if started is None or started.builder is self or started.query_starts is not common.query_start_loc_cpu:
            started = StartedStep(self, common.query_start_loc_cpu, self._start_step(common))
            SparseMetadataBuilder._started = started
        return started.step

    def _start_step(self, common_attn_metadata: CommonAttentionMetadata) -> StepExecution | None:
        """Plan a step and draw what is measured of it; None if all its rows are dense."""
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
                self.step_starts(step)
                return step
        return None

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
            self._sparse_prompt_cost,
            self._sparse_soft_cap,
            self._sparse_held,
            self._sparse_judged_apart,
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
