"""Prometheus metrics of the worker processes.

`worker.WorkerMetrics` is what the backend talks to; `directory` is how its numbers reach the server's ``/metrics``.
"""

from vllm_sparse.metrics.density import Geometry, RowDensity
from vllm_sparse.metrics.directory import DIRECTORY_VARIABLE, PROMETHEUS_VARIABLE, announce_directory
from vllm_sparse.metrics.worker import FALLBACK_REASONS, WorkerMetrics

__all__ = [
    "DIRECTORY_VARIABLE",
    "FALLBACK_REASONS",
    "PROMETHEUS_VARIABLE",
    "Geometry",
    "RowDensity",
    "WorkerMetrics",
    "announce_directory",
]
