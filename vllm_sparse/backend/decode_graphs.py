"""FULL CUDA graphs of steps that decode sparsely, beside vLLM's own, which hold dense attention only (model runner V2).

For each batch size vLLM captures one decode graph. This captures more, of two kinds, and each step replays the one
that launches least:

* for each method the launches of the layer roles that the server's configuration gives it: once for steps in which all
  rows decode sparsely, which need no dense launch in most layers, and once for steps with dense rows too;
* for all methods together, a graph in whose every layer everything is launched: which role a row has there is data.

So layer roles, budgets, and whether a row is guarded, keep no step out of the graphs, nor do they cost steps without
such rows. Rows whose roles launch no more in any layer than the configured ones stay in the first kind. What a graph
cannot hold is what its memory has no room for: lists longer than the server keeps room for, and knobs with which
`BatchDecodeMethod.serves` says no. Admission refuses requests for those (`server.decode_room`); steps with one that the
server's own configuration asks for decode with PIECEWISE graphs, attention between them.

vLLM's many batch sizes are captured for dense steps. Sparse steps pad to the next of fewer (`captured_sizes`), since
each takes start-up time for every one of the kinds above.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    from vllm.config import ParallelConfig

    from vllm_sparse.backend.decode_buffers import DecodeBuffers
    from vllm_sparse.backend.guard import StepGuard
    from vllm_sparse.methods.decode import BatchDecodeMethod
    from vllm_sparse.step.launch import LayerLaunches
    from vllm_sparse.step.requests import SparseRequest
    from vllm_sparse.step.roles import Role

ANY = "any methods and layer roles"
DENSE_ROW = RowSetting(None, 0, (), 0, False)
# Longer than any context, and what the device's settings still hold.
LONGEST_CONTEXT_TOKENS = (1 << 31) - 1
# Of the largest step with graphs for sparse rows alone. More rows that all are long hardly fit the cache: 128 contexts
# of the default `min_tokens` fill that of an H200 beside an 8B model. Larger steps replay graphs for dense rows too.
MOST_ROWS_ALONE = 128
# Of a captured size to the next smaller one, at least. Rows that pad a step read nothing; they cost where the model's
# matrix products are bound by arithmetic, above some 150 rows.
SIZE_RATIO = 1.25
# Layer roles that are remembered: the guard makes new ones where it sends layers dense.
MOST_ROLES = 4096


def beside_dense(method: str) -> str:
    """Name of the graphs of steps in which some rows decode by a method and others are dense."""
    return f"{method} beside dense"


def captured_sizes(sizes: Iterable[int]) -> list[int]:
    """Batch sizes of sparse graphs: of vLLM's the least, each next that is larger by `SIZE_RATIO`, and the largest.

    Gaps stay small enough that all kernels are compiled at start-up which steps outside of graphs need, whatever their
    rows (`padded_rows`).

    Args:
        sizes: rows of vLLM's decode graphs.

    Returns:
        Rows, rising.
    """
    rising = sorted(set(sizes))
    kept = rising[:1]
    for size in rising[1:]:
        if size >= kept[-1] * SIZE_RATIO or size == rising[-1]:
            kept.append(size)
    return kept


def graph_sizes(sizes: Iterable[int], parallel: ParallelConfig) -> list[int]:
    """Batch sizes of a server's sparse graphs, rising.

    Engines of data parallelism and stages of a pipeline pad alike, those whose steps are dense too: there each of
    vLLM's sizes is needed.

    Args:
        sizes: rows of vLLM's decode graphs.
        parallel: the server's.
    """
    pads_alone = parallel.data_parallel_size == parallel.pipeline_parallel_size == 1
    return captured_sizes(sizes) if pads_alone else sorted(set(sizes))


class DecodeGraphs:
    """What graphs of sparse decode steps share.

    Args:
        buffers: that they read.
        methods: as the server's configuration sets them, those that serve rows at once.
        speculative: the server drafts tokens; verification rows run dense.
        guards: the server guards requests by default; then the graphs of a method beside dense rows hold guarded rows
            too. Those of any methods and roles always do.
        judged_apart: ranks that have to replay the same graphs judge guarded rows apart. All-reduces of a graph read
            buffers of the same graph on other ranks, so steps with such rows replay one that holds whatever was judged.

    Attributes:
        sizes: rows of the captured graphs, rising; none before there are graphs.
        step: that is about to run, if it has sparse rows.
        may_replay: the step that vLLM chooses a graph for may replay one of these.
    """

    def __init__(
        self,
        buffers: DecodeBuffers,
        methods: Sequence[BatchDecodeMethod],
        speculative: bool,
        guards: bool = False,
        judged_apart: bool = False,
    ) -> None:
        self.buffers = buffers
        self.speculative = speculative
        self.judged_apart = judged_apart
        size = buffers.size
        self.roles = {type(method): layer_roles(method, size.num_layers, size.held) for method in methods}
        rows = [RowSetting(method, 0, self.roles[type(method)], 0, True) for method in methods]
        self.launches: dict[str, list[LayerLaunches]] = {}
        for row in rows:
            assert row.method is not None
            self.launches[row.method.name] = buffers.launches([row], all_sparse=True)
            self.launches[beside_dense(row.method.name)] = buffers.launches([row], all_sparse=False)
        self.launches[ANY] = buffers.launches_of_any_roles()
        # Of any roles the configured ones are the likeliest, so layers are told apart by them when they are timed.
        kinds = self.launches | {ANY: buffers.launches(rows, all_sparse=False)}
        held = {name: {layer: kind[layer] for layer in size.layers} for name, kind in kinds.items()}
        reading = {name: self._reading_layers(name) for name in self.launches}
        self._observer = GraphObserver(held, reading, buffers.lists, size.kv_heads)
        self._guard = GraphGuard(buffers.lists, size.kv_heads, size.layers)
        self._guarding = {ANY, *(beside_dense(method.name) for method in methods if guards)}
        # Asked in each step; by the name of the graphs and the roles of a row.
        self._held: dict[tuple[str, tuple[Role, ...]], bool] = {}
        self.captured: dict[str, dict[Any, Any]] = {}
        self.capturing: str | None = None
        self.sizes: list[int] = []
        self.step: StepExecution | None = None
        self.may_replay = False

    @property
    def bytes(self) -> int:
        """Of device memory that graphs keep beside the buffers, for the guard."""
        return self._guard.bytes

    def sizes_of(self, name: str) -> list[int]:
        """Rows of the graphs of some launches, of all `sizes`."""
        alone = {method.name for method in self.roles}
        return [size for size in self.sizes if name not in alone or size <= MOST_ROWS_ALONE]

    def padded(self, rows: int) -> int:
        """Rows of the graph that a step replays; as many as it has where it may replay none of these."""
        return next((size for size in self.sizes if size >= rows), rows) if self.may_replay else rows

    def holds(self, requests: Sequence[SparseRequest], rows: int) -> bool:
        """Whether a graph has been captured for a step.

        Args:
            requests: of the step that decode sparsely if their context is long enough.
            rows: of the step.
        """
        if self.speculative:
            return True
        return bool(self.sizes) and rows <= self.sizes[-1] and all(self._holds(request) for request in requests)

    def _holds(self, request: SparseRequest) -> bool:
        method = request.params.decode
        return self.buffers.serves(method) and self.buffers.holds(1, method.longest_list_tokens)

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
        plan = StepPlan(self.buffers.size.layers)
        record = self._observer.capturing(name, rows, plan)
        guard: StepGuard = NO_GUARD
        if name in self._guarding:
            guard = self._guard.capturing(name, rows, self.launches[name])
        return StepExecution(plan, record, batch=BatchStep(step, slice(0, rows)), guard=guard)

    def _reading_layers(self, name: str) -> list[int]:
        """Layers in which all methods of a graph read lists."""
        of_methods = [
            set(reading_layers(roles))
            for method, roles in self.roles.items()
            if name in (ANY, method.name, beside_dense(method.name))
        ]
        return sorted(set.intersection(*of_methods))

    def prepare(self, size: int) -> str | None:
        """Tell this step's rows to the device and return which graphs to replay one of; None for vLLM's own.

        Args:
            size: rows of the graph, those that pad the step included.
        """
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
        self._guard.before_replay(self.step.guard)
        return self._name(plan, rows, size)

    def _name(self, plan: StepPlan, rows: Sequence[RowSetting], size: int) -> str:
        """The graphs that launch least of those that hold a step; arguments as in `prepare`."""
        names = {row.method.name for row in rows if row.method is not None}
        guarded = any(row.guard is not None for row in plan.batch)
        if len(names) != 1 or (guarded and self.judged_apart):
            return ANY
        name = names.pop()
        # Requests of equal knobs share the object; hashing it for each row would take longer than a large batch has.
        roles = {id(row.roles): row.roles for row in rows if row.method is not None}.values()
        if not all(self._hold(beside_dense(name), of_row) for of_row in roles):
            return ANY
        if guarded:
            return beside_dense(name) if beside_dense(name) in self._guarding else ANY
        alone = len(plan.batch) == len(rows) and size <= MOST_ROWS_ALONE
        return name if alone and all(self._hold(name, of_row) for of_row in roles) else beside_dense(name)

    def _hold(self, name: str, roles: tuple[Role, ...]) -> bool:
        """Whether the graphs of one method launch all that its sparse rows with these layer roles need."""
        held = self._held.get((name, roles))
        if held is None:
            method = next(one for one in self.buffers.methods if name in (one.name, beside_dense(one.name)))
            needed = self.buffers.launches([RowSetting(method, 0, roles, 0, False)], all_sparse=True)
            held = all(has.holds(need) for has, need in zip(self.launches[name], needed, strict=True))
            if len(self._held) >= MOST_ROLES:
                self._held.clear()
            self._held[name, roles] = held
        return held

    def replayed(self, name: str, rows: int) -> None:
        """The step's graph is queued: count its rows and read what is sampled of it.

        Args:
            name: of its launches, as from `prepare`.
            rows: of the graph.
        """
        assert self.step is not None
        self._observer.after_replay(self.step.record, self.step.plan, name, rows)
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
