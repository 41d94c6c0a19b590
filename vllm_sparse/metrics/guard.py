"""What the guard (`sparse_min_recall`) measured, and the layers that it sent dense."""

from __future__ import annotations

import logging

import prometheus_client

# Below vLLM's own name, so that its logging configuration applies.
logger = logging.getLogger("vllm.sparse")


class GuardMetrics:
    """Counts the guard's checks and its layers, and logs each layer once.

    Args:
        model_name: label of the metrics, as of vLLM's own.
    """

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        labels = ["model_name", "phase", "method"]
        self._checks = prometheus_client.Counter(
            "vllm_sparse_guard_checks",
            "Layers of prefill chunks and decode steps whose recall was compared with sparse_min_recall.",
            labels,
        )
        self._layers = prometheus_client.Counter(
            "vllm_sparse_guard_layers",
            "Layers of requests that went dense because their recall was below sparse_min_recall.",
            labels,
        )
        self._logged: set[tuple[str, str, int]] = set()

    def count_check(self, phase: str, method: str) -> None:
        """One layer of a row was compared."""
        self._checks.labels(self._model_name, phase, method).inc()

    def count_layer(self, phase: str, method: str, layer: int, recall: float, min_recall: float) -> None:
        """A request's layer goes dense.

        Args:
            phase: ``prefill`` or ``decode``.
            method: name of the method.
            layer: index of the attention layer.
            recall: kept share of the attention mass.
            min_recall: the request's ``sparse_min_recall``.
        """
        self._layers.labels(self._model_name, phase, method).inc()
        if (phase, method, layer) not in self._logged:
            self._logged.add((phase, method, layer))
            logger.warning(
                "Layer %d of a request is dense from now on: %s in %s kept %.3f of the attention mass there, less than "
                "sparse_min_recall %s. Logged once for each layer; "
                'vllm_sparse_guard_layers_total{phase="%s",method="%s"} counts such layers.',
                layer,
                method,
                "its prefill" if phase == "prefill" else "decoding",
                recall,
                min_recall,
                phase,
                method,
            )
