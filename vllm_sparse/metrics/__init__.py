"""Prometheus metrics of the worker processes.

`observer.WorkerMetrics` is what the backend talks to, one file beside it a measure; `directory` is how the numbers
reach the server's ``/metrics``.
"""

from vllm_sparse.metrics.density import Geometry, RowDensity
from vllm_sparse.metrics.directory import DIRECTORY_VARIABLE, PROMETHEUS_VARIABLE, announce_directory
from vllm_sparse.metrics.observer import StepRecord, WorkerMetrics
from vllm_sparse.metrics.sampling import Sampling

__all__ = [
    "DIRECTORY_VARIABLE",
    "PROMETHEUS_VARIABLE",
    "Geometry",
    "RowDensity",
    "Sampling",
    "StepRecord",
    "WorkerMetrics",
    "announce_directory",
]
