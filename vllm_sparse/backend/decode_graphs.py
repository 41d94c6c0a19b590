"""FULL CUDA graphs of steps that decode sparsely, beside vLLM's own, which hold dense attention only (model runner V2).

For each batch size vLLM captures one decode graph. This captures more: for each method one for steps in which all rows
decode sparsely by it and one for steps of such rows and dense ones, and one for steps of any mixture of methods. Dense
steps replay vLLM's own graph and pay nothing, and dense rows beside those of one method do not pay for others. What is
launched in a layer is part of a graph, so graphs hold the layer roles that the server's configuration gives a method;
requests with other roles, with lists longer than the server keeps room for, or with knobs that are not served at once
decode with PIECEWISE graphs, attention between them. So do guarded requests unless the server guards by default: then
the graphs that serve dense rows too also hold what the guard measures, and guarded rows replay those, since their
layers may go dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_sparse.backend.decode_batch import BatchStep, DecodeStep
from vllm_sparse.backend.execution import StepExecution
from vllm_sparse.backend.guard import NO_GUARD, GraphGuard
from vllm_sparse.metrics.graph_observer import GraphObserver
from vllm_sparse.step.plan import StepPlan, layer_roles
from vllm_sparse.step.requests import RowSetting
from vllm_sparse.step.roles import reading_layers

if TYPE_CHECKING:
    import torch

    from vllm_sparse.backend.decode_buffers import DecodeBuffers
    from vllm_sparse.backend.guard import StepGuard
    from vllm_sparse.methods.decode import BatchDecodeMethod
    from vllm_sparse.step.launch import LayerLaunches
    from vllm_sparse.step.requests import SparseRequest

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
        guards: the server guards requests by default.
    """

    def __init__(
        self,
        buffers: DecodeBuffers,
        methods: Sequence[BatchDecodeMethod],
        num_layers: int,
        speculative: bool,
        guards: bool = False,
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
        reading = {name: self._reading_layers(name) for name in self.launches}
        self._observer = GraphObserver(self.launches, reading, buffers.lists, buffers.size.kv_heads)
        self._guard = GraphGuard(buffers.lists, buffers.size.kv_heads, num_layers) if guards else None
        self.captured: dict[str, dict[Any, Any]] = {}
        self.capturing: str | None = None
        self.most_rows = 0
        self.step: StepExecution | None = None

    @property
    def bytes(self) -> int:
        """Of device memory that graphs keep beside the buffers, for the guard."""
        return 0 if self._guard is None else self._guard.bytes

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
            and (request.guard is None or self._guard is not None)
        )

    def capture_step(self, seq_lens: torch.Tensor, block_table: torch.Tensor, capacity_tokens: int) -> StepExecution:
        """The step that is being captured.

        Args:
            seq_lens: int32 ``[rows]``, vLLM's own at its address.
            block_table: int32 ``[rows, blocks]``, likewise.
            capacity_tokens: tokens that there is room to score.
        """
        name = self.capturing
        assert name is not None
        rows = seq_lens.shape[0]
        self.buffers.tell([DENSE_ROW] * rows)
        step = DecodeStep(self.buffers, rows, self.launches[name], seq_lens, block_table, capacity_tokens)
        plan = StepPlan(self.num_layers)
        record = self._observer.capturing(name, rows, plan)
        guard: StepGuard = NO_GUARD
        # Graphs for sparse rows alone hold no guarded ones.
        if self._guard is not None and name not in {method.name for method in self.roles}:
            guard = self._guard.capturing(name, rows, self.launches[name])
        return StepExecution(plan, record, batch=BatchStep(step, slice(0, rows)), guard=guard)

    def _reading_layers(self, name: str) -> list[int]:
        """Layers in which all methods of a graph read lists."""
        of_methods = [
            set(reading_layers(roles))
            for method, roles in self.roles.items()
            if name in (MIXED, method.name, beside_dense(method.name))
        ]
        return sorted(set.intersection(*of_methods))

    def prepare(self) -> str | None:
        """Tell this step's rows to the device and return which graphs to replay one of; None for vLLM's own."""
        if self.step is None:
            return None
        plan = self.step.plan
        if not (plan.batch or plan.summarising):
            return None
        rows = [DENSE_ROW] * (plan.spans[-1].row + 1)
        for new in plan.summarising:
            # Dense for now, whatever its context, but its new key is summarised.
            if self.buffers.serves(new.method):
                rows[new.span.row] = RowSetting(new.method, LONGEST_CONTEXT_TOKENS, new.roles, 0, False)
        for row in plan.batch:
            rows[row.span.row] = row.setting
        self.buffers.tell(rows)
        self._observer.before_replay(self.step.record)
        if self._guard is not None:
            self._guard.before_replay(self.step.guard)
        names = {row.method.name for row in rows if row.method is not None}
        if len(names) != 1:
            return MIXED
        name = names.pop()
        all_sparse = len(plan.batch) == len(rows) and all(row.guard is None for row in plan.batch)
        return name if all_sparse else beside_dense(name)

    def replayed(self, name: str, rows: int) -> None:
        """The step's graph is queued: count its rows and read what is sampled of it.

        Args:
            name: of its launches, as from `prepare`.
            rows: of the graph.
        """
        assert self.step is not None
        self._observer.after_replay(self.step.record, self.step.plan, name, rows)
        if self._guard is not None:
            self._guard.after_replay(self.step.guard, name, rows)


class _Current:
    graphs: DecodeGraphs | None = None


def set_graphs(graphs: DecodeGraphs | None) -> None:
    """The builder of this process's model runner is there.

    The hooks on the runner and on its graph manager ask `current_graphs` for what the builder has made. It is kept for
    the process, because vLLM hands the builder to neither class, and runs one model runner a process.
    """
    _Current.graphs = graphs


def current_graphs() -> DecodeGraphs | None:
    """The graphs of this process's model runner, if it has some."""
    return _Current.graphs
