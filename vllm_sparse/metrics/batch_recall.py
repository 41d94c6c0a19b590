"""Recall of a decode row that is served at once with others, whose list is known to the device alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from vllm_sparse.keys import PlainKeys
from vllm_sparse.pages import PageList, to_logical

if TYPE_CHECKING:
    from vllm_sparse.backend.decode import DecodeBuffers, DecodeStep
    from vllm_sparse.metrics import WorkerMetrics
    from vllm_sparse.step.plan import BatchRow


class RecallLayer(Protocol):
    """Where a step's query and lists are taken."""

    layer: int

    def take(self, step: DecodeStep, query: torch.Tensor, kv_cache: torch.Tensor, scale: float) -> None:
        """The layer has attended.

        Args:
            step: the rows.
            query: ``[rows, query_heads, head_size]``.
            kv_cache: of the layer, as in `DecodeStep.attend`.
            scale: softmax scale.
        """


@dataclass
class EagerRecall:
    """Of a step that runs as Python says: measured at once.

    Attributes:
        layer: one in which the row reads a list.
        row: the row.
        place: of it among the rows that are served at once.
        metrics: receive the recall.
    """

    layer: int
    row: BatchRow
    place: int
    metrics: WorkerMetrics

    def take(self, step: DecodeStep, query: torch.Tensor, kv_cache: torch.Tensor, scale: float) -> None:
        lists = _lists_of(self.place, kv_cache.shape[1])
        kept_tokens = step.contexts.kept_tokens[self.layer, lists]
        table = step.block_table[self.place]
        _observe(
            self.metrics, self.row, query[self.place], step.lists.slots[lists], kept_tokens, kv_cache, table, scale
        )


class TakenRow:
    """Query and list of one row, copied by each replay of a graph, at fixed addresses.

    Args:
        buffers: of the graphs.

    Attributes:
        row: int64 ``[1]`` the row to copy. It is 0 but in sampled steps: other graphs have fewer rows.
        query: ``[1, query_heads, head_size]``; None before the first step.
        slots: int32 ``[1, kv_heads, list_tokens]``.
    """

    def __init__(self, buffers: DecodeBuffers) -> None:
        self.row = torch.zeros(1, dtype=torch.int64, device=buffers.lists.slots.device)
        self.query: torch.Tensor | None = None
        self.slots = buffers.lists.slots.new_zeros(1, buffers.size.kv_heads, buffers.lists.slots.shape[1])


class GraphRecall:
    """Of a step in a CUDA graph: each replay copies a row's query and list, and recall is measured after it.

    Args:
        layer: one in which all methods of the graph read lists.
        taken: what the graph writes.
    """

    def __init__(self, layer: int, taken: TakenRow) -> None:
        self.layer = layer
        self._taken = taken
        self._inputs: tuple[DecodeStep, torch.Tensor, float] | None = None

    def take(self, step: DecodeStep, query: torch.Tensor, kv_cache: torch.Tensor, scale: float) -> None:
        taken = self._taken
        if taken.query is None:
            taken.query = torch.empty_like(query[:1])
        torch.index_select(query, 0, taken.row, out=taken.query)
        torch.index_select(step.lists.slots.view(-1, *taken.slots.shape[1:]), 0, taken.row, out=taken.slots)
        self._inputs = step, kv_cache, scale

    def observe(self, row: BatchRow, metrics: WorkerMetrics) -> None:
        """The graph is queued, with this row as `TakenRow.row`."""
        assert self._inputs is not None, "a graph is captured before it is replayed"
        assert self._taken.query is not None
        step, kv_cache, scale = self._inputs
        place = row.span.row
        kept_tokens = step.contexts.kept_tokens[self.layer, _lists_of(place, kv_cache.shape[1])]
        slots, table = self._taken.slots[0], step.block_table[place]
        _observe(metrics, row, self._taken.query[0], slots, kept_tokens, kv_cache, table, scale)


def _lists_of(place: int, kv_heads: int) -> slice:
    return slice(place * kv_heads, (place + 1) * kv_heads)


def _observe(
    metrics: WorkerMetrics,
    row: BatchRow,
    query: torch.Tensor,
    slots: torch.Tensor,
    kept_tokens: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
) -> None:
    assert row.setting.method is not None
    keys = PlainKeys(kv_cache, block_table, row.span.context_tokens)
    blocks = block_table[: -(-keys.context_tokens // keys.block_size_tokens)]
    tokens = to_logical(slots, blocks, keys.block_size_tokens, keys.num_kv_heads)
    lists = PageList(tokens, kept_tokens, 1)
    metrics.observe_recall("decode", row.setting.method.name, query.unsqueeze(0), keys, lists, 1, scale)
