"""What rows read of what was in reach: of one step, and lately, per layer and head."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_sparse.step.plan import RowSpan

# Of one observation among those that a mean of late ones is made of: about the last 64 count.
RECENT_WEIGHT = 1 / 64
# Observations that are folded into means at once.
MOST_ALIKE = 64


@dataclass(frozen=True)
class Geometry:
    """The attention layers of one process.

    Attributes:
        layers: numbers of the attention layers of this process.
        query_heads: of this process.
        kv_heads: of this process.
        token_bytes: key and value of one token in one KV head.
    """

    layers: range
    query_heads: int
    kv_heads: int
    token_bytes: int


@dataclass
class RowDensity:
    """What one row of a step reads in its sparse layers; the counts stay on the device until the step is queued.

    Attributes:
        phase: ``prefill`` or ``decode``.
        method: name of the method.
        layers: the sparse layers so far.
        lists: the list of each of them, as an index of `kept`: layers may share one.
        kept: int32 ``[list_heads * query_blocks]`` tokens that each list reads, head-major.
        list_heads: heads that have lists of their own.
        candidates: tokens in reach of one head's lists in one layer.
    """

    phase: str
    method: str
    layers: list[int] = field(default_factory=list)
    lists: list[int] = field(default_factory=list)
    kept: list[torch.Tensor] = field(default_factory=list)
    list_heads: int = 0
    candidates: int = 0

    def add(
        self, layer: int, kept_tokens: torch.Tensor, span: RowSpan, query_block_tokens: int, list_heads: int
    ) -> None:
        """Count one layer.

        Args:
            layer: index of the attention layer.
            kept_tokens: int32 ``[list_heads * query_blocks]``, head-major.
            span: the request's place in the step.
            query_block_tokens: query tokens that share a list.
            list_heads: heads that have a list of their own, one per query block.
        """
        if not self.kept:
            first = span.seq_len - span.query_tokens + query_block_tokens
            self.candidates = sum(range(first, span.seq_len, query_block_tokens)) + span.seq_len
            self.list_heads = list_heads
        if not self.kept or self.kept[-1] is not kept_tokens:
            self.kept.append(kept_tokens)
        self.layers.append(layer)
        self.lists.append(len(self.kept) - 1)

    @property
    def numbers(self) -> int:
        """Elements of `kept`, which are equally many in each layer."""
        return len(self.kept) * self.kept[0].shape[0]

    def kept_by_head(self, kept: np.ndarray) -> np.ndarray:
        """Tokens read in each sparse layer by each head that has lists.

        Args:
            kept: int32 ``[numbers]`` of `kept`, on the host.

        Returns:
            int64 ``[sparse layers, list_heads]``.
        """
        by_list: np.ndarray = kept.reshape(len(self.kept), self.list_heads, -1).sum(2, dtype=np.int64)
        return by_list[self.lists]


class RecentDensity:
    """Density of late rows in each layer and query head, by phase and method: exponentially weighted means.

    Args:
        geometry: of the layers.
    """

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._means: dict[tuple[str, str], np.ndarray] = {}
        self._observed: dict[tuple[str, str], int] = defaultdict(int)
        # Of late observations that are alike in all heads: the sparse layers, and their densities.
        self._alike: dict[tuple[str, str], tuple[Sequence[int], list[float]]] = {}

    def observe(self, phase: str, method: str, layers: Sequence[int], density: np.ndarray) -> None:
        """A row's density, 1 in the layers that are not named.

        Args:
            phase: ``prefill`` or ``decode``.
            method: name of the method.
            layers: the sparse ones.
            density: ``[sparse layers, list_heads]``.
        """
        self._fold(phase, method)
        means = self._means_of(phase, method)
        row = np.ones_like(means)
        row[self._places(layers)] = density.repeat(self._geometry.query_heads // density.shape[1], axis=1)
        means += (row - means) * self._next_weight(phase, method)

    def observe_alike(self, phase: str, method: str, layers: Sequence[int], density: float) -> None:
        """As `observe` where all sparse layers and heads have one density; many at once, since it is every step's."""
        known_layers, densities = self._alike.setdefault((phase, method), (layers, []))
        if known_layers is not layers or len(densities) == MOST_ALIKE:
            self._fold(phase, method)
            densities = self._alike.setdefault((phase, method), (layers, []))[1]
        densities.append(density)

    def _fold(self, phase: str, method: str) -> None:
        """Let the observations that are alike count."""
        layers, densities = self._alike.pop((phase, method), ((), []))
        former_share, sparse = 1.0, 0.0
        for density in densities:
            weight = self._next_weight(phase, method)
            former_share *= 1 - weight
            sparse += (density - sparse) * weight
        means = self._means_of(phase, method)
        means *= former_share
        means += 1 - former_share
        means[self._places(layers)] += sparse - (1 - former_share)

    def _places(self, layers: Sequence[int]) -> list[int]:
        """Of layers among those of this process."""
        return [layer - self._geometry.layers.start for layer in layers]

    def _means_of(self, phase: str, method: str) -> np.ndarray:
        shape = len(self._geometry.layers), self._geometry.query_heads
        return self._means.setdefault((phase, method), np.ones(shape))

    def _next_weight(self, phase: str, method: str) -> float:
        """Of one more observation; the first ones count alike, so that none dominates."""
        self._observed[phase, method] += 1
        return max(1 / self._observed[phase, method], RECENT_WEIGHT)

    def as_json(self) -> dict[str, Any]:
        """By phase and method: how many rows were observed, and ``[layers][query_heads]`` densities of late ones, of
        the layers of this process."""
        for key in list(self._alike):
            self._fold(*key)
        phases: dict[str, Any] = {}
        for (phase, method), means in self._means.items():
            phases.setdefault(phase, {})[method] = {
                "rows": self._observed[phase, method],
                "density": means.round(4).tolist(),
            }
        return phases
