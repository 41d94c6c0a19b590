"""The backend on GPUs whose whole contexts vLLM's Triton attention reads."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_sparse.backend.cuda import GpuAttentionImpl, GpuDeclarations, GpuMetadataBuilder
from vllm_sparse.backend.executors.rule import TRITON, StockKernels


class SparseTritonMetadataBuilder(GpuMetadataBuilder, TritonAttentionMetadataBuilder):
    """The Triton attention's builder with a plan for sparse rows."""

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """As the stock builder: contexts as long as they may be would make warm-up runs of this kernel very slow."""
        metadata = super().build_for_cudagraph_capture(common_attn_metadata)
        metadata.seq_lens.fill_(1)
        return metadata


class SparseTritonImpl(GpuAttentionImpl, TritonAttentionImpl):
    """The Triton attention's implementation with a path for sparse rows."""

    @property
    def stock_kernels(self) -> StockKernels:
        return TRITON


class SparseTritonBackend(GpuDeclarations, TritonAttentionBackend):
    """``--attention-backend sparse`` where vLLM's Triton attention reads whole contexts."""

    @staticmethod
    def get_impl_cls() -> type[SparseTritonImpl]:
        return SparseTritonImpl

    @staticmethod
    def get_builder_cls() -> type[SparseTritonMetadataBuilder]:
        return SparseTritonMetadataBuilder
