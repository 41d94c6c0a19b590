"""FlexPrefill's columns and distance bands, drawn into a map over query blocks and key blocks."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.flex_lines import reference

__all__ = ["line_map"]


def line_map(
    columns: torch.Tensor,
    bands: torch.Tensor,
    pooled: torch.Tensor | None,
    chunk: int,
    context: int,
    query_block: int,
    block_size_tokens: int,
) -> torch.Tensor:
    """Key blocks that a query block touches through a column, a band or the pooled map.

    The first block and the query block's own are always set, blocks in its future never. Runs in Triton on CUDA, else
    in PyTorch.

    Args:
        columns: bool ``[heads, key_blocks]`` chosen key blocks.
        bands: bool ``[heads, key_blocks]`` chosen bands of distances, from 0 on.
        pooled: bool ``[heads, query_blocks, key_blocks]`` chosen pairs, or None.
        chunk: tokens of the chunk, which ends the context.
        context: tokens in the request's cache.
        query_block: tokens of a query block; at most those of a key block.
        block_size_tokens: tokens of a key block and of a band.

    Returns:
        bool ``[heads, query_blocks, key_blocks]``.
    """
    if columns.is_cuda:
        from vllm_sparse.kernels.flex_lines import triton

        return triton.line_map(columns, bands, pooled, chunk, context, query_block, block_size_tokens)
    return reference.line_map(columns, bands, pooled, chunk, context, query_block, block_size_tokens)
