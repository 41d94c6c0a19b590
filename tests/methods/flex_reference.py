"""FlexPrefill in float64, written from the paper's formulas and from the notes on the official code; slow and plain."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tests import oracle

B = 128


@dataclass(frozen=True)
class Sample:
    """Mean attention of the last queries of a chunk, float64, for one query head.

    Attributes:
        column: ``[context]`` mass of each key position.
        distance: ``[context]`` mass of each distance between query and key.
        guess: ``[blocks]`` attention of the mean query over the mean keys.
    """

    column: torch.Tensor
    distance: torch.Tensor
    guess: torch.Tensor

    @property
    def column_blocks(self) -> list[float]:
        return [float(part.sum()) for part in torch.split(self.column, B)]

    @property
    def band_blocks(self) -> list[float]:
        return [float(part.sum()) for part in torch.split(self.distance, B)]

    @property
    def js_distance(self) -> float:
        true = self.column_blocks
        total = 0.0
        for p, q in zip(self.guess.tolist(), true, strict=True):
            middle = (p + q) / 2
            total += (p * math.log(p / middle) if p else 0.0) + (q * math.log(q / middle) if q else 0.0)
        return math.sqrt(max(total / 2, 0.0))


def sample(query: torch.Tensor, keys: torch.Tensor, head: int, scale: float) -> Sample:
    """Sample one head: query ``[chunk, heads, head_size]``, keys ``[kv_heads, context, head_size]``."""
    last = query[-B:].double().cpu()[:, head]
    own_keys = oracle.expand(keys, query.shape[1])[head]
    rows, context = last.shape[0], own_keys.shape[0]
    column = torch.zeros(context, dtype=torch.float64)
    distance = torch.zeros(context, dtype=torch.float64)
    for row in range(rows):
        position = context - rows + row
        mass = (own_keys[: position + 1] @ last[row] * scale).softmax(0) / rows
        column[: position + 1] += mass
        distance[: position + 1] += mass.flip(0)
    means = torch.stack([part.mean(0) for part in torch.split(own_keys, B)])
    return Sample(column, distance, (means @ last.mean(0) * scale).softmax(0))


def largest(masses: list[float], count: int) -> set[int]:
    """Indices of the largest, ties to the lower index."""
    order = sorted(range(len(masses)), key=lambda index: (-masses[index], index))
    return set(order[:count])


def shortest_prefix(masses: list[float], gamma: float) -> int:
    """How many of the largest reach `gamma`, the crossing one included."""
    total = 0.0
    for count, mass in enumerate(sorted(masses, reverse=True), 1):
        total += mass
        if total >= gamma:
            return count
    return len(masses)


def pooled_map(query: torch.Tensor, keys: torch.Tensor, head: int, scale: float) -> dict[tuple[int, int], float]:
    """Weight of each causal (query block, key block) pair; all weights sum to 1."""
    own_query = query.double().cpu()[:, head]
    own_keys = oracle.expand(keys, query.shape[1])[head]
    chunk, context = own_query.shape[0], own_keys.shape[0]
    means = torch.stack([part.mean(0) for part in torch.split(own_keys, B)])
    blocks = -(-chunk // B)
    weights: dict[tuple[int, int], float] = {}
    for index, part in enumerate(torch.split(own_query, B)):
        last = context - chunk + index * B + part.shape[0] - 1
        row = (means[: last // B + 1] @ part.mean(0) * scale).softmax(0) / blocks
        weights |= {(index, key_block): float(weight) for key_block, weight in enumerate(row)}
    return weights


def strict_lines(query: torch.Tensor, keys: torch.Tensor, head: int, scale: float, gamma: float) -> torch.Tensor:
    """Columns and bands that reach `gamma`, extended to every query block and token by token: bool map of blocks."""
    found = sample(query, keys, head, scale)
    chunk, context = query.shape[0], keys.shape[1]
    columns = largest(found.column_blocks, shortest_prefix(found.column_blocks, gamma))
    bands = largest(found.band_blocks, shortest_prefix(found.band_blocks, gamma))
    mask = empty_map(chunk, context)
    in_band = torch.tensor([distance // B in bands for distance in range(context)])
    for row, position in enumerate(range(context - chunk, context)):
        reachable = torch.arange(position + 1)
        touched = sorted(set((reachable[in_band[position - reachable]] // B).tolist()))
        mask[row // B, touched] = True
        mask[row // B, [column for column in columns if column <= position // B]] = True
    return mask


def strict_pooled(query: torch.Tensor, keys: torch.Tensor, head: int, scale: float, gamma: float) -> torch.Tensor:
    """Block pairs of the pooled map that reach `gamma`."""
    weights = pooled_map(query, keys, head, scale)
    total = 0.0
    mask = empty_map(query.shape[0], keys.shape[1])
    for pair, weight in sorted(weights.items(), key=lambda item: -item[1]):
        mask[pair] = True
        total += weight
        if total >= gamma:
            break
    return mask


def forced(chunk: int, context: int) -> torch.Tensor:
    """The first block and the blocks of the queries' own positions."""
    mask = empty_map(chunk, context)
    mask[:, 0] = True
    for row, position in enumerate(range(context - chunk, context)):
        mask[row // B, position // B] = True
    return mask


def faithful(
    query: torch.Tensor, keys: torch.Tensor, head: int, gamma: float, tau: float, min_budget: int
) -> torch.Tensor:
    """The official code's map for a whole prompt (context equals chunk), as ``algorithms.md`` 1.2 describes it."""
    length = query.shape[0]
    assert keys.shape[1] == length
    scale = query.shape[2] ** -0.5
    found = sample(query, keys, head, scale)
    blocks = -(-length // B)
    floor = max(-(-min_budget // B), 1)

    def count(profile: torch.Tensor) -> int:
        ordered = profile.sort(descending=True).values
        tokens = int((ordered.cumsum(0) <= gamma).sum()) + 1
        return max(tokens // B + 1, floor)

    # Distances pooled from the far end: the first group of 128 ends at distance length - 1.
    far_first = found.distance.flip(0)
    bands = [float(part.sum()) for part in torch.split(far_first, B)][::-1]
    columns = found.column_blocks
    query_aware = found.js_distance < tau
    if query_aware:
        chosen_columns, chosen_bands = largest(columns, floor), largest(bands, floor)
    else:
        chosen_columns = largest(columns, count(found.column))
        chosen_bands = largest(bands, count(found.distance))
    mask = torch.zeros(blocks, blocks, dtype=torch.bool)
    for row in range(blocks):
        for key_block in range(row + 1):
            mask[row, key_block] = (
                key_block in chosen_columns or row - key_block in chosen_bands or key_block in (0, row)
            )
    if query_aware:
        total = 0.0
        for pair, weight in sorted(pooled_map(query, keys, head, scale).items(), key=lambda item: -item[1]):
            total += weight
            if total > gamma:
                break
            mask[pair] = True
    return mask


def empty_map(chunk: int, context: int) -> torch.Tensor:
    return torch.zeros(-(-chunk // B), -(-context // B), dtype=torch.bool)
