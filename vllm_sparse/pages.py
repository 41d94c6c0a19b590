"""Page lists: what a selection method hands to an executor, and how it becomes physical.

A *row* is one unit that shares one list: in prefill a (head, query block) of one request's chunk, in decode a
(request, head). A list holds **logical** page numbers of the request (page ``n`` holds tokens ``n * page_size`` to
``(n + 1) * page_size - 1``); `vllm_sparse.kernels.page_list.to_physical` is the only place that turns
them into addresses in the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PageList:
    """Pages that each row may read.

    Invariants, each with a test: the live part of a row (its first `kept_pages` entries) is strictly ascending;
    its last entries are the contiguous pages that hold the row's own query positions, so that causal masking
    anchored at the bottom right is exact for any chunk start; entries past the live part are never read.

    Attributes:
        pages: ``[rows, width]`` int32 logical page numbers.
        kept_tokens: ``[rows]`` int32 tokens in the live part; only the last page may be partly filled.
        page_size_tokens: tokens in one page.
    """

    pages: torch.Tensor
    kept_tokens: torch.Tensor
    page_size_tokens: int

    @property
    def kept_pages(self) -> torch.Tensor:
        """``[rows]`` int32 number of live entries."""
        return (self.kept_tokens + self.page_size_tokens - 1) // self.page_size_tokens


def empty_lists(rows: int, width: int, page_size_tokens: int, device: torch.device) -> PageList:
    """Room for lists, which holds anything; arguments as the attributes of `PageList` have them."""
    pages = torch.empty(rows, width, dtype=torch.int32, device=device)
    return PageList(pages, torch.empty(rows, dtype=torch.int32, device=device), page_size_tokens)


def concatenate(lists: list[PageList]) -> PageList:
    """Stack the rows of several lists of one page size, padding to the widest.

    Raises:
        ValueError: the lists have different page sizes, or there is none.
    """
    sizes = {page_list.page_size_tokens for page_list in lists}
    if len(sizes) != 1:
        raise ValueError(f"page lists of one page size are needed, got sizes {sorted(sizes)}")
    if len(lists) == 1:
        return lists[0]
    width = max(page_list.pages.shape[1] for page_list in lists)
    padded = [torch.nn.functional.pad(page_list.pages, (0, width - page_list.pages.shape[1])) for page_list in lists]
    return PageList(torch.cat(padded), torch.cat([page_list.kept_tokens for page_list in lists]), sizes.pop())


def page_mask(page_list: PageList, pages: int) -> torch.Tensor:
    """Lists as a map.

    Args:
        page_list: the lists.
        pages: pages of the context.

    Returns:
        bool ``[rows, pages]``.
    """
    rows, width = page_list.pages.shape
    device = page_list.pages.device
    live = torch.arange(width, device=device) < page_list.kept_pages.unsqueeze(1)
    # Entries past the live part of a row go to one spare column, which is cut off.
    mask = torch.zeros(rows, pages + 1, dtype=torch.bool, device=device)
    mask.scatter_(1, torch.where(live, page_list.pages.long(), pages), True)
    return mask[:, :pages]


def to_logical(
    slots: torch.Tensor, block_table: torch.Tensor, block_size_tokens: int, num_kv_heads: int
) -> torch.Tensor:
    """Translate places of single tokens in the per-head view of a cache back to positions of their request.

    Args:
        slots: int32 ``[rows, width]``, as `kernels.page_list.to_physical` gives them for pages of one token.
        block_table: int32 ``[blocks]`` of the request, as many as its context fills.
        block_size_tokens: tokens of a KV-cache block.
        num_kv_heads: KV heads in the cache.

    Returns:
        int64 ``[rows, width]``; anything for places in blocks that are not the request's.
    """
    blocks, order = block_table.sort()
    place = torch.searchsorted(blocks, slots // (num_kv_heads * block_size_tokens)).clamp(max=blocks.shape[0] - 1)
    return order[place] * block_size_tokens + slots % block_size_tokens
