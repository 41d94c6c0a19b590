"""FlexPrefill's columns and distance bands as a map of query blocks by key blocks."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.flex_lines import reference
from vllm_sparse.step.chunks import PromptBlocks

__all__ = ["line_map"]


def line_map(
    columns: torch.Tensor,
    bands: torch.Tensor,
    pooled: torch.Tensor | None,
    blocks: PromptBlocks,
    key_block_tokens: int,
) -> torch.Tensor:
    """Key blocks that a query block reads because of a column, a band or the pooled map.

    FlexPrefill, arXiv 2502.20766. The first key block and those of the query block's own tokens are always set, later
    ones never. Runs in Triton on CUDA, for all prompt chunks in one launch, else in PyTorch.

    Args:
        columns: bool ``[heads, chunks, key_blocks]`` selected key blocks, anything past a context.
        bands: bool ``[heads, chunks, key_blocks]`` selected bands of distances ``query - key``, ascending from distance
            0, anything past a context.
        pooled: bool ``[heads, blocks, key_blocks]`` selected pairs, or None.
        blocks: query blocks of the chunks, of at most `key_block_tokens`.
        key_block_tokens: tokens of a key block, and width of a band.

    Returns:
        bool ``[heads, blocks, key_blocks]``.
    """
    if columns.is_cuda:
        from vllm_sparse.kernels.flex_lines import triton

        return triton.line_map(columns, bands, pooled, blocks, key_block_tokens)
    return reference.line_map(columns, bands, pooled, blocks, key_block_tokens)
