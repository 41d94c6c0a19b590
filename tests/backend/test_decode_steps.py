"""Several decode steps through the real CPU backend: what a method keeps of a request, in which layer, how long."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch

from tests import oracle
from tests.backend.conftest import HEAD_SIZE, HEADS, KV_HEADS, LAYERS, SCALE, Engine
from tests.backend.test_forward import BLOCK, PLATFORM, Row, common_metadata, forward
from tests.oracle import Paged
from vllm_sparse.config.request import ALL_DENSE, SparseParams
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.methods.hip import HipDecode
from vllm_sparse.methods.tidal import Tidal

HIP = HipDecode(
    stage_block_tokens=(64, 32),
    stage_budget_tokens=(256, 64),
    refresh_steps=(4, 2),
    sink_tokens=16,
    recent_tokens=20,
    dense_layers=2,
)
EVERYWHERE = HipDecode(
    stage_block_tokens=(32,), stage_budget_tokens=(96,), refresh_steps=(3,), sink_tokens=0, recent_tokens=0
)
TIDAL = Tidal(budget_tokens=128, dense_layers=1, reselect_layers=(4,), selection_reads="everything")
STEPS = 9


@dataclass
class Request:
    """A request that decodes, and what the test keeps for it.

    Attributes:
        slot: in which the runner holds it.
        steps: of the test, at which it runs.
        context: at the first of them.
        params: its settings.
        memory: of its layers.
    """

    slot: int
    steps: range
    context: int
    params: SparseParams = ALL_DENSE
    memory: dict[int, LayerMemory] = field(default_factory=dict)

    def context_at(self, step: int) -> int:
        """Context at a step of the test."""
        return self.context + step - self.steps.start

    def list_layer(self, layer: int, context: int) -> int | None:
        """The layer whose list is read in a layer; None if it reads everything."""
        method = self.params.decode
        if method is None or context <= method.budget_tokens:
            return None
        if method.dense_every_steps and context % method.dense_every_steps == 0:
            return None
        if isinstance(method, HipDecode):
            return layer if layer >= method.dense_layers else None
        return None if layer <= 1 or layer == 4 else 1 if layer < 4 else 4


def requests() -> list[Request]:
    """Three methods side by side. One slot gets a second request, whose context goes on where the first one's ended.

    One request grows out of its method's budget, one starts late, two have dense steps among their sparse ones.
    """
    hip, everywhere = SparseParams(None, HIP), SparseParams(None, EVERYWHERE)
    return [
        Request(0, range(5), 701, hip),
        Request(0, range(5, STEPS), 706, hip),
        Request(1, range(STEPS), 650, SparseParams(None, TIDAL)),
        Request(2, range(STEPS), 300),
        Request(3, range(STEPS), 433, everywhere),
        Request(4, range(STEPS), HIP.budget_tokens - 2, hip),
        Request(5, range(3, STEPS), 999, hip),
        Request(6, range(STEPS), 702, SparseParams(None, replace(HIP, dense_every_steps=3))),
        Request(7, range(STEPS), 651, SparseParams(None, replace(TIDAL, dense_every_steps=4))),
    ]


@pytest.fixture(autouse=True)
def empty_table(engine: Engine) -> Iterator[None]:
    from vllm_sparse.step.requests import TABLE

    yield
    TABLE.attach(slots_in_metadata=False)


def make_caches(all_requests: list[Request], generator: torch.Generator) -> list[Paged]:
    """Each layer's cache, with the keys of all steps."""
    order = int(torch.randint(1 << 30, (1,), generator=generator))
    lengths = [request.context + len(request.steps) for request in all_requests]
    caches = []
    for _ in range(LAYERS):
        keys = [oracle.random_tensor(PLATFORM, generator, KV_HEADS, length, HEAD_SIZE) for length in lengths]
        values = [oracle.random_tensor(PLATFORM, generator, KV_HEADS, length, HEAD_SIZE) for length in lengths]
        # All layers share a block table.
        caches.append(oracle.paged(PLATFORM, keys, values, BLOCK, torch.Generator().manual_seed(order)))
    return caches


def make_queries(generator: torch.Generator) -> torch.Tensor:
    """``[steps, layers, requests, heads, head_size]``."""
    return oracle.random_tensor(PLATFORM, generator, STEPS, LAYERS, len(requests()), HEADS, HEAD_SIZE, spread=2)


def run(
    engine: Engine,
    everyone: dict[int, Request],
    caches: list[Paged],
    queries: torch.Tensor,
    generator: torch.Generator,
) -> dict[tuple[int, int], list[torch.Tensor]]:
    """Run all steps, rows in any order.

    Args:
        engine: the worker.
        everyone: requests by their number in the caches.
        caches: of the layers.
        queries: as `make_queries` draws them.
        generator: draws the order of rows.

    Returns:
        Outputs of the layers, each ``[heads, head_size]``, by step and number.
    """
    from vllm_sparse.step.requests import TABLE, SparseRequest

    TABLE.attach(slots_in_metadata=True)
    outputs: dict[tuple[int, int], list[torch.Tensor]] = {}
    for step in range(STEPS):
        for request in everyone.values():
            if step == request.steps.start:
                TABLE.put(request.slot, None if request.params.is_dense else SparseRequest(request.params))
        running = [number for number, request in everyone.items() if step in request.steps]
        if not running:
            continue
        running = [running[pick] for pick in torch.randperm(len(running), generator=generator).tolist()]
        rows = [Row(1, everyone[number].context_at(step), everyone[number].params) for number in running]
        slots = [everyone[number].slot for number in running]
        metadata = engine.builder.build(0, common_metadata(rows, caches[0].block_table[running], slots))
        for index, (layer, cache) in enumerate(zip(engine.layers, caches, strict=True)):
            output = forward(layer.impl, layer, queries[step, index, running], cache.kv_cache, metadata)
            for row, number in enumerate(running):
                outputs.setdefault((step, number), []).append(output[row])
    return outputs


def allowed(
    request: Request, number: int, context: int, layer: int, queries: torch.Tensor, cache: Paged
) -> torch.Tensor:
    """Tokens that a request may read in a layer.

    Args:
        request: it, whose memory is that of the step before.
        number: its number in the caches.
        context: at the step.
        layer: whose list is read.
        queries: of the step in that layer, ``[requests, heads, head_size]``.
        cache: of that layer.

    Returns:
        bool, broadcasting to ``[heads, 1, context]``.
    """
    assert request.params.decode is not None
    reader = PLATFORM.keys_of(cache.kv_cache, cache.block_table[number], context)
    memory = request.memory.setdefault(layer, LayerMemory())
    lists = request.params.decode.select(queries[number], reader, SCALE, BLOCK, memory)
    kept = torch.stack([oracle.kept_positions(lists, row, context) for row in range(KV_HEADS)])
    assert context < 300 or not bool(kept.all()), "a list must leave something out for this test to see it"
    return kept.repeat_interleave(HEADS // KV_HEADS, dim=0).unsqueeze(1)


def test_every_step_equals_the_oracle_in_every_layer(engine: Engine, generator: torch.Generator) -> None:
    """Lists of this step's choice or a former one's, by the memory of the request and layer."""
    everyone = dict(enumerate(requests()))
    caches, queries = make_caches(list(everyone.values()), generator), make_queries(generator)
    for (step, number), outputs in run(engine, everyone, caches, queries, generator).items():
        request = everyone[number]
        context = request.context_at(step)
        for layer, output in enumerate(outputs):
            may_read = oracle.causal_mask(1, context)
            source = request.list_layer(layer, context)
            if source is not None:
                may_read = allowed(request, number, context, source, queries[step, source], caches[source])
            keys, values = (of[number][:, :context] for of in (caches[layer].keys, caches[layer].values))
            expected = oracle.attention(queries[step, layer, number].unsqueeze(0), keys, values, SCALE, may_read)
            oracle.assert_close(output, expected[0], f"step {step}, layer {layer}, request {number} at {context}")


@pytest.mark.parametrize("number", [1, 4, 7])
def test_a_request_reads_the_same_with_and_without_others(
    engine: Engine, number: int, generator: torch.Generator
) -> None:
    """What it keeps does not depend on who runs beside it, nor on who had its slot before."""
    everyone = dict(enumerate(requests()))
    caches, queries = make_caches(list(everyone.values()), generator), make_queries(generator)
    alone = run(engine, {number: everyone[number]}, caches, queries, generator)
    beside = run(engine, everyone, caches, queries, generator)
    assert len(alone) == len(everyone[number].steps)
    for step, outputs in alone.items():
        for one, other in zip(outputs, beside[step], strict=True):
            # The kernel splits contexts by the batch that it schedules.
            assert oracle.relative_error(one, other) < 2e-6
