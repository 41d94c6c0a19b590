"""The backend on CUDA: FlashAttention 3, its paged kernel as executor."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_sparse.backend.attention_shape import attention_shape
from vllm_sparse.backend.decode_buffers import DecodeBuffers
from vllm_sparse.backend.decode_graphs import DecodeGraphs, set_graphs
from vllm_sparse.backend.execution import StepExecution
from vllm_sparse.backend.executors.flash_attention import FlashAttentionExecutor
from vllm_sparse.backend.host_copy import indices_on, to_device
from vllm_sparse.backend.impl import SparseAttentionImpl
from vllm_sparse.backend.metadata import SparseMetadataBuilder
from vllm_sparse.backend.support import SparseDeclarations
from vllm_sparse.backend.warm_up import PrefillWarmUp
from vllm_sparse.config.request import configured_method
from vllm_sparse.config.server import server_config
from vllm_sparse.keys import PagedKeys, PlainKeys
from vllm_sparse.methods.decode import BatchDecodeMethod
from vllm_sparse.methods.method import Method
from vllm_sparse.methods.registry import DECODE_METHODS
from vllm_sparse.step.costs import StepCosts
from vllm_sparse.step.gpu_table import costs_of
from vllm_sparse.step.launch import Executor
from vllm_sparse.step.plan import RowSpan
from vllm_sparse.step.requests import SparseRequest
from vllm_sparse.step.rows import ServerSize

logger = logging.getLogger("vllm.sparse")

PREFERRED_BLOCK_TOKENS = 128


class SparseFlashAttentionMetadataBuilder(SparseMetadataBuilder, FlashAttentionMetadataBuilder):
    """FlashAttention's builder with a plan for sparse rows."""

    # Decode batches run in FULL graphs: vLLM's own hold dense attention only, others sparse steps (decode_graphs.py).
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        config = server_config(vllm_config)
        configured = [configured_method(config, "decode", name) for name in DECODE_METHODS if name in config.methods]
        size = ServerSize(
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.model_config.max_model_len,
            self._sparse_num_layers,
            kv_cache_spec.num_kv_heads,
        )
        methods = [
            method
            for method in configured
            if isinstance(method, BatchDecodeMethod) and method.serves(method, size.max_seq_len)
        ]
        if config.decode_in_batches:
            _warn_of_rows_without_graphs(configured, methods, config.decode_list_tokens)
        if vllm_config.kernel_config.enable_jit_warmup:
            PrefillWarmUp(vllm_config, layer_names[0]).register_warmup()
        self.step_costs = StepCosts(
            costs_of(torch.cuda.get_device_name(device)),
            attention_shape(vllm_config, kv_cache_spec, size.num_layers),
            methods if config.decode_in_batches and self._sparse_one_group else [],
        )
        self._graphs: DecodeGraphs | None = None
        # vLLM makes a builder to measure memory with, too; its buffers are not needed beside these.
        set_graphs(None)
        if config.decode_in_batches and not self._sparse_one_group:
            logger.warning(
                "Sparse attention: layers with full attention lie in several KV-cache groups, so sparse decode rows "
                "are served one by one, without FULL CUDA graphs"
            )
        if methods and config.decode_in_batches and self._sparse_one_group:
            self.decode_buffers = DecodeBuffers(
                size.requests,
                size,
                methods,
                config.decode_list_tokens,
                device,
            )
            self._graphs = DecodeGraphs(
                self.decode_buffers,
                methods,
                self._sparse_num_layers,
                self._sparse_speculative,
                guards=config.min_recall > 0,
            )
            if self._sparse_metrics.memory is not None:
                self._sparse_metrics.memory.set_buffers(self.decode_buffers.bytes + self._graphs.bytes)
        set_graphs(self._graphs)

    def step_starts(self, step: StepExecution) -> None:
        if self._graphs is not None:
            self._graphs.step = step

    def graphs_hold(self, requests: Sequence[SparseRequest], rows: int) -> bool:
        graphs = self._graphs
        return graphs is None or not graphs.sizes or graphs.holds(requests, rows)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """vLLM's own graphs hold dense attention only, those of `DecodeGraphs` what is being captured."""
        metadata = super().build_for_cudagraph_capture(common_attn_metadata)
        if self._graphs is not None and self._graphs.capturing is not None:
            metadata.sparse_step = self._graphs.capture_step(
                metadata.seq_lens, metadata.block_table, self.batch_capacity_tokens
            )
        return metadata

    @property
    def batch_capacity_tokens(self) -> int:
        """As many as the cache holds: more are in reach only where requests share a prefix."""
        blocks: int = self.vllm_config.cache_config.num_gpu_blocks
        block_tokens: int = self.kv_cache_spec.block_size
        return blocks * block_tokens

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Runner V1 has no hook that keeps a sparse step out of a FULL graph, so it gets none."""
        return cls._cudagraph_support if vllm_config.use_v2_model_runner else AttentionCGSupport.NEVER


def _warn_of_rows_without_graphs(
    configured: Sequence[Method], served: Sequence[BatchDecodeMethod], list_tokens: int
) -> None:
    """Say at start-up which methods the configuration gives knobs with which no CUDA graph holds their rows."""
    for method in configured:
        longest = next((one.longest_list_tokens for one in served if one is method), None)
        if longest is not None and longest <= list_tokens:
            continue
        why = "its rows are served one by one" if longest is None else f"its lists have up to {longest} tokens"
        logger.warning(
            "Sparse attention: CUDA graphs do not hold %s as the object sparse configures it (%s; decode_list_tokens "
            "is %d), so every decode step with such a row, and with it all rows beside it, runs without FULL graphs",
            method.name,
            why,
            list_tokens,
        )


class SparseFlashAttentionImpl(SparseAttentionImpl, FlashAttentionImpl):
    """FlashAttention's implementation with a path for sparse rows."""

    supports_dcp = False

    def make_executor(self, layer: Any) -> Executor:
        return FlashAttentionExecutor(self.vllm_flash_attn_version, self.logits_soft_cap)

    def keys_of(self, layer: Any, kv_cache: torch.Tensor, block_table: torch.Tensor, seq_len: int) -> PagedKeys:
        return PlainKeys(kv_cache, block_table, seq_len)

    def prefill_page_size(self, wanted_tokens: int, block_size_tokens: int) -> int:
        # The kernel is as efficient with small pages as with large ones; they have to divide a block.
        return min(wanted_tokens, block_size_tokens & -block_size_tokens)

    def decode_page_size(self, block_size_tokens: int) -> int:
        # Token lists cost FlashAttention 3 no more than page lists.
        return 1

    def dense_subset(
        self, layer: Any, query: torch.Tensor, metadata: FlashAttentionMetadata, spans: list[RowSpan]
    ) -> FlashAttentionMetadata:
        device = metadata.seq_lens.device
        rows = indices_on(device, [span.row for span in spans])
        starts = [0, *accumulate(span.query_tokens for span in spans)]
        return _of_other_rows(
            metadata,
            num_actual_tokens=starts[-1],
            max_query_len=max(span.query_tokens for span in spans),
            max_seq_len=max(span.seq_len for span in spans),
            query_start_loc=to_device(torch.tensor(starts, dtype=torch.int32), device),
            seq_lens=metadata.seq_lens[rows],
            block_table=metadata.block_table[rows],
        )

    def dense_rows(
        self,
        metadata: FlashAttentionMetadata,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        query_starts: torch.Tensor,
    ) -> FlashAttentionMetadata:
        return _of_other_rows(
            metadata,
            num_actual_tokens=seq_lens.shape[0],
            max_query_len=1,
            max_seq_len=metadata.max_seq_len,
            query_start_loc=query_starts,
            seq_lens=seq_lens,
            block_table=block_table,
        )


def _of_other_rows(metadata: FlashAttentionMetadata, **rows: Any) -> FlashAttentionMetadata:
    """Metadata of other rows than a step's.

    Made anew, not copied: whatever else the step's holds, such as the kernel's schedule or a prefix of all rows, is of
    the whole batch. Of other rows it is what the class starts with: the kernel schedules itself.

    Args:
        metadata: of the whole step.
        rows: what describes the rows.
    """
    return FlashAttentionMetadata(
        slot_mapping=metadata.slot_mapping, max_num_splits=metadata.max_num_splits, causal=metadata.causal, **rows
    )


class SparseFlashAttentionBackend(SparseDeclarations, FlashAttentionBackend):
    """``--attention-backend sparse`` on CUDA."""

    @staticmethod
    def get_impl_cls() -> type[SparseFlashAttentionImpl]:
        return SparseFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[SparseFlashAttentionMetadataBuilder]:
        return SparseFlashAttentionMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Head-major blocks: a head of a block is then a plain view, in pages of any size."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return PREFERRED_BLOCK_TOKENS

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        """FlashAttention 3 runs on Hopper."""
        return bool(capability == DeviceCapability(9, 0))
