"""The plugin's foothold in the API server: vLLM makes a stat logger there, and only there."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any

import prometheus_client
from prometheus_client import multiprocess
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_sparse.config.model_layers import sparse_layers
from vllm_sparse.config.server import uses_sparse_backend
from vllm_sparse.hooks import base_serving, sampling_params
from vllm_sparse.hooks.output_processor import observe_requests
from vllm_sparse.metrics import DIRECTORY_VARIABLE, PROMETHEUS_VARIABLE, announce_directory
from vllm_sparse.server.latency import RequestMetrics

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# vLLM imports this module before it starts the engine, whose processes inherit the announcement.
announce_directory()

_merged_directories: set[str] = set()


class MetricsCollector(AggregateStatLoggerBase):
    """Merges the workers' metrics into ``/metrics`` and adds what only the API server knows."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None) -> None:
        base_serving.install(vllm_config)
        sampling_params.install()
        directory = os.environ.get(DIRECTORY_VARIABLE)
        if directory is not None and PROMETHEUS_VARIABLE not in os.environ and directory not in _merged_directories:
            _merged_directories.add(directory)
            multiprocess.MultiProcessCollector(prometheus_client.REGISTRY, path=directory)  # type: ignore[no-untyped-call]
        self._sparse = uses_sparse_backend(vllm_config)
        if not self._sparse:
            return
        observe_requests()
        self._requests = _request_metrics(vllm_config)
        model = vllm_config.model_config
        self._model_name = model.served_model_name
        # Layers of other kinds lie in cache groups of their own, and how the groups share blocks is not known here.
        self._cache_used = None
        if sparse_layers(model) == model.get_total_num_hidden_layers():
            self._cache_used = _cache_used_gauge()
            self._cache_bytes = cache_bytes(vllm_config) // len(engine_indexes or [0])

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """One iteration of an engine; vLLM's own statistics are exported by vLLM."""
        if not self._sparse:
            return
        self._requests.record(iteration_stats)
        if scheduler_stats is not None and self._cache_used is not None:
            used_bytes = scheduler_stats.kv_cache_usage * self._cache_bytes
            self._cache_used.labels(self._model_name, str(engine_idx)).set(used_bytes)

    def log_engine_initialized(self) -> None:
        """Nothing to log."""


def cache_bytes(vllm_config: VllmConfig) -> int:
    """KV-cache bytes of one tensor-parallel rank, of all data-parallel engines that this API server feeds."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    model, cache = vllm_config.model_config, vllm_config.cache_config
    head_bytes = 2 * model.get_head_size() * kv_cache_dtype_str_to_dtype(cache.cache_dtype, model).itemsize
    token_bytes = model.get_num_kv_heads(vllm_config.parallel_config) * head_bytes
    tokens = (cache.num_gpu_blocks or 0) * cache.block_size
    return int(tokens * token_bytes * model.get_total_num_hidden_layers())


# Metrics are of the process, whose engines may be made anew.
@cache
def _cache_used_gauge() -> prometheus_client.Gauge:
    return prometheus_client.Gauge(
        "vllm_sparse_kv_cache_used_bytes",
        "KV-cache memory of running requests, of one tensor-parallel rank.",
        ["model_name", "engine"],
        multiprocess_mode="mostrecent",
    )


_request_metrics_of_process: list[RequestMetrics] = []


def _request_metrics(vllm_config: VllmConfig) -> RequestMetrics:
    if not _request_metrics_of_process:
        overrides = vllm_config.observability_config.custom_histogram_buckets
        _request_metrics_of_process.append(RequestMetrics(overrides, vllm_config.model_config.served_model_name))
    return _request_metrics_of_process[0]
