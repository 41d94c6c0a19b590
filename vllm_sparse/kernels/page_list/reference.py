"""Selection maps to page lists, in PyTorch: the specification, on any device, without a device-to-host sync."""

from __future__ import annotations

import torch

from vllm_sparse.pages import PageList


def blocks_to_pages(
    block_mask: torch.Tensor, block_size_tokens: int, page_size_tokens: int, context_tokens: int
) -> torch.Tensor:
    """Widen a map over selection blocks to a map over pages: a page is kept if it overlaps a kept block.

    Args:
        block_mask: bool ``[..., ceil(context / block)]``.
        block_size_tokens: tokens of a selection block.
        page_size_tokens: tokens of a page; neither size has to divide the other.
        context_tokens: tokens in the request's cache.

    Returns:
        bool ``[..., ceil(context / page)]``, a superset of the blocks in tokens.
    """
    if block_size_tokens == page_size_tokens:
        return block_mask
    num_pages = -(-context_tokens // page_size_tokens)
    first_token = torch.arange(num_pages, device=block_mask.device) * page_size_tokens
    last_token = (first_token + page_size_tokens - 1).clamp(max=context_tokens - 1)
    first_block = first_token // block_size_tokens
    last_block = last_token // block_size_tokens
    page_mask = block_mask[..., first_block]
    for step in range(1, page_size_tokens // block_size_tokens + 2):
        page_mask = page_mask | block_mask[..., torch.minimum(first_block + step, last_block)]
    return page_mask


def compact_pages(page_mask: torch.Tensor, last_position: torch.Tensor, page_size_tokens: int) -> PageList:
    """Compact a map over pages into ascending lists.

    Args:
        page_mask: bool ``[rows, pages]``; the page that holds the row's last query position is set, none after it.
        last_position: integer ``[rows]`` absolute position of the row's last query token.
        page_size_tokens: tokens of a page.

    Returns:
        The lists, as wide as the map; entries past the live part are 0.
    """
    rows, num_pages = page_mask.shape
    device = page_mask.device
    rank = page_mask.cumsum(1, dtype=torch.int32)
    # Dropped pages go to one spare column, which is cut off: no data-dependent shape, so no sync.
    slot = torch.where(page_mask, rank - 1, num_pages).long()
    pages = torch.zeros(rows, num_pages + 1, dtype=torch.int32, device=device)
    pages.scatter_(1, slot, torch.arange(num_pages, dtype=torch.int32, device=device).expand(rows, -1))
    kept_pages = rank[:, -1]
    in_last_page = (last_position % page_size_tokens + 1).to(torch.int32)
    kept_tokens = (kept_pages - 1) * page_size_tokens + in_last_page
    return PageList(pages[:, :num_pages], kept_tokens.to(torch.int32), page_size_tokens)
