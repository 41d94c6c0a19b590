"""FlexPrefill's lines in PyTorch: the specification, on any device."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.page_list import query_blocks


def line_map(
    columns: torch.Tensor,
    bands: torch.Tensor,
    pooled: torch.Tensor | None,
    chunk: int,
    context: int,
    query_block: int,
    block_size_tokens: int,
) -> torch.Tensor:
    """Columns, bands and pooled pairs as one map; arguments as in the public function."""
    first, last = query_blocks(chunk, context, query_block, columns.device)
    touched = band_blocks(bands, first, last, block_size_tokens) | columns.unsqueeze(1)
    return with_forced(touched if pooled is None else touched | pooled, first, last, block_size_tokens)


def with_forced(
    touched: torch.Tensor, first_query: torch.Tensor, last_query: torch.Tensor, block_size_tokens: int
) -> torch.Tensor:
    """A map ``[heads, query_blocks, key_blocks]`` with the first block and each query block's own, without futures."""
    block = torch.arange(touched.shape[2], device=touched.device)
    own = block >= (first_query // block_size_tokens).unsqueeze(1)
    return (touched | own | (block == 0)) & (block <= (last_query // block_size_tokens).unsqueeze(1))


def band_blocks(
    bands: torch.Tensor, first_query: torch.Tensor, last_query: torch.Tensor, block_size_tokens: int
) -> torch.Tensor:
    """Key blocks that a query block touches through any selected band: bool ``[heads, query_blocks, key_blocks]``.

    Band ``n`` of query positions ``q0..q1`` covers keys ``q0 - (n + 1) * block + 1`` to ``q1 - n * block``, so key
    block ``J`` is touched by bands ``ceil((q0 + 2) / block) - J - 2`` to ``floor(q1 / block) - J``.
    """
    count = bands.shape[1]
    key_block = torch.arange(count, device=bands.device)
    lowest = -(-(first_query + 2) // block_size_tokens).unsqueeze(1) - key_block - 2
    highest = (last_query // block_size_tokens).unsqueeze(1) - key_block
    touched = torch.zeros(bands.shape[0], *lowest.shape, dtype=torch.bool, device=bands.device)
    # A query block no larger than a band and the band meet in at most three key blocks.
    for step in range(3):
        band = lowest + step
        valid = (band >= 0) & (band <= highest) & (band < count)
        touched |= bands[:, band.clamp(0, count - 1)] & valid
    return touched
