"""Which GPU this process has, and which stock kernels serve its server there."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_sparse.backend.executors.rule import Device, StockKernels, stock_kernels
from vllm_sparse.config.server import server_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@lru_cache
def gpu() -> Device:
    """The GPU of this process."""
    platform = "cuda" if current_platform.is_cuda() else "rocm" if current_platform.is_rocm() else None
    capability = current_platform.get_device_capability() if platform else None
    major, minor = (capability.major, capability.minor) if capability is not None else (0, 0)
    return Device(platform or current_platform.device_name, (major, minor))


def server_kernels(vllm_config: VllmConfig | None) -> StockKernels:
    """The stock kernels of a server.

    Args:
        vllm_config: of the server; None: as it is by default.

    Raises:
        ValueError: nothing serves its device, or not as its configuration chooses; with what is supported.
    """
    if vllm_config is None:
        return stock_kernels(gpu())
    return stock_kernels(
        gpu(),
        server_config(vllm_config).executor,
        vllm_config.attention_config.flash_attn_version,
        is_quantized_kv_cache(vllm_config.cache_config.cache_dtype),
    )
