"""What is measured of decode steps in CUDA graphs: taken by every replay, read after sampled ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_sparse.metrics.graph_timing import GraphTimer
from vllm_sparse.metrics.observer import StepRecord, WorkerMetrics
from vllm_sparse.metrics.row_recall import EagerRecall, GraphRecall, TakenRow
from vllm_sparse.metrics.timing import NO_TIMER
from vllm_sparse.step.launch import LayerLaunches
from vllm_sparse.step.plan import StepPlan
from vllm_sparse.step.rows import TokenLists


class GraphObserver:
    """Measures replays.

    Args:
        launches: of each layer of this process, by its number, with the knobs that the server's configuration sets, by
            the name of the graphs. Layers that then launch the same are timed as one.
        reading_layers: layers in which all methods of a graph read lists, by the name of the graphs.
        lists: of the graphs' rows.
        kv_heads: lists of a row.
    """

    def __init__(
        self,
        launches: Mapping[str, Mapping[int, LayerLaunches]],
        reading_layers: Mapping[str, Sequence[int]],
        lists: TokenLists,
        kv_heads: int,
    ) -> None:
        self._reading_layers = reading_layers
        self._timers = {name: GraphTimer(of_layers, lists.slots.device) for name, of_layers in launches.items()}
        self._taken = TakenRow(lists, kv_heads)
        # By the name of the graphs and the rows of one.
        self._recalls: dict[tuple[str, int], GraphRecall] = {}

    def capturing(self, name: str, rows: int, plan: StepPlan) -> StepRecord:
        """The record of a step that is being captured: what it does is part of the graph.

        Args:
            name: of the graphs.
            rows: of the graph.
            plan: of the step.
        """
        metrics = WorkerMetrics.get()
        record = StepRecord(metrics, plan)
        if metrics.sampling.timing_interval_steps:
            record.timer = self._timers[name]
        reading = self._reading_layers[name]
        if metrics.sampling.recall_interval_steps and reading:
            # Another layer in each size of graph.
            recall = GraphRecall(reading[rows % len(reading)], self._taken)
            record.batch_recall = self._recalls[name, rows] = recall
        return record

    def before_replay(self, record: StepRecord) -> None:
        """Tell the graph which row to copy."""
        if isinstance(record.batch_recall, EagerRecall):
            self._taken.row.fill_(record.batch_recall.row.span.row)

    def after_replay(self, record: StepRecord, plan: StepPlan, name: str, rows: int) -> None:
        """The step's graph is queued: count its rows and read what is sampled of it.

        Args:
            record: of the step.
            plan: of the step.
            name: of the graphs.
            rows: of the graph.
        """
        metrics = record.metrics
        metrics.observe_batch(plan.batch)
        if record.timer is not NO_TIMER:
            metrics.observe_graph(self._timers[name], record.timer.rows)
        if isinstance(record.batch_recall, EagerRecall):
            self._taken.row.zero_()
            recall, row = self._recalls.get((name, rows)), record.batch_recall.row
            # The guard may have sent the layer of the graph dense for this row.
            if recall is not None and row.setting.roles[recall.layer].reads_list:
                recall.observe(row, metrics.observe_recall)
