"""Seconds of selection and of attention in steps that replay a CUDA graph.

A graph does the same in every replay, so it takes stamps of the device's clock in all of them, at a few places: in one
layer of each kind, which counts for all layers that launch the same. They are read in sampled steps only.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from vllm_sparse.metrics.timing import ATTENTION, SELECTION, Mark, NoTimer, ignore
from vllm_sparse.step.launch import LayerLaunches

# Of one layer, the first one, where rows are arranged too; the others have fewer.
MOST_STAMPS = 6


class GraphTimer(NoTimer):
    """Stamps in graphs of equal launches, whose sizes may differ.

    Args:
        launches: of each layer of this process, by its number.
        device: of the model; on a CPU the stamps are of the host's clock.

    Attributes:
        stamps: int64 ``[timed layers, MOST_STAMPS]`` nanoseconds, written by each replay.
    """

    def __init__(self, launches: Mapping[int, LayerLaunches], device: torch.device) -> None:
        super().__init__()
        kinds: dict[LayerLaunches, list[int]] = defaultdict(list)
        for layer, kind in launches.items():
            if kind.writing_ahead or kind.writing_here or kind.reading:
                kinds[kind].append(layer)
        self._alike = {layers[len(layers) // 2]: len(layers) for layers in kinds.values()}
        self._parts: dict[int, list[str]] = {layer: [] for layer in self._alike}
        self.stamps = torch.zeros(len(self._alike), MOST_STAMPS, dtype=torch.int64, device=device)

    def marks(self, layer: int, methods: Sequence[str]) -> Mark:
        if layer not in self._alike:
            return ignore
        stamps = self.stamps[list(self._alike).index(layer)]
        parts = self._parts[layer] = []

        def mark(part: str) -> None:
            _stamp(stamps[len(parts)])
            parts.append(part)

        return mark

    def seconds_by_rows(
        self, stamps: np.ndarray, rows: Counter[tuple[str, str]]
    ) -> dict[tuple[str, str], tuple[float, float]]:
        """Selection and attention seconds of a replay by phase and method, in equal shares for its rows.

        Args:
            stamps: as `stamps` after the replay, on the host.
            rows: of each phase and method.
        """
        totals: Counter[str] = Counter()
        for stamped, (layer, alike) in zip(stamps, self._alike.items(), strict=True):
            parts = self._parts[layer]
            for part, nanoseconds in zip(parts[1:], np.diff(stamped[: len(parts)]).tolist(), strict=True):
                totals[part] += nanoseconds * alike / 1e9
        return {
            key: (totals[SELECTION] * count / rows.total(), totals[ATTENTION] * count / rows.total())
            for key, count in rows.items()
        }


def _stamp(place: torch.Tensor) -> None:
    if not place.is_cuda:
        place.fill_(time.perf_counter_ns())
        return
    # Imported here: there is Triton only where there is a GPU.
    from vllm_sparse.kernels.device_clock.triton import stamp

    stamp(place)
