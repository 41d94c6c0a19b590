"""Sparse prompt chunks: one request at a time chooses its page lists and attends over them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_sparse.backend.guard import NO_GUARD
from vllm_sparse.backend.host_copy import to_device
from vllm_sparse.kernels.page_list import to_physical
from vllm_sparse.methods.prefill import Layer
from vllm_sparse.metrics.recall import RecallSample
from vllm_sparse.pages import PageList
from vllm_sparse.step.launch import Executor, Launch

if TYPE_CHECKING:
    from vllm_sparse.backend.guard import StepGuard
    from vllm_sparse.backend.layer import LayerCall, LayerPlatform
    from vllm_sparse.methods.prefill import PrefillMethod
    from vllm_sparse.metrics import StepRecord
    from vllm_sparse.step.plan import PrefillRow

# Of each head, so that the last queries lie in them where the very last block is short.
LAST_BLOCKS = 2


@dataclass(frozen=True)
class PromptChunk:
    """One request's prompt chunk in one layer.

    Attributes:
        query: ``[tokens, query_heads, head_size]``.
        output: likewise, written.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``, head-major.
        request_blocks: int32 ``[blocks]`` of the request.
        scale: softmax scale.
    """

    query: torch.Tensor
    output: torch.Tensor
    kv_cache: torch.Tensor
    request_blocks: torch.Tensor
    scale: float


def serve_row(
    platform: LayerPlatform, call: LayerCall, row: PrefillRow, record: StepRecord, guard: StepGuard = NO_GUARD
) -> None:
    """Serve one sparse prompt chunk in one layer: choose, translate, attend.

    Args:
        platform: of the layer.
        call: of the layer.
        row: the chunk.
        record: what is measured of the step.
        guard: of the step.
    """
    span, method = row.span, row.method
    tokens = slice(span.query_start, span.query_start + span.query_tokens)
    chunk = PromptChunk(
        call.query[tokens], call.output[tokens], call.kv_cache, call.block_table[span.row], platform.scale
    )
    keys = platform.row_keys(call, span)
    page_size = platform.prefill_page_size(method.page_tokens, call.block_size_tokens)
    with record.timer.serving("prefill", [method.name]):
        layer = Layer(call.index, platform.first_query_head)
        lists = method.select(chunk.query, keys, platform.scale, page_size, layer)
        attend_prompt_chunk(record.timer.executor(platform.executor(call.layer)), method, lists, chunk)
    list_heads = method.list_heads(platform.num_heads, platform.num_kv_heads)
    record.count(call.index, span, lists.kept_tokens, method.query_block_tokens, list_heads)
    sample = RecallSample(chunk.query, keys, lists, method.query_block_tokens, platform.scale, platform.logits_soft_cap)
    if record.measures_recall(call.index, span):
        record.metrics.observe_recall("prefill", method.name, sample)
    if row.guard is not None:
        guard.check_chunk(row.guard, call.index, method.name, sample)


def attend_prompt_chunk(executor: Executor, method: PrefillMethod, lists: PageList, chunk: PromptChunk) -> None:
    """Run the stock kernel over a prompt chunk's lists.

    Args:
        executor: the platform's.
        method: what chose the lists.
        lists: as `PrefillMethod.select` returns them.
        chunk: written.
    """
    tokens, query_heads, _ = chunk.query.shape
    kv_heads, block_size = chunk.kv_cache.shape[1:3]
    list_heads = method.list_heads(query_heads, kv_heads)
    rows = prompt_chunk_rows(tokens, method.query_block_tokens, list_heads, kv_heads, chunk.query.device)
    lists = PageList(lists.pages[rows.lists], lists.kept_tokens[rows.lists], lists.page_size_tokens)
    pages = to_physical(lists, chunk.request_blocks, rows.kv_head, block_size, kv_heads)
    queries = rows.gather(chunk.query)
    attended = torch.empty_like(queries)
    launch = Launch(
        rows.starts, method.query_block_tokens, pages, lists.kept_tokens, lists.page_size_tokens, rows.list_head
    )
    executor.run(launch, queries, attended, chunk.kv_cache, chunk.scale)
    rows.scatter(attended, chunk.output)


@dataclass(frozen=True)
class PromptChunkRows:
    """Rows of a prompt chunk in the order of execution: each head's last query blocks, then the others head by head.

    Methods that read everything for the last queries of a prompt chunk make those rows many times longer than the
    others. A kernel that met one at the end would leave all but one multiprocessor idle.

    Attributes:
        lists: int64 ``[rows]`` which list, head-major, belongs to each row.
        kv_head: int64 ``[rows]`` which KV head it reads.
        list_head: int64 ``[rows]`` which of the heads that have lists of their own it has.
        starts: int32 ``[rows + 1]`` first query token of each row in what `gather` returns.
        list_heads: heads that have lists of their own.
        first_last: token of the prompt chunk that begins the last query blocks.
    """

    lists: torch.Tensor
    kv_head: torch.Tensor
    list_head: torch.Tensor
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
def prompt_chunk_rows(
    tokens: int, query_block: int, list_heads: int, kv_heads: int, device: torch.device
) -> PromptChunkRows:
    """Rows of a prompt chunk.

    Args:
        tokens: of the prompt chunk.
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
    list_head = lists // blocks
    kv_head = list_head // (list_heads // kv_heads)
    lists, kv_head, list_head = to_device(torch.stack([lists, kv_head, list_head]), device)
    return PromptChunkRows(lists, kv_head, list_head, to_device(starts, device), list_heads, cut * query_block)
