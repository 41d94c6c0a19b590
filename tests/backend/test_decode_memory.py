"""What methods keep on the device from step to step: requests come, pause, move and go, and read what they should.

Steps go through vLLM's slots, the planner and the buffers, in turn as in a FULL graph, which holds all rows of a padded
batch, and as between PIECEWISE graphs, where only sparse rows are served at once. Triton is compiled on a GPU, where
steps of the first kind are replayed from a graph, and interpreted elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from vllm.sampling_params import SamplingParams

from tests import oracle
from tests.backend.test_decode import Gather
from tests.backend.test_forward import Row, common_metadata
from tests.cuda_graph import captured
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from tests.oracle import Paged, Platform
from vllm_sparse.backend.decode_batch import BatchLayer, DecodeStep
from vllm_sparse.backend.decode_buffers import DecodeBuffers
from vllm_sparse.backend.decode_graphs import ANY, DecodeGraphs
from vllm_sparse.backend.execution import StepExecution
from vllm_sparse.backend.executors.flash_attention import FlashAttentionExecutor
from vllm_sparse.backend.guard import LAYERS_PER_STEP, RecallGuard, StepGuard
from vllm_sparse.config.request import ALL_DENSE, RESOLVED_KEY, SparseParams
from vllm_sparse.kernels.hip_decode import HipMemory
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.methods.hip import HipDecode
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.metrics import Sampling, StepRecord, WorkerMetrics
from vllm_sparse.metrics.recall import RecallSample
from vllm_sparse.metrics.row_recall import EagerRecall
from vllm_sparse.step.guard import RequestGuard
from vllm_sparse.step.launch import Executor, Launch
from vllm_sparse.step.plan import BatchRow, PlanLimits, plan_step
from vllm_sparse.step.requests import RequestTable, RowSetting
from vllm_sparse.step.roles import Role, reading_layers
from vllm_sparse.step.rows import ServerSize

pytest.importorskip("triton")

LAYERS, HEADS, KV_HEADS, HEAD_SIZE, BLOCK, SCALE = 2, 4, 2, 64, 16, 0.12
ROWS, LIST_TOKENS, LONGEST = 6, 200, 512
PLATFORM = Platform("plain", DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32, None)
HIP = HipDecode(
    stage_block_tokens=(64, 32), stage_budget_tokens=(192, 64), refresh_steps=(4, 2), sink_tokens=16, recent_tokens=20
)
# Of fewer stages; and with a list that needs buffers of its own.
FLAT = HipDecode(
    stage_block_tokens=(64,), stage_budget_tokens=(128,), refresh_steps=(8,), sink_tokens=0, recent_tokens=0
)
WIDE = HipDecode(
    stage_block_tokens=(64, 32), stage_budget_tokens=(192, 96), refresh_steps=(8, 4), sink_tokens=48, recent_tokens=70
)
TIDAL = Tidal(budget_tokens=128, dense_layers=0, reselect_layers=(1,), selection_reads="list")
EVERYTHING = 1 << 20
# Of the graph, whose lists another layer overwrites.
RECALL_LAYER = 0
RECALL_TOLERANCE = 1e-4


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=12)


def eighths(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Random numbers whose products are exact sums in any order, so that a search goes the same way everywhere."""
    return (oracle.random_tensor(PLATFORM, generator, *shape) * 8).round() / 8


class Recalls(WorkerMetrics):
    """Metrics of a process without a tensor-parallel group, where recalls and counted rows can be seen."""

    def __init__(self) -> None:
        super().__init__(recording=False)
        self.sampling = Sampling(1, 1)
        self.found: list[torch.Tensor] = []
        self.counted: list[BatchRow] = []

    def observe_batch(self, batch: Sequence[BatchRow]) -> None:
        self.counted += batch

    def observe_recall(self, phase: str, method: str, sample: RecallSample) -> None:
        assert phase == "decode"
        self.found.append(sample.recall())


class Checks(RecallGuard):
    """The guard, whose measurements can be seen."""

    def __init__(self, metrics: WorkerMetrics) -> None:
        super().__init__(metrics)
        self.found: list[tuple[RequestGuard, int, float]] = []

    def check(self, guard: RequestGuard, layer: int, phase: str, method: str, sample: RecallSample) -> None:
        self.found.append((guard, layer, float(sample.recall().mean())))


@pytest.fixture(autouse=True)
def recalls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkerMetrics, "_instance", Recalls())


@dataclass
class Request:
    """A request, and what the test keeps for it.

    Attributes:
        context: at its next step.
        params: its settings.
        runner_slot: in which the model runner holds it.
        memory: of its layers, as the method alone would have it.
        dense_layers: that the guard has sent dense.
    """

    context: int
    params: SparseParams
    runner_slot: int
    memory: dict[int, LayerMemory] = field(default_factory=dict)
    dense_layers: frozenset[int] = frozenset()


def hip(context: int, runner_slot: int, method: HipDecode = HIP, min_tokens: int = 0) -> Request:
    return Request(context, SparseParams(None, method, min_tokens), runner_slot)


class Server:
    """Steps of requests, by their numbers in the caches, each compared with float64.

    Args:
        generator: draws keys, queries, blocks and the order of rows.
        requests: of which there are keys.
    """

    def __init__(self, generator: torch.Generator, requests: int) -> None:
        self.generator = generator
        order = int(torch.randint(1 << 30, (1,), generator=generator))
        self.caches: list[Paged] = []
        for _ in range(LAYERS):
            keys, values = (
                [eighths(generator, KV_HEADS, LONGEST, HEAD_SIZE) for _ in range(requests)] for _ in range(2)
            )
            self.caches.append(oracle.paged(PLATFORM, keys, values, BLOCK, torch.Generator().manual_seed(order)))
        size = ServerSize(ROWS, LONGEST, LAYERS, KV_HEADS)
        self.buffers = DecodeBuffers(ROWS, size, [TIDAL, HIP], LIST_TOKENS, torch.device(DEVICE))
        memory = self.buffers.memories["hip"]
        assert isinstance(memory, HipMemory)
        self.memory = memory
        for layer in memory.layers.values():
            layer.key_blocks.fill_(-7)
        self.table = RequestTable()
        self.table.attach(slots_in_metadata=True)
        self.graphs = DecodeGraphs(self.buffers, [TIDAL, HIP], speculative=False, guards=True)
        self.guard = Checks(WorkerMetrics.get())
        self.graphs.captured = {name: {} for name in self.graphs.launches}
        # Requests, by their numbers, and layers that the guard has checked, in turn.
        self.checked: list[tuple[int, int]] = []
        # What a graph reads and writes, at addresses that stay.
        self.contexts = torch.zeros(ROWS, dtype=torch.int32, device=DEVICE)
        self.blocks = torch.zeros(ROWS, self.caches[0].block_table.shape[1], dtype=torch.int32, device=DEVICE)
        self.queries = torch.zeros(LAYERS, ROWS, HEADS, HEAD_SIZE, dtype=PLATFORM.dtype, device=DEVICE)
        self.outputs = torch.zeros_like(self.queries)
        self.replay = self.capture()

    def capture(self) -> Callable[[], None]:
        """A step of all rows, at full contexts while it is captured, which must leave no trace."""
        self.contexts.fill_(LONGEST)
        self.graphs.capturing = ANY
        execution = self.graphs.capture_step(self.contexts, self.blocks, EVERYTHING)
        self.graphs.capturing = None
        step = execution.batch(self.contexts, self.blocks).step

        def attend() -> None:
            self.attend(step, self.queries, self.outputs, self.blocks, execution.record, [], execution.guard)

        if DEVICE == "cpu":
            attend()
            return attend
        return captured(attend)

    def attend(
        self,
        step: DecodeStep,
        queries: torch.Tensor,
        outputs: torch.Tensor,
        blocks: torch.Tensor,
        record: StepRecord,
        names: Sequence[str],
        guard: StepGuard,
    ) -> None:
        """All layers, measured as the record says; queries and outputs ``[layers, rows, heads, head_size]``."""
        executor: Executor = FlashAttentionExecutor(3) if DEVICE == "cuda" else Gather()
        for layer, cache in enumerate(self.caches):

            def dense(query: torch.Tensor, contexts: torch.Tensor, output: torch.Tensor, cache: Paged = cache) -> None:
                position = torch.arange(LONGEST, device=DEVICE)
                head = torch.arange(KV_HEADS, device=DEVICE).view(1, -1, 1)
                slots = (blocks[:, position // BLOCK].unsqueeze(1) * KV_HEADS + head) * BLOCK + position % BLOCK
                lists = query.shape[0] * KV_HEADS
                starts = torch.arange(lists + 1, dtype=torch.int32, device=DEVICE)
                kept = contexts.repeat_interleave(KV_HEADS)
                launch = Launch(starts, 1, slots.flatten(0, 1).int(), kept, 1)
                shape = lists, HEADS // KV_HEADS, HEAD_SIZE
                executor.run(launch, query.reshape(shape), output.view(shape), cache.kv_cache, SCALE)

            mark = record.timer.marks(layer, names)
            at = BatchLayer(layer, queries[layer], cache.kv_cache, SCALE, outputs[layer], executor, dense, {}, mark)
            step.attend(at)
            if record.batch_recall is not None and record.batch_recall.layer == layer:
                record.batch_recall.take(*step.layer_lists(at))
            for taker in guard.takers(layer):
                taker.take(*step.layer_lists(at))

    def enter(self, request: Request) -> None:
        """The runner gives a request its slot, for the first time or after a preemption."""
        extra_args = {} if request.params.is_dense else {RESOLVED_KEY: request.params.serialize()}
        self.table.set(request.runner_slot, SamplingParams(extra_args=extra_args))
        request.memory = {}

    def step(
        self, running: dict[int, Request], full_graph: bool, capacity: int = EVERYTHING, order: list[int] | None = None
    ) -> set[int]:
        """One step of some requests.

        Args:
            running: requests by their numbers in the caches.
            full_graph: as in a FULL graph, else as between PIECEWISE graphs.
            capacity: tokens that there is room to score.
            order: numbers in the order of rows, where that matters.

        Returns:
            Numbers of the requests that were sparse.
        """
        any_order = [list(running)[pick] for pick in torch.randperm(len(running), generator=self.generator).tolist()]
        numbers = order or any_order
        requests = [running[number] for number in numbers]
        rows = [Row(1, request.context, request.params) for request in requests]
        blocks = self.caches[0].block_table[numbers]
        common = common_metadata(rows, blocks, [request.runner_slot for request in requests])
        queries = 2 * eighths(self.generator, LAYERS, len(rows), HEADS, HEAD_SIZE)
        sparse_rows = self.table.sparse_rows(common.req_idx, len(rows))
        plan = plan_step(common, sparse_rows, PlanLimits(LAYERS, False, capacity, self.buffers.serves))
        metrics = WorkerMetrics.get()
        assert isinstance(metrics, Recalls)
        assert not plan.decode
        contexts = torch.tensor([request.context for request in requests], dtype=torch.int32, device=DEVICE)
        outputs = torch.full_like(queries, oracle.NAN)
        served = [row.span.row for row in plan.batch]
        place = int(torch.randint(len(served), (1,), generator=self.generator))
        reading = reading_layers(plan.batch[place].roles)
        layer = reading[int(torch.randint(len(reading), (1,), generator=self.generator))]
        record = StepRecord(metrics, plan)
        record.batch_recall = EagerRecall(layer, plan.batch[place], place, metrics.observe_recall)
        guard = self.guard.start_step(plan)
        execution = StepExecution(plan, record, self.buffers, guard=guard)
        if full_graph:
            self.contexts.zero_()
            self.contexts[: len(rows)] = contexts
            self.blocks[: len(rows)] = blocks
            self.queries[:, : len(rows)] = queries
            self.graphs.step = execution
            assert self.graphs.prepare(ROWS) is not None
            self.replay()
            assert not metrics.counted, "counting before the graph is queued would lengthen the step"
            self.graphs.replayed(ANY, ROWS)
            assert metrics.counted == list(plan.batch)
            metrics.counted.clear()
            layer = RECALL_LAYER
            outputs.copy_(self.outputs[:, : len(rows)])
            compared = list(range(len(rows)))
        else:
            batch = execution.batch(contexts, blocks)
            gathered = outputs[:, served]
            self.attend(batch.step, queries[:, served], gathered, blocks[served], record, batch.method_names, guard)
            outputs[:, served] = gathered
            compared = served
        for row in compared:
            kept = self.check(requests[row], numbers[row], row in served, queries[:, row], outputs[:, row])
            if row == served[place]:
                if layer in reading:
                    assert (metrics.found.pop().cpu() - kept[layer]).abs().max() < RECALL_TOLERANCE, f"layer {layer}"
                assert not metrics.found, "a layer that reads everything has no list"
            if guard.decode is not None and guard.decode.row.span.row == row:
                for of_guard, checked, recall in self.guard.found:
                    assert of_guard is sparse_rows[row].guard
                    assert abs(recall - float(kept[checked].mean())) < RECALL_TOLERANCE, f"layer {checked}"
                assert [checked for _, checked, _ in self.guard.found] == list(guard.decode.layers)
                self.checked += [(numbers[row], checked) for _, checked, _ in self.guard.found]
                self.guard.found.clear()
        assert not self.guard.found
        for request in requests:
            request.context += 1
        return {numbers[row] for row in served}

    def check(
        self, request: Request, number: int, sparse: bool, queries: torch.Tensor, outputs: torch.Tensor
    ) -> list[torch.Tensor]:
        """Compare a row's layers with float64 over what its method alone chooses, whose recall in each is returned."""
        context, method = request.context, request.params.decode
        recalls = []
        for layer, cache in enumerate(self.caches):
            allowed = oracle.causal_mask(1, context)
            if sparse and layer not in request.dense_layers:
                assert method is not None
                reader = PLATFORM.keys_of(cache.kv_cache, cache.block_table[number], context)
                memory = request.memory.setdefault(layer, LayerMemory())
                lists = method.select(queries[layer], reader, SCALE, 1, memory)
                kept = torch.stack([oracle.kept_positions(lists, head, context) for head in range(KV_HEADS)])
                assert not bool(kept.all()), "a list must leave something out for this test to see it"
                allowed = kept.repeat_interleave(HEADS // KV_HEADS, dim=0).unsqueeze(1)
            keys, values = (of[number][:, :context] for of in (cache.keys, cache.values))
            expected = oracle.attention(queries[layer].unsqueeze(0), keys, values, SCALE, allowed)
            oracle.assert_close(outputs[layer], expected[0], f"layer {layer}, request {number} at {context}")
            shares = oracle.probabilities(queries[layer].unsqueeze(0), keys, SCALE, oracle.causal_mask(1, context))
            recalls.append((shares * allowed).sum(2)[:, 0])
        return recalls


def alternating(steps: int) -> list[bool]:
    """Kinds of steps: some after their like, some after the other."""
    return [step % 3 > 0 for step in range(steps)]


@needs_triton
def test_requests_take_their_own_turns(generator: torch.Generator) -> None:
    """Other methods, knobs and dense rows beside; one request grows out of what its method reads."""
    server = Server(generator, 5)
    running = {
        0: hip(401, 3),
        1: hip(333, 1, FLAT),
        2: hip(HIP.budget_tokens - 2, 0),
        3: Request(290, SparseParams(None, TIDAL), 5),
        4: Request(205, ALL_DENSE, 2),
    }
    for request in running.values():
        server.enter(request)
    for step, full_graph in enumerate(alternating(7)):
        assert server.step(running, full_graph) == ({0, 1, 3} if step < 3 else {0, 1, 2, 3})


@needs_triton
def test_layer_roles_are_the_rows_own(generator: torch.Generator) -> None:
    """In one graph with those of the server's knobs, and with lists that layers read of others, and outside."""
    server = Server(generator, 4)
    later = replace(HIP, dense_layers=1)
    first_only = replace(TIDAL, dense_layers=1, reselect_layers=(), selection_reads="list")
    running = {
        0: hip(401, 3),
        1: Request(333, SparseParams(None, later), 1, dense_layers=frozenset({0})),
        2: Request(290, SparseParams(None, first_only), 5, dense_layers=frozenset({0})),
        3: Request(390, SparseParams(None, TIDAL), 4),
    }
    for request in running.values():
        server.enter(request)
    for full_graph in (True, False, True, True):
        assert server.step(running, full_graph) == {0, 1, 2, 3}


@needs_triton
def test_a_context_below_the_minimum_keeps_nothing(generator: torch.Generator) -> None:
    server = Server(generator, 2)
    running = {0: hip(400, 0, FLAT, min_tokens=403), 1: hip(397, 1)}
    for request in running.values():
        server.enter(request)
    for step, full_graph in enumerate(alternating(6)):
        assert server.step(running, full_graph) == ({1} if step < 3 else {0, 1})


@needs_triton
def test_a_slot_gets_another_request(generator: torch.Generator) -> None:
    """Whose context goes on where the former one's ended, so that only the host knows that it is another."""
    server = Server(generator, 3)
    former, neighbour = hip(401, 2, FLAT), hip(350, 4)
    server.enter(former)
    server.enter(neighbour)
    for full_graph in alternating(4):
        server.step({0: former, 1: neighbour}, full_graph)
    latter = hip(405, 2, FLAT)
    server.enter(latter)
    for full_graph in (True, True, False):
        server.step({2: latter, 1: neighbour}, full_graph)


@needs_triton
@pytest.mark.parametrize("runner_slot", [1, 0], ids=["same-slot", "other-slot"])
def test_a_preempted_request_resumes(generator: torch.Generator, runner_slot: int) -> None:
    """Its prompt and answer are computed again; its place may have been another's meanwhile."""
    server = Server(generator, 3)
    preempted, neighbour, between = hip(393, 1, FLAT), hip(350, 3), hip(300, 1)
    server.enter(neighbour)
    server.enter(preempted)
    server.step({0: preempted, 1: neighbour}, True)
    server.step({0: preempted, 1: neighbour}, True)
    if runner_slot != preempted.runner_slot:
        server.enter(between)
    for full_graph in (True, False):
        server.step({1: neighbour} if runner_slot == 1 else {1: neighbour, 2: between}, full_graph)
    preempted.runner_slot = runner_slot
    server.enter(preempted)
    for full_graph in (True, False, True):
        server.step({0: preempted, 1: neighbour}, full_graph)


@needs_triton
def test_a_request_that_is_left_out_of_a_step_goes_on(generator: torch.Generator) -> None:
    """It keeps its slot and what it found: no search before it is due."""
    server = Server(generator, 2)
    waiting, neighbour = hip(393, 0, FLAT), hip(350, 1)
    server.enter(waiting)
    server.enter(neighbour)
    for step, full_graph in enumerate(alternating(6)):
        server.step({1: neighbour} if step in (1, 2) else {0: waiting, 1: neighbour}, full_graph)


@needs_triton
def test_a_step_without_room_is_not_remembered(generator: torch.Generator) -> None:
    """Rows behind one whose scores find no room are dense for that step, and search anew in the next."""
    server = Server(generator, 3)
    running = {0: Request(400, SparseParams(None, TIDAL), 4), 1: hip(393, 0, FLAT), 2: hip(353, 1)}
    for request in running.values():
        server.enter(request)
    for full_graph in (True, False):
        assert server.step(running, full_graph) == {0, 1, 2}
        assert server.step(running, full_graph, capacity=300, order=[2, 0, 1]) == {2}
    assert server.step(running, True) == {0, 1, 2}


@needs_triton
def test_lists_that_need_buffers_of_their_own_share_the_memory(generator: torch.Generator) -> None:
    """Steps with a longer list beside, and without."""
    server = Server(generator, 2)
    usual, long = hip(393, 0, FLAT), hip(411, 1, WIDE)
    assert WIDE.longest_list_tokens > LIST_TOKENS
    server.enter(usual)
    server.enter(long)
    server.step({0: usual}, True)
    for _ in range(3):
        server.step({0: usual, 1: long}, False)
    server.step({0: usual}, True)
    server.step({0: usual, 1: long}, False)


def guarded(params: SparseParams) -> SparseParams:
    """With a floor that any list reaches, so that the test alone says which layers are dense."""
    return replace(params, min_recall=1e-6)


@needs_triton
def test_the_guard_measures_what_rows_read(generator: torch.Generator) -> None:
    """In graphs and outside, one row a step, beside rows that have no guard; all layers in turn."""
    server = Server(generator, 4)
    running = {
        0: hip(401, 3),
        1: Request(333, guarded(SparseParams(None, FLAT)), 1),
        2: Request(290, guarded(SparseParams(None, TIDAL)), 5),
        3: Request(205, ALL_DENSE, 2),
    }
    for request in running.values():
        server.enter(request)
    for full_graph in (True, False, False, True):
        server.step(running, full_graph)
    assert LAYERS_PER_STEP == LAYERS
    assert sorted(server.checked) == [(number, layer) for number in (1, 2) for layer in (0, 0, 1, 1)]
    assert {number for number, _ in server.checked[: 2 * LAYERS]} == {1, 2}, "in turn"


@needs_triton
def test_layers_that_the_guard_sends_dense_are_dense_in_graphs_too(generator: torch.Generator) -> None:
    """From one step to the next, for this row alone; where all are, the row is dense."""
    server = Server(generator, 3)
    running = {
        0: hip(401, 3),
        1: Request(333, guarded(SparseParams(None, FLAT)), 1),
        2: Request(290, guarded(SparseParams(None, TIDAL)), 5),
    }
    for request in running.values():
        server.enter(request)
    sent_dense: list[dict[int, set[int]]] = [{}, {1: {0}}, {1: {0}, 2: {1}}, {1: {0, 1}, 2: {1}}]
    for dense in sent_dense:
        for number, layers in dense.items():
            request = running[number]
            held = server.table.take(request.runner_slot)
            server.table.put(request.runner_slot, held)
            assert held is not None
            assert held.guard is not None
            held.guard.dense_layers = request.dense_layers = frozenset(layers)
        for full_graph in (True, False):
            expected = {0, 1, 2} if running[1].dense_layers != {0, 1} else {0, 2}
            assert server.step(running, full_graph) == expected


@needs_triton
def test_captures_and_idle_rows_leave_no_trace(generator: torch.Generator) -> None:
    """A graph that is captured late, rows that pad a batch with settings of former steps."""
    server = Server(generator, 2)
    assert all(bool((layer.key_blocks == -7).all()) for layer in server.memory.layers.values())
    running = {0: hip(401, 1), 1: hip(333, 0, FLAT)}
    for request in running.values():
        server.enter(request)
    server.step(running, True)
    server.step({0: running[0]}, True)
    kept = [(layer.key_blocks.clone(), layer.seq_lens.clone()) for layer in server.memory.layers.values()]
    server.replay = server.capture()
    server.contexts.zero_()
    server.buffers.tell([RowSetting(HIP, 0, (Role.WRITE_AND_READ,) * LAYERS, slot, True) for slot in range(ROWS)])
    server.replay()
    for layer, (key_blocks, contexts) in zip(server.memory.layers.values(), kept, strict=True):
        assert torch.equal(layer.key_blocks, key_blocks)
        assert torch.equal(layer.seq_lens, contexts)
    assert not bool(server.memory.scratch.arrived.any())
    server.step(running, True)
