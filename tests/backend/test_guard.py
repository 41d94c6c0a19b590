"""The guard through the real CPU backend: broken selectors are caught within one request, whatever runs beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from vllm.sampling_params import SamplingParams

from tests import oracle
from tests.backend.conftest import HEAD_SIZE, HEADS, KV_HEADS, LAYERS, SCALE, Engine
from tests.backend.test_forward import BLOCK, PLATFORM, Row, common_metadata, forward
from tests.methods.lists import chunk_allowed
from tests.prometheus import counted
from vllm_sparse.backend.guard import LAYERS_PER_STEP
from vllm_sparse.config.request import RESOLVED_KEY, SparseParams
from vllm_sparse.keys import PagedKeys
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.hip import HipDecode
from vllm_sparse.methods.prefill import Layer
from vllm_sparse.methods.streaming import Streaming
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.metrics import guard as guard_metrics
from vllm_sparse.pages import PageList
from vllm_sparse.step.guard import RequestGuard
from vllm_sparse.step.requests import TABLE, SparseRequest

LONGEST = 800
CHUNK_TOKENS = 256
FLOOR = 0.8
# Selection in layers 1 and 4 of 8, so that these are dense, as layer 0 is.
TIDAL = Tidal(budget_tokens=512, dense_layers=1, reselect_layers=(4,), selection_reads="everything")
READING = {2, 3, 5, 6, 7}
FLEX = FlexPrefill(gamma=0.97, min_budget_tokens=0)
HIP = HipDecode(
    stage_block_tokens=(64,), stage_budget_tokens=(128,), refresh_steps=(3,), sink_tokens=0, recent_tokens=0
)
# A method that anyone may ask for, with a window that is far too small.
WINDOW = Streaming(sink_tokens=4, recent_tokens=32)


def broken(self: Tidal, query: torch.Tensor, keys: PagedKeys, scale: float, page: int, memory: LayerMemory) -> PageList:
    """Reads the first page and the newest one."""
    last = (keys.seq_len - 1) // page
    kept = page + keys.seq_len - last * page
    pages = torch.tensor([[0, last]] * KV_HEADS, dtype=torch.int32)
    return PageList(pages, torch.full((KV_HEADS,), kept, dtype=torch.int32), page)


@dataclass(frozen=True)
class Turn:
    """What one request does in a step: new tokens, tokens in its cache, whether they are of its prompt."""

    tokens: int
    seq_len: int
    prefilling: bool = False


class Worker:
    """Steps of requests, slot by slot, whose keys are drawn once.

    Args:
        engine: the worker.
        generator: draws.
        requests: how many.
    """

    def __init__(self, engine: Engine, generator: torch.Generator, requests: int = 1) -> None:
        self.engine = engine
        self.generator = generator
        order = int(torch.randint(1 << 30, (1,), generator=generator))
        self.caches = []
        for _ in range(LAYERS):
            keys, values = (
                [oracle.random_tensor(PLATFORM, generator, KV_HEADS, LONGEST, HEAD_SIZE) for _ in range(requests)]
                for _ in range(2)
            )
            self.caches.append(oracle.paged(PLATFORM, keys, values, BLOCK, torch.Generator().manual_seed(order)))
        # Of the last step.
        self.queries: list[torch.Tensor] = []

    def step(self, turns: dict[int, Turn], queries: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """Output of each layer, rows in the order of `turns`, which are by slot."""
        rows = [Row(turn.tokens, turn.seq_len, prefilling=turn.prefilling) for turn in turns.values()]
        tokens = sum(turn.tokens for turn in turns.values())
        drawn = [
            oracle.random_tensor(PLATFORM, self.generator, tokens, HEADS, HEAD_SIZE, spread=2) for _ in self.caches
        ]
        self.queries = queries or drawn
        TABLE.slots_in_metadata = True
        common = common_metadata(rows, self.caches[0].block_table[list(turns)], list(turns))
        metadata = self.engine.builder.build(0, common)
        return [
            forward(layer.impl, layer, query, cache.kv_cache, metadata)
            for layer, query, cache in zip(self.engine.layers, self.queries, self.caches, strict=True)
        ]

    def exact(self, slot: int, turn: Turn, layer: int, start: int = 0, allowed: Any = None) -> torch.Tensor:
        """Dense attention of a row whose tokens begin at `start`, or over the tokens that it may read."""
        cache = self.caches[layer]
        keys, values = (of[slot][:, : turn.seq_len] for of in (cache.keys, cache.values))
        query = self.queries[layer][start : start + turn.tokens]
        may_read = oracle.causal_mask(turn.tokens, turn.seq_len) if allowed is None else allowed
        return oracle.attention(query, keys, values, SCALE, may_read)

    def dense_layers(self, outputs: list[torch.Tensor], slot: int, turn: Turn) -> set[int]:
        """Layers in which a step of one request gave what dense attention gives."""
        return {
            layer
            for layer, output in enumerate(outputs)
            if oracle.relative_error(output, self.exact(slot, turn, layer)) < 1e-3
        }


def count(metric: str, phase: str, method: str, **labels: str) -> float:
    return counted(f"vllm_sparse_{metric}_total", phase=phase, method=method, **labels)


def enter(slot: int, params: SparseParams) -> RequestGuard | None:
    """A request enters a slot as the runner puts it there."""
    TABLE.set(slot, SamplingParams(extra_args={RESOLVED_KEY: params.serialize()}))
    return guard_of(slot)


def guard_of(slot: int) -> RequestGuard | None:
    request = TABLE.take(slot)
    TABLE.put(slot, request)
    return None if request is None else request.guard


@pytest.mark.parametrize("min_recall", [0.0, FLOOR])
def test_a_broken_prefill_selector_is_caught_in_the_first_chunk(
    engine: Engine, min_recall: float, generator: torch.Generator
) -> None:
    worker = Worker(engine, generator)
    guard = enter(0, SparseParams(WINDOW, min_recall=min_recall))
    counted = [("guard_checks", {}), ("guard_layers", {}), ("fallbacks", {"reason": "low_recall"})]
    before = [count(metric, "prefill", "streaming", **labels) for metric, labels in counted]
    first, second = (Turn(CHUNK_TOKENS, CHUNK_TOKENS * chunks, True) for chunks in (2, 3))
    assert worker.dense_layers(worker.step({0: first}), 0, first) == set(), "the chunk that is measured stays as it is"
    right = worker.dense_layers(worker.step({0: second}), 0, second)
    found = [count(metric, "prefill", "streaming", **labels) for metric, labels in counted]
    if not min_recall:
        assert guard is None
        assert right == set(), "without the guard the answer stays wrong"
        assert found == before
        return
    assert right == set(range(LAYERS))
    assert guard is not None
    assert guard.dense_layers == set(range(LAYERS))
    assert [after - other for after, other in zip(found, before, strict=True)] == [LAYERS, LAYERS, 1]


@pytest.mark.parametrize("judged_apart", [False, True])
@pytest.mark.parametrize("min_recall", [0.0, FLOOR])
def test_a_broken_decode_selector_is_caught_within_one_round(
    engine: Engine, min_recall: float, judged_apart: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tidal, "select", broken)
    monkeypatch.setattr(engine.builder, "_sparse_judged_apart", judged_apart)
    worker = Worker(engine, generator)
    guard = enter(0, SparseParams(None, TIDAL, min_recall=min_recall))
    layers, rows = count("guard_layers", "decode", "tidal"), count("fallbacks", "decode", "tidal", reason="low_recall")
    steps = -(-len(READING) // LAYERS_PER_STEP)
    for step in range(steps + 1):
        turn = Turn(1, 600 + step)
        right = worker.dense_layers(worker.step({0: turn}), 0, turn)
        caught = set(sorted(READING)[: step * LAYERS_PER_STEP]) if min_recall else set()
        assert right == set(range(LAYERS)) - READING | caught
    if guard is None:
        return
    assert guard.dense_layers == READING
    assert count("guard_layers", "decode", "tidal") - layers == len(READING)
    assert count("fallbacks", "decode", "tidal", reason="low_recall") - rows == steps


def test_layers_between_dense_ones_read_the_right_list(engine: Engine, generator: torch.Generator) -> None:
    """A layer that goes dense still lets those behind it read what an earlier one has written."""
    method = replace(TIDAL, budget_tokens=128)
    worker = Worker(engine, generator)
    guard = enter(0, SparseParams(None, method, min_recall=1e-6))
    assert guard is not None
    guard.dense_layers = frozenset({2, 5, 6})
    turn = Turn(1, 700)
    outputs = worker.step({0: turn})
    for layer, output in enumerate(outputs):
        allowed = None
        if layer in READING - guard.dense_layers:
            source = 1 if layer < 4 else 4
            data = worker.caches[source]
            reader = PLATFORM.keys_of(data.kv_cache, data.block_table[0], turn.seq_len)
            lists = method.select(worker.queries[source][0], reader, SCALE, BLOCK, LayerMemory())
            kept = torch.stack([oracle.kept_positions(lists, row, turn.seq_len) for row in range(KV_HEADS)])
            assert not bool(kept.all())
            allowed = kept.repeat_interleave(HEADS // KV_HEADS, dim=0).unsqueeze(1)
        oracle.assert_close(output, worker.exact(0, turn, layer, allowed=allowed), f"layer {layer}")


def test_intact_methods_are_left_alone(engine: Engine, generator: torch.Generator) -> None:
    """And their output is bit for bit that of an unguarded request."""
    worker = Worker(engine, generator)
    checks = count("guard_checks", "prefill", "flexprefill"), count("guard_checks", "decode", "tidal")
    turns = [Turn(CHUNK_TOKENS, CHUNK_TOKENS, True), Turn(CHUNK_TOKENS, 2 * CHUNK_TOKENS, True)]
    turns += [Turn(1, 2 * CHUNK_TOKENS + 1 + step) for step in range(6)]
    guard = enter(0, SparseParams(FLEX, TIDAL, min_recall=FLOOR))
    assert guard is not None
    guarded = []
    for turn in turns:
        guarded.append((worker.step({0: turn}), worker.queries))
    assert guard.dense_layers == set()
    enter(0, SparseParams(FLEX, TIDAL))
    for turn, (outputs, queries) in zip(turns, guarded, strict=True):
        for one, other in zip(worker.step({0: turn}, queries), outputs, strict=True):
            assert torch.equal(one, other)
    prompt_layers = LAYERS - FLEX.dense_layers
    assert count("guard_checks", "prefill", "flexprefill") - checks[0] == 2 * prompt_layers
    assert count("guard_checks", "decode", "tidal") - checks[1] == 6 * LAYERS_PER_STEP


def test_neighbours_are_not_touched(
    engine: Engine, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sparse ones keep their lists while a guarded request's layers go dense one after the other; so do dense ones."""
    monkeypatch.setattr(Tidal, "select", broken)
    worker = Worker(engine, generator, requests=4)
    for slot, params in enumerate(
        [
            SparseParams(None, TIDAL, min_recall=FLOOR),
            SparseParams(None, HIP),
            SparseParams(FLEX),
            SparseParams(),
        ]
    ):
        enter(slot, params)
    memory: dict[int, LayerMemory] = {}
    for step in range(3):
        chunk = Turn(300, 300 + step * 100, True)
        turns = {0: Turn(1, 600 + step), 1: Turn(1, 500 + step), 2: chunk, 3: Turn(1, 450 + step)}
        outputs = worker.step(turns)
        for layer, output in enumerate(outputs):
            data, query = worker.caches[layer], worker.queries[layer]
            roles = HIP.layer_roles(LAYERS)
            allowed: Any = None
            if roles[layer].reads_list:
                reader = PLATFORM.keys_of(data.kv_cache, data.block_table[1], 500 + step)
                lists = HIP.select(query[1], reader, SCALE, BLOCK, memory.setdefault(layer, LayerMemory()))
                kept = torch.stack([oracle.kept_positions(lists, row, 500 + step) for row in range(KV_HEADS)])
                allowed = kept.repeat_interleave(HEADS // KV_HEADS, dim=0).unsqueeze(1)
            oracle.assert_close(output[1:2], worker.exact(1, turns[1], layer, 1, allowed), f"hip, layer {layer}")
            if layer >= FLEX.dense_layers:
                reader = PLATFORM.keys_of(data.kv_cache, data.block_table[2], chunk.seq_len)
                lists = FLEX.select(query[2:302], reader, SCALE, BLOCK, Layer(layer, 0))
                allowed = chunk_allowed(FLEX, lists, shortened(data, chunk.seq_len), 2, query[2:302])
            else:
                allowed = None
            oracle.assert_close(output[2:302], worker.exact(2, chunk, layer, 2, allowed), f"flex, layer {layer}")
            oracle.assert_close(output[302:], worker.exact(3, turns[3], layer, 302), f"dense, layer {layer}")
    guard = guard_of(0)
    assert guard is not None
    assert guard.dense_layers == READING
    assert [guard_of(slot) for slot in (1, 2, 3)] == [None] * 3


def shortened(data: Any, seq_len: int) -> Any:
    """A layer's cache whose requests hold fewer tokens."""
    return replace(
        data,
        keys=[keys[:, :seq_len] for keys in data.keys],
        values=[values[:, :seq_len] for values in data.values],
    )


def test_each_request_starts_guarded_from_scratch(engine: Engine, generator: torch.Generator) -> None:
    """The next one in a slot, and one that was preempted and resumes; a move to another slot changes nothing."""
    worker = Worker(engine, generator)
    params = SparseParams(WINDOW, min_recall=FLOOR)
    turn = Turn(CHUNK_TOKENS, 2 * CHUNK_TOKENS, True)
    first = enter(0, params)
    worker.step({0: turn})
    assert first is not None
    assert first.dense_layers == set(range(LAYERS))
    TABLE.put(3, TABLE.take(0))
    assert guard_of(3) is first
    again = enter(0, params)
    assert again is not None
    assert again.dense_layers == set()
    assert worker.dense_layers(worker.step({0: turn}), 0, turn) == set()
    enter(0, SparseParams(WINDOW))
    assert guard_of(0) is None
    assert worker.dense_layers(worker.step({0: turn}), 0, turn) == set()


def test_a_layer_is_logged_once(engine: Engine, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(engine.builder._sparse_metrics._guard, "_logged", set())
    monkeypatch.setattr(guard_metrics.logger, "warning", lambda text, *values: messages.append(text % values))
    worker = Worker(engine, generator)
    turn = Turn(CHUNK_TOKENS, 2 * CHUNK_TOKENS, True)
    for _ in range(2):
        enter(0, SparseParams(WINDOW, min_recall=FLOOR))
        worker.step({0: turn})
    begins = [message.partition(" of a request is dense")[0] for message in messages]
    assert begins == [f"Layer {layer}" for layer in range(LAYERS)]


def test_one_row_a_step_is_checked_the_unseen_first(
    engine: Engine, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost does not grow with the batch, and a new request does not wait for a full round of the others."""
    worker = Worker(engine, generator, requests=3)
    floor = 1e-6
    for slot in range(2):
        TABLE.put(slot, SparseRequest(SparseParams(None, TIDAL, min_recall=floor)))
    checked: list[int] = []

    def step(slots: int) -> None:
        before = [0 if guard is None else guard.layers_checked for guard in map(guard_of, range(slots))]
        worker.step({slot: Turn(1, 600) for slot in range(slots)})
        after = [0 if guard is None else guard.layers_checked for guard in map(guard_of, range(slots))]
        (slot,) = [slot for slot in range(slots) if after[slot] != before[slot]]
        assert after[slot] - before[slot] == LAYERS_PER_STEP
        checked.append(slot)

    for _ in range(8):
        step(2)
    assert checked == [0, 1] * 4
    TABLE.put(2, SparseRequest(SparseParams(None, TIDAL, min_recall=floor)))
    checked.clear()
    for _ in range(6):
        step(3)
    assert checked == [2, 2, 2, 0, 1, 2]
