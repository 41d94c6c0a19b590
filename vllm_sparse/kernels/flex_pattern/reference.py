"""FlexPrefill's pattern switch in PyTorch: the specification, on any device."""

from __future__ import annotations

import math

import torch


def distance(logits: torch.Tensor, mass: torch.Tensor, guard_zeros: bool) -> torch.Tensor:
    """Distance of the softmax of `logits` from `mass`: float32 ``[rows]``.

    Args:
        logits: float32 ``[rows, n]``.
        mass: float32 ``[rows, n]``; rows sum to 1.
        guard_zeros: as in `jensen_shannon_distance`.
    """
    return jensen_shannon_distance(logits.softmax(-1), mass, guard_zeros)


def jensen_shannon_distance(first: torch.Tensor, second: torch.Tensor, guard_zeros: bool = True) -> torch.Tensor:
    """Square root of the Jensen-Shannon divergence of each row, natural logarithm: 0 to sqrt(ln 2).

    Args:
        first: ``[rows, n]`` probabilities.
        second: ``[rows, n]`` probabilities.
        guard_zeros: take ``0 * log 0`` as 0; else the row is infinite, as in the official code.
    """
    middle = (first + second) / 2

    def divergence(part: torch.Tensor) -> torch.Tensor:
        if guard_zeros:
            ratio = part / middle.clamp(min=torch.finfo(middle.dtype).tiny)
            guarded: torch.Tensor = torch.special.xlogy(part, ratio.clamp(min=torch.finfo(middle.dtype).tiny)).sum(1)
            return guarded
        unguarded: torch.Tensor = (part * (part / middle).log()).sum(1)
        return unguarded

    squared = (divergence(first) + divergence(second)) / 2
    return squared.clamp(min=0).sqrt() if guard_zeros else squared.sqrt().nan_to_num(nan=math.inf)
