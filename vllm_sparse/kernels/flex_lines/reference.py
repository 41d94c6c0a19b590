"""FlexPrefill's lines in PyTorch: the specification, on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparse.kernels.page_list import query_blocks


@dataclass(frozen=True)
class BlockGrid:
    """Query blocks of a prompt chunk and key blocks of its context.

    Attributes:
        query_tokens: tokens of the prompt chunk, which ends the context.
        seq_len: tokens in the request's cache, the prompt chunk included.
        query_block_tokens: tokens of a query block, at most `key_block_tokens`.
        key_block_tokens: tokens of a key block, and width of a band.
    """

    query_tokens: int
    seq_len: int
    query_block_tokens: int
    key_block_tokens: int


def line_map(columns: torch.Tensor, bands: torch.Tensor, pooled: torch.Tensor | None, grid: BlockGrid) -> torch.Tensor:
    """Columns, bands and pooled pairs as one map; arguments and result as in the public function."""
    first, last = query_blocks(grid.query_tokens, grid.seq_len, grid.query_block_tokens, columns.device)
    touched = band_blocks(bands, first, last, grid.key_block_tokens) | columns.unsqueeze(1)
    return with_forced(touched if pooled is None else touched | pooled, first, last, grid.key_block_tokens)


def with_forced(
    touched: torch.Tensor, first_query: torch.Tensor, last_query: torch.Tensor, block_size_tokens: int
) -> torch.Tensor:
    """A map ``[heads, query_blocks, key_blocks]`` with the first key block and each query block's own, none later."""
    block = torch.arange(touched.shape[2], device=touched.device)
    own = block >= (first_query // block_size_tokens).unsqueeze(1)
    return (touched | own | (block == 0)) & (block <= (last_query // block_size_tokens).unsqueeze(1))


def band_blocks(
    bands: torch.Tensor, first_query: torch.Tensor, last_query: torch.Tensor, block_size_tokens: int
) -> torch.Tensor:
    """Key blocks that a query block meets in any selected band: bool ``[heads, query_blocks, key_blocks]``.

    Band ``n`` of query positions ``q0..q1`` covers keys ``q0 - (n + 1) * block + 1`` to ``q1 - n * block``, so key
    block ``J`` is touched by bands ``ceil((q0 + 2) / block) - J - 2`` to ``floor(q1 / block) - J``.
    """
    count = bands.shape[1]
    key_block = torch.arange(count, device=bands.device)
    lowest = -(-(first_query + 2) // block_size_tokens).unsqueeze(1) - key_block - 2
    highest = (last_query // block_size_tokens).unsqueeze(1) - key_block
    touched = torch.zeros(bands.shape[0], *lowest.shape, dtype=torch.bool, device=bands.device)
    # A query block is no larger than a band, so at most three bands lead to the same key block.
    for step in range(3):
        band = lowest + step
        valid = (band >= 0) & (band <= highest) & (band < count)
        touched |= bands[:, band.clamp(0, count - 1)] & valid
    return touched
