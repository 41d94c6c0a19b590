"""What the sparse metadata builders of both platforms share: a plan beside the stock backend's metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm import envs

from vllm_sparse.config.request import resolve
from vllm_sparse.config.server import server_config
from vllm_sparse.methods.registry import SUMMARISING_METHODS
from vllm_sparse.metrics import Geometry, WorkerMetrics
from vllm_sparse.metrics.worker import Sampling
from vllm_sparse.step.plan import StepPlan, plan_step
from vllm_sparse.step.requests import TABLE

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_sparse.backend.decode import DecodeBuffers


class SparseMetadataBuilder:
    """Mixin before a stock builder. A step without sparse rows gets the stock metadata and nothing else.

    A plan is attached to the stock metadata object as ``sparse_plan``; the attribute is absent from dense steps.
    """

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        check_supported(vllm_config, layer_names)
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        # Checked here too: a configuration need not come from vLLM's arguments.
        check_summaries(vllm_config, kv_cache_spec.block_size)
        self._sparse_num_layers = vllm_config.model_config.get_total_num_hidden_layers()
        self._sparse_speculative = vllm_config.speculative_config is not None
        self._sparse_metrics = WorkerMetrics.get(vllm_config.parallel_config.data_parallel_index)
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
        self._sparse_metrics.collect_finished()
        sparse_rows = TABLE.sparse_rows(common_attn_metadata.req_idx, common_attn_metadata.num_reqs)
        if sparse_rows:
            plan = plan_step(
                common_attn_metadata,
                sparse_rows,
                self._sparse_num_layers,
                self._sparse_speculative,
                self._sparse_metrics,
                self.batch_capacity_tokens,
                self.decode_buffers,
            )
            if plan is not None:
                metadata.sparse_plan = plan
                self._sparse_metrics.sample(plan)
                self.planned(plan)
        return metadata

    def planned(self, plan: StepPlan) -> None:
        """A step with sparse rows is about to run."""

    decode_buffers: DecodeBuffers | None = None
    """What the server keeps for decode rows that are served at once; None: all are served one by one."""

    @property
    def batch_capacity_tokens(self) -> int:
        """Tokens that there is room to score of decode rows that are served at once."""
        return 0

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """vLLM's own graphs hold dense attention only, whatever slots held requests before."""
        return super().build(0, common_attn_metadata)  # type: ignore[misc]


def check_supported(vllm_config: VllmConfig, layer_names: list[str]) -> None:
    """Refuse at start-up what this backend cannot do yet.

    Raises:
        ValueError: with the reason and what to do instead.
    """
    advice = "serve without --attention-backend sparse, or change that setting"
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(f"attention backend sparse does not support pipeline parallelism yet; {advice}")
    if parallel.enable_dbo:
        raise ValueError(f"attention backend sparse does not support dual-batch overlap yet; {advice}")
    if vllm_config.speculative_config is not None and not vllm_config.use_v2_model_runner:
        raise ValueError(
            "attention backend sparse does not support speculative decoding on model runner V1, which hands no "
            f"sampling parameters to plugins then; {advice}"
        )
    if envs.VLLM_USE_RUST_FRONTEND:
        raise ValueError(
            "attention backend sparse checks and resolves requests in vLLM's Python frontend; "
            "unset VLLM_USE_RUST_FRONTEND"
        )
    layers = vllm_config.model_config.get_total_num_hidden_layers()
    if len(layer_names) != layers:
        raise ValueError(
            f"attention backend sparse needs all {layers} layers of the model, this cache group has "
            f"{len(layer_names)}: hybrid models are not supported yet; {advice}"
        )
    if not TABLE.attached:
        raise ValueError(
            "attention backend sparse receives request parameters through the entry point 'sparse' of the group "
            "vllm.logits_processors, which was not loaded; reinstall vllm-sparse"
        )


def check_summaries(vllm_config: VllmConfig, block_size_tokens: int) -> None:
    """Refuse at start-up a cache whose pages cannot be summarised as an enabled method wants them.

    Args:
        vllm_config: the server's configuration.
        block_size_tokens: tokens of a KV-cache block.

    Raises:
        ValueError: with the reason and what to do instead, or the plugin's configuration is wrong.
    """
    config = server_config(vllm_config)
    for name in SUMMARISING_METHODS:
        if name not in config.methods:
            continue
        if vllm_config.kv_transfer_config is not None:
            raise ValueError(
                f"{name} keeps summaries of the blocks that this process writes, and blocks that the configured KV "
                f"connector {vllm_config.kv_transfer_config.kv_connector} loads would have none; serve without the "
                f'connector (or KV offloading), or without {name} in "methods" of --additional-config, object sparse'
            )
        decode = resolve({"sparse_decode": name}, config, vllm_config.model_config.get_total_num_hidden_layers()).decode
        assert decode is not None
        assert decode.summaries is not None
        if block_size_tokens % decode.summaries.page_tokens:
            raise ValueError(
                f"{name} scores pages of {decode.summaries.page_tokens} tokens, which do not divide a KV-cache block "
                f"of {block_size_tokens}; set --block-size to a multiple, or block in --additional-config, object "
                f"sparse.{name}"
            )
