"""Rows that asked for a sparse method and ran dense."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import prometheus_client

if TYPE_CHECKING:
    from vllm_sparse.step.plan import Fallback

# Below vLLM's own name, so that its logging configuration applies.
logger = logging.getLogger("vllm.sparse")


class FallbackMetrics:
    """Counts fallbacks and logs each kind once.

    Args:
        model_name: label of the metrics, as of vLLM's own.
    """

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._rows = prometheus_client.Counter(
            "vllm_sparse_fallbacks",
            "Prefill chunks and decode steps of requests that asked for a sparse method and ran dense; with reason "
            "low_recall, in some layers at least.",
            ["model_name", "phase", "method", "reason"],
        )
        self._logged: set[Fallback] = set()

    def count(self, fallbacks: Mapping[Fallback, int]) -> None:
        """Rows of one step, by phase, method and reason."""
        for fallback, rows in fallbacks.items():
            self._rows.labels(self._model_name, *fallback).inc(rows)
            if fallback not in self._logged:
                self._logged.add(fallback)
                phase, method, reason = fallback
                logger.info(
                    "A request that asked for %s in %s ran a step dense: %s. Logged once; "
                    'vllm_sparse_fallbacks_total{reason="%s"} counts them.',
                    method,
                    "its prefill" if phase == "prefill" else "decoding",
                    reason.sentence,
                    reason,
                )
