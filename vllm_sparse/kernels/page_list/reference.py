"""Selection maps to page lists and to addresses, in PyTorch: the specification, without a device-to-host sync."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparse.pages import PageList
from vllm_sparse.step.chunks import LaunchRows, PromptBlocks


def blocks_to_pages(
    block_mask: torch.Tensor, block_size_tokens: int, page_size_tokens: int, seq_len: int
) -> torch.Tensor:
    """Widen a map over selection blocks to a map over pages: a page is kept if it overlaps a kept block.

    Args:
        block_mask: bool ``[..., ceil(context / block)]``.
        block_size_tokens: tokens of a selection block.
        page_size_tokens: tokens of a page; neither size has to divide the other.
        seq_len: tokens in the request's cache.

    Returns:
        bool ``[..., ceil(context / page)]``, a superset of the blocks in tokens.
    """
    if block_size_tokens == page_size_tokens:
        return block_mask
    num_pages = -(-seq_len // page_size_tokens)
    first_token = torch.arange(num_pages, device=block_mask.device) * page_size_tokens
    last_token = (first_token + page_size_tokens - 1).clamp(max=seq_len - 1)
    first_block = first_token // block_size_tokens
    last_block = last_token // block_size_tokens
    page_mask = block_mask[..., first_block]
    for step in range(1, page_size_tokens // block_size_tokens + 2):
        page_mask = page_mask | block_mask[..., torch.minimum(first_block + step, last_block)]
    return page_mask


def query_blocks(
    query_tokens: int, seq_len: int, query_block_tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last absolute position of each query block of a prompt chunk.

    Args:
        query_tokens: of the prompt chunk, which ends the context.
        seq_len: tokens in the request's cache.
        query_block_tokens: tokens of a query block.
        device: of the result.

    Returns:
        Two int64 ``[ceil(query_tokens / query_block_tokens)]``.
    """
    first = torch.arange(seq_len - query_tokens, seq_len, query_block_tokens, device=device)
    return first, (first + query_block_tokens - 1).clamp(max=seq_len - 1)


@dataclass(frozen=True)
class ListGrid:
    """Queries and keys that a map over key blocks covers, and the form of the lists that come of it.

    Attributes:
        query_tokens: queries of the prompt chunk, which ends the context; 1 in decoding.
        seq_len: tokens in the request's cache.
        query_block_tokens: query tokens that share a list.
        key_block_tokens: tokens of a key block of the map.
        page_size_tokens: page size of the executor.
        list_heads: heads with lists of their own; divides the query heads.
    """

    query_tokens: int
    seq_len: int
    query_block_tokens: int
    key_block_tokens: int
    page_size_tokens: int
    list_heads: int


def block_lists(block_mask: torch.Tensor, grid: ListGrid) -> PageList:
    """The lists of a map over key blocks; arguments as in the public function."""
    block_size_tokens, page_size_tokens = grid.key_block_tokens, grid.page_size_tokens
    first, last = query_blocks(grid.query_tokens, grid.seq_len, grid.query_block_tokens, block_mask.device)
    if grid.list_heads != block_mask.shape[0]:
        block_mask = block_mask.view(grid.list_heads, -1, *block_mask.shape[1:]).any(1)
    block = torch.arange(block_mask.shape[-1], device=block_mask.device)
    own = (block >= (first // block_size_tokens).unsqueeze(1)) & (block <= (last // block_size_tokens).unsqueeze(1))
    page_mask = blocks_to_pages(block_mask | own, block_size_tokens, page_size_tokens, grid.seq_len)
    page = torch.arange(page_mask.shape[-1], device=block_mask.device)
    page_mask = page_mask & (page <= (last // page_size_tokens).unsqueeze(1))
    return compact_pages(page_mask.flatten(0, 1), last.repeat(grid.list_heads), page_size_tokens)


def write_lists(
    block_mask: torch.Tensor, blocks: PromptBlocks, key_block_tokens: int, list_heads: int, lists: PageList
) -> None:
    """Write the lists of prompt chunks; arguments as in the public function."""
    for chunk, span in enumerate(blocks.spans):
        grid = ListGrid(
            span.query_tokens,
            span.seq_len,
            blocks.query_block_tokens,
            key_block_tokens,
            lists.page_size_tokens,
            list_heads,
        )
        mask = block_mask[:, blocks.starts[chunk] : blocks.starts[chunk + 1], : -(-span.seq_len // key_block_tokens)]
        found = block_lists(mask, grid)
        rows = blocks.lists_of(chunk, list_heads)
        lists.pages[rows, : found.pages.shape[1]] = found.pages
        lists.kept_tokens[rows] = found.kept_tokens


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


def to_physical(
    page_list: PageList, block_table: torch.Tensor, row_kv_head: torch.Tensor, pages_per_block: int, num_kv_heads: int
) -> torch.Tensor:
    """Logical pages to page numbers of the per-head view of the cache; arguments as in `vllm_sparse.pages`."""
    logical_block = (page_list.pages // pages_per_block).long()
    block = block_table[logical_block] if block_table.dim() == 1 else block_table.gather(1, logical_block)
    head = row_kv_head.to(block.dtype).unsqueeze(1)
    return ((block * num_kv_heads + head) * pages_per_block + page_list.pages % pages_per_block).to(torch.int32)


def launch_lists(
    page_list: PageList, rows: LaunchRows, block_table: torch.Tensor, pages_per_block: int, num_kv_heads: int
) -> PageList:
    """Lists in the order of execution; arguments as in the public function."""
    kept_tokens = page_list.kept_tokens[rows.lists]
    # Past the live part there may be anything, which is no page.
    live = torch.arange(page_list.pages.shape[1], device=kept_tokens.device) * page_list.page_size_tokens
    pages = page_list.pages[rows.lists].masked_fill(live >= kept_tokens.unsqueeze(1), 0)
    lists = PageList(pages, kept_tokens, page_list.page_size_tokens)
    physical = to_physical(lists, block_table[rows.table_row], rows.kv_head, pages_per_block, num_kv_heads)
    return PageList(physical, kept_tokens, page_list.page_size_tokens)
