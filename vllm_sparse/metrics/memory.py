"""Memory of one rank: of its device, and what this plugin keeps there beside the KV cache."""

from __future__ import annotations

import time

import prometheus_client
import psutil
import torch

# Asking the driver takes longer than the other metrics of a step together.
INTERVAL_SECONDS = 5.0


class MemoryMetrics:
    """Gauges of one rank.

    Args:
        engine: data-parallel index, as in vLLM's own label.
        rank: of the engine's processes.
        model_name: label of the metrics, as of vLLM's own.
    """

    def __init__(self, engine: int, rank: int, model_name: str = "") -> None:
        def gauge(name: str, text: str) -> prometheus_client.Gauge:
            metric = prometheus_client.Gauge(
                f"vllm_sparse_{name}_bytes",
                text,
                ["model_name", "engine", "rank"],
                multiprocess_mode="livemostrecent",
            )
            child: prometheus_client.Gauge = metric.labels(model_name, str(engine), str(rank))
            return child

        own = "On the CPU: resident memory of the worker process."
        self._allocated = gauge("device_memory_allocated", f"Device memory in use by tensors. {own}")
        self._reserved = gauge("device_memory_reserved", f"Device memory held by torch's allocator. {own}")
        self._free = gauge("device_memory_free", "Device memory that nobody holds. On the CPU: the machine's.")
        self._buffers = gauge("decode_buffer", "Memory kept for decode steps beside the KV cache, on a GPU.")
        self._side_data = gauge("side_data", "Memory of what methods keep of each KV-cache block: page summaries.")
        self._side_data_bytes = 0
        # A gauge that was never set is not exported.
        self._buffers.set(0)
        self._side_data.set(0)
        self._process = psutil.Process()
        self._next_update = 0.0

    def set_buffers(self, size_bytes: int) -> None:
        """Memory kept for decode steps."""
        self._buffers.set(size_bytes)

    def change_side_data(self, by_bytes: int) -> None:
        """A layer's page summaries were made, or made anew in another size."""
        self._side_data_bytes += by_bytes
        self._side_data.set(self._side_data_bytes)

    def update(self) -> None:
        """Ask the device, unless that was done a moment ago; called once a step."""
        now = time.monotonic()
        if now < self._next_update:
            return
        self._next_update = now + INTERVAL_SECONDS
        if torch.cuda.is_available():
            self._allocated.set(torch.cuda.memory_allocated())
            self._reserved.set(torch.cuda.memory_reserved())
            self._free.set(torch.cuda.mem_get_info()[0])
        else:
            resident = self._process.memory_info().rss
            self._allocated.set(resident)
            self._reserved.set(resident)
            self._free.set(psutil.virtual_memory().available)
