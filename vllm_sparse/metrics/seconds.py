"""Counters of the seconds that sampled steps spend on selection and on attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import prometheus_client


class SecondsMetrics:
    """Prometheus metrics of timed steps.

    Args:
        model_name: label of the metrics, as of vLLM's own.
    """

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        labels = ["model_name", "phase", "method"]
        self._selection = prometheus_client.Counter(
            "vllm_sparse_selection_seconds",
            "Time of choosing lists and of arranging rows for them, in sampled steps.",
            labels,
        )
        self._attention = prometheus_client.Counter(
            "vllm_sparse_attention_seconds", "Time of the attention kernel over lists, in sampled steps.", labels
        )
        self._total = prometheus_client.Counter(
            "vllm_sparse_attention_total_seconds",
            "Time of the sparse layers' attention with its selection, in sampled steps.",
            labels,
        )
        self._rows = prometheus_client.Counter(
            "vllm_sparse_timed_rows", "Prefill chunks and decode steps of requests in sampled steps.", labels
        )

    def count(self, seconds: Mapping[tuple[str, str], tuple[float, float]], rows: Counter[tuple[str, str]]) -> None:
        """One timed step.

        Args:
            seconds: of selection and of attention, by phase and method.
            rows: of each phase and method.
        """
        for key, (selection, attention) in seconds.items():
            self._selection.labels(self._model_name, *key).inc(selection)
            self._attention.labels(self._model_name, *key).inc(attention)
            self._total.labels(self._model_name, *key).inc(selection + attention)
        for key, count in rows.items():
            self._rows.labels(self._model_name, *key).inc(count)
