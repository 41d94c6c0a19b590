"""The largest entries of each row, as many as a target share of the row's sum needs."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.coverage import reference
from vllm_sparse.step.chunks import PromptBlocks

__all__ = ["chunk_coverage", "coverage_mask"]


def coverage_mask(mass: torch.Tensor, gamma: torch.Tensor, min_count: int, max_count: int) -> torch.Tensor:
    """Keep the fewest entries of each row whose sum reaches `gamma`, the entry that crosses it included.

    Of equal entries the lower index is kept first. Runs in Triton on CUDA, else in PyTorch.

    Args:
        mass: float32 ``[rows, n]``, none negative.
        gamma: float32 ``[rows]``; 0 or less keeps `min_count` entries, 1 or more keeps as many as `max_count` allows.
        min_count: fewest entries to keep in a row; at least 0.
        max_count: most entries to keep in a row; at least `min_count`.

    Returns:
        bool ``[rows, n]``.
    """
    if mass.is_cuda:
        from vllm_sparse.kernels.coverage import triton

        return triton.coverage_mask(mass, gamma, min_count, max_count)
    return reference.coverage_mask(mass, gamma, min_count, max_count)


def chunk_coverage(mass: torch.Tensor, gamma: torch.Tensor, blocks: PromptBlocks) -> torch.Tensor:
    """Keep the fewest pairs of a query block and a key block of each head and prompt chunk whose sum reaches `gamma`.

    As `coverage_mask` for a row that holds all of a chunk's query blocks, one after another.

    Args:
        mass: float32 ``[heads, blocks, key_blocks]``, none negative; 0 past a chunk's context.
        gamma: float32 ``[heads, chunks]``; 0 or less keeps nothing, 1 or more everything.
        blocks: query blocks of the chunks.

    Returns:
        bool ``[heads, blocks, key_blocks]``.
    """
    if mass.is_cuda:
        from vllm_sparse.kernels.coverage import triton

        return triton.chunk_coverage(mass, gamma, blocks)
    return reference.chunk_coverage(mass, gamma, blocks)
