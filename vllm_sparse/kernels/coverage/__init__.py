"""The largest entries of each row, as many as a target share of the row's sum needs."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.coverage import reference

__all__ = ["coverage_mask"]


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
