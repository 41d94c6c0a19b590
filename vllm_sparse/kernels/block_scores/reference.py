"""DHSA's scores and selection in PyTorch: the specification, on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparse.kernels.coverage.reference import reaching_count, top_mask
from vllm_sparse.step.chunks import PromptBlocks


@dataclass(frozen=True)
class KeyBlocks:
    """A context's keys, cut into key blocks.

    Attributes:
        representation: float32 ``[kv_heads, key_blocks, head_size]`` length-normalised mean ``sqrt(length) * mean`` of
            the keys of each key block, because a plain mean of ``n`` noisy keys shrinks like ``1 / sqrt(n)``; or
            ``[kv_heads, key_blocks, 2 * head_size]``, in each channel what a negative and what a positive number of the
            query is multiplied by, such as the least and the largest number of a key.
        start: int64 ``[key_blocks + 1]`` first position of each key block, ascending from 0, and the end of the last.
            Key blocks that start at the context's end do not exist.
        look_ahead_tokens: number of keys after a key block that decide where it ends.
    """

    representation: torch.Tensor
    start: torch.Tensor
    look_ahead_tokens: int


@dataclass(frozen=True)
class PageSelection:
    """How `kept_pages` selects.

    Attributes:
        query_block_tokens: query tokens that share a selection; a power of two.
        page_tokens: tokens of a page.
        score_heads: heads with scores of their own. If they are fewer than the query heads, consecutive heads share the
            mean of their representations, for queries and for keys.
        sink_tokens: first tokens of the context, whose pages are forced.
    """

    query_block_tokens: int
    page_tokens: int
    score_heads: int
    sink_tokens: int


def merge_heads(representation: torch.Tensor, heads: int) -> torch.Tensor:
    """Mean over consecutive heads: ``[n, ...]`` to ``[heads, ...]``, `heads` a divisor of ``n``."""
    if representation.shape[0] == heads:
        return representation
    return representation.view(heads, -1, *representation.shape[1:]).mean(1)


def pooled_queries(query: torch.Tensor, query_block_tokens: int) -> torch.Tensor:
    """``sqrt(length) * mean`` of each query block; arguments as in the public function."""
    blocks = torch.split(query, query_block_tokens)
    return torch.stack([block.sum(0, dtype=torch.float32) / block.shape[0] ** 0.5 for block in blocks], dim=1)


def chunk_queries(query: torch.Tensor, blocks: PromptBlocks) -> torch.Tensor:
    """`pooled_queries` of prompt chunks; arguments as in the public function."""
    lengths = (blocks.last_query - blocks.first_query + 1).tolist()
    each = [
        pooled_queries(query[first : first + length], length)
        for first, length in zip(blocks.first_token.tolist(), lengths, strict=True)
    ]
    return torch.cat(each, dim=1)


def for_bounds(queries: torch.Tensor) -> torch.Tensor:
    """Queries' negative numbers, then their positive ones, so that a product with bounds of keys bounds all products.

    Args:
        queries: float32 ``[..., head_size]``; the result has twice as many numbers.
    """
    return torch.cat((queries.clamp(max=0), queries.clamp(min=0)), dim=-1)


def page_scores(
    queries: torch.Tensor, representation: torch.Tensor, first_key_block: torch.Tensor, last_key_block: torch.Tensor
) -> torch.Tensor:
    """Largest score of the key blocks that each page overlaps: float32 ``[heads, query_blocks, pages]``.

    Args:
        queries: float32 ``[heads, query_blocks, head_size]``.
        representation: float32 ``[key_heads, key_blocks, head_size]``; each key head serves consecutive heads.
        first_key_block: int32 ``[pages]`` key block that holds each page's first token.
        last_key_block: int32 ``[pages]`` key block that holds each page's last token.
    """
    heads, blocks, head_size = queries.shape
    key_heads = representation.shape[0]
    grouped = queries.view(key_heads, -1, head_size)
    scores = torch.bmm(grouped, representation.transpose(1, 2)).view(heads, blocks, -1)
    page = scores[..., first_key_block]
    for step in range(1, int((last_key_block - first_key_block).max()) + 1):
        page = torch.maximum(page, scores[..., torch.minimum(first_key_block + step, last_key_block)])
    return page


def chunk_scores(
    queries: torch.Tensor,
    representation: torch.Tensor,
    first_key_block: torch.Tensor,
    last_key_block: torch.Tensor,
    blocks: PromptBlocks,
) -> torch.Tensor:
    """`page_scores` of prompt chunks; here minus infinity for pages past a chunk's context.

    Args:
        queries: float32 ``[heads, blocks, head_size]``.
        representation: float32 ``[key_heads, chunks, key_blocks, head_size]``, anything past a chunk's context.
        first_key_block: int32 ``[chunks, pages]`` key block that holds each page's first token; 1 past the context.
        last_key_block: int32 ``[chunks, pages]`` key block that holds each page's last token; 0 past the context.
        blocks: query blocks of the chunks.
    """
    scores = queries.new_full((*queries.shape[:2], first_key_block.shape[1]), float("-inf"))
    for chunk in range(len(blocks.spans)):
        rows = slice(blocks.starts[chunk], blocks.starts[chunk + 1])
        pages = int((first_key_block[chunk] <= last_key_block[chunk]).sum())
        edges = first_key_block[chunk, :pages], last_key_block[chunk, :pages]
        keys = representation[:, chunk, : int(edges[1].max()) + 1]
        scores[:, rows, :pages] = page_scores(queries[:, rows].contiguous(), keys, *edges)
    return scores


def select_pages(
    scores: torch.Tensor,
    sink_pages: int,
    band_page: torch.Tensor,
    last_page: torch.Tensor,
    budget_pages: torch.Tensor,
    covered_mass: float | None = None,
) -> torch.Tensor:
    """Forced pages, then those of the highest scores up to the budget; of equal scores the lower page wins.

    Of the latter, with `covered_mass`, only those among the fewest pages in reach whose scores add up to it.

    Args:
        scores: float32 ``[heads, query_blocks, pages]``, none NaN.
        sink_pages: first pages, forced.
        band_page: int32 ``[query_blocks]`` page from which on all pages up to `last_page` are forced.
        last_page: int32 ``[query_blocks]`` last page that the query block may read; at least `band_page`.
        budget_pages: int32 ``[query_blocks]`` pages to keep; more if more are forced, fewer if fewer are in reach.
        covered_mass: sum that is enough, of scores that are not negative; None: no sum is.

    Returns:
        bool, the shape of `scores`.
    """
    pages = scores.shape[-1]
    page = torch.arange(pages, device=scores.device)
    causal = page <= last_page.unsqueeze(1)
    forced = causal & ((page < sink_pages) | (page >= band_page.unsqueeze(1)))
    competes = causal & ~forced
    free = (budget_pages - forced.sum(1)).clamp(min=0)
    # Score and page in one integer, so that no two are equal. Adding zero turns a negative zero into a positive one.
    bits = (scores + 0.0).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    rank = ((ordered << 32) - page).masked_fill_(~competes, torch.iinfo(torch.int64).min)
    best = rank.topk(min(int(budget_pages.max()), pages), dim=-1).indices
    within = torch.arange(best.shape[-1], device=scores.device) < free.unsqueeze(1)
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    chosen = chosen.scatter_(-1, best, within.expand_as(best)) & competes
    if covered_mass is not None:
        mass = scores.clamp(min=0).masked_fill(~causal, 0).flatten(0, 1)
        chosen &= top_mask(mass, reaching_count(mass, covered_mass)).view_as(chosen)
    return forced | chosen
