"""DHSA's selection: which pages of keys each query block keeps, by the scores of the chunks that the pages overlap."""

from __future__ import annotations

from types import ModuleType

import torch

from vllm_sparse.kernels.chunk_scores import reference
from vllm_sparse.kernels.chunk_scores.reference import KeyChunks
from vllm_sparse.kernels.page_list import query_blocks

__all__ = ["KeyChunks", "kept_pages", "pooled_queries"]


def _implementation(query: torch.Tensor) -> ModuleType:
    if query.is_cuda:
        from vllm_sparse.kernels.chunk_scores import triton

        return triton
    return reference


def pooled_queries(query: torch.Tensor, query_block: int) -> torch.Tensor:
    """``sqrt(length) * mean`` of each query block: float32 ``[query_heads, ceil(chunk / query_block), head_size]``.

    Args:
        query: ``[chunk, query_heads, head_size]``.
        query_block: query tokens of a block; a power of two.
    """
    pooled: torch.Tensor = _implementation(query).pooled_queries(query, query_block)
    return pooled


def kept_pages(
    query: torch.Tensor,
    chunks: KeyChunks,
    context_tokens: int,
    query_block: int,
    page_tokens: int,
    score_heads: int,
    sink_tokens: int,
    band_start: torch.Tensor,
    budget_tokens: int,
) -> torch.Tensor:
    """Keep the forced pages of each query block, then those of the highest scores while the budget lasts.

    A query block is represented as a chunk of keys is, by ``sqrt(length) * mean``; a chunk's score is the product of
    the two, a page's the largest of the chunks that it overlaps (DHSA, arXiv 2510.24606; the rounding to pages is this
    project's). Only the order counts, so there is no scale and no softmax. Equal scores: the lower page wins.

    Runs in Triton on CUDA, else in PyTorch; without a device-to-host sync.

    Args:
        query: ``[chunk, query_heads, head_size]``, at the last positions of the context.
        chunks: the context's keys in chunks.
        context_tokens: tokens in the request's cache.
        query_block: query tokens that share a selection.
        page_tokens: tokens of a page.
        score_heads: heads with scores of their own. If fewer than the query heads, consecutive heads share the mean of
            their representations, of queries as of keys.
        sink_tokens: first tokens, whose pages are forced.
        band_start: integer ``[query_blocks]`` position from which on, to its last query, a query block's pages are
            forced.
        budget_tokens: tokens to keep, the forced ones included; rounded up to pages. Forced pages stay even beyond it.

    Returns:
        bool ``[score_heads, ceil(chunk / query_block), ceil(context / page_tokens)]``.
    """
    implementation = _implementation(query)
    pages = -(-context_tokens // page_tokens)
    page_start = torch.arange(0, context_tokens, page_tokens, device=query.device)
    page_end = (page_start + (page_tokens - 1)).clamp(max=context_tokens - 1)
    edges = torch.searchsorted(chunks.start, torch.stack((page_start, page_end)), right=True, out_int32=True) - 1
    first_chunk, last_chunk = edges.unbind(0)
    _, last_query = query_blocks(query.shape[0], context_tokens, query_block, query.device)

    queries = reference.merge_heads(pooled_queries(query, query_block), score_heads)
    key_heads = min(chunks.representation.shape[0], score_heads)
    representation = reference.merge_heads(chunks.representation, key_heads)
    scores = implementation.page_scores(queries, representation, first_chunk, last_chunk)
    kept: torch.Tensor = implementation.select_pages(
        scores,
        min(-(-sink_tokens // page_tokens), pages),
        (band_start // page_tokens).int(),
        (last_query // page_tokens).int(),
        -(-budget_tokens // page_tokens),
    )
    return kept
