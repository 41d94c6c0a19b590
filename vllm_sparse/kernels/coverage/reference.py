"""The largest entries of each row that cover a share of it, in PyTorch: the specification, on any device."""

from __future__ import annotations

import torch

from vllm_sparse.step.chunks import PromptBlocks


def reaching_count(mass: torch.Tensor, target: torch.Tensor | float) -> torch.Tensor:
    """Least number of each row's largest entries whose sum reaches `target`, all where none does: int64 ``[rows]``.

    Args:
        mass: ``[rows, n]``, none negative.
        target: one for all rows, or double ``[rows, 1]``.
    """
    ordered = mass.double().sort(dim=1, descending=True).values
    return ((ordered.cumsum(1) < target).sum(1) + 1).clamp(max=mass.shape[1])


def coverage_count(mass: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Least number of each row's largest entries whose sum reaches `gamma`: int64 ``[rows]``.

    All entries where the whole row does not reach `gamma`, and for ``gamma >= 1``; none for ``gamma <= 0``.
    """
    counts = torch.where(gamma >= 1, mass.shape[1], reaching_count(mass, gamma.double().unsqueeze(1)))
    return torch.where(gamma <= 0, 0, counts)


def top_mask(mass: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The `counts` largest entries of each row, of equal ones those of lower index: bool, the shape of `mass`."""
    order = mass.sort(dim=1, descending=True, stable=True).indices
    keep = torch.arange(mass.shape[1], device=mass.device) < counts.unsqueeze(1)
    return torch.zeros_like(keep).scatter_(1, order, keep)


def coverage_mask(mass: torch.Tensor, gamma: torch.Tensor, min_count: int, max_count: int) -> torch.Tensor:
    """Keep the fewest entries that reach `gamma`; arguments as in the public function."""
    return top_mask(mass, coverage_count(mass, gamma).clamp(min=min_count, max=max_count))


def chunk_coverage(mass: torch.Tensor, gamma: torch.Tensor, blocks: PromptBlocks) -> torch.Tensor:
    """Keep the fewest pairs of each chunk that reach `gamma`; arguments as in the public function."""
    keep = torch.empty(mass.shape, dtype=torch.bool, device=mass.device)
    for chunk in range(len(blocks.spans)):
        rows = slice(blocks.starts[chunk], blocks.starts[chunk + 1])
        pairs = mass[:, rows].flatten(1)
        keep[:, rows] = coverage_mask(pairs, gamma[:, chunk], 0, pairs.shape[1]).view_as(mass[:, rows])
    return keep
