"""The attention backend; `SparseAttentionBackend` is the class of the current platform."""

from __future__ import annotations

from vllm.platforms import current_platform

if current_platform.is_cpu():
    from vllm_sparse.backend.cpu import SparseCpuBackend as SparseAttentionBackend
else:
    from vllm_sparse.backend.cuda import (
        SparseFlashAttentionBackend as SparseAttentionBackend,
    )

__all__ = ["SparseAttentionBackend"]
