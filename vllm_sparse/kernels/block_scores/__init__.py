"""DHSA's selection: the pages that each query block reads, by the scores of the key blocks that the pages overlap."""

from __future__ import annotations

from types import ModuleType

import torch

from vllm_sparse.kernels.block_scores import reference
from vllm_sparse.kernels.block_scores.reference import KeyBlocks, PageSelection
from vllm_sparse.step.chunks import PromptBlocks

__all__ = [
    "KeyBlocks",
    "PageSelection",
    "best_pages",
    "chunk_page_scores",
    "page_scores",
    "pooled_queries",
    "select_pages",
]


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
    pooled = pooled_queries(query, selection.query_block_tokens)
    queries, representation = _merged(pooled, key_blocks.representation, selection.score_heads)
    scores: torch.Tensor = _implementation(query).page_scores(queries, representation, first_key_block, last_key_block)
    return scores


def chunk_page_scores(
    query: torch.Tensor,
    representation: torch.Tensor,
    first_key_block: torch.Tensor,
    last_key_block: torch.Tensor,
    blocks: PromptBlocks,
    score_heads: int,
) -> torch.Tensor:
    """`page_scores` of prompt chunks, of all in one launch on CUDA.

    Args:
        query: ``[step tokens, query_heads, head_size]``.
        representation: of each chunk's key blocks as in `KeyBlocks`, ``[kv_heads, chunks, key_blocks, ...]``, anything
            past a chunk's context.
        first_key_block: int32 ``[chunks, pages]`` key block that holds each page's first token; 1 past the context.
        last_key_block: int32 ``[chunks, pages]`` key block that holds each page's last token; 0 past the context.
        blocks: query blocks of the chunks.
        score_heads: as in `PageSelection`.

    Returns:
        float32 ``[score_heads, blocks, pages]``, not NaN, past a chunk's context anything else.
    """
    implementation = _implementation(query)
    pooled = implementation.chunk_queries(query, blocks)
    queries, representation = _merged(pooled, representation, score_heads)
    scores: torch.Tensor = implementation.chunk_scores(queries, representation, first_key_block, last_key_block, blocks)
    return scores


def _merged(queries: torch.Tensor, representation: torch.Tensor, score_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled queries and key blocks of the heads with scores, in as many numbers as one another."""
    queries = reference.merge_heads(queries, score_heads)
    representation = reference.merge_heads(representation, min(representation.shape[0], score_heads))
    if representation.shape[-1] != queries.shape[-1]:
        queries = reference.for_bounds(queries)
    return queries, representation


def best_pages(
    scores: torch.Tensor,
    band_start: torch.Tensor,
    last_query: torch.Tensor,
    budget_pages: torch.Tensor,
    selection: PageSelection,
    covered_mass: float | None = None,
) -> torch.Tensor:
    """Keep the forced pages of each query block, then the pages of the highest scores while its budget lasts.

    Forced are the pages of the sink, and those from `band_start` to the query block's last token; they are kept even
    beyond the budget. Of equal scores the lower page wins. With `covered_mass` the scores are masses, and other pages
    are kept only until the query block's highest masses add up to it.

    Runs in Triton on CUDA, else in PyTorch; without a device-to-host sync.

    Args:
        scores: float32 ``[heads, query_blocks, pages]``, none NaN.
        band_start: integer ``[query_blocks]`` position from which on, up to its last query, a query block's pages are
            forced.
        last_query: integer ``[query_blocks]`` position of its last query.
        budget_pages: integer ``[query_blocks]`` pages to keep, the forced ones included.
        selection: size of pages, and the sink.
        covered_mass: sum of the highest scores, forced pages' among them, that is enough; negative scores count as
            nothing. None: what the budget allows.

    Returns:
        bool, the shape of `scores`.
    """
    page_tokens = selection.page_tokens
    return select_pages(
        scores,
        -(-selection.sink_tokens // page_tokens),
        (band_start // page_tokens).int(),
        (last_query // page_tokens).int(),
        budget_pages.int(),
        covered_mass,
    )


def select_pages(
    scores: torch.Tensor,
    sink_pages: int,
    band_page: torch.Tensor,
    last_page: torch.Tensor,
    budget_pages: torch.Tensor,
    covered_mass: float | None = None,
) -> torch.Tensor:
    """As `best_pages`, by pages, in one launch on CUDA.

    Args:
        scores: as there.
        sink_pages: first pages, forced.
        band_page: int32 ``[query_blocks]`` page from which on all pages up to `last_page` are forced.
        last_page: int32 ``[query_blocks]`` last page that the query block may read; at least `band_page`.
        budget_pages: int32 ``[query_blocks]`` pages to keep.
        covered_mass: as there.
    """
    sink_pages = min(sink_pages, scores.shape[2])
    select = _implementation(scores).select_pages
    kept: torch.Tensor = select(scores, sink_pages, band_page, last_page, budget_pages, covered_mass)
    return kept
