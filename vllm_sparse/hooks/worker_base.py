"""vLLM's `WorkerBase`: methods that the API server calls in all workers, and the moment before a model is made.

Not needed any more once `collective_rpc` can call a function that a plugin names, and `backend_per_kind` knows
chunked-local layers (`attention_selector`).
"""

from __future__ import annotations

from typing import Any

from vllm_sparse.hooks import attention_selector
from vllm_sparse.hooks.wrapping import is_wrapped, wraps

WORKER_METHOD = "sparse_stats"
LAYERS_METHOD = "sparse_layers"


def install() -> None:
    """Give vLLM's workers the methods; idempotent."""
    from vllm.v1.worker.worker_base import WorkerBase

    start = WorkerBase.__init__
    if is_wrapped(start):
        return
    setattr(WorkerBase, WORKER_METHOD, _sparse_stats)
    setattr(WorkerBase, LAYERS_METHOD, _sparse_layers)

    @wraps(start)
    def start_worker(self: Any, *args: Any, **kwargs: Any) -> None:
        attention_selector.install_deriving()
        start(self, *args, **kwargs)

    WorkerBase.__init__ = start_worker


def _sparse_layers(worker: Any) -> list[dict[str, Any]]:
    from vllm_sparse.backend.layer_table import layer_table

    return [kind.as_json() for kind in layer_table(worker.vllm_config)]


def _sparse_stats(worker: Any) -> dict[str, Any]:
    from vllm_sparse.metrics import WorkerMetrics

    return WorkerMetrics.get().stats()
