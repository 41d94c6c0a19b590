"""FULL CUDA graphs of steps that decode sparsely, beside vLLM's own, which hold dense attention only (model runner V2).

For each batch size vLLM captures one decode graph. This captures more: for each method one for steps in which all rows
decode sparsely by it and one for steps of such rows and dense ones, and one for steps of any mixture of methods. Dense
steps replay vLLM's own graph and pay nothing, and dense rows beside those of one method do not pay for others. What is
launched in a layer is part of a graph, so graphs hold the layer roles that the server's configuration gives a method;
requests with other roles, with lists longer than the server keeps room for, or with knobs that are not served at once
decode with PIECEWISE graphs, attention between them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_sparse.backend.decode import DecodeBuffers, DecodeStep, LayerLaunches, RowSetting
from vllm_sparse.methods.decode import reading_layers
from vllm_sparse.metrics import WorkerMetrics
from vllm_sparse.metrics.batch_recall import EagerRecall, GraphRecall, TakenRow
from vllm_sparse.metrics.graph_timing import GraphTimer
from vllm_sparse.metrics.timing import NO_TIMER
from vllm_sparse.step.plan import BatchStep, StepPlan, layer_roles
from vllm_sparse.step.requests import TABLE, SparseRequest

if TYPE_CHECKING:
    import numpy as np
    import torch

    from vllm_sparse.methods.decode import BatchDecodeMethod

MIXED = "any mixture"
DENSE_ROW = RowSetting(None, 0, (), 0, False)
# Longer than any context, and what the device's settings still hold.
LONGEST_CONTEXT_TOKENS = (1 << 31) - 1


def beside_dense(method: str) -> str:
    """Name of the graphs of steps in which some rows decode by a method and others are dense."""
    return f"{method} beside dense"


class DecodeGraphs:
    """What graphs of sparse decode steps share.

    Args:
        buffers: that they read.
        methods: as the server's configuration sets them, those that serve rows at once.
        num_layers: attention layers.
        speculative: the server drafts tokens; verification rows run dense.
    """

    def __init__(
        self, buffers: DecodeBuffers, methods: Sequence[BatchDecodeMethod], num_layers: int, speculative: bool
    ) -> None:
        self.buffers = buffers
        self.num_layers = num_layers
        self.speculative = speculative
        self.roles = {type(method): layer_roles(method, num_layers) for method in methods}
        rows = [RowSetting(method, 0, self.roles[type(method)], 0, True) for method in methods]
        self.launches: dict[str, list[LayerLaunches]] = {}
        for row in rows:
            assert row.method is not None
            self.launches[row.method.name] = buffers.launches([row], all_sparse=True)
            self.launches[beside_dense(row.method.name)] = buffers.launches([row], all_sparse=False)
        if len(rows) > 1:
            self.launches[MIXED] = buffers.launches(rows, all_sparse=False)
        self._timers = {name: GraphTimer(launches, buffers.settings.device) for name, launches in self.launches.items()}
        self._taken = TakenRow(buffers)
        # By launches and rows of a graph.
        self._recalls: dict[tuple[str, int], GraphRecall] = {}
        self.captured: dict[str, dict[Any, Any]] = {}
        self.capturing: str | None = None
        self.most_rows = 0
        self.plan: StepPlan | None = None

    def holds(self, requests: Sequence[SparseRequest], rows: int) -> bool:
        """Whether a graph has been captured for a step.

        Args:
            requests: of the step that decode sparsely if their context is long enough.
            rows: of the step.
        """
        return self.speculative or (rows <= self.most_rows and all(self._holds(request) for request in requests))

    def _holds(self, request: SparseRequest) -> bool:
        method = request.params.decode
        return (
            self.buffers.serves(method)
            and layer_roles(method, self.num_layers) == self.roles.get(type(method))
            and self.buffers.holds(1, method.longest_list_tokens)
        )

    def capture_plan(self, context_tokens: torch.Tensor, block_table: torch.Tensor, capacity_tokens: int) -> StepPlan:
        """The plan of a step that is being captured.

        Args:
            context_tokens: int32 ``[rows]``, vLLM's own at its address.
            block_table: int32 ``[rows, blocks]``, likewise.
            capacity_tokens: tokens that there is room to score.
        """
        assert self.capturing is not None
        rows = context_tokens.shape[0]
        self.buffers.say([DENSE_ROW] * rows)
        launches = self.launches[self.capturing]
        step = DecodeStep(self.buffers, rows, launches, context_tokens, block_table, capacity_tokens)
        batch = BatchStep(step, slice(0, rows))
        metrics = WorkerMetrics.get()
        plan = StepPlan([], [], [], [], [], self.buffers, self.num_layers, metrics, batch)
        if metrics.sampling.timing_interval_steps:
            plan.timer = self._timers[self.capturing]
        reading = self._reading_layers(self.capturing)
        if metrics.sampling.recall_interval_steps and reading:
            # Another layer in each size of graph.
            plan.recall = self._recalls[self.capturing, rows] = GraphRecall(reading[rows % len(reading)], self._taken)
        return plan

    def _reading_layers(self, name: str) -> list[int]:
        """Layers in which all methods of a graph read lists."""
        of_methods = [
            set(reading_layers(roles))
            for method, roles in self.roles.items()
            if name in (MIXED, method.name, beside_dense(method.name))
        ]
        return sorted(set.intersection(*of_methods))

    def prepare(self) -> str | None:
        """Say this step's rows to the device and return which graphs to replay one of; None for vLLM's own."""
        plan = self.plan
        if plan is None or not (plan.batch or plan.summarising):
            return None
        rows = [DENSE_ROW] * (plan.spans[-1].row + 1)
        for new in plan.summarising:
            # Dense for now, whatever its context, but its new key is summarised.
            if self.buffers.serves(new.method):
                rows[new.span.row] = RowSetting(new.method, LONGEST_CONTEXT_TOKENS, new.roles, 0, False)
        for row in plan.batch:
            rows[row.span.row] = row.setting
        self.buffers.say(rows)
        if isinstance(plan.recall, EagerRecall):
            self._taken.row.fill_(plan.recall.row.span.row)
        names = {row.method.name for row in rows if row.method is not None}
        if len(names) != 1:
            return MIXED
        name = names.pop()
        return name if len(plan.batch) == len(rows) else beside_dense(name)

    def measure(self, name: str, rows: int) -> None:
        """The step's graph is queued: count its rows and take what is sampled of it.

        Args:
            name: of its launches, as from `prepare`.
            rows: of the graph.
        """
        plan = self.plan
        assert plan is not None
        plan.metrics.observe_batch(plan.batch)
        if plan.timer is not NO_TIMER:
            plan.metrics.observe_graph(self._timers[name], plan.timer.rows)
        if isinstance(plan.recall, EagerRecall):
            self._taken.row.zero_()
            if self._reading_layers(name):
                self._recalls[name, rows].observe(plan.recall.row, plan.metrics)


class _Current:
    """The graphs of this process's model runner: vLLM runs each worker in its own."""

    graphs: DecodeGraphs | None = None


def set_graphs(graphs: DecodeGraphs | None) -> None:
    """The builder of a model runner's attention metadata is there."""
    _Current.graphs = graphs


def _graphs_hold(slots: np.ndarray) -> bool:
    """Whether a step of these slots may replay a FULL graph."""
    requests = TABLE.sparse_decodes(slots)
    graphs = _Current.graphs
    return not requests or (graphs is not None and graphs.holds(requests, len(slots)))


def install() -> None:
    """Make runner V2 capture and replay graphs of sparse decode steps.

    A batch is eligible for a FULL decode graph when its rows have a uniform token count. Where no graph was captured
    for a sparse step, none is reported: that makes it a mixed batch, for which PIECEWISE graphs run with the attention
    between them; data-parallel ranks agree on that value, so all of them follow.
    """
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    gather, capture, run = (
        GPUModelRunner.gather_batch_req_state,
        ModelCudaGraphManager.capture,
        ModelCudaGraphManager.run_fullgraph,
    )
    if hasattr(gather, "__wrapped__"):
        return

    @functools.wraps(gather)
    def gather_batch_req_state(self: Any, scheduler_output: Any, dummy_run: bool) -> tuple[Any, int | None]:
        batch, uniform_tokens = gather(self, scheduler_output, dummy_run)
        TABLE.dummy_step = dummy_run
        if _Current.graphs is not None:
            _Current.graphs.plan = None
        if batch is not None and uniform_tokens is not None and not _graphs_hold(batch.idx_mapping_np):
            uniform_tokens = None
        return batch, uniform_tokens

    @functools.wraps(capture)
    def capture_all(self: Any, *args: Any, **kwargs: Any) -> None:
        capture(self, *args, **kwargs)
        graphs = _Current.graphs
        # While vLLM measures memory, before there is a cache, its own are enough.
        if graphs is None or self._max_full_descs_to_capture is not None:
            return
        own_graphs, own_shapes = self.graphs, self._capture_descs
        shapes = [
            shape
            for shape in own_shapes.get(CUDAGraphMode.FULL, [])
            if shape.uniform_token_count == 1 and graphs.buffers.holds(shape.num_reqs, 1)
        ]
        if not shapes:
            return
        try:
            self._capture_descs = {CUDAGraphMode.FULL: shapes}
            for name in graphs.launches:
                self.graphs = graphs.captured[name] = {}
                graphs.capturing = name
                kwargs["progress_bar_desc"] = f"Capturing CUDA graphs of sparse decode steps, {name}"
                capture(self, *args, **kwargs)
            graphs.most_rows = max(shape.num_reqs for shape in shapes)
        finally:
            graphs.capturing = None
            self.graphs, self._capture_descs = own_graphs, own_shapes

    @functools.wraps(run)
    def run_fullgraph(self: Any, desc: Any) -> Any:
        graphs = _Current.graphs
        name = None if graphs is None else graphs.prepare()
        if graphs is None or name is None:
            return run(self, desc)
        own = self.graphs
        self.graphs = graphs.captured[name]
        try:
            output = run(self, desc)
        finally:
            self.graphs = own
        graphs.measure(name, desc.num_reqs)
        return output

    GPUModelRunner.gather_batch_req_state = gather_batch_req_state
    ModelCudaGraphManager.capture = capture_all
    ModelCudaGraphManager.run_fullgraph = run_fullgraph
