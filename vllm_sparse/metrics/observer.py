"""Metrics of one worker: what its steps read, how well, how fast, and where they ran dense.

They observe a step's plan and what the backend does by it, in a record of their own (`StepRecord`) that the backend
carries beside the plan. Nothing here decides what a step does.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vllm_sparse.metrics.arrivals import Arrivals
from vllm_sparse.metrics.density import Geometry, RowDensity
from vllm_sparse.metrics.directory import write_to_announced_directory
from vllm_sparse.metrics.fallbacks import FallbackMetrics
from vllm_sparse.metrics.guard import GuardMetrics
from vllm_sparse.metrics.memory import MemoryMetrics
from vllm_sparse.metrics.reads import ReadMetrics
from vllm_sparse.metrics.recall import RecallMetrics, RecallSample
from vllm_sparse.metrics.row_recall import EagerRecall, ListsTaken
from vllm_sparse.metrics.sampling import Sampling, is_due
from vllm_sparse.metrics.seconds import SecondsMetrics
from vllm_sparse.metrics.timing import NO_TIMER, StepTimer
from vllm_sparse.step.roles import reading_layers

if TYPE_CHECKING:
    from vllm_sparse.metrics.graph_timing import GraphTimer
    from vllm_sparse.step.plan import BatchRow, DenseStepRow, Fallback, RowSpan, StepPlan


class WorkerMetrics:
    """Metrics of one worker.

    Args:
        recording: of rows; other ranks than the first of a tensor-parallel group run the same ones.
        memory: gauges of this rank.
        rank: of the engine's processes: those of a stage of the pipeline follow one another.
        engine: data-parallel index.
        model_name: label of all of them, as of vLLM's own.
        counts_rows: if it records; all stages of a pipeline run the same rows, and the last one counts them. The others
            record what their layers read, keep and take.

    Attributes:
        sampling: what is measured how often.
        memory: gauges of this rank.
    """

    _instance: WorkerMetrics | None = None

    def __init__(
        self,
        recording: bool,
        memory: MemoryMetrics | None = None,
        rank: int = 0,
        engine: int = 0,
        model_name: str = "",
        counts_rows: bool = True,
    ) -> None:
        self.memory = memory
        self._engine, self._rank = engine, rank
        self.sampling = Sampling()
        self._arrivals = Arrivals()
        self._reads = ReadMetrics(recording, model_name, counts_rows)
        self._recording = recording
        self._counts_rows = recording and counts_rows
        if recording:
            self._fallbacks = FallbackMetrics(model_name)
            self._guard = GuardMetrics(model_name)
            self._recall = RecallMetrics(model_name)
            self._seconds = SecondsMetrics(model_name)

    @classmethod
    def get(cls, engine: int = 0, model_name: str = "") -> WorkerMetrics:
        """The metrics of this process, made on first use, when its data-parallel index and its model are told.

        One for a process, because prometheus_client lets a name be registered once, and because summaries, graphs and
        the worker's own methods, which vLLM makes apart, write to it.
        """
        if cls._instance is None:
            from vllm.distributed import get_pp_group, get_tp_group

            stage, heads = get_pp_group(), get_tp_group()
            rank = stage.rank_in_group * heads.world_size + heads.rank_in_group
            write_to_announced_directory()
            memory = MemoryMetrics(engine, rank, model_name)
            cls._instance = cls(heads.is_first_rank, memory, rank, engine, model_name, stage.is_last_rank)
        return cls._instance

    def start_serving(self, geometry: Geometry, sampling: Sampling) -> None:
        """The model is there.

        Args:
            geometry: its attention layers; without it neither bytes nor late densities are counted.
            sampling: what is measured how often.
        """
        self._reads.start_serving(geometry)
        self.sampling = sampling

    def stats(self) -> dict[str, Any]:
        """Densities of late rows in each layer and query head of this rank, as JSON, with the numbers of the layers."""
        layers = list(self._reads.layers)
        return {"engine": self._engine, "rank": self._rank, "layers": layers, "density": self._reads.recent()}

    def count_fallbacks(self, fallbacks: Mapping[Fallback, int]) -> None:
        """Rows of a step that asked for a method and run dense (`StepPlan.fallbacks`)."""
        if fallbacks and self._counts_rows:
            self._fallbacks.count(fallbacks)

    def start_step(self, plan: StepPlan) -> StepRecord:
        """Draw what is measured in a step that is about to run."""
        record = StepRecord(self, plan)
        if not self._recording:
            return record
        decode_rows = len(plan.decode) + len(plan.batch)
        if (plan.prefill or decode_rows) and is_due(self.sampling.timing_interval_steps):
            rows = [("prefill", row.method.name) for row in plan.prefill]
            rows += [("decode", row.method.name) for row in plan.decode]
            rows += [("decode", row.setting.method.name) for row in plan.batch if row.setting.method is not None]
            record.timer = StepTimer(torch.cuda.is_available(), rows)
        if plan.prefill and is_due(self.sampling.recall_interval_steps):
            chunk = random.choice(plan.prefill)
            # A stage of a pipeline may hold none that is sparse.
            if sparse := [layer for layer in plan.layers if layer >= chunk.method.dense_layers]:
                record.recall_layers[chunk.span.row] = random.choice(sparse)
        if decode_rows and is_due(self.sampling.recall_interval_steps):
            place = random.randrange(decode_rows)
            of_batch = place - len(plan.decode)
            roles = plan.decode[place].roles if of_batch < 0 else plan.batch[of_batch].setting.roles
            layers = reading_layers(roles)
            # Settings may leave no layer that reads a list.
            if layers and of_batch < 0:
                record.recall_layers[plan.decode[place].span.row] = random.choice(layers)
            elif layers:
                layer, row = random.choice(layers), plan.batch[of_batch]
                record.batch_recall = EagerRecall(layer, row, of_batch, self.observe_recall)
        return record

    def observe_recall(self, phase: str, method: str, sample: RecallSample) -> None:
        """Measure the attention-mass recall of a row in one layer."""
        assert self._recording, "other ranks sample nothing"
        self._arrivals.fetch(sample.recall(), lambda recall: self._recall.observe(phase, method, recall))

    def count_guard_check(self, phase: str, method: str) -> None:
        """The guard compares the recall of a row in a layer, on this rank."""
        if self._recording:
            self._guard.count_check(phase, method)

    def count_guard_layer(self, phase: str, method: str, layer: int, recall: float, min_recall: float) -> None:
        """The guard sends a layer of a request dense, on this rank; arguments as of `GuardMetrics.count_layer`."""
        if self._recording:
            self._guard.count_layer(phase, method, layer, recall, min_recall)

    def finish_step(self, densities: Sequence[RowDensity], timer: StepTimer = NO_TIMER) -> None:
        """All layers of the step are queued: fetch the rows' kept counts and times without waiting for the device."""
        densities = [density for density in densities if density.kept]
        if densities:
            kept = torch.cat([kept for density in densities for kept in density.kept])
            self._arrivals.fetch(kept, lambda host: self._reads.observe_lists(host, densities))
        if timer.rows:
            self._arrivals.after_device(lambda: self._count_seconds(timer.seconds(), timer.rows))

    def observe_batch(self, batch: Sequence[BatchRow]) -> None:
        """Decode rows that are served at once, whose lists' lengths the host knows; called when their step is queued.

        The device is busy with them then: before that, the time that counting takes would be the step's.
        """
        self._reads.observe_batch(batch)

    def observe_dense_steps(self, rows: Sequence[DenseStepRow]) -> None:
        """Decode rows that read everything because their settings ask for it (`StepPlan.dense_steps`)."""
        self._reads.observe_dense_steps(rows)

    def observe_graph(self, timer: GraphTimer, rows: Counter[tuple[str, str]]) -> None:
        """A graph is queued whose times count.

        Args:
            timer: of the graph.
            rows: of each phase and method.
        """
        self._arrivals.fetch(
            timer.stamps, lambda stamps: self._count_seconds(timer.seconds_by_rows(stamps, rows), rows)
        )

    def _count_seconds(
        self, seconds: Mapping[tuple[str, str], tuple[float, float]], rows: Counter[tuple[str, str]]
    ) -> None:
        self._seconds.count(seconds, rows if self._counts_rows else Counter())

    def collect_finished(self) -> None:
        """Take what has arrived from the device; called once a step."""
        if self.memory is not None:
            self.memory.update()
        self._arrivals.collect()


class StepRecord:
    """What is measured of one step: made from its plan, carried beside it, written while the step is queued.

    Args:
        metrics: receive what was measured.
        plan: of the step.

    Attributes:
        timer: of the step; `NO_TIMER` unless it is sampled.
        recall_layers: layer in which the recall of a row that is served alone is measured, by the row's index in the
            batch; of sampled rows only.
        batch_recall: takes a row of those that are served at once, if it is sampled.
    """

    def __init__(self, metrics: WorkerMetrics, plan: StepPlan) -> None:
        self.metrics = metrics
        self.timer: StepTimer = NO_TIMER
        self.recall_layers: dict[int, int] = {}
        self.batch_recall: ListsTaken | None = None
        self._batch = plan.batch
        self._densities = {row.span.row: RowDensity("prefill", row.method.name) for row in plan.prefill}
        for row in plan.decode:
            self._densities[row.span.row] = RowDensity("decode", row.method.name)

    def count(
        self, layer: int, span: RowSpan, kept_tokens: torch.Tensor, query_block_tokens: int, list_heads: int
    ) -> None:
        """A row that is served alone reads lists in a layer; arguments as of `RowDensity.add`."""
        self._densities[span.row].add(layer, kept_tokens, span, query_block_tokens, list_heads)

    def measures_recall(self, layer: int, span: RowSpan) -> bool:
        """Whether the recall of a row that is served alone is measured in a layer."""
        return self.recall_layers.get(span.row) == layer

    def finish(self) -> None:
        """All layers of the step are queued."""
        self.metrics.finish_step(list(self._densities.values()), self.timer)
        self.metrics.observe_batch(self._batch)
