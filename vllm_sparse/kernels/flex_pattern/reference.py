"""FlexPrefill's pattern switch in PyTorch: the specification, on any device."""

from __future__ import annotations

import math

import torch


def pooled_distance(
    sample: torch.Tensor, key_block_mean: torch.Tensor, column_mass: torch.Tensor, scale: float, guard_zeros: bool
) -> torch.Tensor:
    """Distance of the pooled guess from the sampled masses; arguments as in the public function."""
    pooled = sample.float().mean(0).view(key_block_mean.shape[0], -1, sample.shape[2])
    guess = torch.matmul(pooled, key_block_mean.transpose(1, 2)).mul(scale).softmax(-1).flatten(0, 1)
    return jensen_shannon_distance(guess, column_mass, guard_zeros)


def jensen_shannon_distance(first: torch.Tensor, second: torch.Tensor, guard_zeros: bool = True) -> torch.Tensor:
    """Square root of the Jensen-Shannon divergence of each row, natural logarithm: 0 to sqrt(ln 2).

    Args:
        first: ``[rows, n]`` probabilities.
        second: likewise.
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
