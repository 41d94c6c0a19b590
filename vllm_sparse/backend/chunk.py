"""Attention of one request's prefill chunk over its page lists."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_sparse.pages import PageList, to_physical
from vllm_sparse.step.launch import Executor, Launch

if TYPE_CHECKING:
    from vllm_sparse.methods.prefill import PrefillMethod

# Of each head, so that the last queries lie in them where the very last block is short.
LAST_BLOCKS = 2


def attend_chunk(
    executor: Executor,
    method: PrefillMethod,
    lists: PageList,
    query: torch.Tensor,
    output: torch.Tensor,
    kv_cache: torch.Tensor,
    request_blocks: torch.Tensor,
    scale: float,
) -> None:
    """Run the stock kernel over a chunk's lists.

    Args:
        executor: the platform's.
        method: what chose the lists.
        lists: as `PrefillMethod.select` returns them.
        query: ``[chunk, query_heads, head_size]``.
        output: likewise, written.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``, head-major.
        request_blocks: int32 ``[blocks]`` of the request.
        scale: softmax scale.
    """
    tokens, query_heads, _ = query.shape
    kv_heads, block_size = kv_cache.shape[1:3]
    rows = chunk_rows(
        tokens, method.query_block_tokens, method.list_heads(query_heads, kv_heads), kv_heads, query.device
    )
    lists = PageList(lists.pages[rows.lists], lists.kept_tokens[rows.lists], lists.page_size_tokens)
    pages = to_physical(lists, request_blocks, rows.kv_head, block_size, kv_heads)
    queries = rows.gather(query)
    attended = torch.empty_like(queries)
    launch = Launch(rows.starts, method.query_block_tokens, pages, lists.kept_tokens, lists.page_size_tokens)
    executor.run(launch, queries, attended, kv_cache, scale)
    rows.scatter(attended, output)


@dataclass(frozen=True)
class ChunkRows:
    """The rows of a chunk in the order of execution: first each head's last query blocks, then the others head by head.

    Methods that read everything for the last queries of a chunk make those rows many times longer than the others. A
    kernel that met one at the end would leave all but one multiprocessor idle.

    Attributes:
        lists: int64 ``[rows]`` which list, head-major, belongs to each row.
        kv_head: int64 ``[rows]`` which KV head it reads.
        starts: int32 ``[rows + 1]`` first query token of each row in what `gather` returns.
        list_heads: heads that have lists of their own.
        first_last: token of the chunk that begins the last query blocks.
    """

    lists: torch.Tensor
    kv_head: torch.Tensor
    starts: torch.Tensor
    list_heads: int
    first_last: int

    def gather(self, chunk: torch.Tensor) -> torch.Tensor:
        """Queries row by row, each with the heads that share its list.

        Args:
            chunk: ``[tokens, query_heads, head_size]``.

        Returns:
            ``[list_heads * tokens, query_heads / list_heads, head_size]``.
        """
        tokens, query_heads, head_size = chunk.shape
        grouped = chunk.reshape(tokens, self.list_heads, query_heads // self.list_heads, head_size)
        rows = chunk.new_empty(self.list_heads * tokens, grouped.shape[2], head_size)
        for of_rows, of_chunk in self._parts(rows, grouped):
            of_rows.copy_(of_chunk)
        return rows

    def scatter(self, rows: torch.Tensor, chunk: torch.Tensor) -> None:
        """Inverse of `gather`: writes `chunk`, whose heads lie side by side."""
        for of_rows, of_chunk in self._parts(rows, chunk.view(chunk.shape[0], self.list_heads, *rows.shape[1:])):
            of_chunk.copy_(of_rows)

    def _parts(self, rows: torch.Tensor, grouped: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The last blocks and the others, in both orders: pairs of ``[list_heads, tokens, group, head_size]``."""
        cut = self.list_heads * (grouped.shape[0] - self.first_last)
        parts = (rows[:cut], grouped[self.first_last :]), (rows[cut:], grouped[: self.first_last])
        return [(part.view(self.list_heads, -1, *part.shape[1:]), of_chunk.transpose(0, 1)) for part, of_chunk in parts]


@functools.lru_cache(maxsize=64)
def chunk_rows(tokens: int, query_block: int, list_heads: int, kv_heads: int, device: torch.device) -> ChunkRows:
    """Rows of a chunk.

    Args:
        tokens: of the chunk.
        query_block: query tokens that share a list.
        list_heads: heads that have lists of their own.
        kv_heads: KV heads.
        device: of the result.
    """
    blocks = -(-tokens // query_block)
    lists = torch.arange(list_heads * blocks).view(list_heads, blocks)
    cut = max(blocks - LAST_BLOCKS, 0)
    lists = torch.cat([lists[:, cut:].flatten(), lists[:, :cut].flatten()])
    lengths = (tokens - lists % blocks * query_block).clamp(max=query_block)
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    kv_head = lists // blocks // (list_heads // kv_heads)
    return ChunkRows(lists.to(device), kv_head.to(device), starts.to(device), list_heads, cut * query_block)
