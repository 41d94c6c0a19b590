"""Summaries of a layer's pages, stored by physical block beside its KV cache."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from vllm_sparse.kernels.page_summaries import SummaryKind, store_summaries
from vllm_sparse.metrics import WorkerMetrics

if TYPE_CHECKING:
    from vllm_sparse.keys import PagedKeys

logger = logging.getLogger("vllm.sparse")


class StoredSummaries:
    """One layer's summaries.

    Attributes:
        by_kind: ``[blocks, kv_heads, pages of a block, width of the kind]`` of each kind in use.
    """

    def __init__(self) -> None:
        self.by_kind: dict[SummaryKind, torch.Tensor] = {}

    def of(self, kind: SummaryKind, kv_cache: torch.Tensor) -> torch.Tensor:
        """Summaries of the layer's pages; memory is taken when the first request needs them.

        Args:
            kind: of summary.
            kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]`` of the layer.
        """
        blocks, kv_heads, block_size, double_head_size = kv_cache.shape
        shape = blocks, kv_heads, block_size // kind.page_tokens, kind.width(double_head_size // 2)
        stored = self.by_kind.get(kind)
        # vLLM profiles with a smaller cache than it serves with.
        if stored is None or stored.shape != shape:
            former_bytes = 0 if stored is None else stored.nbytes
            stored = torch.empty(shape, dtype=kind.dtype(kv_cache.dtype), device=kv_cache.device)
            self.by_kind[kind] = stored
            memory = WorkerMetrics.get().memory
            if memory is not None:
                memory.change_side_data(stored.nbytes - former_bytes)
            _log_memory(kind, stored.nbytes, kv_cache.nbytes)
        return stored

    def summarise(self, kind: SummaryKind, first_token: int, keys: PagedKeys, kv_cache: torch.Tensor) -> None:
        """Summarise a request's keys that have no summaries.

        Args:
            kind: of summary.
            first_token: first token whose summary is missing.
            keys: of the request, which read these summaries from now on.
            kv_cache: as in `of`.
        """
        keys.summaries = self.of(kind, kv_cache)
        store_summaries(keys, kind, first_token)


@lru_cache
def _log_memory(kind: SummaryKind, summary_bytes: int, cache_bytes: int) -> None:
    """Once, not for each layer."""
    logger.info(
        "Page summaries (%s of %d tokens) take %.1f MiB in each layer that chooses by them, beside its KV cache of "
        "%.1f MiB. On a GPU the cache leaves room for them, unless its size was set.",
        {"mean": "means", "bounds": "bounds", "float8_bounds": "8-bit bounds", "codes": "2-bit keys"}[kind.content],
        kind.page_tokens,
        summary_bytes / 2**20,
        cache_bytes / 2**20,
    )
