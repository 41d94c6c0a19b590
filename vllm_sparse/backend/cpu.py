"""The backend on the CPU: vLLM's own paged CPU kernel as executor."""

from __future__ import annotations

from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_sparse.backend.executors.cpu import CpuExecutor
from vllm_sparse.backend.impl import SparseAttentionImpl
from vllm_sparse.backend.layer import seq_lens_of
from vllm_sparse.backend.metadata import SparseMetadataBuilder
from vllm_sparse.backend.support import SparseDeclarations, check_packing
from vllm_sparse.keys import InterleavedPairKeys, PagedKeys, TransposedKeys
from vllm_sparse.step.launch import Executor
from vllm_sparse.step.plan import RowSpan

# The smallest page is a block here, since keys are packed inside it.
DEFAULT_BLOCK_TOKENS = 32

# How the kernel packs keys for each instruction set; others have not been measured.
PACKINGS: dict[str, type[PagedKeys]] = {
    "vec": TransposedKeys,
    "vec16": TransposedKeys,
    "amx": InterleavedPairKeys,
}


class SparseCpuMetadataBuilder(SparseMetadataBuilder, CPUAttentionMetadataBuilder):
    """The CPU builder with a plan for sparse rows."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        check_packing(self.isa, PACKINGS)


class SparseCpuImpl(SparseAttentionImpl, CPUAttentionBackendImpl):
    """The CPU implementation with a path for sparse rows."""

    def make_executor(self, layer: Any) -> Executor:
        return CpuExecutor(layer.isa, self.kv_cache_dtype, self.logits_soft_cap, self.sinks)

    def keys_of(self, layer: Any, kv_cache: torch.Tensor, block_table: torch.Tensor, seq_len: int) -> PagedKeys:
        return PACKINGS[layer.isa](kv_cache, block_table, seq_len)

    def prefill_page_size(self, wanted_tokens: int, block_size_tokens: int) -> int:
        return block_size_tokens

    def decode_page_size(self, block_size_tokens: int) -> int:
        return block_size_tokens

    def dense_subset(
        self, layer: Any, query: torch.Tensor, metadata: CPUAttentionMetadata, spans: list[RowSpan]
    ) -> CPUAttentionMetadata:
        rows = torch.tensor([span.row for span in spans])
        lengths = torch.tensor([0, *(span.query_tokens for span in spans)])
        query_starts = lengths.cumsum(0).to(torch.int32)
        seq_lens = seq_lens_of(metadata.seq_lens[rows], spans)
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(spans),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            seq_lens=seq_lens,
            dtype=query.dtype,
            query_start_loc=query_starts,
            causal=True,
            sliding_window_size=-1,
            isa=layer.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        # Made anew, not copied: whatever else the step's metadata holds is of the whole batch.
        return CPUAttentionMetadata(
            num_actual_tokens=int(lengths.sum()),
            max_query_len=max(span.query_tokens for span in spans),
            query_start_loc=query_starts,
            max_seq_len=max(span.seq_len for span in spans),
            seq_lens=seq_lens,
            block_table=metadata.block_table[rows],
            slot_mapping=metadata.slot_mapping,
            scheduler_metadata=schedule,
            causal=metadata.causal,
        )


class SparseCpuBackend(SparseDeclarations, CPUAttentionBackend):
    """``--attention-backend sparse`` on the CPU."""

    @staticmethod
    def get_impl_cls() -> type[SparseCpuImpl]:
        return SparseCpuImpl

    @staticmethod
    def get_builder_cls() -> type[SparseCpuMetadataBuilder]:
        return SparseCpuMetadataBuilder

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]
