"""What an executor runs: the platform's own dense paged kernel over shortened page tables.

Each row becomes one "request" of the kernel with its own page table and length; causal masking is anchored at the
bottom right, so a row's own positions, which end its list, are masked exactly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Launch:
    """One launch of a stock kernel over rows.

    Attributes:
        query_starts: int32 ``[rows + 1]`` first query token of each row.
        max_query_tokens: longest row.
        pages: int32 ``[rows, width]`` pages of the cache's per-head view (`vllm_sparse.kernels.page_list.to_physical`).
        kept_tokens: int32 ``[rows]``.
        page_size_tokens: tokens of a page.
        list_head: int64 ``[rows]`` which heads of the layer a row has: its first query head over its query heads. None
            where the kernel does the same for all heads.
    """

    query_starts: torch.Tensor
    max_query_tokens: int
    pages: torch.Tensor
    kept_tokens: torch.Tensor
    page_size_tokens: int
    list_head: torch.Tensor | None = None


class Executor(ABC):
    """Runs one launch."""

    @abstractmethod
    def run(
        self, launch: Launch, query: torch.Tensor, output: torch.Tensor, kv_cache: torch.Tensor, scale: float
    ) -> None:
        """Attend.

        Args:
            launch: the rows.
            query: ``[tokens, heads_per_row, head_size]``, rows one after the other; all heads read one KV head.
            output: likewise, written.
            kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``, contiguous (LBHNC).
            scale: softmax scale.
        """


@dataclass(frozen=True)
class LayerLaunches:
    """What is launched in one layer for decode rows that are served at once.

    Attributes:
        dense: the stock kernel over whole contexts.
        writing_ahead: numbers of the methods by which rows may write lists for later layers.
        writing_here: numbers of the methods by which rows may write lists that they read here; some may be in both.
        reading: the stock kernel over lists.
    """

    dense: bool
    writing_ahead: tuple[int, ...]
    writing_here: tuple[int, ...]
    reading: bool

    def holds(self, needed: LayerLaunches) -> bool:
        """Whether all that rows need in the layer is launched; launches that a row does not need leave it alone."""
        return (
            self.dense >= needed.dense
            and self.reading >= needed.reading
            and {*needed.writing_ahead} <= {*self.writing_ahead}
            and {*needed.writing_here} <= {*self.writing_here}
        )
