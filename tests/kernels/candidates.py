"""Random lists of candidate pages."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.page_list import ListGrid, query_blocks, reference
from vllm_sparse.pages import PageList


def candidate_lists(
    heads: int,
    chunk: int,
    context: int,
    query_block: int,
    page: int,
    generator: torch.Generator,
    share: float | None = None,
) -> tuple[torch.Tensor, PageList]:
    """Lists as a selection's first stage makes them, on the CPU.

    Args:
        heads: that have lists of their own.
        chunk: queries, which end the context.
        context: tokens.
        query_block: queries that share a list.
        page: tokens of a page.
        generator: decides which pages.
        share: of the pages that are listed, at least; None for a random one.

    Returns:
        bool ``[heads, query_blocks, pages]``, the query blocks' own pages included and none of their future, and the
        same as lists.
    """
    blocks, pages = -(-chunk // query_block), -(-context // page)
    chosen = torch.rand(heads, blocks, pages, generator=generator)
    mask = chosen < (torch.rand((), generator=generator) if share is None else share)
    lists = reference.block_lists(mask, ListGrid(chunk, context, query_block, page, page, heads))
    first, last = query_blocks(chunk, context, query_block, mask.device)
    number = torch.arange(pages)
    own = (number >= (first // page).unsqueeze(1)) & (number <= (last // page).unsqueeze(1))
    return (mask | own) & (number <= (last // page).unsqueeze(1)), lists
