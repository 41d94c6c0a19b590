"""Sparse prompt chunks as device kernels see them: those of several requests in one launch.

A step's layers differ in queries and keys alone. So where its query blocks lie is told to the device once a step, in
tables, and kernels that serve several chunks look there what differs between them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from vllm_sparse.host_copy import to_device
from vllm_sparse.keys import PagedKeys

# Of each head and chunk, so that the last queries lie in them where the very last block is short.
LAST_BLOCKS = 2
# Tables of int32 begin at multiples of 16 bytes, which Triton specialises on.
TABLE_ENTRIES = 4


class Span(Protocol):
    """A request's place in a step's tensors (`vllm_sparse.step.plan.RowSpan`)."""

    @property
    def row(self) -> int:
        """Index in the batch."""

    @property
    def query_start(self) -> int:
        """Its first token in the step's queries."""

    @property
    def query_tokens(self) -> int:
        """Its tokens in this step."""

    @property
    def seq_len(self) -> int:
        """Tokens in its KV cache, this step's included."""


@dataclass(frozen=True)
class PromptBlocks:
    """Query blocks of prompt chunks, in the order of the chunks.

    Lists of the chunks lie one chunk after another, each head-major. With `h` heads that have lists of their own, that
    of head ``i`` and query block ``b`` of chunk ``c`` is number ``h * chunk_start[c] + i * n + b - chunk_start[c]``,
    where ``n = chunk_start[c + 1] - chunk_start[c]``. Maps have one axis for all query blocks instead.

    Attributes:
        spans: of the chunks.
        query_block_tokens: query tokens of a query block.
        starts: first query block of each chunk, and the number of all, on the host.
        positions: int32 ``[2, blocks]`` position in its context of each query block's first and last query, on the
            host.
        first_query: the first of these, int32 ``[blocks]`` on the device, as are all that follow.
        last_query: the second of these.
        first_token: int32 ``[blocks]`` first token of each query block in the step's queries.
        chunk: int32 ``[blocks]`` its chunk.
        chunk_start: int32 ``[chunks + 1]`` as `starts`.
        table_row: int32 ``[chunks]`` row of each chunk's request in the step's block table.
        seq_len: int32 ``[chunks]`` tokens in its cache.
    """

    spans: tuple[Span, ...]
    query_block_tokens: int
    starts: tuple[int, ...]
    positions: np.ndarray
    first_query: torch.Tensor
    last_query: torch.Tensor
    first_token: torch.Tensor
    chunk: torch.Tensor
    chunk_start: torch.Tensor
    table_row: torch.Tensor
    seq_len: torch.Tensor

    @property
    def blocks(self) -> int:
        """Query blocks of all chunks."""
        return self.starts[-1]

    @property
    def longest_seq_len(self) -> int:
        """Tokens in the longest context."""
        return max(span.seq_len for span in self.spans)

    @property
    def most_blocks(self) -> int:
        """Query blocks of the chunk that has most."""
        return int(np.diff(self.starts).max())

    def lists_of(self, chunk: int, list_heads: int) -> slice:
        """The lists of a chunk."""
        return slice(list_heads * self.starts[chunk], list_heads * self.starts[chunk + 1])


def prompt_blocks(spans: Sequence[Span], query_block_tokens: int, device: torch.device) -> PromptBlocks:
    """Tables of the query blocks of prompt chunks.

    Args:
        spans: of the chunks; at least one.
        query_block_tokens: query tokens of a query block.
        device: of the tables.
    """
    counts = [-(-span.query_tokens // query_block_tokens) for span in spans]
    starts = np.cumsum([0, *counts])
    chunk = np.repeat(np.arange(len(spans)), counts)
    fields = np.array([(span.row, span.query_start, span.query_tokens, span.seq_len) for span in spans])
    row, query_start, query_tokens, seq_len = fields.T
    offset = (np.arange(starts[-1]) - starts[chunk]) * query_block_tokens
    first_query = (seq_len - query_tokens)[chunk] + offset
    last_query = np.minimum(first_query + query_block_tokens, seq_len[chunk]) - 1
    tables = first_query, last_query, query_start[chunk] + offset, chunk, starts, row, seq_len
    positions = np.stack([first_query, last_query]).astype(np.int32)
    return PromptBlocks(
        tuple(spans), query_block_tokens, tuple(starts.tolist()), positions, *int_tables(tables, device)
    )


def int_tables(tables: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Integers of the host as int32 on a device, in one copy that does not wait for it."""
    lengths = [-(-len(table) // TABLE_ENTRIES) * TABLE_ENTRIES for table in tables]
    packed = np.zeros(sum(lengths), dtype=np.int32)
    for end, length, table in zip(np.cumsum(lengths), lengths, tables, strict=True):
        packed[end - length : end - length + len(table)] = table
    parts = torch.split(to_device(torch.from_numpy(packed), device), lengths)
    return [part[: len(table)] for part, table in zip(parts, tables, strict=True)]


@dataclass(frozen=True)
class _Span:
    """A span of no step's plan: by default the only one."""

    query_tokens: int
    seq_len: int
    row: int = 0
    query_start: int = 0


@functools.lru_cache(maxsize=64)
def one_chunk(query_tokens: int, seq_len: int, query_block_tokens: int, device: torch.device) -> PromptBlocks:
    """Query blocks of one chunk alone, made once.

    Args:
        query_tokens: of the chunk, which ends the context.
        seq_len: tokens in the cache.
        query_block_tokens: query tokens of a query block.
        device: of the tables.
    """
    return prompt_blocks([_Span(query_tokens, seq_len)], query_block_tokens, device)


def last_blocks(blocks: PromptBlocks, tokens: int) -> PromptBlocks:
    """The last queries of each chunk as its only query block.

    Args:
        blocks: of the chunks.
        tokens: most of a chunk's.
    """
    spans = []
    for span in blocks.spans:
        before = max(span.query_tokens - tokens, 0)
        spans.append(_Span(span.query_tokens - before, span.seq_len, span.row, span.query_start + before))
    return prompt_blocks(spans, tokens, blocks.chunk.device)


def regrouped(blocks: PromptBlocks, spans: Sequence[Span], chunk: np.ndarray) -> PromptBlocks:
    """The same query blocks as those of other chunks.

    Args:
        blocks: of any chunks.
        spans: of the other chunks.
        chunk: integer ``[blocks]`` which of them each query block belongs to, ascending.
    """
    starts = np.searchsorted(chunk, np.arange(len(spans) + 1))
    row, seq_len = np.array([(span.row, span.seq_len) for span in spans]).T
    of_block, chunk_start, table_row, lengths = int_tables((chunk, starts, row, seq_len), blocks.chunk.device)
    return replace(
        blocks,
        spans=tuple(spans),
        starts=tuple(starts.tolist()),
        chunk=of_block,
        chunk_start=chunk_start,
        table_row=table_row,
        seq_len=lengths,
    )


def stretches(blocks: PromptBlocks, every_tokens: int) -> tuple[PromptBlocks, np.ndarray]:
    """The same query blocks, with chunks cut where positions are multiples of so many tokens.

    A query block belongs to the stretch that holds its last query. Where chunks begin off the grid of the cuts, its
    first ones may lie in the stretch before, which then ends with queries whose lists it does not choose.

    Args:
        blocks: of the chunks.
        every_tokens: between cuts; at least a query block.

    Returns:
        The query blocks with stretches in place of chunks, each of whose contexts ends at a cut or with its chunk; and
        the chunk of each stretch, integer ``[stretches]``.
    """
    chunk = np.repeat(np.arange(len(blocks.spans)), np.diff(blocks.starts))
    first_query, last_query = blocks.positions
    begins = np.ones(blocks.blocks, dtype=bool)
    begins[1:] = (np.diff(chunk) > 0) | (np.diff(last_query // every_tokens) > 0)
    first_blocks = np.flatnonzero(begins)
    spans = []
    for number, first, last in zip(chunk[begins], first_query[begins], last_query[begins], strict=True):
        span = blocks.spans[number]
        seq_len = min((int(last) // every_tokens + 1) * every_tokens, span.seq_len)
        before = int(first) - (span.seq_len - span.query_tokens)
        spans.append(_Span(seq_len - int(first), seq_len, span.row, span.query_start + before))
    return regrouped(blocks, spans, np.cumsum(begins) - 1), chunk[first_blocks]


def parts_within(starts: Sequence[int], most: int) -> list[range]:
    """Ranges of adjacent chunks that hold no more than so much each, but for a chunk that holds more alone.

    Args:
        starts: what all chunks before each one hold, and all of them, ascending from 0.
        most: of a range.

    Returns:
        Ascending ranges that cover all chunks; each holds something if any does.
    """
    found, first = [], 0
    for chunk in range(1, len(starts) - 1):
        holds_something, adds_something = starts[chunk] > starts[first], starts[chunk + 1] > starts[chunk]
        if holds_something and adds_something and starts[chunk + 1] - starts[first] > most:
            found.append(range(first, chunk))
            first = chunk
    return [*found, range(first, len(starts) - 1)]


def held_at_once(chunks: int, of_a_chunk: int, most: int) -> int:
    """What a range of `parts_within` holds at the most, of chunks that are alike.

    Args:
        chunks: how many.
        of_a_chunk: what one of them holds.
        most: of a range, as of `parts_within`.
    """
    return min(chunks * of_a_chunk, max(most, of_a_chunk))


@dataclass(frozen=True)
class PromptChunks:
    """Prompt chunks in one layer.

    Attributes:
        blocks: their query blocks.
        query: ``[step tokens, query_heads, head_size]``, of all rows of the step.
        keys: of each chunk's request, the chunk's included.
        block_table: int32 ``[batch, blocks]`` of the step.
        scale: softmax scale of the model; positive.
    """

    blocks: PromptBlocks
    query: torch.Tensor
    keys: tuple[PagedKeys, ...]
    block_table: torch.Tensor
    scale: float

    def query_of(self, chunk: int) -> torch.Tensor:
        """``[query_tokens, query_heads, head_size]`` of a chunk."""
        span = self.blocks.spans[chunk]
        return self.query[span.query_start : span.query_start + span.query_tokens]


def chunk_alone(query: torch.Tensor, keys: PagedKeys, scale: float, query_block_tokens: int) -> PromptChunks:
    """One request's prompt chunk as if it were all of a step.

    Args:
        query: ``[query_tokens, query_heads, head_size]``, at the last positions of the context.
        keys: the request's, the chunk's included.
        scale: softmax scale of the model; positive.
        query_block_tokens: query tokens of a query block.
    """
    blocks = one_chunk(query.shape[0], keys.seq_len, query_block_tokens, query.device)
    return PromptChunks(blocks, query, (keys,), keys.block_table.unsqueeze(0), scale)


@dataclass(frozen=True)
class LaunchRows:
    """Rows of prompt chunks in the order of execution: each head's last query blocks, then the others head by head.

    Methods that read everything for the last queries of a prompt make those rows many times longer than the others. A
    kernel that met one at the end would leave all but one multiprocessor idle. For the same reason chunks of longer
    contexts come first.

    Attributes:
        lists: int32 ``[rows]`` list of each row, of the lists of all chunks.
        list_head: int32 ``[rows]`` head of the list, of those with lists of their own.
        kv_head: int32 ``[rows]`` KV head that it reads.
        table_row: int32 ``[rows]`` row of its request in the step's block table.
        first_token: int32 ``[rows]`` its first token in the step's queries.
        starts: int32 ``[rows + 1]`` its first token among those of all rows.
        list_heads: heads that have lists of their own.
        max_query_tokens: of the longest row.
        tokens: of all rows.
    """

    lists: torch.Tensor
    list_head: torch.Tensor
    kv_head: torch.Tensor
    table_row: torch.Tensor
    first_token: torch.Tensor
    starts: torch.Tensor
    list_heads: int
    max_query_tokens: int
    tokens: int

    @functools.cached_property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each token of all rows its token in the step's queries and its head of lists: two int64 ``[tokens]``."""
        lengths = self.starts.diff()
        row = torch.arange(lengths.shape[0], device=lengths.device).repeat_interleave(lengths, output_size=self.tokens)
        token = torch.arange(self.tokens, device=lengths.device)
        return token + (self.first_token - self.starts[:-1])[row], self.list_head[row].long()


def launch_rows(groups: Sequence[PromptBlocks], list_heads: int, kv_heads: int, device: torch.device) -> LaunchRows:
    """Rows of prompt chunks whose lists follow one another, group by group.

    Args:
        groups: the chunks.
        list_heads: heads that have lists of their own; a multiple of the KV heads, or as many.
        kv_heads: KV heads.
        device: of the tables.
    """
    chunks = []
    first_list = 0
    for blocks in groups:
        for number, span in enumerate(blocks.spans):
            chunks.append((span.seq_len, first_list + list_heads * blocks.starts[number], span, blocks))
        first_list += list_heads * blocks.blocks
    chunks.sort(key=lambda chunk: -chunk[0])
    last, others = [], []
    for _, offset, span, blocks in chunks:
        count = -(-span.query_tokens // blocks.query_block_tokens)
        cut = max(count - LAST_BLOCKS, 0)
        head, block = (axis.reshape(list_heads, count) for axis in np.divmod(np.arange(list_heads * count), count))
        first = block * blocks.query_block_tokens
        length = np.minimum(span.query_tokens - first, blocks.query_block_tokens)
        rows = np.stack(
            [
                offset + head * count + block,
                head,
                head // (list_heads // kv_heads),
                np.full_like(head, span.row),
                span.query_start + first,
                length,
            ]
        )
        last.append(rows[:, :, cut:].reshape(6, -1))
        others.append(rows[:, :, :cut].reshape(6, -1))
    *tables, lengths = np.concatenate([*last, *others], axis=1)
    starts = np.concatenate([[0], lengths.cumsum()])
    lists, list_head, kv_head, table_row, first_token, first_of_row = int_tables([*tables, starts], device)
    return LaunchRows(
        lists,
        list_head,
        kv_head,
        table_row,
        first_token,
        first_of_row,
        list_heads,
        max_query_tokens=int(lengths.max()),
        tokens=int(starts[-1]),
    )
