"""DHSA's selection: the pages that each query block reads, by the scores of the key blocks that the pages overlap."""

from __future__ import annotations

from types import ModuleType

import torch

from vllm_sparse.kernels.block_scores import reference
from vllm_sparse.kernels.block_scores.reference import KeyBlocks, PageSelection

__all__ = ["KeyBlocks", "PageSelection", "best_pages", "page_scores", "pooled_queries"]


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


def page_scores(query: torch.Tensor, key_blocks: KeyBlocks, seq_len: int, selection: PageSelection) -> torch.Tensor:
    """What each page is worth to each query block.

    A query block is represented by ``sqrt(length) * mean``, and a key block by the same or by bounds of its keys. The
    score of a key block is the product of the two (with means: DHSA, arXiv 2510.24606), that of a page the largest
    among the key blocks that it overlaps (this project's way to whole pages). Only the order of a query block's scores
    counts, so there is no scale and no softmax.

    Runs in Triton on CUDA, else in PyTorch; without a device-to-host sync.

    Args:
        query: ``[query_tokens, query_heads, head_size]`` of a prompt chunk, at the last positions of the context.
        key_blocks: the context's keys in key blocks.
        seq_len: tokens in the request's cache.
        selection: sizes of query blocks and pages, and the heads that share scores.

    Returns:
        float32 ``[score_heads, ceil(query_tokens / query_block_tokens), ceil(context / page_tokens)]``.
    """
    page_start = torch.arange(0, seq_len, selection.page_tokens, device=query.device)
    page_end = (page_start + (selection.page_tokens - 1)).clamp(max=seq_len - 1)
    edges = torch.searchsorted(key_blocks.start, torch.stack((page_start, page_end)), right=True, out_int32=True) - 1
    first_key_block, last_key_block = edges.unbind(0)
    queries = reference.merge_heads(pooled_queries(query, selection.query_block_tokens), selection.score_heads)
    key_heads = min(key_blocks.representation.shape[0], selection.score_heads)
    representation = reference.merge_heads(key_blocks.representation, key_heads)
    if representation.shape[2] != queries.shape[2]:
        queries = reference.for_bounds(queries)
    scores: torch.Tensor = _implementation(query).page_scores(queries, representation, first_key_block, last_key_block)
    return scores


def best_pages(
    scores: torch.Tensor,
    band_start: torch.Tensor,
    last_query: torch.Tensor,
    budget_pages: torch.Tensor,
    selection: PageSelection,
) -> torch.Tensor:
    """Keep the forced pages of each query block, then the pages of the highest scores while its budget lasts.

    Forced are the pages of the sink, and those from `band_start` to the query block's last token; they are kept even
    beyond the budget. Of equal scores the lower page wins.

    Runs in Triton on CUDA, else in PyTorch; without a device-to-host sync.

    Args:
        scores: float32 ``[heads, query_blocks, pages]``, none NaN.
        band_start: integer ``[query_blocks]`` position from which on, up to its last query, a query block's pages are
            forced.
        last_query: integer ``[query_blocks]`` position of its last query.
        budget_pages: integer ``[query_blocks]`` pages to keep, the forced ones included.
        selection: size of pages, and the sink.

    Returns:
        bool, the shape of `scores`.
    """
    page_tokens = selection.page_tokens
    kept: torch.Tensor = _implementation(scores).select_pages(
        scores,
        min(-(-selection.sink_tokens // page_tokens), scores.shape[2]),
        (band_start // page_tokens).int(),
        (last_query // page_tokens).int(),
        budget_pages.int(),
    )
    return kept
