"""vLLM's `WorkerBase`: a method that the API server calls in all workers, for their late densities.

Not needed any more once `collective_rpc` can call a function that a plugin names.
"""

from __future__ import annotations

from typing import Any

WORKER_METHOD = "sparse_stats"


def install() -> None:
    """Give vLLM's workers the method."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, WORKER_METHOD, _sparse_stats)


def _sparse_stats(worker: Any) -> dict[str, Any]:
    from vllm_sparse.metrics import WorkerMetrics

    return WorkerMetrics.get().stats()
