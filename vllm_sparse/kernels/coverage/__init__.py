"""The largest entries of each row, as many as a target share of the row's sum needs."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.coverage import reference

__all__ = ["coverage_mask"]


def coverage_mask(mass: torch.Tensor, gamma: torch.Tensor, min_count: int, max_count: int) -> torch.Tensor:
    """Keep the fewest entries of each row that reach a sum of `gamma`, the crossing one included.

    Equal entries go to the lower index first. Runs in Triton on CUDA, else in PyTorch.

    Args:
        mass: float32 ``[rows, n]``, none negative.
        gamma: float32 ``[rows]``; 0 or less keeps the least count, 1 or more keeps everything.
        min_count: fewest entries of a row; 0 or more.
        max_count: most entries of a row; at least `min_count`.

    Returns:
        bool ``[rows, n]``.
    """
    if mass.is_cuda:
        from vllm_sparse.kernels.coverage import triton

        return triton.coverage_mask(mass, gamma, min_count, max_count)
    return reference.coverage_mask(mass, gamma, min_count, max_count)
