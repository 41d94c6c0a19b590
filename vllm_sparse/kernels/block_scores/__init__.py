"""DHSA's selection: the pages that each query block reads, by the scores of the key blocks that the pages overlap."""

from __future__ import annotations

from types import ModuleType

import torch

from vllm_sparse.kernels.block_scores import reference
from vllm_sparse.kernels.block_scores.reference import KeyBlocks, PageSelection
from vllm_sparse.kernels.page_list import query_blocks

__all__ = ["KeyBlocks", "PageSelection", "kept_pages", "pooled_queries"]


def _implementation(query: torch.Tensor) -> ModuleType:
    if query.is_cuda:
        from vllm_sparse.kernels.block_scores import triton

        return triton
    return reference


def pooled_queries(query: torch.Tensor, query_block_tokens: int) -> torch.Tensor:
    """``sqrt(length) * mean`` of each query block.

    Args:
        query: ``[query_tokens, query_heads, head_size]``.
        query_block_tokens: query tokens of a query block; a power of two.

    Returns:
        float32 ``[query_heads, ceil(query_tokens / query_block_tokens), head_size]``.
    """
    pooled: torch.Tensor = _implementation(query).pooled_queries(query, query_block_tokens)
    return pooled


def kept_pages(
    query: torch.Tensor,
    key_blocks: KeyBlocks,
    seq_len: int,
    band_start: torch.Tensor,
    selection: PageSelection,
) -> torch.Tensor:
    """Keep the forced pages of each query block, then the pages of the highest scores while the budget lasts.

    A query block and a key block are both represented by ``sqrt(length) * mean``. The score of a key block is the
    product of the two (DHSA, arXiv 2510.24606), that of a page the largest among the key blocks that it overlaps (this
    project's way to whole pages). Only the order of the scores counts, so there is no scale and no softmax. Of equal
    scores the lower page wins.

    Runs in Triton on CUDA, else in PyTorch; without a device-to-host sync.

    Args:
        query: ``[query_tokens, query_heads, head_size]`` of a prompt chunk, at the last positions of the context.
        key_blocks: the context's keys in key blocks.
        seq_len: tokens in the request's cache.
        band_start: integer ``[query_blocks]`` position from which on, up to its last query, a query block's pages are
            forced.
        selection: sizes of query blocks and pages, the heads that share scores, sink and budget.

    Returns:
        bool ``[score_heads, ceil(query_tokens / query_block_tokens), ceil(context / page_tokens)]``.
    """
    implementation = _implementation(query)
    page_tokens = selection.page_tokens
    pages = -(-seq_len // page_tokens)
    page_start = torch.arange(0, seq_len, page_tokens, device=query.device)
    page_end = (page_start + (page_tokens - 1)).clamp(max=seq_len - 1)
    edges = torch.searchsorted(key_blocks.start, torch.stack((page_start, page_end)), right=True, out_int32=True) - 1
    first_key_block, last_key_block = edges.unbind(0)
    _, last_query = query_blocks(query.shape[0], seq_len, selection.query_block_tokens, query.device)

    queries = reference.merge_heads(pooled_queries(query, selection.query_block_tokens), selection.score_heads)
    key_heads = min(key_blocks.representation.shape[0], selection.score_heads)
    representation = reference.merge_heads(key_blocks.representation, key_heads)
    scores = implementation.page_scores(queries, representation, first_key_block, last_key_block)
    kept: torch.Tensor = implementation.select_pages(
        scores,
        min(-(-selection.sink_tokens // page_tokens), pages),
        (band_start // page_tokens).int(),
        (last_query // page_tokens).int(),
        -(-selection.budget_tokens // page_tokens),
    )
    return kept
