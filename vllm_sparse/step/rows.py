"""Decode rows as device kernels see them: all of a step's rows at once, with nothing about them known to the host.

A decode step runs inside a CUDA graph: shapes and addresses are those of the capture, and which row does what, how long
its context is and how much it may read are values on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class DecodeRows:
    """The newest tokens of several requests in one layer.

    Attributes:
        query: ``[rows, query_heads, head_size]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``, head-major (LBHNC), a token's key and value side by
            side.
        block_table: int32 ``[rows, blocks]``; entries past a row's context are stale.
        seq_lens: int32 ``[rows]`` tokens in the row's cache, the newest included; 0 for a row that does not
            choose here, whose list stays as it is.
        scale: softmax scale of the model.
        soft_cap: on logits; 0: none.
    """

    query: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    scale: float
    soft_cap: float = 0.0


@dataclass(frozen=True)
class TokenLists:
    """Tokens that each decode row may read, one list per KV head, as the executor takes them with pages of one token.

    Attributes:
        slots: int32 ``[rows * kv_heads, width]``, ascending by position: ``(block * kv_heads + head) * block_size +
            offset`` of each token, its place in the per-head view of the cache. Entries past `kept_tokens` are never
            read, and are valid places or left over from former steps.
        kept_tokens: int32 ``[rows * kv_heads]``.
    """

    slots: torch.Tensor
    kept_tokens: torch.Tensor


def padded_rows(rows: int) -> int:
    """Rows of the smallest of vLLM's default decode graphs that holds a step: 1, 2, 4 and multiples of 8.

    Steps outside of graphs are cut as those are, so that their kernels are those that start-up has compiled.
    """
    return min(size for size in (1, 2, 4, -(-rows // 8) * 8) if size >= rows)


@dataclass(frozen=True)
class ServerSize:
    """What memory for decode rows is sized by.

    Attributes:
        requests: most that the server holds, each in a slot of its own.
        max_seq_len: of the longest request.
        num_layers: attention layers of the model.
        kv_heads: of one process.
        held: numbers of the layers that the process holds; None: all.
    """

    requests: int
    max_seq_len: int
    num_layers: int
    kv_heads: int
    held: range | None = None

    @property
    def layers(self) -> range:
        """Numbers of the layers that the process holds."""
        return range(self.num_layers) if self.held is None else self.held


class DecodeMemory(Protocol):
    """What a method keeps on the device for decode rows, of all requests and layers."""

    @property
    def bytes(self) -> int:
        """Of device memory."""


@dataclass(frozen=True)
class RowsPlace:
    """Where a choice for decode rows finds its room.

    Attributes:
        starts: int64 ``[rows]`` first token of each row's room for scores of all its tokens, rising with the row; rows
            do not overlap.
        capacity_tokens: tokens that there is room for.
        slots: int32 ``[rows]`` place of each row's request in what a method keeps from step to step.
        fresh: int32 ``[rows]`` 1 if another request held the slot before this step, else 0.
        members: int32 ``[rows]`` tokens in the cache of the rows that have the method, whether they choose or are still
            too short for it, else 0.
        layer: index of the attention layer.
        summaries: of the layer's pages, by physical block, where the method has `DecodeMethod.summaries`.
        memory: what the method has allocated (`BatchDecodeMethod.allocate`).
    """

    starts: torch.Tensor
    capacity_tokens: int
    slots: torch.Tensor
    fresh: torch.Tensor
    members: torch.Tensor
    layer: int
    summaries: torch.Tensor | None
    memory: DecodeMemory | None


@dataclass(frozen=True)
class RowScores:
    """Scores of the units of decode rows' contexts, a unit being `unit_tokens` adjacent tokens from token 0 on.

    Unit ``u`` of KV head ``h`` of row ``r`` is element ``starts[r] + h * head_stride + u``.

    Attributes:
        values: float32, any shape, contiguous; neither NaN nor plus infinity.
        starts: int64 ``[rows]``.
        head_stride: elements from a head's scores to the next head's.
        unit_tokens: tokens of a unit; divides a block of the cache, or is a multiple of one.
    """

    values: torch.Tensor
    starts: torch.Tensor
    head_stride: int
    unit_tokens: int
