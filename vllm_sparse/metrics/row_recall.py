"""Recall of a decode row that is served at once with others, whose list is known to the device alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from vllm_sparse.keys import PlainKeys
from vllm_sparse.metrics.recall import RecallSample
from vllm_sparse.pages import PageList, to_logical
from vllm_sparse.step.rows import DecodeRows, TokenLists

if TYPE_CHECKING:
    from vllm_sparse.step.plan import BatchRow


# `WorkerMetrics.observe_recall`: phase, method, what is measured.
Observe = Callable[[str, str, RecallSample], None]


class ListsTaken(Protocol):
    """Takes queries and lists of one layer."""

    layer: int

    def take(self, rows: DecodeRows, lists: TokenLists) -> None:
        """The layer has attended.

        Args:
            rows: all rows that are served at once, in this layer.
            lists: what they have read.
        """


@dataclass
class EagerRecall:
    """Recall of a row in a step outside of CUDA graphs, measured when the layer has attended.

    Attributes:
        layer: one in which the row reads a list.
        row: the row.
        place: its index among the rows that are served at once.
        observed: receives the recall.
    """

    layer: int
    row: BatchRow
    place: int
    observed: Observe

    def take(self, rows: DecodeRows, lists: TokenLists) -> None:
        own = _lists_of(self.place, rows)
        newest = rows.query[self.place]
        _observe(
            self.observed, self.row, rows, self.place, newest, TokenLists(lists.slots[own], lists.kept_tokens[own])
        )


class TakenRow:
    """Query and list of one row, copied by each replay of a graph, at fixed addresses.

    Args:
        lists: of the graphs' rows.
        kv_heads: lists of a row.
        row: int64 ``[1]`` place of the row's number; one of its own if None.

    Attributes:
        row: int64 ``[1]`` the row to copy. It is 0 but in sampled steps: other graphs have fewer rows.
        query: ``[1, query_heads, head_size]``; None before the first step.
        slots: int32 ``[1, kv_heads, list_tokens]``.
    """

    def __init__(self, lists: TokenLists, kv_heads: int, row: torch.Tensor | None = None) -> None:
        self.row = torch.zeros(1, dtype=torch.int64, device=lists.slots.device) if row is None else row
        self.query: torch.Tensor | None = None
        self.slots = lists.slots.new_zeros(1, kv_heads, lists.slots.shape[1])


class GraphRecall:
    """Recall of a row in a step in a CUDA graph: each replay copies a row's query and list, which are read after it.

    Args:
        layer: one in which all methods of the graph read lists.
        taken: what the graph writes.
    """

    def __init__(self, layer: int, taken: TakenRow) -> None:
        self.layer = layer
        self._taken = taken
        self._inputs: tuple[DecodeRows, torch.Tensor] | None = None

    def take(self, rows: DecodeRows, lists: TokenLists) -> None:
        taken = self._taken
        if taken.query is None:
            taken.query = torch.empty_like(rows.query[:1])
        torch.index_select(rows.query, 0, taken.row, out=taken.query)
        torch.index_select(lists.slots.view(-1, *taken.slots.shape[1:]), 0, taken.row, out=taken.slots)
        # Without the query of all rows: whoever holds it keeps its memory from later layers of the graph.
        self._inputs = replace(rows, query=taken.query), lists.kept_tokens

    def observe(self, row: BatchRow, observed: Observe) -> None:
        """The graph is queued, with this row as `TakenRow.row`; `observed` receives its recall."""
        assert self._inputs is not None, "a graph is captured before it is replayed"
        assert self._taken.query is not None
        rows, kept_tokens = self._inputs
        place = row.span.row
        lists = TokenLists(self._taken.slots[0], kept_tokens[_lists_of(place, rows)])
        _observe(observed, row, rows, place, self._taken.query[0], lists)


def _lists_of(place: int, rows: DecodeRows) -> slice:
    kv_heads = rows.kv_cache.shape[1]
    return slice(place * kv_heads, (place + 1) * kv_heads)


def _observe(
    observed: Observe, row: BatchRow, rows: DecodeRows, place: int, query: torch.Tensor, lists: TokenLists
) -> None:
    """Measure one row.

    Args:
        observed: receives the recall.
        row: the row.
        rows: all rows of the step.
        place: index of the row among them.
        query: ``[query_heads, head_size]`` of the row.
        lists: of the row.
    """
    assert row.setting.method is not None
    table = rows.block_table[place]
    keys = PlainKeys(rows.kv_cache, table, row.span.seq_len)
    blocks = table[: -(-keys.seq_len // keys.block_size_tokens)]
    tokens = to_logical(lists.slots, blocks, keys.block_size_tokens, keys.num_kv_heads)
    pages = PageList(tokens, lists.kept_tokens, 1)
    sample = RecallSample(query.unsqueeze(0), keys, pages, 1, rows.scale, rows.soft_cap)
    observed("decode", row.setting.method.name, sample)
