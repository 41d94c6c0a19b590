"""FlexPrefill's lines in PyTorch: the specification, on any device."""

from __future__ import annotations

import torch

from vllm_sparse.step.chunks import PromptBlocks


def line_map(
    columns: torch.Tensor,
    bands: torch.Tensor,
    pooled: torch.Tensor | None,
    blocks: PromptBlocks,
    key_block_tokens: int,
) -> torch.Tensor:
    """Columns, bands and pooled pairs as one map; arguments and result as in the public function."""
    chunk = blocks.chunk.long()
    first, last = blocks.first_query.long(), blocks.last_query.long()
    touched = band_blocks(bands, chunk, first, last, key_block_tokens) | columns[:, chunk]
    return with_forced(touched if pooled is None else touched | pooled, first, last, key_block_tokens)


def with_forced(
    touched: torch.Tensor, first_query: torch.Tensor, last_query: torch.Tensor, block_size_tokens: int
) -> torch.Tensor:
    """A map ``[heads, query_blocks, key_blocks]`` with the first key block and each query block's own, none later."""
    block = torch.arange(touched.shape[2], device=touched.device)
    own = block >= (first_query // block_size_tokens).unsqueeze(1)
    return (touched | own | (block == 0)) & (block <= (last_query // block_size_tokens).unsqueeze(1))


def band_blocks(
    bands: torch.Tensor,
    chunk: torch.Tensor,
    first_query: torch.Tensor,
    last_query: torch.Tensor,
    block_size_tokens: int,
) -> torch.Tensor:
    """Key blocks that a query block meets in any selected band: bool ``[heads, query_blocks, key_blocks]``.

    Band ``n`` of query positions ``q0..q1`` covers keys ``q0 - (n + 1) * block + 1`` to ``q1 - n * block``, so key
    block ``J`` is touched by bands ``ceil((q0 + 2) / block) - J - 2`` to ``floor(q1 / block) - J``.
    """
    count = bands.shape[2]
    key_block = torch.arange(count, device=bands.device)
    lowest = -(-(first_query + 2) // block_size_tokens).unsqueeze(1) - key_block - 2
    highest = (last_query // block_size_tokens).unsqueeze(1) - key_block
    touched = torch.zeros(bands.shape[0], *lowest.shape, dtype=torch.bool, device=bands.device)
    # A query block is no larger than a band, so at most three bands lead to the same key block.
    for step in range(3):
        band = lowest + step
        valid = (band >= 0) & (band <= highest)
        touched |= bands[:, chunk.unsqueeze(1), band.clamp(0, count - 1)] & valid
    return touched
