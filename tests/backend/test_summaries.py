"""Page summaries over several steps of the real CPU backend: what lies beside a block is right whoever wrote it.

Every output is compared with float64 attention over the list that the method chooses from the keys alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests import oracle
from tests.backend.conftest import HEAD_SIZE, HEADS, KV_HEADS, LAYERS, SCALE, Engine
from tests.backend.test_forward import BLOCK, FLEX, PLATFORM, TIDAL, Row, common_metadata, forward
from tests.methods.lists import chunk_allowed
from tests.oracle import Paged
from vllm_sparse.config.request import ALL_DENSE, SparseParams
from vllm_sparse.methods.block_topk import BlockTopk
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.methods.prefill import Layer
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.step.requests import TABLE, SparseRequest
from vllm_sparse.step.roles import Role

BLOCKS, WIDEST_TABLE = 120, 40
MEANS = SparseParams(None, BlockTopk(budget_tokens=160, dense_layers=1, scores="mean", recent_tokens=20))
BOUNDS = SparseParams(FLEX, BlockTopk(budget_tokens=96, dense_layers=3, sink_tokens=0, recent_tokens=0))
PARAMS = pytest.mark.parametrize("params", [MEANS, BOUNDS], ids=["mean", "bounds"])


@dataclass
class Request:
    """A request with its blocks, and its keys and values in each layer."""

    params: SparseParams
    blocks: list[int] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=lambda: [torch.empty(KV_HEADS, 0, HEAD_SIZE)] * LAYERS)
    values: list[torch.Tensor] = field(default_factory=lambda: [torch.empty(KV_HEADS, 0, HEAD_SIZE)] * LAYERS)
    held: SparseRequest = field(init=False)

    def __post_init__(self) -> None:
        self.held = SparseRequest(self.params)

    @property
    def context(self) -> int:
        return self.keys[0].shape[1]

    def prefix(self, tokens: int, params: SparseParams | None = None) -> Request:
        """A request with the same first tokens, which finds them in the prefix cache; its settings too if None."""
        assert tokens % BLOCK == 0
        first = [[tensor[:, :tokens] for tensor in tensors] for tensors in (self.keys, self.values)]
        return Request(params or self.params, self.blocks[: tokens // BLOCK], *first)


class Worker:
    """The KV caches of all layers, and steps over them. Keys are NaN and summaries too where nothing was written."""

    def __init__(self, engine: Engine, generator: torch.Generator) -> None:
        self.engine = engine
        self.generator = generator
        self.free = torch.randperm(BLOCKS, generator=generator).tolist()
        self.caches = [torch.full((BLOCKS, KV_HEADS, BLOCK, 2 * HEAD_SIZE), oracle.NAN) for _ in range(LAYERS)]
        stale = torch.full((BLOCKS * BLOCK, KV_HEADS, HEAD_SIZE), oracle.NAN)
        for cache in self.caches:
            PLATFORM.write(cache, stale, torch.full_like(stale, oracle.STALE_VALUE), torch.arange(BLOCKS * BLOCK))
        for params in (MEANS, BOUNDS):
            assert params.decode is not None
            assert params.decode.summaries is not None
            for layer, cache in zip(engine.layers, self.caches, strict=True):
                layer.impl.summaries.of(params.decode.summaries, cache).fill_(oracle.NAN)

    def random(self, *shape: int, spread: float = 1.0) -> torch.Tensor:
        return oracle.random_tensor(PLATFORM, self.generator, *shape, spread=spread)

    def release(self, request: Request) -> None:
        """Its blocks are handed out next."""
        self.free[:0] = request.blocks
        request.blocks = []

    def append(self, request: Request, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        """New tokens enter the caches, on new blocks where the last one is full."""
        start, stop = request.context, request.context + keys[0].shape[1]
        while len(request.blocks) * BLOCK < stop:
            request.blocks.append(self.free.pop(0))
        position = torch.arange(start, stop)
        slots = torch.tensor(request.blocks)[position // BLOCK] * BLOCK + position % BLOCK
        for layer, cache in enumerate(self.caches):
            by_token = keys[layer].transpose(0, 1).contiguous(), values[layer].transpose(0, 1).contiguous()
            PLATFORM.write(cache, *by_token, slots)
        request.keys = [torch.cat(parts, dim=1) for parts in zip(request.keys, keys, strict=True)]
        request.values = [torch.cat(parts, dim=1) for parts in zip(request.values, values, strict=True)]

    def grow(self, request: Request, tokens: int) -> None:
        """Fresh tokens enter the caches."""
        fresh = [[self.random(KV_HEADS, tokens, HEAD_SIZE) for _ in range(LAYERS)] for _ in range(2)]
        self.append(request, *fresh)

    def step(self, *work: tuple[Request, int]) -> None:
        """Requests with so many new tokens each; more than one token are its prompt's."""
        for request, tokens in work:
            self.grow(request, tokens)
        self.attend(*work)

    def attend(self, *work: tuple[Request, int]) -> None:
        """A step whose keys are in the cache; every output is compared with the oracle, but those of another method."""
        rows = [Row(tokens, request.context, request.params, tokens > 1) for request, tokens in work]
        table = torch.zeros(len(rows), WIDEST_TABLE, dtype=torch.int32)
        for index, (request, _) in enumerate(work):
            table[index, : len(request.blocks)] = torch.tensor(request.blocks)
        TABLE.attach(slots_in_metadata=False)
        for index, (request, _) in enumerate(work):
            TABLE.put(index, None if request.params.is_dense else request.held)
        metadata = self.engine.builder.build(0, common_metadata(rows, table))
        for layer, module in enumerate(self.engine.layers):
            query = self.random(sum(row.tokens for row in rows), HEADS, HEAD_SIZE, spread=2)
            output = forward(module.impl, module, query, self.caches[layer], metadata)
            start = 0
            for index, (request, tokens) in enumerate(work):
                span = slice(start, start + tokens)
                start += tokens
                if isinstance(request.params.decode, Tidal):
                    continue
                keys = PLATFORM.keys_of(self.caches[layer], table[index], request.context)
                allowed = self.allowed(rows[index], layer, query[span], keys)
                expected = oracle.attention(query[span], request.keys[layer], request.values[layer], SCALE, allowed)
                oracle.assert_close(output[span], expected, f"layer {layer}, row {index} of {rows}")

    def allowed(self, row: Row, layer: int, query: torch.Tensor, keys: Any) -> torch.Tensor:
        """Tokens that a row may read in a layer, by lists that are chosen from the keys."""
        prefill, decode = row.params.prefill, row.params.decode
        if row.prefilling and prefill is not None and row.tokens >= prefill.min_query_tokens:
            lists = prefill.select(query, keys, SCALE, BLOCK, Layer(layer, 0))
            written = torch.zeros(KV_HEADS, row.context, 1)
            return chunk_allowed(
                prefill, lists, Paged(PLATFORM, keys.kv_cache, keys.block_table, [written], []), 0, query
            )
        if (
            row.prefilling
            or not isinstance(decode, BlockTopk)
            or row.context < max(row.params.min_tokens, decode.budget_tokens + 1)
            or layer < decode.dense_layers
        ):
            return oracle.causal_mask(row.tokens, row.context)
        lists = decode.select(query[0], keys, SCALE, BLOCK, LayerMemory())
        kept = torch.stack([oracle.kept_positions(lists, head, row.context) for head in range(KV_HEADS)])
        assert not bool(kept.all()), "a list must leave something out for this test to see it"
        return kept.repeat_interleave(HEADS // KV_HEADS, dim=0).unsqueeze(1)


@pytest.fixture
def worker(engine: Engine, generator: torch.Generator) -> Iterator[Worker]:
    yield Worker(engine, generator)
    for layer in engine.layers:
        layer.impl.summaries.by_kind.clear()


def test_chunks_and_decode_steps_of_a_mixed_batch(worker: Worker) -> None:
    """Chunks that end anywhere, sparse and dense ones, beside a dense request and one of another method."""
    means, bounds, dense = Request(MEANS), Request(BOUNDS), Request(ALL_DENSE)
    worker.step((means, 77), (dense, 40))
    worker.step((bounds, 300), (means, 200))
    worker.step((dense, 1), (means, 130), (bounds, 5))
    worker.step((dense, 30), (bounds, 257))
    for _ in range(17):
        worker.step((means, 1), (dense, 1), (bounds, 1))


@PARAMS
def test_a_context_that_was_short_before(worker: Worker, params: SparseParams) -> None:
    """Steps below the minimum and below the budget are dense, and summarised all the same."""
    late = SparseParams(None, params.decode, min_tokens=290)
    request = Request(late)
    worker.step((request, 200))
    worker.step((request, 80))
    for _ in range(15):
        worker.step((request, 1))
    assert request.context > late.min_tokens


@PARAMS
@pytest.mark.parametrize("cached", [256, 320])
def test_a_prefix_in_the_cache(worker: Worker, params: SparseParams, cached: int) -> None:
    """Another request's blocks, of its prompt and of its answer; the first request may be gone or not."""
    first = Request(params)
    worker.step((first, 310))
    for _ in range(12):
        worker.step((first, 1))
    second = first.prefix(cached)
    worker.step((first, 1), (second, 2))
    for _ in range(3):
        worker.step((first, 1), (second, 1))


@PARAMS
@pytest.mark.parametrize("writer", [ALL_DENSE, SparseParams(None, TIDAL)], ids=["dense", "tidal"])
@pytest.mark.parametrize("new", [1, 40])
def test_a_prefix_that_requests_without_summaries_wrote(
    worker: Worker, params: SparseParams, writer: SparseParams, new: int
) -> None:
    """The request's first step summarises it, be it a prompt chunk or a lone token, which is decoded."""
    first = Request(writer)
    worker.step((first, 310))
    second = first.prefix(288, SparseParams(None, params.decode))
    worker.step((first, 1), (second, new))
    for _ in range(3):
        worker.step((first, 1), (second, 1))


@PARAMS
def test_a_prompt_that_is_cached_but_for_its_last_token(worker: Worker, params: SparseParams) -> None:
    """The last token of a prompt runs as a decode step does."""
    first = Request(params)
    worker.step((first, 288 + 1))
    second = first.prefix(288)
    worker.step((second, 1))
    worker.step((second, 1))


@PARAMS
def test_a_prefix_that_the_same_step_computes(worker: Worker, params: SparseParams) -> None:
    """vLLM lets a request share blocks from the moment that another's tokens are scheduled."""
    first = Request(params)
    worker.grow(first, 300)
    second = first.prefix(288)
    worker.grow(second, 1)
    worker.attend((second, 1), (first, 300))


@PARAMS
@pytest.mark.parametrize("in_block", [1, 17, 31])
def test_a_block_that_vllm_copied(worker: Worker, params: SparseParams, in_block: int) -> None:
    """A hit that ends inside a block: its keys are copied to a block of the second request, without summaries."""
    first = Request(params)
    worker.step((first, 288 + in_block + 9))
    second = first.prefix(288)
    copy = worker.free.pop(0)
    for cache in worker.caches:
        cache[copy] = cache[first.blocks[9]]
    second.blocks.append(copy)
    for name in ("keys", "values"):
        setattr(second, name, [tensor[:, : 288 + in_block] for tensor in getattr(first, name)])
    for _ in range(3):
        worker.step((second, 1))


@PARAMS
def test_blocks_of_requests_that_have_ended(worker: Worker, params: SparseParams) -> None:
    """Reused in other order by requests of every kind, sparse again in the end."""
    for other in (ALL_DENSE, MEANS, SparseParams(FLEX, TIDAL), BOUNDS, params):
        request = Request(other)
        worker.step((request, 290))
        for _ in range(3):
            worker.step((request, 1))
        request.blocks.reverse()
        worker.release(request)


@PARAMS
def test_preemption_and_recomputation(worker: Worker, params: SparseParams) -> None:
    """A preempted request computes its prompt and its answer again, on blocks that others have used meanwhile."""
    request, other = Request(params), Request(MEANS if params is BOUNDS else BOUNDS)
    worker.step((request, 280))
    for _ in range(5):
        worker.step((request, 1))
    keys, values = request.keys, request.values
    worker.release(request)
    worker.step((other, 270))
    again = Request(params)
    for start, stop in ((0, 200), (200, 285)):
        part = [[tensor[:, start:stop] for tensor in tensors] for tensors in (keys, values)]
        worker.append(again, *part)
        worker.attend((again, stop - start))
    for _ in range(3):
        worker.step((again, 1), (other, 1))


def test_neighbours_do_not_pay(worker: Worker) -> None:
    """Nothing is summarised for a request that needs none, and a step of such requests has no plan."""
    summarised, dense, tidal = Request(MEANS), Request(ALL_DENSE), Request(SparseParams(None, TIDAL))
    worker.step((summarised, 200), (dense, 200), (tidal, 200))
    worker.step((summarised, 1), (dense, 1), (tidal, 1))
    assert MEANS.decode is not None
    assert MEANS.decode.summaries is not None
    for index, layer in enumerate(worker.engine.layers):
        stored = layer.impl.summaries.of(MEANS.decode.summaries, worker.caches[index])
        chooses = MEANS.decode.layer_roles(LAYERS)[index] is Role.WRITE_AND_READ
        assert bool(stored[summarised.blocks[:6]].isfinite().all()) == chooses
        assert bool(stored[dense.blocks + tidal.blocks].isnan().all())
    TABLE.attach(slots_in_metadata=False)
    rows = [Row(1, dense.context)]
    metadata = worker.engine.builder.build(0, common_metadata(rows, torch.tensor([dense.blocks], dtype=torch.int32)))
    assert not hasattr(metadata, "sparse_step")


def test_another_cache_gets_summaries_of_its_size(worker: Worker) -> None:
    impl = worker.engine.layers[0].impl
    assert MEANS.decode is not None
    assert MEANS.decode.summaries is not None
    kind, cache = MEANS.decode.summaries, worker.caches[0]
    stored = impl.summaries.of(kind, cache)
    assert stored.shape == (BLOCKS, KV_HEADS, BLOCK // 16, HEAD_SIZE)
    assert impl.summaries.of(kind, cache) is stored
    assert impl.summaries.of(kind, cache[:7]).shape[0] == 7


@pytest.mark.parametrize(
    ("methods", "connector", "block", "refusal"),
    [
        (
            ["blocktopk"],
            "OffloadingConnector",
            32,
            "blocktopk keeps summaries.*OffloadingConnector.*without blocktopk in",
        ),
        (["blocktopk"], None, 48, "pages of 32 tokens.*block of 48; set --block-size"),
        (["blocktopk"], None, 64, None),
        (["tidal"], "OffloadingConnector", 48, None),
        (None, "OffloadingConnector", 48, None),
    ],
)
def test_caches_that_cannot_be_summarised_are_refused(
    engine: Engine, methods: list[str] | None, connector: str | None, block: int, refusal: str | None
) -> None:
    from vllm.config import KVTransferConfig

    from vllm_sparse.backend.support import check_summaries

    config = copy.copy(engine.config)
    enabled = {} if methods is None else {"methods": methods}
    config.additional_config = {"sparse": {**enabled, "blocktopk": {"page_tokens": 32}}}
    config.kv_transfer_config = KVTransferConfig(kv_connector=connector, kv_role="kv_both") if connector else None
    if refusal is None:
        check_summaries(config, block)
        return
    with pytest.raises(ValueError, match=refusal):
        check_summaries(config, block)


def test_pages_smaller_than_blocks_are_said_to_cost_time(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """Of codes, which are written anew in each step then; the setting that saves it is named."""
    from vllm_sparse.backend.support import check_summaries

    config = copy.copy(engine.config)
    config.additional_config = {"sparse": {"methods": ["tokentopk", "blocktopk"]}}
    config.kv_transfer_config = None
    caplog.set_level("WARNING", logger="vllm.sparse")
    check_summaries(config, 32)
    assert not caplog.records
    check_summaries(config, 128)
    assert '{"sparse": {"tokentopk": {"page_tokens": 128}}}' in caplog.text
