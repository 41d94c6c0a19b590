"""Queries of prompt chunks in the order in which an executor takes their rows, and outputs back in that of the step."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.row_queries import reference
from vllm_sparse.step.chunks import LaunchRows

__all__ = ["gather_rows", "scatter_rows"]


def gather_rows(query: torch.Tensor, rows: LaunchRows) -> torch.Tensor:
    """Queries row by row, each with the heads that share its list.

    Runs in Triton on CUDA, else in PyTorch.

    Args:
        query: ``[step tokens, query_heads, head_size]``.
        rows: the rows.

    Returns:
        ``[rows.tokens, query_heads / rows.list_heads, head_size]``, contiguous.
    """
    if query.is_cuda:
        from vllm_sparse.kernels.row_queries import triton

        return triton.gather_rows(query, rows)
    return reference.gather_rows(query, rows)


def scatter_rows(attended: torch.Tensor, rows: LaunchRows, output: torch.Tensor) -> None:
    """Inverse of `gather_rows`.

    Args:
        attended: ``[rows.tokens, query_heads / rows.list_heads, head_size]``, contiguous.
        rows: the rows.
        output: ``[step tokens, query_heads, head_size]``, written where the rows' tokens are.
    """
    if attended.is_cuda:
        from vllm_sparse.kernels.row_queries import triton

        triton.scatter_rows(attended, rows, output)
    else:
        reference.scatter_rows(attended, rows, output)
