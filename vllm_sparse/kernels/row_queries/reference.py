"""Queries row by row in PyTorch: the specification, on any device."""

from __future__ import annotations

import torch

from vllm_sparse.step.chunks import LaunchRows


def gather_rows(query: torch.Tensor, rows: LaunchRows) -> torch.Tensor:
    """Queries row by row; arguments as in the public function."""
    return query.unflatten(1, (rows.list_heads, -1))[rows.places]  # type: ignore[no-untyped-call, no-any-return]


def scatter_rows(attended: torch.Tensor, rows: LaunchRows, output: torch.Tensor) -> None:
    """Outputs in the order of the step; arguments as in the public function."""
    output.view(output.shape[0], rows.list_heads, -1, output.shape[2])[rows.places] = attended
