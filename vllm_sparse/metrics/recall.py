"""Attention-mass recall: the share of the true softmax that a list keeps, of a few queries of one layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_sparse.pages import PageList, page_mask

if TYPE_CHECKING:
    from vllm_sparse.keys import PagedKeys

SAMPLED_QUERIES = 4
# Keys that are scored at a time, so that the room needed does not grow with the context.
SEGMENT_TOKENS = 8192


def attention_recall(
    query: torch.Tensor, keys: PagedKeys, lists: PageList, query_block: int, scale: float
) -> torch.Tensor:
    """Softmax mass of the keys in a query's list over that of all keys in its reach.

    Measured on `SAMPLED_QUERIES` query tokens that are spread evenly over the chunk, in each query head.

    Args:
        query: ``[chunk, query_heads, head_size]``, at the last positions of the context.
        keys: the request's keys, the chunk's included.
        lists: of ``list_heads * ceil(chunk / query_block)`` rows, head-major.
        query_block: query tokens that share a list.
        scale: softmax scale.

    Returns:
        float32 ``[query_heads]``, 0 to 1, mean over the sampled queries.
    """
    chunk, query_heads, head_size = query.shape
    context, device = keys.context_tokens, query.device
    sampled = min(SAMPLED_QUERIES, chunk)
    # The middle of each of as many equal parts.
    token = (torch.arange(sampled, device=device) * 2 + 1) * chunk // (2 * sampled)
    position = (context - chunk + token).view(-1, 1, 1)
    kept_pages = _page_mask(lists, token // query_block, -(-chunk // query_block), context)
    queries = query[token].float().view(sampled, keys.num_kv_heads, -1, head_size)
    mass = torch.full((2, sampled, query_heads), float("-inf"), device=device)
    for start in range(0, context, SEGMENT_TOKENS):
        stop = min(start + SEGMENT_TOKENS, context)
        logits = torch.einsum("skgd,knd->skgn", queries, keys.read(start, stop).float()).flatten(1, 2) * scale
        key = torch.arange(start, stop, device=device)
        logits = logits.masked_fill(key > position, float("-inf"))
        kept = kept_pages[..., key // lists.page_size_tokens]
        kept = kept.repeat_interleave(query_heads // kept.shape[1], dim=1)
        segment = torch.stack([logits.masked_fill(~kept, float("-inf")), logits]).logsumexp(3)
        mass = torch.logaddexp(mass, segment)
    return (mass[0] - mass[1]).exp().mean(0)


def _page_mask(lists: PageList, block: torch.Tensor, blocks: int, context_tokens: int) -> torch.Tensor:
    """Pages in the lists of some query blocks of each head: bool ``[blocks asked for, list_heads, pages]``."""
    list_heads = lists.kept_tokens.shape[0] // blocks
    row = (torch.arange(list_heads, device=block.device) * blocks + block.unsqueeze(1)).flatten()
    of_rows = PageList(lists.pages[row], lists.kept_tokens[row], lists.page_size_tokens)
    pages = -(-context_tokens // lists.page_size_tokens)
    return page_mask(of_rows, pages).view(-1, list_heads, pages)
