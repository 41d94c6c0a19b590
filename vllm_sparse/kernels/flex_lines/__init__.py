"""FlexPrefill's columns and distance bands as a map of query blocks by key blocks."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.flex_lines import reference
from vllm_sparse.kernels.flex_lines.reference import BlockGrid

__all__ = ["BlockGrid", "line_map"]


def line_map(columns: torch.Tensor, bands: torch.Tensor, pooled: torch.Tensor | None, grid: BlockGrid) -> torch.Tensor:
    """Key blocks that a query block reads because of a column, a band or the pooled map.

    FlexPrefill, arXiv 2502.20766. The first key block and those of the query block's own tokens are always set, later
    ones never. Runs in Triton on CUDA, else in PyTorch.

    Args:
        columns: bool ``[heads, key_blocks]`` selected key blocks.
        bands: bool ``[heads, key_blocks]`` selected bands of distances ``query - key``, ascending from distance 0.
        pooled: bool ``[heads, query_blocks, key_blocks]`` selected pairs, or None.
        grid: the prompt chunk and the sizes of its blocks.

    Returns:
        bool ``[heads, query_blocks, key_blocks]``.
    """
    if columns.is_cuda:
        from vllm_sparse.kernels.flex_lines import triton

        return triton.line_map(columns, bands, pooled, grid)
    return reference.line_map(columns, bands, pooled, grid)
