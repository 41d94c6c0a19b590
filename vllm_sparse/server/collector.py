"""The plugin's foothold in the API server: vLLM makes a stat logger there, and only there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import prometheus_client
from prometheus_client import multiprocess
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_sparse.metrics import DIRECTORY_VARIABLE, PROMETHEUS_VARIABLE, announce_directory
from vllm_sparse.server.admission import check_before_streaming

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# vLLM imports this module before it starts the engine, whose processes inherit the announcement.
announce_directory()

_merged_directories: set[str] = set()


class MetricsCollector(AggregateStatLoggerBase):
    """Merges the workers' metrics into ``/metrics``; logs nothing itself."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None) -> None:
        check_before_streaming(vllm_config)
        directory = os.environ.get(DIRECTORY_VARIABLE)
        if directory is not None and PROMETHEUS_VARIABLE not in os.environ and directory not in _merged_directories:
            _merged_directories.add(directory)
            multiprocess.MultiProcessCollector(prometheus_client.REGISTRY, path=directory)  # type: ignore[no-untyped-call]

    def record(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's own statistics are exported by vLLM."""

    def log_engine_initialized(self) -> None:
        """Nothing to log."""
