"""The guard (`sparse_min_recall`): measures the recall of guarded rows and sends layers dense that keep too little.

It bounds how long a bad selection lasts; it does not repair what was computed. Results are copied from the device
without waiting for it and count from when they have arrived: one or two steps later, if not in a later layer of the
same step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_sparse.metrics.arrivals import Arrivals
from vllm_sparse.metrics.row_recall import EagerRecall, GraphRecall, TakenRow
from vllm_sparse.step.plan import BatchRow, DecodeRow
from vllm_sparse.step.roles import reading_layers

if TYPE_CHECKING:
    from vllm_sparse.metrics import WorkerMetrics
    from vllm_sparse.metrics.recall import RecallSample
    from vllm_sparse.metrics.row_recall import ListsTaken
    from vllm_sparse.step.guard import RequestGuard
    from vllm_sparse.step.launch import LayerLaunches
    from vllm_sparse.step.plan import RowSpan, StepPlan
    from vllm_sparse.step.rows import TokenLists

# Of the decode row that a step checks.
LAYERS_PER_STEP = 2


@dataclass(frozen=True)
class DecodeCheck:
    """The decode row that a step checks.

    Attributes:
        row: the row.
        place: its index among the rows that are served at once, or alone.
        guard: of its request.
        layers: in which it is checked; it reads a list there.
    """

    row: DecodeRow | BatchRow
    place: int
    guard: RequestGuard
    layers: tuple[int, ...]


class RecallGuard:
    """The guard of one worker. Each tensor-parallel rank decides for its own heads, whose lists are its own.

    Args:
        metrics: count checks and layers.
    """

    def __init__(self, metrics: WorkerMetrics) -> None:
        self._metrics = metrics
        self._arrivals = Arrivals()
        self._step = 0

    def collect(self) -> None:
        """Let results count that have arrived."""
        self._arrivals.collect()

    def start_step(self, plan: StepPlan) -> StepGuard:
        """Choose the decode row to check: requests of which not all layers were seen come first, then the oldest check.

        One row a step, so that a step's cost does not grow with the batch.
        """
        self._step += 1
        best: tuple[tuple[bool, int], DecodeRow | BatchRow, int, RequestGuard, list[int]] | None = None
        rows: list[tuple[int, DecodeRow | BatchRow]] = [*enumerate(plan.decode), *enumerate(plan.batch)]
        for place, row in rows:
            guard = row.guard
            if guard is None:
                continue
            reading = reading_layers(row.roles)
            rank = guard.layers_checked >= len(reading), guard.last_check
            if reading and (best is None or rank < best[0]):
                best = rank, row, place, guard, reading
        if best is None:
            return StepGuard(self)
        _, row, place, guard, reading = best
        return StepGuard(self, DecodeCheck(row, place, guard, guard.take_turn(reading, LAYERS_PER_STEP, self._step)))

    def check(self, guard: RequestGuard, layer: int, phase: str, method: str, sample: RecallSample) -> None:
        """Measure a guarded row in a layer. The mean over query tokens and heads counts.

        Args:
            guard: of the row's request.
            layer: index of the attention layer.
            phase: ``prefill`` or ``decode``.
            method: name of the method.
            sample: of the row.
        """
        self._metrics.count_guard_check(phase, method)

        def arrived(recall: np.ndarray) -> None:
            if guard.observe(layer, float(recall)):
                self._metrics.count_guard_layer(phase, method, layer, float(recall), guard.min_recall)

        self._arrivals.fetch(sample.recall().mean(), arrived)


class StepGuard:
    """What the guard does in one step.

    Args:
        guard: of the worker; None checks nothing.
        decode: the decode row to check, if there is a guarded one.
    """

    def __init__(self, guard: RecallGuard | None = None, decode: DecodeCheck | None = None) -> None:
        self._guard = guard
        self.decode = decode

    def collect(self) -> None:
        """Let results count that have arrived; prompt chunks ask in each layer."""
        if self._guard is not None:
            self._guard.collect()

    def check_chunk(self, guard: RequestGuard, layer: int, method: str, sample: RecallSample) -> None:
        """Check a prompt chunk in a layer."""
        assert self._guard is not None, "a step with guarded rows has a guard"
        self._guard.check(guard, layer, "prefill", method, sample)

    def checks(self, layer: int, span: RowSpan) -> bool:
        """Whether a row that is served alone is checked in a layer."""
        check = self.decode
        return check is not None and check.row.span.row == span.row and layer in check.layers

    def observer(self, layer: int) -> partial[None]:
        """Takes phase, method and `RecallSample` of the decode row that is checked, in one of its layers."""
        assert self._guard is not None
        assert self.decode is not None
        return partial(self._guard.check, self.decode.guard, layer)

    def takers(self, layer: int) -> list[ListsTaken]:
        """What takes the lists of rows that are served at once, outside of graphs, when a layer has attended."""
        check = self.decode
        if check is None or layer not in check.layers or not isinstance(check.row, BatchRow):
            return []
        return [EagerRecall(layer, check.row, check.place, self.observer(layer))]


class GraphGuard:
    """Takes queries and lists of a row in all layers of a CUDA graph, which are read after a replay.

    Args:
        lists: of the graphs' rows.
        kv_heads: lists of a row.
        layers: numbers of the attention layers of this process.
    """

    def __init__(self, lists: TokenLists, kv_heads: int, layers: range) -> None:
        # One place for all layers. It is 0 but in checked steps: other graphs have fewer rows.
        self._row = torch.zeros(1, dtype=torch.int64, device=lists.slots.device)
        self._taken = {layer: TakenRow(lists, kv_heads, self._row) for layer in layers}
        # By the name of the graphs and the rows of one, by layer.
        self._recalls: dict[tuple[str, int], dict[int, GraphRecall]] = {}

    @property
    def bytes(self) -> int:
        """Of device memory, without the queries."""
        return sum(taken.slots.nbytes for taken in self._taken.values())

    def capturing(self, name: str, rows: int, launches: Sequence[LayerLaunches]) -> CapturedGuard:
        """What a graph that is being captured does for the guard.

        Args:
            name: of the graphs.
            rows: of the graph.
            launches: of each layer of the model.
        """
        self._recalls[name, rows] = {
            layer: GraphRecall(layer, taken) for layer, taken in self._taken.items() if launches[layer].reading
        }
        return CapturedGuard(self._recalls[name, rows])

    def before_replay(self, step: StepGuard) -> None:
        """Tell the graph which row to copy."""
        if step.decode is not None and isinstance(step.decode.row, BatchRow):
            self._row.fill_(step.decode.row.span.row)

    def after_replay(self, step: StepGuard, name: str, rows: int) -> None:
        """The step's graph is queued: measure the row that it has copied.

        Args:
            step: the step's.
            name: of the graphs.
            rows: of the graph.
        """
        check = step.decode
        if check is None or not isinstance(check.row, BatchRow):
            return
        for layer in check.layers:
            self._recalls[name, rows][layer].observe(check.row, step.observer(layer))
        self._row.zero_()


class CapturedGuard(StepGuard):
    """Of a step that is being captured: every replay takes a row in each layer.

    Args:
        recalls: by layer.
    """

    def __init__(self, recalls: Mapping[int, GraphRecall]) -> None:
        super().__init__()
        self._recalls = recalls

    def takers(self, layer: int) -> list[ListsTaken]:
        return [self._recalls[layer]] if layer in self._recalls else []


NO_GUARD = StepGuard()
