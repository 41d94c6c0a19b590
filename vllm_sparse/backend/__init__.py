"""The attention backend; `SparseAttentionBackend` is the class for the current platform, device and configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.config import get_current_vllm_config_or_none
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionBackend

    SparseAttentionBackend: type[AttentionBackend]

__all__ = ["SparseAttentionBackend"]


def __getattr__(name: str) -> Any:
    """vLLM looks the backend up by its path in each process, where the server's configuration is the current one."""
    if name != "SparseAttentionBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if current_platform.is_cpu():
        from vllm_sparse.backend.cpu import SparseCpuBackend

        return SparseCpuBackend
    from vllm_sparse.backend.device import server_kernels

    if server_kernels(get_current_vllm_config_or_none()).dense == "triton":
        from vllm_sparse.backend.triton import SparseTritonBackend

        return SparseTritonBackend
    from vllm_sparse.backend.cuda import SparseFlashAttentionBackend

    return SparseFlashAttentionBackend
