"""vLLM's GPU `Worker`: what the plugin keeps beside the KV cache is taken off the memory that the cache gets.

vLLM measures a run of the model before there is a cache, a metadata builder or a graph of a sparse step. Not needed any
more once backends can say what they keep beside the cache.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm_sparse.hooks.wrapping import is_wrapped, wraps

logger = logging.getLogger("vllm.sparse")


def install() -> None:
    """Wrap `determine_available_memory`; idempotent."""
    from vllm.v1.worker.gpu_worker import Worker

    original = Worker.determine_available_memory
    if is_wrapped(original):
        return

    @wraps(original)
    def determine_available_memory(self: Any) -> int:
        available: int = original(self)
        # Imported here: the platform must not be chosen while plugins are loaded.
        from vllm_sparse.config.server import uses_sparse_backend

        # Who says how large the cache is leaves the room himself.
        if self.cache_config.kv_cache_memory_bytes or not uses_sparse_backend(self.vllm_config):
            return available
        from vllm_sparse.backend.memory import MIB, beside_cache

        beside = beside_cache(self.vllm_config)
        left = beside.left_for_cache(available)
        self.available_kv_cache_memory_bytes = left
        logger.info(
            "Sparse attention keeps beside the KV cache %.0f MiB of buffers, about %.0f MiB of CUDA graphs and %.1f %% "
            "of the cache's size for page summaries and scores. The cache gets %.0f MiB of %.0f.",
            beside.buffer_bytes / MIB,
            beside.graph_bytes / MIB,
            100 * beside.cache_share,
            left / MIB,
            available / MIB,
        )
        return left

    Worker.determine_available_memory = determine_available_memory
