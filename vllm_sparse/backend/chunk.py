"""Attention of one request's prefill chunk over its page lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_sparse.executors import Executor, Launch
from vllm_sparse.pages import PageList, to_physical

if TYPE_CHECKING:
    from vllm_sparse.methods.base import PrefillMethod


def attend_chunk(
    executor: Executor,
    method: PrefillMethod,
    lists: PageList,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    request_blocks: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Run the stock kernel over a chunk's lists.

    Args:
        executor: the platform's.
        method: what chose the lists.
        lists: as `PrefillMethod.select` returns them.
        query: ``[chunk, query_heads, head_size]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``, head-major.
        request_blocks: int32 ``[blocks]`` of the request.
        scale: softmax scale.

    Returns:
        ``[chunk, query_heads, head_size]``.
    """
    tokens, query_heads, _ = query.shape
    kv_heads, block_size = kv_cache.shape[1:3]
    having = method.list_heads(query_heads, kv_heads)
    row_heads, starts = chunk_rows(tokens, method.query_block, having, query.device)
    pages = to_physical(lists, request_blocks, row_heads * kv_heads // having, block_size, kv_heads)
    # Head-major copies of the queries: a row is a run of tokens, each with the heads that share its list.
    rows = head_major(query, having)
    attended = torch.empty_like(rows)
    launch = Launch(starts, method.query_block, pages, lists.kept_tokens, lists.page_size_tokens)
    executor.run(launch, rows, attended, kv_cache, scale)
    return token_major(attended, having)


def head_major(chunk: torch.Tensor, list_heads: int) -> torch.Tensor:
    """``[tokens, query_heads, head_size]`` to ``[list_heads * tokens, query_heads / list_heads, head_size]``."""
    tokens, _, head_size = chunk.shape
    grouped = chunk.reshape(tokens, list_heads, -1, head_size).transpose(0, 1)
    return grouped.reshape(list_heads * tokens, -1, head_size)


def token_major(rows: torch.Tensor, list_heads: int) -> torch.Tensor:
    """Inverse of `head_major`."""
    grouped = rows.view(list_heads, -1, rows.shape[1], rows.shape[2]).transpose(0, 1)
    return grouped.flatten(1, 2)


def chunk_rows(
    tokens: int, query_block_tokens: int, list_heads: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a head-major chunk: list head ``[rows]`` and int32 first token ``[rows + 1]`` of each."""
    blocks = -(-tokens // query_block_tokens)
    head = torch.arange(list_heads, device=device).repeat_interleave(blocks)
    offset = torch.arange(blocks, device=device).repeat(list_heads) * query_block_tokens
    starts = torch.empty(list_heads * blocks + 1, dtype=torch.int32, device=device)
    starts[:-1] = head * tokens + offset
    starts[-1:] = list_heads * tokens
    return head, starts
