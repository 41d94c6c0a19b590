"""Plans where costs are known: what a step runs, for what reason, and what it leaves for later steps."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.backend.test_forward import Row, common_metadata
from tests.step.measured import LLAMA_8B, QWEN_HALF_B, tidal
from vllm_sparse.config.request import ALL_DENSE, SparseParams
from vllm_sparse.hooks import gpu_model_runner as hook
from vllm_sparse.methods.block_topk import BlockTopk
from vllm_sparse.methods.decode import DecodeMethod
from vllm_sparse.methods.dhsa import Dhsa
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.hip import Hip, HipDecode
from vllm_sparse.methods.oracle import Oracle
from vllm_sparse.methods.prefill import PrefillMethod
from vllm_sparse.methods.sale import Sale
from vllm_sparse.step.costs import AttentionShape, StepCosts
from vllm_sparse.step.eligibility import DenseReason
from vllm_sparse.step.gpu_table import GPUS, H200, GpuCosts
from vllm_sparse.step.gpu_table import UNKNOWN as UNKNOWN_GPU
from vllm_sparse.step.plan import PlanLimits, StepPlan, plan_step
from vllm_sparse.step.requests import RequestTable, SparseRequest

LAYERS, BLOCK = 32, 128
SERVED = [tidal(2048), HipDecode(), BlockTopk()]
COSTS = StepCosts(H200, LLAMA_8B, SERVED)
TIDAL = SparseParams(None, tidal(2048))
BLOCKTOPK = SparseParams(None, BlockTopk())
OUTSIDE = SparseParams(None, tidal(8192))


def is_served(method: DecodeMethod) -> bool:
    return type(method) in {type(one) for one in SERVED}


def graphs_hold(requests: object, rows: int) -> bool:
    assert isinstance(requests, list)
    assert all(isinstance(request, SparseRequest) for request in requests)
    return all(request.params.decode is None or request.params.decode.budget_tokens <= 4352 for request in requests)


LIMITS = PlanLimits(LAYERS, False, 1 << 30, is_served, COSTS, True, graphs_hold, BLOCK)
MIXED = replace(LIMITS, full_graph=False)
UNKNOWN = replace(LIMITS, costs=None)
# All its keys, in any step.
SUMMARISED: dict[str, Any] = {"summarised_tokens": 1 << 40, "catches_up": False}


def held(*params: SparseParams) -> dict[int, SparseRequest]:
    """Requests in slots, as steps find them that are not their first."""
    return {row: SparseRequest(of, row, **SUMMARISED) for row, of in enumerate(params) if not of.is_dense}


def plan(rows: list[Row], limits: PlanLimits = LIMITS, requests: dict[int, SparseRequest] | None = None) -> StepPlan:
    common = common_metadata(rows, torch.zeros(len(rows), 1, dtype=torch.int32))
    return plan_step(common, held(*(row.params for row in rows)) if requests is None else requests, limits)


def sparse_rows(plan: StepPlan) -> list[int]:
    spans = [
        *(row.span for row in plan.prefill),
        *(row.span for row in plan.batch),
        *(row.span for row in plan.decode),
    ]
    return sorted(span.row for span in spans)


def unprofitable(phase: str, method: str, rows: int = 1) -> dict[tuple[str, str, DenseReason], int]:
    return {(phase, method, DenseReason.UNPROFITABLE): rows}


def as_asked(params: SparseParams) -> SparseParams:
    return replace(params, unprofitable="sparse")


def test_a_lone_row_is_dense_where_many_are_sparse() -> None:
    lone = plan([Row(1, 32768, TIDAL)])
    assert lone.is_dense
    assert lone.fallbacks == unprofitable("decode", "tidal")
    many = plan([Row(1, 32768, TIDAL)] * 24)
    assert sparse_rows(many) == list(range(24))
    assert not many.fallbacks
    assert sparse_rows(plan([Row(1, 131072, TIDAL)])) == [0]


def test_without_costs_and_as_asked_everything_is_sparse() -> None:
    assert sparse_rows(plan([Row(1, 9000, TIDAL)], UNKNOWN)) == [0]
    forced = plan([Row(1, 9000, as_asked(TIDAL)), Row(300, 9000, as_asked(SparseParams(Dhsa())), prefilling=True)])
    assert sparse_rows(forced) == [0, 1]
    assert not forced.fallbacks


DEAR: list[PrefillMethod] = [
    FlexPrefill(gamma=0.999, query_block_tokens=64),
    FlexPrefill(min_budget_tokens=1 << 20, max_budget_tokens=1 << 20),
    Sale(tau=0.0001, list_per="query_head"),
    Dhsa(density=0.99, query_block_tokens=64, list_per="query_head"),
    Dhsa(dense_tail_tokens=1 << 16),
    Hip(stage_budget_tokens=(1 << 20, 1 << 20, 1 << 20), query_stride=(1, 1, 1), list_per="query_head"),
    Oracle(density=0.99),
    Dhsa(),
    Hip(),
]


@given(
    method=st.sampled_from(DEAR),
    chunk=st.sampled_from([512, 2048, 8192, 16384]),
    chunks=st.integers(1, 24),
    min_tokens=st.sampled_from([0, 1000, 8192]),
    shape=st.sampled_from([LLAMA_8B, QWEN_HALF_B]),
    gpu=st.sampled_from([*GPUS, UNKNOWN_GPU]),
)
def test_no_prompt_costs_much_more_than_a_dense_one(
    method: PrefillMethod, chunk: int, chunks: int, min_tokens: int, shape: AttentionShape, gpu: GpuCosts
) -> None:
    """Whatever a request asks for, by the costs of the GPU: what would is dense, and counted."""
    costs = StepCosts(gpu, shape, [])
    limits = PlanLimits(LAYERS, costs=costs, prompt_cost=1.2)
    params = SparseParams(method, None, min_tokens, unprofitable="sparse")
    request, dense_seconds, seconds = SparseRequest(params), 0.0, 0.0
    for seq_len in range(chunk, chunk * chunks + 1, chunk):
        found = plan([Row(chunk, seq_len, params, prefilling=True)], limits, {0: request})
        dense = costs.dense_chunk_seconds(chunk, seq_len) + chunk * shape.linear_flops / gpu.dense_flops
        dense_seconds += dense
        seconds += dense
        if not found.prefill:
            (fallback,) = found.fallbacks
            assert fallback[2] in (DenseReason.TOO_EXPENSIVE, DenseReason.SHORT_CONTEXT, DenseReason.SHORT_PROMPT_CHUNK)
            continue
        tokens = found.prefill[0].span.query_tokens
        cost = costs.chunk_cost(method, tokens, seq_len)
        of_span = costs.dense_chunk_seconds(tokens, seq_len) + tokens * shape.linear_flops / gpu.dense_flops
        seconds += (cost - 1) * of_span
    assert seconds <= 1.2 * dense_seconds


def test_a_prompt_that_would_cost_more_is_dense_and_counted() -> None:
    """Lists of nearly the whole context are read at 0.7 of the dense kernel's speed."""
    limits = replace(LIMITS, prompt_cost=1.2)
    dear = as_asked(SparseParams(Dhsa(density=0.99, coverage=1.0)))
    found = plan([Row(8192, 131072, dear, prefilling=True)], limits)
    assert found.is_dense
    assert found.fallbacks == {("prefill", "dhsa", DenseReason.TOO_EXPENSIVE): 1}
    assert sparse_rows(plan([Row(8192, 131072, dear, prefilling=True)], replace(limits, prompt_cost=3))) == [0]
    assert sparse_rows(plan([Row(8192, 131072, as_asked(SparseParams(Sale())), prefilling=True)], limits)) == [0]


def test_rows_beside_one_that_runs_as_asked_share_its_launches() -> None:
    """Alone they would not pay for them."""
    rows = [Row(1, 16384, TIDAL)] * 2
    assert sparse_rows(plan(rows)) == []
    assert sparse_rows(plan([*rows, Row(1, 9000, as_asked(TIDAL))])) == [0, 1, 2]
    beside_another = plan([*rows, Row(1, 9000, as_asked(BLOCKTOPK))])
    assert sparse_rows(beside_another) == [2]
    assert beside_another.fallbacks == unprofitable("decode", "tidal", 2)


def test_a_row_that_does_not_pay_is_dense_beside_others_that_do() -> None:
    mixed = plan([Row(1, 131072, TIDAL), Row(1, 2200, TIDAL), Row(1, 131072, TIDAL), Row(1, 2048, TIDAL)])
    assert sparse_rows(mixed) == [0, 2]
    assert mixed.fallbacks == {
        **unprofitable("decode", "tidal"),
        ("decode", "tidal", DenseReason.SHORT_CONTEXT): 1,
    }


def test_a_method_that_does_not_pay_leaves_the_mixture() -> None:
    """Graphs of mixtures launch all methods of the server."""
    rows = [*[Row(1, 131072, TIDAL)] * 4, Row(1, 33000, BLOCKTOPK), Row(1, 131072, ALL_DENSE)]
    found = plan(rows)
    assert sparse_rows(found) == [0, 1, 2, 3]
    assert found.fallbacks == unprofitable("decode", "blocktopk")
    assert sparse_rows(plan([*rows, *[Row(1, 131072, BLOCKTOPK)] * 4])) == [0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_a_dense_row_takes_no_slot_and_no_room() -> None:
    request = SparseRequest(TIDAL)
    for _ in range(3):
        assert plan([Row(1, 32768, TIDAL)], LIMITS, {0: request}).is_dense
    assert request.setting is None
    (row,) = plan([Row(1, 131072, TIDAL)], LIMITS, {0: request}).batch
    assert row.setting.fresh, "what another request kept in the slot must not be taken for its own"
    tight = replace(LIMITS, scored_tokens=131072)
    assert sparse_rows(plan([Row(1, 2200, TIDAL), Row(1, 131072, TIDAL)], tight)) == [1]


def test_keys_of_rows_that_are_dense_for_now_are_summarised_when_they_fill_a_block() -> None:
    short = replace(BLOCKTOPK, min_tokens=1 << 20, unprofitable="sparse")
    request = SparseRequest(short)
    assert plan([Row(100, 8200, short, prefilling=True)], LIMITS, {0: request}).summarising[0].first_token == 0
    rows = [(seq_len, plan([Row(1, seq_len)], LIMITS, {0: request})) for seq_len in range(8201, 8200 + 2 * BLOCK)]
    assert [seq_len for seq_len, found in rows if found.summarising] == [8320, 8448]
    assert [row.first_token for _, found in rows for row in found.summarising] == [8200, 8320]
    sparse = plan([Row(1, 131073, BLOCKTOPK)])
    assert sparse_rows(sparse) == [row.span.row for row in sparse.summarising] == [0], "each step of a sparse row"
    prompt = plan([Row(100, 8300, BLOCKTOPK, prefilling=True)])
    assert len(prompt.summarising) == 1, "each prompt chunk"


def test_rows_that_do_not_pay_are_not_summarised_until_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a step outside of the graphs summarises what is missing, whether or not it is sparse itself."""
    request = SparseRequest(BLOCKTOPK)
    table = RequestTable()
    table.put(0, request)
    monkeypatch.setattr(hook, "TABLE", table)
    monkeypatch.setattr(hook, "current_graphs", lambda: SimpleNamespace(holds=lambda requests, rows: True))
    assert not hook.graphs_hold(np.array([0]))
    assert plan([Row(100, 8200, BLOCKTOPK, prefilling=True)], LIMITS, {0: request}).summarising
    for seq_len in range(8201, 8200 + 2 * BLOCK):
        found = plan([Row(1, seq_len)], LIMITS, {0: request})
        assert found.is_dense
        assert found.fallbacks == unprofitable("decode", "blocktopk")
        assert hook.graphs_hold(np.array([0]))
    assert plan([Row(1, 131080)], LIMITS, {0: request}).is_dense, "its graph would read blocks without summaries"
    assert not hook.graphs_hold(np.array([0]))
    catching = plan([Row(1, 131081)], MIXED, {0: request})
    assert sparse_rows(catching) == [], "one row does not pay outside of graphs"
    assert [(row.first_token, row.catches_up) for row in catching.summarising] == [(8200, True)]
    assert hook.graphs_hold(np.array([0]))
    found = plan([Row(1, 131082)], LIMITS, {0: request})
    assert sparse_rows(found) == [0]
    assert [(row.first_token, row.catches_up) for row in found.summarising] == [(131081, False)]


def test_a_row_that_pays_outside_of_graphs_catches_up_as_it_reads() -> None:
    requests = held(*[BLOCKTOPK] * 8)
    for request in requests.values():
        request.summarised_tokens = 8200
    found = plan([Row(1, 131080, BLOCKTOPK)] * 8, MIXED, requests)
    assert sparse_rows(found) == list(range(8))
    assert {(row.first_token, row.catches_up) for row in found.summarising} == {(8200, True)}


def test_the_first_step_of_a_request_summarises_what_it_found_in_the_cache() -> None:
    """Whether it is a prompt chunk, or its last token, which runs as a decode step does; dense or sparse."""
    for row in (Row(300, 900), Row(1, 900, prefilling=True), Row(1, 900), Row(1, 131073)):
        request = SparseRequest(BLOCKTOPK)
        (first,) = plan([row], UNKNOWN, {0: request}).summarising
        assert (first.first_token, first.catches_up) == (0, True)
        (second,) = plan([Row(128, row.context + 128, prefilling=True)], UNKNOWN, {0: request}).summarising
        assert (second.first_token, second.catches_up) == (row.context, False)


def test_no_graph_is_replayed_for_the_first_step_of_a_request_with_summaries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Graphs would leave the blocks without summaries that it found in the prefix cache."""
    request, other = SparseRequest(BLOCKTOPK, 0), SparseRequest(TIDAL, 1)
    table = RequestTable()
    for slot, one in enumerate((request, other)):
        table.put(slot, one)
    graphs = SimpleNamespace(holds=lambda requests, rows: True, may_replay=False)
    monkeypatch.setattr(hook, "TABLE", table)
    monkeypatch.setattr(hook, "current_graphs", lambda: graphs)
    assert not hook.graphs_hold(np.array([0, 1]))
    assert not graphs.may_replay
    assert hook.graphs_hold(np.array([1]))
    plan([Row(1, 900, prefilling=True)], LIMITS, {0: request})
    assert hook.graphs_hold(np.array([0, 1]))


@given(
    computed=st.integers(0, 2000),
    tokens=st.integers(1, 2000),
    min_tokens=st.integers(0, 3000),
)
def test_tokens_before_the_minimum_are_dense_wherever_prompts_are_cut(
    computed: int, tokens: int, min_tokens: int
) -> None:
    """So what wrote a block of the cache is told by its position."""
    params = SparseParams(FlexPrefill(), None, min_tokens)
    rows = [Row(1, 50), Row(tokens, computed + tokens, params, prefilling=True), Row(7, 900, prefilling=True)]
    found = plan(rows, UNKNOWN)
    first = max(computed, min_tokens)
    if computed + tokens - first < FlexPrefill().min_query_tokens:
        assert found.is_dense
        return
    (sparse,) = found.prefill
    assert sparse.span.seq_len == computed + tokens
    assert sparse.span.seq_len - sparse.span.query_tokens == first
    # The spans cover the step's tokens, in order.
    starts = [span.query_start for span in found.spans]
    ends = [span.query_start + span.query_tokens for span in found.spans]
    assert starts == [0, *ends[:-1]]
    assert ends[-1] == 1 + tokens + 7
    if first > computed:
        dense = found.spans[1]
        assert (dense.row, dense.seq_len, dense.later_tokens) == (1, min_tokens, sparse.span.query_tokens)


def test_steps_outside_of_graphs_have_to_gain_more() -> None:
    rows = [Row(1, 131072, TIDAL)]
    assert sparse_rows(plan(rows)) == [0]
    assert sparse_rows(plan(rows, MIXED)) == []
    assert sparse_rows(plan(rows * 8, MIXED)) == list(range(8))
    prompt = Row(8192, 65536, SparseParams(Dhsa(), tidal(2048)), prefilling=True)
    beside = plan([*rows, prompt], MIXED)
    assert sparse_rows(beside) == [1]
    assert beside.fallbacks == unprofitable("decode", "tidal")


def test_rows_that_no_graph_holds_leave_the_graphs_where_that_pays() -> None:
    """And only then: a step that replays a graph decides for the next one, in which all rows share the launches."""
    many = [Row(1, 131072, OUTSIDE)] * 24
    requests = held(*(row.params for row in many))
    for limits, sparse in ((LIMITS, 0), (MIXED, 24)):
        assert len(sparse_rows(plan(many, limits, requests))) == sparse
        assert all(request.leaves_graphs for request in requests.values())
    lone = {0: requests[0]}
    for limits in (MIXED, LIMITS):
        found = plan(many[:1], limits, lone)
        assert found.is_dense
        assert found.fallbacks == unprofitable("decode", "tidal")
        assert not requests[0].leaves_graphs
    assert sparse_rows(plan(many, LIMITS, requests)) == []
    assert requests[0].leaves_graphs


def test_rows_that_graphs_hold_stay_in_them_beside_one_that_they_do_not() -> None:
    rows = [*[Row(1, 131072, TIDAL)] * 2, Row(1, 33000, OUTSIDE)]
    requests = held(*(row.params for row in rows))
    assert sparse_rows(plan(rows, LIMITS, requests)) == [0, 1]
    assert [requests[row].leaves_graphs for row in range(3)] == [True, True, False]


def test_a_row_that_no_graph_holds_and_does_not_pay_need_not_leave_them() -> None:
    params = SparseParams(None, BlockTopk(budget_tokens=8192))
    request = SparseRequest(params, **SUMMARISED)
    assert plan([Row(1, 33001, params)], MIXED, {0: request}).is_dense
    assert not request.leaves_graphs


def test_a_row_that_is_served_alone_pays_for_its_step() -> None:
    params = SparseParams(None, tidal(2048))
    alone = replace(MIXED, serves_at_once=lambda method: False)
    request = SparseRequest(params, **SUMMARISED)
    assert plan([Row(1, 131072, params)], alone, {0: request}).is_dense
    assert not request.leaves_graphs
    assert not plan([Row(1, 1 << 20, params)], replace(alone, full_graph=True), {0: request}).decode
    assert request.leaves_graphs
    assert len(plan([Row(1, 1 << 20, params)], alone, {0: request}).decode) == 1


def test_prompt_chunks_by_their_own_numbers() -> None:
    params = SparseParams(Dhsa(), None)
    long, short = Row(8192, 32768, params, prefilling=True), Row(300, 32768, params, prefilling=True)
    assert sparse_rows(plan([long], MIXED)) == [0]
    found = plan([short], MIXED)
    assert found.is_dense
    assert found.fallbacks == unprofitable("prefill", "dhsa")
    too_short = plan([Row(255, 32768, params, prefilling=True)], MIXED)
    assert too_short.fallbacks == {("prefill", "dhsa", DenseReason.SHORT_PROMPT_CHUNK): 1}


@given(st.integers(2, 9), st.integers(8200, 9000), st.sampled_from(["tidal", "blocktopk", "hip"]), st.booleans())
def test_every_nth_step_is_dense_and_no_fallback(every: int, first: int, name: str, alone: bool) -> None:
    """By its position alone, whatever the request's first step was."""
    methods: dict[str, DecodeMethod] = {"tidal": tidal(2048), "blocktopk": BlockTopk(), "hip": HipDecode()}
    row = Row(1, first, SparseParams(None, replace(methods[name], dense_every_steps=every)))
    limits = replace(UNKNOWN, serves_at_once=(lambda method: False) if alone else is_served)
    request = SparseRequest(row.params, **SUMMARISED)
    dense_steps = []
    for seq_len in range(first, first + 2 * every):
        found = plan([replace(row, context=seq_len)], limits, {0: request})
        assert not found.fallbacks
        assert bool(sparse_rows(found)) != bool(found.dense_steps)
        dense_steps += [of.span.seq_len for of in found.dense_steps]
        if found.dense_steps and seq_len % BLOCK:
            assert found.is_dense, "the step replays the graph of dense ones"
    assert dense_steps == [seq_len for seq_len in range(first, first + 2 * every) if seq_len % every == 0]


def test_a_dense_step_takes_no_room_and_is_summarised_where_it_fills_a_block() -> None:
    every = SparseParams(None, BlockTopk(dense_every_steps=64))
    tight = replace(UNKNOWN, scored_tokens=8321)
    rows = [Row(1, 8320, every), Row(1, 8321, every)]
    found = plan(rows, tight)
    assert sparse_rows(found) == [1]
    assert [row.span.row for row in found.summarising] == [0, 1], "8320 is the end of a block"
    assert not plan([Row(1, 8256, every)], UNKNOWN).summarising, "the next sparse step summarises the block"
    short = plan([Row(1, 2048, every)])
    assert not short.dense_steps
    assert short.fallbacks == {("decode", "blocktopk", DenseReason.SHORT_CONTEXT): 1}, "as at each other step"


def test_a_dense_step_of_one_row_changes_nothing_for_others() -> None:
    every = SparseParams(None, replace(tidal(2048), dense_every_steps=16))
    rows = [Row(1, 131072 + number, every) for number in range(24)]
    found = plan(rows)
    assert [row.span.row for row in found.dense_steps] == [0, 16]
    assert sparse_rows(found) == [row for row in range(24) if row % 16]
    assert not found.fallbacks


CHUNKS = st.builds(
    lambda tokens, context, method: Row(tokens, tokens + context, SparseParams(method, tidal(2048)), prefilling=True),
    st.integers(1, 8192),
    st.integers(0, 1 << 18),
    st.sampled_from([Dhsa(), FlexPrefill()]),
)
DECODES = st.builds(
    lambda seq_len, params: Row(1, seq_len, params),
    st.integers(1, 1 << 19),
    st.sampled_from([TIDAL, BLOCKTOPK, OUTSIDE, as_asked(TIDAL), SparseParams(None, HipDecode()), ALL_DENSE]),
)


@given(CHUNKS, st.lists(CHUNKS | DECODES, max_size=12), st.booleans())
def test_neighbours_change_nothing_for_a_prompt_chunk(chunk: Row, others: list[Row], full_graph: bool) -> None:
    limits = replace(LIMITS, full_graph=full_graph)
    assert bool(plan([chunk], limits).prefill) == (0 in sparse_rows(plan([chunk, *others], limits)))


@given(st.lists(DECODES, min_size=1, max_size=40), st.booleans())
def test_each_row_is_sparse_or_counted(rows: list[Row], full_graph: bool) -> None:
    found = plan(rows, replace(LIMITS, full_graph=full_graph))
    asking = sum(not row.params.is_dense for row in rows)
    assert len(sparse_rows(found)) + sum(found.fallbacks.values()) == asking
    assert {row.span.row for row in found.batch} >= {
        index
        for index, row in enumerate(rows)
        if row.params.unprofitable == "sparse" and row.params.decode and row.context > row.params.decode.budget_tokens
    }


@given(st.lists(DECODES, min_size=1, max_size=40))
def test_no_step_is_sparse_that_is_predicted_to_be_slower(rows: list[Row]) -> None:
    """Counted anew, without doubt or margin."""
    rows = [row for row in rows if row.params.unprofitable == "dense"]
    found = plan(rows) if rows else StepPlan(range(LAYERS))
    costs = StepCosts(H200.as_predicted, LLAMA_8B, SERVED)
    gained, methods = 0.0, set()
    for row in found.batch:
        method = row.setting.method
        assert method is not None
        methods.add(method.name)
        gained += costs.row_gain(method, row.roles).at(row.span.seq_len)
    if methods:
        all_sparse = len(found.batch) == len(rows)
        assert gained > costs.launch_seconds(methods, all_sparse and len(methods) == 1, full_graph=True)


JUDGED = st.lists(st.frozensets(st.integers(0, LAYERS - 1)) | st.just(frozenset(range(LAYERS))), min_size=2, max_size=2)


@given(st.lists(DECODES, min_size=1, max_size=12), JUDGED, st.booleans(), st.data())
def test_ranks_that_judge_apart_run_the_same_rows(
    rows: list[Row], judged: list[frozenset[int]], full_graph: bool, data: st.DataObject
) -> None:
    """What the guard found on one rank changes no graph: those of all ranks read one another's buffers."""
    guarded = [data.draw(st.booleans()) for _ in rows]
    rows = [
        replace(row, params=replace(row.params, min_recall=0.5)) if has else row
        for row, has in zip(rows, guarded, strict=True)
    ]
    limits = replace(LIMITS, full_graph=full_graph, judged_apart=True)
    ranks = []
    for dense_layers in judged:
        requests = held(*(row.params for row in rows))
        plans = []
        for _ in range(2):
            plans.append(plan(rows, limits, requests))
            for request in requests.values():
                if request.guard is not None:
                    request.guard.dense_layers = dense_layers
        states = [(one.leaves_graphs, one.catches_up, one.in_graph) for one in requests.values()]
        served = [([row.span for row in found.batch], [row.span for row in found.decode]) for found in plans]
        ranks.append((states, served, [found.summarising == () for found in plans]))
    assert ranks[0] == ranks[1]
