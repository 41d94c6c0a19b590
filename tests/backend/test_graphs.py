"""Which graph a step replays and what the device is told before; graphs themselves need a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
from vllm_sparse.backend.decode_graphs import (
    ANY,
    MOST_ROWS_ALONE,
    DecodeGraphs,
    beside_dense,
    captured_sizes,
    set_graphs,
)
from vllm_sparse.backend.execution import StepExecution
from vllm_sparse.config.request import SparseParams
from vllm_sparse.config.settings import ServerConfig
from vllm_sparse.hooks import gpu_model_runner, model_cuda_graph_manager
from vllm_sparse.methods.block_topk import BlockTopk
from vllm_sparse.methods.decode import BatchDecodeMethod, DecodeMethod
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.hip import HipDecode
from vllm_sparse.methods.hip.decode import MOST_STAGES
from vllm_sparse.methods.knobs import KnobError
from vllm_sparse.methods.registry import DECODE_METHODS
from vllm_sparse.methods.streaming import StreamingDecode
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.metrics import StepRecord, WorkerMetrics
from vllm_sparse.step.eligibility import DenseReason
from vllm_sparse.step.guard import RequestGuard, guarded_roles
from vllm_sparse.step.plan import BatchRow, PlanLimits, RowSpan, StepPlan, SummaryRow, plan_step
from vllm_sparse.step.requests import RowSetting, SparseRequest
from vllm_sparse.step.roles import Role, reading_layers
from vllm_sparse.step.rows import ServerSize, padded_rows

LAYERS, MOST_ROWS, LIST_TOKENS = 6, 8, 512
CONFIGURED = Tidal(budget_tokens=256, dense_layers=1, reselect_layers=(3,), selection_reads="everything")
SIZE = ServerSize(MOST_ROWS, 1024, LAYERS, 2)
BATCH_METHODS = [kind for kind in DECODE_METHODS.values() if issubclass(kind, BatchDecodeMethod)]


@pytest.fixture
def graphs() -> DecodeGraphs:
    buffers = DecodeBuffers(MOST_ROWS, SIZE, [CONFIGURED], LIST_TOKENS, torch.device("cpu"))
    made = DecodeGraphs(buffers, [CONFIGURED], speculative=False)
    made.sizes = [1, 2, 4]
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
        (replace(CONFIGURED, reselect_layers=(4,)), True),
        (replace(CONFIGURED, dense_layers=0, selection_reads="list"), True),
        (replace(CONFIGURED, list_per="query_head"), False),
    ],
)
def test_a_graph_holds_requests_of_any_layer_roles(graphs: DecodeGraphs, method: Tidal, held: bool) -> None:
    assert graphs.holds([request(CONFIGURED), request(method)], 3) == held
    assert graphs.holds([request(CONFIGURED)], 4)
    assert not graphs.holds([request(CONFIGURED)], 5), "no graph for so many rows"
    graphs.speculative = True
    assert graphs.holds([request(method)], 5), "verification steps are dense"


def test_a_graph_holds_requests_that_its_methods_have_room_for() -> None:
    """And a method that the server does not keep buffers for is served one by one."""
    configured = HipDecode(stage_block_tokens=(64, 16), stage_budget_tokens=(512, 128), recent_tokens=50)
    buffers = DecodeBuffers(MOST_ROWS, SIZE, [configured], LIST_TOKENS, torch.device("cpu"))
    graphs = DecodeGraphs(buffers, [configured], speculative=False)
    graphs.sizes = [1, 2, 4]
    assert graphs.launches["hip"] == graphs.buffers.launches(
        [RowSetting(configured, 0, (Role.WRITE_AND_READ,) * LAYERS, 0, True)], True
    )
    narrow = replace(
        configured, stage_block_tokens=(64,), stage_budget_tokens=(128,), refresh_steps=(3,), recent_tokens=7
    )
    assert graphs.holds([request(configured), request(narrow)], 2)
    assert graphs.holds([request(replace(configured, dense_layers=1))], 1), "other layer roles"
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
    return StepPlan(range(LAYERS), spans, batch=batch)


def step_of(plan: StepPlan) -> StepExecution:
    return StepExecution(plan, StepRecord(WorkerMetrics(recording=False), plan))


def setting(slot: int, fresh: bool = False, method: Tidal = CONFIGURED) -> RowSetting:
    return RowSetting(method, 300 + slot, tuple(method.layer_roles(LAYERS)), slot, fresh)


def test_a_step_is_told_to_the_device(graphs: DecodeGraphs) -> None:
    graphs.buffers.settings.fill_(-5)
    graphs.step = step_of(plan_of(4, {1: setting(7), 3: setting(2, True, replace(CONFIGURED, budget_tokens=99))}))
    assert graphs.prepare(4) == beside_dense("tidal")
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
    graphs.prepare(4)
    assert said[[1, 3], FRESH].tolist() == [0, 0]


def test_the_graph_follows_the_rows(graphs: DecodeGraphs) -> None:
    assert graphs.prepare(4) is None, "no sparse rows"
    graphs.step = step_of(plan_of(2, {}))
    assert graphs.prepare(4) is None
    graphs.step = step_of(plan_of(2, {0: setting(0), 1: setting(1)}))
    assert graphs.prepare(4) == "tidal"
    graphs.step = step_of(plan_of(3, {0: setting(0), 1: setting(1)}))
    assert graphs.prepare(4) == beside_dense("tidal")


def test_a_dense_step_of_a_sparse_request_replays_what_dense_rows_do(graphs: DecodeGraphs) -> None:
    """Beside sparse rows and alone, with its own setting told again at the step after."""
    method = replace(CONFIGURED, dense_every_steps=4)
    requests = {row: SparseRequest(SparseParams(None, method, 0), row) for row in range(2)}
    limits = PlanLimits(LAYERS, scored_tokens=1 << 20, serves_at_once=graphs.buffers.serves)
    told = []
    for contexts in ((1000, 1001), (1001, 1002), (1004, 1008), (1005, 1009)):
        rows = [Row(1, context, request.params) for context, request in zip(contexts, requests.values(), strict=True)]
        plan = plan_step(common_metadata(rows, torch.zeros(2, 64, dtype=torch.int32)), requests, limits)
        graphs.step = None if plan.is_dense else step_of(plan)
        told.append((graphs.prepare(2), graphs.buffers.settings[:2, METHOD].tolist()))
    assert told == [
        (beside_dense("tidal"), [-1, 0]),
        ("tidal", [0, 0]),
        (None, [0, 0]),
        ("tidal", [0, 0]),
    ]


def test_rows_of_other_layer_roles_stay_in_a_graph(graphs: DecodeGraphs) -> None:
    """In that of any roles; where their roles launch nothing more, in the one that all others replay."""
    earlier = replace(CONFIGURED, dense_layers=0, reselect_layers=(3,))
    plan = plan_of(2, {0: setting(0), 1: setting(1, method=earlier)})
    graphs.step = step_of(plan)
    assert graphs.prepare(2) == ANY
    assert graphs.buffers.roles[:2].tolist() == [[0, 1, 2, 1, 2, 2], [1, 2, 2, 1, 2, 2]]
    # Layers that the guard sent dense are held where dense rows are.
    dense = replace(setting(1), roles=guarded_roles(setting(1).roles, frozenset({2, 4})))
    graphs.step = step_of(plan_of(2, {0: setting(0), 1: dense}))
    assert graphs.prepare(2) == beside_dense("tidal")


def test_a_row_of_fewer_sparse_layers_costs_no_other_graph() -> None:
    configured = HipDecode(stage_block_tokens=(64, 16), stage_budget_tokens=(512, 128), recent_tokens=50)
    buffers = DecodeBuffers(MOST_ROWS, SIZE, [configured], LIST_TOKENS, torch.device("cpu"))
    hip = DecodeGraphs(buffers, [configured], speculative=False)
    rows = {
        row: RowSetting(method, 300, tuple(method.layer_roles(LAYERS)), row, False)
        for row, method in enumerate((configured, replace(configured, dense_layers=3)))
    }
    hip.step = step_of(plan_of(2, rows))
    assert hip.prepare(2) == beside_dense("hip")
    hip.step = step_of(plan_of(1, {0: rows[0]}))
    assert hip.prepare(1) == "hip"


def test_large_steps_have_no_graph_of_their_own_where_all_rows_are_sparse(graphs: DecodeGraphs) -> None:
    graphs.sizes = [1, 2, 4, MOST_ROWS_ALONE, 2 * MOST_ROWS_ALONE]
    assert graphs.sizes_of("tidal") == [1, 2, 4, MOST_ROWS_ALONE]
    assert graphs.sizes_of(beside_dense("tidal")) == graphs.sizes_of(ANY) == graphs.sizes
    graphs.step = step_of(plan_of(2, {0: setting(0), 1: setting(1)}))
    assert graphs.prepare(MOST_ROWS_ALONE) == "tidal"
    assert graphs.prepare(2 * MOST_ROWS_ALONE) == beside_dense("tidal")


TIDALS = st.builds(
    lambda first, more, reads: Tidal(96, first, tuple(first + gap for gap in more), selection_reads=reads),
    st.integers(0, LAYERS - 2),
    st.sets(st.just(1), max_size=1),
    st.sampled_from(["everything", "list"]),
)
FEW_STAGES = HipDecode(stage_block_tokens=(64,), stage_budget_tokens=(128,), recent_tokens=50)
METHODS = st.one_of(
    TIDALS,
    st.builds(lambda layers: BlockTopk(budget_tokens=96, dense_layers=layers), st.integers(0, LAYERS - 1)),
    st.builds(lambda layers: replace(FEW_STAGES, dense_layers=layers), st.integers(0, LAYERS - 1)),
)
GUARDED = st.frozensets(st.integers(0, LAYERS - 1))


@given(st.data())
def test_a_step_replays_a_graph_that_launches_all_that_it_needs(data: st.DataObject) -> None:
    """Whatever the knobs of its rows, the layers that the guard sent dense, and the server's own knobs."""
    configured = [data.draw(TIDALS), BlockTopk(budget_tokens=96, dense_layers=data.draw(st.integers(0, 3))), FEW_STAGES]
    buffers = DecodeBuffers(MOST_ROWS, SIZE, configured, LIST_TOKENS, torch.device("cpu"))
    guards = data.draw(st.booleans())
    made = DecodeGraphs(buffers, configured, speculative=False, guards=guards)
    count = data.draw(st.integers(1, MOST_ROWS))
    spans = tuple(RowSpan(row, row, 1, 1000) for row in range(count))
    batch = []
    for span in spans:
        method = data.draw(st.none() | METHODS)
        if method is None:
            continue
        dense = data.draw(st.none() | GUARDED)
        roles = tuple(method.layer_roles(LAYERS))
        guard = None if dense is None else RequestGuard(0.5, dense)
        row = RowSetting(method, 300, roles if guard is None else guard.roles(roles), span.row, False)
        batch.append(BatchRow(span, row, guard))
    made.step = step_of(StepPlan(range(LAYERS), spans, batch=tuple(batch)))
    name = made.prepare(count)
    if not batch:
        assert name is None
        return
    assert name is not None
    needed = buffers.launches([row.setting for row in batch], all_sparse=len(batch) == count)
    assert all(has.holds(need) for has, need in zip(made.launches[name], needed, strict=True))
    if any(row.guard is not None for row in batch):
        made.capturing = name
        with patch.object(WorkerMetrics, "_instance", WorkerMetrics(recording=False)):
            captured = made.capture_step(torch.ones(count).int(), torch.zeros(count, 4).int(), 100).guard
        reading = {layer for row in batch for layer in reading_layers(row.roles)}
        assert all(captured.takers(layer) for layer in reading), "the guard measures where a row reads a list"


@given(st.sampled_from([kind for kind in BATCH_METHODS if not kind.shares_lists]), st.integers(0, 40), GUARDED)
def test_methods_that_share_no_lists_write_none_for_other_layers(
    kind: Any, dense_layers: int, guarded: frozenset[int]
) -> None:
    """Graphs of any roles leave out what passes lists on for these."""
    try:
        roles = tuple(kind(dense_layers=dense_layers).layer_roles(LAYERS))
    except KnobError:
        return
    assert {*roles, *guarded_roles(roles, guarded)} <= {Role.DENSE, Role.WRITE_AND_READ}


def default_sizes(most_rows: int) -> list[int]:
    """vLLM's, without speculative decoding."""
    sizes = [1, 2, 4, *range(8, min(most_rows + 1, 256), 8), *range(256, most_rows + 1, 16), most_rows]
    return sorted({size for size in sizes if size <= most_rows})


@given(st.integers(1, 512))
def test_few_sizes_are_captured(most_rows: int) -> None:
    sizes = default_sizes(most_rows)
    kept = captured_sizes(reversed(sizes))
    assert set(kept) <= set(sizes)
    assert kept[-1] == most_rows
    assert kept == sorted(set(kept))
    for size, larger in pairwise(kept):
        assert larger >= size * 1.25 or larger == most_rows
        assert not [other for other in sizes if size * 1.25 <= other < larger], "rows are padded by more than they need"
    assert len(kept) <= 19


@given(st.integers(1, 16), st.integers(1, 512))
def test_kernels_of_all_steps_are_compiled_with_few_sizes(kv_heads: int, most_rows: int) -> None:
    """Those whose shape depends on a step's rows, by the powers of two that they are compiled for."""

    def power_of_two(number: int) -> int:
        return 1 << (number - 1).bit_length()

    def shapes(rows: int) -> list[int]:
        # Splits of `token_scores`, shares of `page_scores`, rows of `decode_roles`.
        programs = [power_of_two(max(most // (padded_rows(rows) * kv_heads), 1)) for most in (528, 1024)]
        return [*programs, power_of_two(rows)]

    captured = [set(of_sizes) for of_sizes in zip(*map(shapes, captured_sizes(default_sizes(most_rows))), strict=True)]
    for rows in range(1, most_rows + 1):
        assert all(shape in known for shape, known in zip(shapes(rows), captured, strict=True)), rows


def test_rows_that_only_keep_summaries_are_dense_but_known(graphs: DecodeGraphs) -> None:
    """A row too short for its method, whose new key the method must not miss."""
    method = BlockTopk(budget_tokens=96)
    roles = tuple(method.layer_roles(LAYERS))
    buffers = DecodeBuffers(MOST_ROWS, SIZE, [CONFIGURED, method], LIST_TOKENS, torch.device("cpu"))
    both = DecodeGraphs(buffers, [CONFIGURED, method], speculative=False)
    both.captured = {name: {} for name in both.launches}
    assert set(both.launches) == {"tidal", "blocktopk", beside_dense("tidal"), beside_dense("blocktopk"), ANY}
    assert all(layer.writing_here == (0, 1) for layer in both.launches[ANY])
    assert all(layer.writing_ahead == (0,) for layer in both.launches[ANY]), "blocktopk shares no lists"
    assert all(layer.writing_here == () for layer in both.launches[beside_dense("tidal")]), "launches of another method"
    plan = plan_of(3, {0: setting(0)})
    plan = replace(plan, summarising=(SummaryRow(plan.spans[2], method, method.summaries, roles, 999, False),))
    both.step = step_of(plan)
    assert both.prepare(4) == ANY
    assert buffers.settings[:3, METHOD].tolist() == [0, -1, 1]
    assert int(buffers.settings[2, LEAST_CONTEXT]) == 2**31 - 1
    # One that is long enough is in the batch too.
    long_enough = BatchRow(plan.spans[2], RowSetting(method, 64, roles, 3, True))
    both.step = step_of(replace(plan, batch=(*plan.batch, long_enough)))
    both.prepare(4)
    assert buffers.settings[2, [LEAST_CONTEXT, SLOT]].tolist() == [64, 3]
    alone = plan_of(1, {})
    both.step = step_of(
        replace(alone, summarising=(SummaryRow(alone.spans[0], method, method.summaries, roles, 999, False),))
    )
    assert both.prepare(4) == beside_dense("blocktopk")


def test_guarded_rows_replay_graphs_that_hold_dense_ones(graphs: DecodeGraphs) -> None:
    """Their layers may go dense, and only those graphs hold what the guard measures."""
    params = SparseParams(None, CONFIGURED, 0, min_recall=0.5)
    assert graphs.holds([request(CONFIGURED), SparseRequest(params)], 2)
    guards = DecodeGraphs(graphs.buffers, [CONFIGURED], speculative=False, guards=True)
    guards.sizes = [1, 2, 4]
    assert guards.holds([request(CONFIGURED), SparseRequest(params)], 2)
    plan = plan_of(2, {0: setting(0), 1: setting(1)})
    guards.step = step_of(plan)
    assert guards.prepare(4) == "tidal", "others do not pay"
    guarded = step_of(replace(plan, batch=(plan.batch[0], replace(plan.batch[1], guard=RequestGuard(0.5)))))
    guards.step = graphs.step = guarded
    assert guards.prepare(4) == beside_dense("tidal")
    assert graphs.prepare(4) == ANY, "where the server does not guard by default"
    guards.judged_apart = True
    assert guards.prepare(4) == ANY, "whatever this rank has sent dense"
    guards.step = step_of(plan)
    assert guards.prepare(4) == "tidal"


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
        summarising=tuple(SummaryRow(span, method, method.summaries, roles, 999, False) for span in plan.spans),
    )
    step = step_of(plan)
    table = torch.zeros(2, 1, dtype=torch.int32)
    assert roles[3:5] == (Role.WRITE_AND_READ,) * 2
    assert [[row.span.row for row in step.work(layer, table).summarising] for layer in (3, 4, 5)] == [[], [1], []]


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

    own = (
        GPUModelRunner.add_requests,
        GPUModelRunner.gather_batch_req_state,
        ModelCudaGraphManager.capture,
        ModelCudaGraphManager.dispatch,
        ModelCudaGraphManager.run_fullgraph,
    )
    gpu_model_runner.install()
    model_cuda_graph_manager.install()
    once = ModelCudaGraphManager.run_fullgraph
    model_cuda_graph_manager.install()
    assert ModelCudaGraphManager.run_fullgraph is once, "hooks must not pile up"
    set_graphs(graphs)
    yield
    set_graphs(None)
    (
        GPUModelRunner.add_requests,
        GPUModelRunner.gather_batch_req_state,
        ModelCudaGraphManager.capture,
        ModelCudaGraphManager.dispatch,
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
    other_roles = setting(1, method=replace(CONFIGURED, dense_layers=0))
    alone, beside = plan_of(2, {0: setting(0), 1: setting(1)}), plan_of(2, {1: setting(1)})
    plans = [None, alone, None, beside, plan_of(2, {0: setting(0), 1: other_roles})]
    for plan in plans:
        graphs.step = None if plan is None else step_of(plan)
        assert manager.run_fullgraph(shape).tolist() == [0, 1, 2, 3]
    assert log == ["own", "tidal", "own", beside_dense("tidal"), ANY]
    assert manager.graphs[shape].name == "own"


@pytest.mark.usefixtures("hooks")
def test_a_sparse_step_is_padded_to_a_size_that_was_captured(graphs: DecodeGraphs) -> None:
    """Through vLLM's own choice of a graph; dense steps keep theirs."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager

    shapes = {rows: BatchExecutionDescriptor(CUDAGraphMode.FULL, rows, rows, 1) for rows in (1, 2, 3, 4, 5)}
    piecewise = BatchExecutionDescriptor(CUDAGraphMode.PIECEWISE, 5, None)
    manager: Any = ModelCudaGraphManager.__new__(ModelCudaGraphManager)
    manager._graphs_captured, manager._lora_dispatch_map = True, {}
    manager._candidates = {(rows, 0): [shape, piecewise] for rows, shape in shapes.items()}
    graphs.sizes = [1, 2, 4]

    def rows_of(rows: int, uniform_tokens: int | None = 1) -> int:
        shape = manager.dispatch(rows, rows, uniform_tokens, num_active_loras=0, max_query_len=1)
        return int(shape.num_tokens)

    assert [rows_of(rows) for rows in (2, 3, 5)] == [2, 3, 5]
    graphs.may_replay = True
    assert [rows_of(rows) for rows in (2, 3, 5)] == [2, 4, 5]
    assert rows_of(3, None) == 5, "a mixed step"


def test_fewer_sizes_are_captured_than_vllm_has(graphs: DecodeGraphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all of them where ranks of data parallelism have to pad alike."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager

    def capture(manager: Any, progress_bar_desc: str = "") -> None:
        for shape in manager._capture_descs[CUDAGraphMode.FULL]:
            manager.graphs[shape] = graphs.capturing

    for name in ("capture", "dispatch", "run_fullgraph"):
        monkeypatch.setattr(ModelCudaGraphManager, name, getattr(ModelCudaGraphManager, name))
    monkeypatch.setattr(ModelCudaGraphManager, "capture", capture)
    model_cuda_graph_manager.install()
    set_graphs(graphs)
    vllm_sizes = [8, 7, 6, 5, 4, 2, 1]
    shapes = [BatchExecutionDescriptor(CUDAGraphMode.FULL, rows, rows, 1) for rows in vllm_sizes]
    try:
        for engines, stages, sizes in (
            (1, 1, [1, 2, 4, 5, 7, 8]),
            (2, 1, [1, 2, 4, 5, 6, 7, 8]),
            (1, 2, [1, 2, 4, 5, 6, 7, 8]),
        ):
            manager: Any = ModelCudaGraphManager.__new__(ModelCudaGraphManager)
            manager.graphs, manager._max_full_descs_to_capture = {}, None
            manager._capture_descs = {CUDAGraphMode.FULL: shapes}
            parallel = SimpleNamespace(data_parallel_size=engines, pipeline_parallel_size=stages)
            manager.vllm_config = SimpleNamespace(parallel_config=parallel)
            manager.capture()
            assert graphs.sizes == sizes
            assert manager._capture_descs == {CUDAGraphMode.FULL: shapes}
            assert set(manager.graphs.values()) == {None}, "vLLM's own, of each size"
            assert len(manager.graphs) == len(shapes)
            for name, captured in graphs.captured.items():
                assert sorted(shape.num_reqs for shape in captured) == sizes
                assert set(captured.values()) == {name}
    finally:
        set_graphs(None)


@pytest.mark.usefixtures("hooks")
def test_steps_without_a_graph_are_reported_as_mixed(graphs: DecodeGraphs) -> None:
    from vllm_sparse.step.requests import TABLE

    TABLE.attach(slots_in_metadata=True)
    TABLE.put(1, request(CONFIGURED))
    TABLE.put(2, request(replace(CONFIGURED, budget_tokens=LIST_TOKENS + 1)))
    TABLE.put(6, request(replace(CONFIGURED, dense_layers=0)))
    try:
        assert gpu_model_runner.graphs_hold(np.array([0, 5]))
        assert not graphs.may_replay, "a dense step is not padded"
        assert gpu_model_runner.graphs_hold(np.array([0, 1, 6]))
        assert graphs.may_replay
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


def test_the_start_tells_of_methods_that_no_graph_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_sparse.backend import cuda

    told: list[tuple[str, str]] = []
    monkeypatch.setattr(cuda.logger, "warning", lambda text, name, why, _: told.append((name, why)))
    alone = replace(CONFIGURED, list_per="query_head")
    long = BlockTopk(budget_tokens=LIST_TOKENS + 1)
    held = StreamingDecode(recent_tokens=LIST_TOKENS - 4)
    cuda._warn_of_rows_without_graphs([alone, long, held], [long, held], LIST_TOKENS)
    assert told == [("tidal", "its rows are served one by one"), ("blocktopk", "its lists have up to 528 tokens")]


def test_dense_rows_of_a_mixed_step_have_metadata_of_their_own() -> None:
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

    from vllm_sparse.backend.cuda import SparseFlashAttentionImpl

    # As of a step whose rows share a prefix, say: each field that the class may leave out is of the whole batch.
    of_all_rows = {field.name: f"{field.name} of all rows" for field in fields(FlashAttentionMetadata)}
    of_any_rows = {"slot_mapping": torch.zeros(9), "max_num_splits": 3, "causal": True}
    described = {
        "seq_lens": torch.tensor([5, 60, 7, 80], dtype=torch.int32),
        "block_table": torch.arange(8, dtype=torch.int32).view(4, 2),
    }
    metadata = FlashAttentionMetadata(**{**of_all_rows, **of_any_rows, **described})
    spans = [RowSpan(1, 1, 2, 60), RowSpan(3, 4, 5, 80)]
    subset: Any = SparseFlashAttentionImpl.dense_subset(None, None, None, metadata, spans)  # type: ignore[arg-type]
    assert (subset.num_actual_tokens, subset.max_query_len, subset.max_seq_len) == (7, 5, 80)
    assert subset.query_start_loc.tolist() == [0, 2, 7]
    assert subset.query_start_loc.dtype == torch.int32
    assert subset.seq_lens.tolist() == [60, 80]
    assert subset.block_table.tolist() == [[2, 3], [6, 7]]
    for field in fields(FlashAttentionMetadata):
        value = getattr(subset, field.name)
        assert not isinstance(value, str), value
        if field.name in of_any_rows:
            assert value is of_any_rows[field.name]
    assert metadata.scheduler_metadata == "scheduler_metadata of all rows"
    starts = torch.tensor([0, 1, 2], dtype=torch.int32)
    rows: Any = SparseFlashAttentionImpl.dense_rows(
        None,  # type: ignore[arg-type]
        metadata,
        subset.seq_lens,
        subset.block_table,
        starts,
    )
    assert rows.seq_lens.tolist() == [60, 80]
    taken = {"max_seq_len", *of_any_rows}
    assert not any(isinstance(getattr(rows, field.name), str) for field in fields(rows) if field.name not in taken)


def test_a_step_says_whether_it_replays_a_full_graph(graphs: DecodeGraphs, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from vllm_sparse.step.requests import TABLE

    def gathered(runner: Any, slots: list[int] | None, dummy_run: bool) -> tuple[Any, int | None]:
        """As vLLM describes a batch of decode rows, or one with a prompt chunk."""
        batch = None if dummy_run else SimpleNamespace(idx_mapping_np=np.array(slots))
        return batch, None if slots == [7] else 1

    monkeypatch.setattr(GPUModelRunner, "gather_batch_req_state", gathered)
    monkeypatch.setattr(GPUModelRunner, "add_requests", GPUModelRunner.add_requests)
    gpu_model_runner.install()
    set_graphs(graphs)
    TABLE.attach(slots_in_metadata=True)
    TABLE.put(1, request(CONFIGURED))
    TABLE.put(2, request(replace(CONFIGURED, budget_tokens=LIST_TOKENS + 1)))

    def is_full(slots: list[int], dummy_run: bool = False) -> bool:
        _, uniform_tokens = GPUModelRunner.gather_batch_req_state(None, slots, dummy_run)
        assert dummy_run or TABLE.full_graph == (uniform_tokens is not None and bool(graphs.sizes))
        return TABLE.full_graph

    try:
        assert is_full([0, 1])
        assert not is_full([0, 1], dummy_run=True)
        assert not is_full([1, 2])
        assert not is_full([7])
        graphs.sizes = []
        assert not is_full([0])
    finally:
        TABLE.attach(slots_in_metadata=False)
        TABLE.full_graph = False
        set_graphs(None)
