"""Which graph a step replays and what the device is told before; graphs themselves need a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.backend.test_forward import Row, common_metadata
from vllm_sparse.backend.decode_buffers import (
    FRESH,
    KNOBS,
    LEAST_CONTEXT,
    METHOD,
    MOST_KNOBS,
    SLOT,
    DecodeBuffers,
)
from vllm_sparse.backend.decode_graphs import MIXED, DecodeGraphs, beside_dense, set_graphs
from vllm_sparse.backend.execution import StepExecution
from vllm_sparse.config.request import SparseParams
from vllm_sparse.config.settings import ServerConfig
from vllm_sparse.hooks import gpu_model_runner, model_cuda_graph_manager
from vllm_sparse.methods.block_topk import BlockTopk
from vllm_sparse.methods.decode import BatchDecodeMethod, DecodeMethod
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.hip import HipDecode
from vllm_sparse.methods.hip.decode import MOST_STAGES
from vllm_sparse.methods.registry import DECODE_METHODS
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.metrics import StepRecord, WorkerMetrics
from vllm_sparse.step.eligibility import DenseReason
from vllm_sparse.step.guard import RequestGuard, guarded_roles
from vllm_sparse.step.plan import BatchRow, PlanLimits, RowSpan, StepPlan, SummaryRow, plan_step
from vllm_sparse.step.requests import RowSetting, SparseRequest
from vllm_sparse.step.roles import Role
from vllm_sparse.step.rows import ServerSize

LAYERS, MOST_ROWS, LIST_TOKENS = 6, 8, 512
CONFIGURED = Tidal(budget_tokens=256, dense_layers=1, reselect_layers=(3,))
SIZE = ServerSize(MOST_ROWS, 1024, LAYERS, 2)


@pytest.fixture
def graphs() -> DecodeGraphs:
    buffers = DecodeBuffers(MOST_ROWS, SIZE, [CONFIGURED], LIST_TOKENS, torch.device("cpu"))
    made = DecodeGraphs(buffers, [CONFIGURED], LAYERS, speculative=False)
    made.most_rows = 4
    made.captured = {name: {} for name in made.launches}
    return made


def request(method: BatchDecodeMethod) -> SparseRequest:
    return SparseRequest(SparseParams(FlexPrefill(), method, 0))


@pytest.mark.parametrize(
    ("method", "held"),
    [
        (CONFIGURED, True),
        (replace(CONFIGURED, budget_tokens=LIST_TOKENS, sink_tokens=0), True),
        (replace(CONFIGURED, budget_tokens=LIST_TOKENS + 1), False),
        (replace(CONFIGURED, reselect_layers=(4,)), False),
        (replace(CONFIGURED, dense_layers=0), False),
        (replace(CONFIGURED, list_per="query_head"), False),
    ],
)
def test_a_graph_holds_requests_of_its_layer_roles(graphs: DecodeGraphs, method: Tidal, held: bool) -> None:
    assert graphs.holds([request(CONFIGURED), request(method)], 3) == held
    assert graphs.holds([request(CONFIGURED)], 4)
    assert not graphs.holds([request(CONFIGURED)], 5), "no graph for so many rows"
    graphs.speculative = True
    assert graphs.holds([request(method)], 5), "verification steps are dense"


def test_a_graph_holds_requests_that_its_methods_have_room_for() -> None:
    """And a method that the server does not keep buffers for is served one by one."""
    configured = HipDecode(stage_block_tokens=(64, 16), stage_budget_tokens=(512, 128), recent_tokens=50)
    buffers = DecodeBuffers(MOST_ROWS, SIZE, [configured], LIST_TOKENS, torch.device("cpu"))
    graphs = DecodeGraphs(buffers, [configured], LAYERS, speculative=False)
    graphs.most_rows = 4
    assert graphs.launches["hip"] == graphs.buffers.launches(
        [RowSetting(configured, 0, (Role.WRITE_AND_READ,) * LAYERS, 0, True)], True
    )
    narrow = replace(
        configured, stage_block_tokens=(64,), stage_budget_tokens=(128,), refresh_steps=(3,), recent_tokens=7
    )
    assert graphs.holds([request(configured), request(narrow)], 2)
    assert not graphs.holds([request(replace(configured, dense_layers=1))], 1), "other layer roles"
    assert not graphs.holds([request(replace(configured, recent_tokens=400))], 1), "a longer list"
    assert not graphs.holds([request(replace(configured, stage_block_tokens=(32, 16)))], 1), "more candidates"
    assert not graphs.holds([request(CONFIGURED)], 1)
    assert [buffers.serves(method) for method in (configured, narrow, CONFIGURED, None)] == [True, True, False, False]


def test_requests_that_are_not_served_at_once_are_served_one_by_one() -> None:
    """In the same step as others: knobs that the server's memory has no room for, methods that it does not keep."""
    configured = HipDecode(stage_block_tokens=(64, 16), stage_budget_tokens=(512, 128), recent_tokens=50)
    buffers = DecodeBuffers(MOST_ROWS, SIZE, [configured], LIST_TOKENS, torch.device("cpu"))
    deep = replace(
        configured, stage_block_tokens=(64, 32, 16), stage_budget_tokens=(512, 256, 128), refresh_steps=(16, 8, 4)
    )
    methods = [configured, deep, CONFIGURED, replace(configured, recent_tokens=9)]
    rows = [Row(1, 1000, SparseParams(None, method)) for method in methods]
    requests = {row: SparseRequest(SparseParams(None, method), row) for row, method in enumerate(methods)}
    common = common_metadata(rows, torch.zeros(len(rows), 64, dtype=torch.int32))
    limits = PlanLimits(LAYERS, scored_tokens=1 << 20, serves_at_once=buffers.serves)
    plan = plan_step(common, requests, limits)
    assert [row.span.row for row in plan.batch] == [0, 3]
    assert [row.span.row for row in plan.decode] == [1, 2]
    plan = plan_step(common, requests, PlanLimits(LAYERS))
    assert [row.span.row for row in plan.decode] == [0, 1, 2, 3]


def test_a_larger_step_shares_what_methods_keep() -> None:
    method = HipDecode(stage_block_tokens=(64,), stage_budget_tokens=(128,))
    buffers = DecodeBuffers(2, SIZE, [method], LIST_TOKENS, torch.device("cpu"))
    assert buffers.for_step(2, LIST_TOKENS) is buffers
    for rows, list_tokens in ((3, 1), (1, LIST_TOKENS + 1)):
        larger = buffers.for_step(rows, list_tokens)
        assert larger.holds(rows, list_tokens)
        assert larger.memories["hip"] is buffers.memories["hip"]
    (memory,) = buffers.memories.values()
    assert memory is not None
    assert buffers.bytes > memory.bytes


def test_launches_of_a_graph_follow_the_roles(graphs: DecodeGraphs) -> None:
    alone, mixed = graphs.launches["tidal"], graphs.launches[beside_dense("tidal")]
    assert [layer.dense for layer in alone] == [True, True, False, True, False, False]
    assert all(layer.dense for layer in mixed)
    for launches in (alone, mixed):
        assert [layer.reading for layer in launches] == [False, False, True, False, True, True]
        assert [layer.writing_ahead for layer in launches] == [(), (0,), (), (0,), (), ()]
        assert all(layer.writing_here == () for layer in launches)


def plan_of(rows: int, sparse: dict[int, RowSetting]) -> StepPlan:
    spans = tuple(RowSpan(row, row, 1, 1000) for row in range(rows))
    batch = tuple(BatchRow(spans[row], setting) for row, setting in sparse.items())
    return StepPlan(LAYERS, spans, batch=batch)


def step_of(plan: StepPlan) -> StepExecution:
    return StepExecution(plan, StepRecord(WorkerMetrics(recording=False), plan))


def setting(slot: int, fresh: bool = False, method: Tidal = CONFIGURED) -> RowSetting:
    return RowSetting(method, 300 + slot, tuple(method.layer_roles(LAYERS)), slot, fresh)


def test_a_step_is_told_to_the_device(graphs: DecodeGraphs) -> None:
    graphs.buffers.settings.fill_(-5)
    graphs.step = step_of(plan_of(4, {1: setting(7), 3: setting(2, True, replace(CONFIGURED, budget_tokens=99))}))
    assert graphs.prepare() == beside_dense("tidal")
    said = graphs.buffers.settings
    assert said[:4, METHOD].tolist() == [-1, 0, -1, 0]
    assert said[[1, 3], LEAST_CONTEXT].tolist() == [307, 302]
    assert said[[1, 3], SLOT].tolist() == [7, 2]
    assert said[[1, 3], FRESH].tolist() == [0, 1]
    assert said[1, KNOBS : KNOBS + 3].tolist() == [256, 16, 64]
    assert said[3, KNOBS : KNOBS + 3].tolist() == [99, 16, 64]
    assert graphs.buffers.roles[3].tolist() == [0, 1, 2, 1, 2, 2]
    # A step alike in all but who is fresh is told again.
    graphs.step = step_of(plan_of(4, {1: setting(7), 3: setting(2, False, replace(CONFIGURED, budget_tokens=99))}))
    graphs.prepare()
    assert said[[1, 3], FRESH].tolist() == [0, 0]


def test_the_graph_follows_the_rows(graphs: DecodeGraphs) -> None:
    assert graphs.prepare() is None, "no sparse rows"
    graphs.step = step_of(plan_of(2, {}))
    assert graphs.prepare() is None
    graphs.step = step_of(plan_of(2, {0: setting(0), 1: setting(1)}))
    assert graphs.prepare() == "tidal"
    graphs.step = step_of(plan_of(3, {0: setting(0), 1: setting(1)}))
    assert graphs.prepare() == beside_dense("tidal")


def test_rows_that_only_keep_summaries_are_dense_but_known(graphs: DecodeGraphs) -> None:
    """A row too short for its method, whose new key the method must not miss."""
    method = BlockTopk(budget_tokens=96)
    roles = tuple(method.layer_roles(LAYERS))
    buffers = DecodeBuffers(MOST_ROWS, SIZE, [CONFIGURED, method], LIST_TOKENS, torch.device("cpu"))
    both = DecodeGraphs(buffers, [CONFIGURED, method], LAYERS, speculative=False)
    both.captured = {name: {} for name in both.launches}
    assert set(both.launches) == {"tidal", "blocktopk", beside_dense("tidal"), beside_dense("blocktopk"), MIXED}
    assert any(layer.writing_here == (1,) for layer in both.launches[MIXED])
    assert all(layer.writing_here == () for layer in both.launches[beside_dense("tidal")]), "launches of another method"
    plan = plan_of(3, {0: setting(0)})
    plan = replace(plan, summarising=(SummaryRow(plan.spans[2], method, method.summaries, roles),))
    both.step = step_of(plan)
    assert both.prepare() == MIXED
    assert buffers.settings[:3, METHOD].tolist() == [0, -1, 1]
    assert int(buffers.settings[2, LEAST_CONTEXT]) == 2**31 - 1
    # One that is long enough is in the batch too.
    long_enough = BatchRow(plan.spans[2], RowSetting(method, 64, roles, 3, True))
    both.step = step_of(replace(plan, batch=(*plan.batch, long_enough)))
    both.prepare()
    assert buffers.settings[2, [LEAST_CONTEXT, SLOT]].tolist() == [64, 3]
    alone = plan_of(1, {})
    both.step = step_of(replace(alone, summarising=(SummaryRow(alone.spans[0], method, method.summaries, roles),)))
    assert both.prepare() == beside_dense("blocktopk")


def test_guarded_rows_replay_graphs_that_hold_dense_ones(graphs: DecodeGraphs) -> None:
    """Their layers may go dense, and only those graphs hold what the guard measures."""
    params = SparseParams(None, CONFIGURED, 0, min_recall=0.5)
    assert not graphs.holds([request(CONFIGURED), SparseRequest(params)], 2), "this server does not guard by default"
    guards = DecodeGraphs(graphs.buffers, [CONFIGURED], LAYERS, speculative=False, guards=True)
    guards.most_rows = 4
    assert guards.holds([request(CONFIGURED), SparseRequest(params)], 2)
    plan = plan_of(2, {0: setting(0), 1: setting(1)})
    guards.step = step_of(plan)
    assert guards.prepare() == "tidal", "others do not pay"
    guards.step = step_of(replace(plan, batch=(plan.batch[0], replace(plan.batch[1], guard=RequestGuard(0.5)))))
    assert guards.prepare() == beside_dense("tidal")


def test_a_row_tells_the_device_of_layers_that_went_dense(graphs: DecodeGraphs) -> None:
    """From the step after on; its setting stays the same otherwise, and is told once."""
    held = SparseRequest(SparseParams(None, CONFIGURED, 0, min_recall=0.5), slot=3)
    assert held.guard is not None
    limits = PlanLimits(LAYERS, scored_tokens=1 << 20, serves_at_once=graphs.buffers.serves)
    common = common_metadata([Row(1, 1000, held.params)], torch.zeros(1, 64, dtype=torch.int32))
    settings = []
    for dense in (frozenset[int](), frozenset({2}), frozenset({2}), frozenset({2, 4, 5})):
        held.guard.dense_layers = dense
        plan = plan_step(common, {0: held}, limits)
        settings += [row.setting for row in plan.batch]
        low = {("decode", "tidal", DenseReason.LOW_RECALL): 1} if dense else {}
        assert plan.fallbacks == low
    assert [setting.fresh for setting in settings] == [True, False, False]
    assert settings[2] is settings[1]
    graphs.buffers.tell(settings[1:2])
    # Layer 3 writes the list of layers 4 and 5; layer 2 was the only one to read that of layer 1.
    assert graphs.buffers.roles[0].tolist() == [0, 0, 0, 1, 2, 2]


def test_a_row_whose_layer_went_dense_is_summarised_all_the_same() -> None:
    """Requests that share its blocks read the summaries."""
    method = BlockTopk(budget_tokens=96)
    roles = tuple(method.layer_roles(LAYERS))
    plan = plan_of(2, {row: RowSetting(method, 96, roles, row, True) for row in range(2)})
    guarded = replace(plan.batch[1], setting=replace(plan.batch[1].setting, roles=guarded_roles(roles, frozenset({4}))))
    plan = replace(
        plan,
        batch=(plan.batch[0], guarded),
        summarising=tuple(SummaryRow(span, method, method.summaries, roles) for span in plan.spans),
    )
    step = step_of(plan)
    assert roles[3:5] == (Role.WRITE_AND_READ,) * 2
    assert [[row.span.row for row in step.work(layer).summarising] for layer in (3, 4, 5)] == [[], [1], []]


@pytest.mark.parametrize(
    "method",
    [
        Tidal(),
        Tidal(budget_tokens=100, sink_tokens=60, recent_tokens=40),
        BlockTopk(),
        BlockTopk(budget_tokens=48, sink_tokens=17, recent_tokens=31),
        BlockTopk(budget_tokens=16, sink_tokens=0, recent_tokens=0, page_tokens=64),
        BlockTopk(budget_tokens=33, sink_tokens=16, recent_tokens=17),
        BlockTopk(budget_tokens=33, candidate_factor=4, sink_tokens=16, recent_tokens=17),
        BlockTopk(budget_tokens=33, coverage=0.9, sink_tokens=0, recent_tokens=17),
        HipDecode(),
        HipDecode(refresh_steps=(21, 7, 7), sink_tokens=7, recent_tokens=30),
    ],
    ids=str,
)
def test_no_list_is_longer_than_the_longest(method: BatchDecodeMethod) -> None:
    contexts = np.arange(method.budget_tokens + 1, method.budget_tokens + 600)
    assert method.list_tokens(contexts).max() == method.longest_list_tokens


@pytest.mark.parametrize("kind", DECODE_METHODS.values())
def test_graphs_hold_default_knobs(kind: type[DecodeMethod]) -> None:
    method = kind()
    assert isinstance(method, BatchDecodeMethod)
    assert method.serves(method, 1 << 20)
    assert method.longest_list_tokens <= ServerConfig().decode_list_tokens


def test_settings_hold_the_knobs_of_all_stages() -> None:
    method = HipDecode(stage_block_tokens=(128, 64, 32, 16), stage_budget_tokens=(512, 256, 128, 64))
    assert len(method.stage_block_tokens) == MOST_STAGES
    assert len(method.row_knobs()) <= MOST_KNOBS


class Replayed:
    """In the place of a captured graph."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def replay(self) -> None:
        self.log.append(self.name)


@pytest.fixture
def hooks(graphs: DecodeGraphs) -> Iterator[None]:
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    own = GPUModelRunner.gather_batch_req_state, ModelCudaGraphManager.capture, ModelCudaGraphManager.run_fullgraph
    gpu_model_runner.install()
    model_cuda_graph_manager.install()
    once = ModelCudaGraphManager.run_fullgraph
    model_cuda_graph_manager.install()
    assert ModelCudaGraphManager.run_fullgraph is once, "hooks must not pile up"
    set_graphs(graphs)
    yield
    set_graphs(None)
    (
        GPUModelRunner.gather_batch_req_state,
        ModelCudaGraphManager.capture,
        ModelCudaGraphManager.run_fullgraph,
    ) = own


@pytest.mark.usefixtures("hooks")
def test_runner_v2_replays_the_graph_of_the_step(graphs: DecodeGraphs) -> None:
    """Through vLLM's own manager, with graphs that only say that they were replayed."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager

    log: list[str] = []
    shape = BatchExecutionDescriptor(CUDAGraphMode.FULL, 4, 4, 1)
    manager: Any = ModelCudaGraphManager.__new__(ModelCudaGraphManager)
    manager.graphs = {shape: Replayed("own", log)}
    manager.is_last_pp_rank, manager.use_aux_hidden_state_outputs = True, False
    manager.hidden_states = torch.arange(8)
    for name in graphs.captured:
        graphs.captured[name] = {shape: Replayed(name, log)}
    plans = [None, plan_of(2, {0: setting(0), 1: setting(1)}), None, plan_of(2, {1: setting(1)})]
    for plan in plans:
        graphs.step = None if plan is None else step_of(plan)
        assert manager.run_fullgraph(shape).tolist() == [0, 1, 2, 3]
    assert log == ["own", "tidal", "own", beside_dense("tidal")]
    assert manager.graphs[shape].name == "own"


@pytest.mark.usefixtures("hooks")
def test_steps_without_a_graph_are_reported_as_mixed(graphs: DecodeGraphs) -> None:
    from vllm_sparse.step.requests import TABLE

    TABLE.attach(slots_in_metadata=True)
    TABLE.put(1, request(CONFIGURED))
    TABLE.put(2, request(replace(CONFIGURED, dense_layers=0)))
    try:
        assert gpu_model_runner.graphs_hold(np.array([0, 5]))
        assert gpu_model_runner.graphs_hold(np.array([0, 1]))
        assert not gpu_model_runner.graphs_hold(np.array([0, 1, 2]))
        assert not gpu_model_runner.graphs_hold(np.array([0, 1, 3, 4, 5]))
        outside = TABLE.sparse_decodes(np.array([2]))[0]
        outside.leaves_graphs = False
        assert gpu_model_runner.graphs_hold(np.array([0, 1, 2])), "its row is dense"
        set_graphs(None)
        assert not gpu_model_runner.graphs_hold(np.array([1]))
        assert gpu_model_runner.graphs_hold(np.array([0]))
    finally:
        TABLE.attach(slots_in_metadata=False)


def test_a_step_says_whether_it_replays_a_full_graph(graphs: DecodeGraphs, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from vllm_sparse.step.requests import TABLE

    def gathered(runner: Any, slots: list[int] | None, dummy_run: bool) -> tuple[Any, int | None]:
        """As vLLM describes a batch of decode rows, or one with a prompt chunk."""
        batch = None if dummy_run else SimpleNamespace(idx_mapping_np=np.array(slots))
        return batch, None if slots == [7] else 1

    monkeypatch.setattr(GPUModelRunner, "gather_batch_req_state", gathered)
    gpu_model_runner.install()
    set_graphs(graphs)
    TABLE.attach(slots_in_metadata=True)
    TABLE.put(1, request(CONFIGURED))
    TABLE.put(2, request(replace(CONFIGURED, dense_layers=0)))

    def is_full(slots: list[int], dummy_run: bool = False) -> bool:
        _, uniform_tokens = GPUModelRunner.gather_batch_req_state(None, slots, dummy_run)
        assert dummy_run or TABLE.full_graph == (uniform_tokens is not None and graphs.most_rows > 0)
        return TABLE.full_graph

    try:
        assert is_full([0, 1])
        assert not is_full([0, 1], dummy_run=True)
        assert not is_full([1, 2])
        assert not is_full([7])
        graphs.most_rows = 0
        assert not is_full([0])
    finally:
        TABLE.attach(slots_in_metadata=False)
        TABLE.full_graph = False
        set_graphs(None)
