"""Whole steps through the real CPU backend: every layer's output against float64, row by row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from tests import oracle
from tests.backend.conftest import HEAD_SIZE, HEADS, KV_HEADS, LAYERS, SCALE, Engine
from tests.methods.lists import chunk_allowed
from tests.oracle import Paged, Platform
from tests.prometheus import counted
from vllm_sparse.backend.executors.cpu import CpuExecutor
from vllm_sparse.backend.impl import gather_tokens
from vllm_sparse.config.request import ALL_DENSE, SparseParams
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.methods.dhsa import Dhsa
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.hip import Hip
from vllm_sparse.methods.prefill import Layer, PrefillMethod
from vllm_sparse.methods.sale import Sale
from vllm_sparse.methods.streaming import Streaming
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.step.launch import Launch
from vllm_sparse.step.plan import RowSpan

PLATFORM = Platform("cpu-vec-float32", "cpu", torch.float32, "vec")
BLOCK = 32
FLEX = FlexPrefill(gamma=0.4, min_budget_tokens=0)
# Selection in layers 1 and 4 of 8.
TIDAL = Tidal(budget_tokens=128, dense_layers=1, reselect_layers=(4,), selection_reads="everything")
PER_HEAD = Tidal(
    budget_tokens=96, dense_layers=2, reselect_layers=(5,), list_per="query_head", selection_reads="everything"
)


@dataclass
class Row:
    """One request of a step: new tokens, tokens in the cache, parameters, and of a prompt chunk the prompt's tokens."""

    tokens: int
    context: int
    params: SparseParams = ALL_DENSE
    prefilling: bool = False
    prompt_tokens: int | None = None


MIXED = [
    Row(1, 700, SparseParams(None, TIDAL)),
    Row(1, 300),
    Row(1, 1001, SparseParams(None, PER_HEAD)),
    Row(1, 640, SparseParams(FLEX, TIDAL)),
    Row(300, 900, SparseParams(FLEX, TIDAL), prefilling=True),
    Row(50, 200, prefilling=True),
    Row(
        257,
        257,
        SparseParams(FlexPrefill(gamma=0.3, divergence_threshold=1.0, min_budget_tokens=0, dense_layers=3)),
        prefilling=True,
    ),
    Row(
        400,
        700,
        SparseParams(FlexPrefill(gamma=0.3, min_budget_tokens=0, query_block_tokens=64, list_per="kv_head")),
        prefilling=True,
    ),
]


@dataclass
class Step:
    """Inputs of a step: per layer a cache and queries, and vLLM's metadata."""

    rows: list[Row]
    data: list[Paged]
    queries: list[torch.Tensor]
    common: Any

    def span(self, row: int) -> slice:
        start = sum(other.tokens for other in self.rows[:row])
        return slice(start, start + self.rows[row].tokens)


def common_metadata(rows: list[Row], block_table: torch.Tensor, slots: list[int] | None = None) -> Any:
    """vLLM's description of a step, with the rows' slots as runner V2 gives them."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *(row.tokens for row in rows)]).cumsum(0).int()
    contexts = torch.tensor([row.context for row in rows], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=contexts,
        num_reqs=len(rows),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(row.tokens for row in rows),
        max_seq_len=max(row.context for row in rows),
        block_table_tensor=block_table,
        slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64),
        is_prefilling=torch.tensor([row.prefilling for row in rows]),
        seq_lens_cpu_upper_bound=contexts,
        req_idx=None if slots is None else np.array(slots),
    )


def make_step(rows: list[Row], generator: torch.Generator) -> Step:
    order = int(torch.randint(1 << 30, (1,), generator=generator))
    data = []
    for _ in range(LAYERS):
        keys = [oracle.random_tensor(PLATFORM, generator, KV_HEADS, row.context, HEAD_SIZE) for row in rows]
        values = [oracle.random_tensor(PLATFORM, generator, KV_HEADS, row.context, HEAD_SIZE) for row in rows]
        # All layers share a block table.
        data.append(oracle.paged(PLATFORM, keys, values, BLOCK, torch.Generator().manual_seed(order)))
    tokens = sum(row.tokens for row in rows)
    queries = [oracle.random_tensor(PLATFORM, generator, tokens, HEADS, HEAD_SIZE, spread=2) for _ in range(LAYERS)]
    return Step(rows, data, queries, common_metadata(rows, data[0].block_table))


def run(engine: Engine, step: Step) -> list[torch.Tensor]:
    """Each layer's output of the sparse backend."""
    from vllm_sparse.step.requests import TABLE, SparseRequest

    for index, row in enumerate(step.rows):
        TABLE.put(index, None if row.params.is_dense else SparseRequest(row.params, row.prompt_tokens))
    metadata = engine.builder.build(0, step.common)
    return [
        forward(layer.impl, layer, query, data.kv_cache, metadata)
        for layer, query, data in zip(engine.layers, step.queries, step.data, strict=True)
    ]


def run_stock(engine: Engine, step: Step) -> list[torch.Tensor]:
    """Each layer's output of the stock backend for the whole batch."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

    metadata = CPUAttentionMetadataBuilder.build(engine.builder, 0, step.common)
    assert not hasattr(metadata, "sparse_step")
    return [
        forward(engine.stock, layer, query, data.kv_cache, metadata)
        for layer, query, data in zip(engine.layers, step.queries, step.data, strict=True)
    ]


def forward(impl: Any, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, metadata: Any) -> torch.Tensor:
    output = torch.full_like(query, oracle.NAN)
    unused = torch.full((query.shape[0], KV_HEADS, HEAD_SIZE), oracle.NAN)
    returned = impl.forward(layer, query, unused, unused, kv_cache, metadata, output)
    assert returned.data_ptr() == output.data_ptr()
    return output


def role(row: Row, layer: int) -> str:
    """What the row does in a layer, by the rules of the notes: dense, flex or the layer whose list it reads."""
    if row.prefilling:
        method = row.params.prefill
        return "flex" if method is not None and layer >= method.dense_layers else "dense"
    decode = row.params.decode
    if decode is None or row.context <= decode.budget_tokens:
        return "dense"
    assert isinstance(decode, Tidal)
    first, again = decode.dense_layers, decode.reselect_layers[0]
    assert first is not None
    if layer <= first or layer == again:
        return "dense"
    return f"list {first if layer < again else again}"


def allowed(step: Step, index: int, layer: int) -> torch.Tensor:
    """Tokens that a row may read in a layer: bool, broadcasting to ``[heads, tokens, context]``."""
    row, span = step.rows[index], step.span(index)
    kind = role(row, layer)
    if kind == "flex":
        assert row.params.prefill is not None
        query = step.queries[layer][span]
        place = Layer(layer, 0, row.prompt_tokens)
        lists = row.params.prefill.select(query, step.data[layer].reader(index), SCALE, BLOCK, place)
        return chunk_allowed(row.params.prefill, lists, step.data[layer], index, query)
    if kind.startswith("list"):
        assert row.params.decode is not None
        source = int(kind.split()[1])
        query = step.queries[source][span][0]
        lists = row.params.decode.select(query, step.data[source].reader(index), SCALE, BLOCK, LayerMemory())
        count = lists.pages.shape[0]
        kept = torch.stack([oracle.kept_positions(lists, list_row, row.context) for list_row in range(count)])
        assert not bool(kept.all()), "a list must leave something out for this test to see it"
        return kept.repeat_interleave(HEADS // count, dim=0).unsqueeze(1)
    return oracle.causal_mask(row.tokens, row.context)


def check(step: Step, outputs: list[torch.Tensor]) -> None:
    for layer, output in enumerate(outputs):
        check_layer(step, layer, output)


def check_layer(step: Step, layer: int, output: torch.Tensor) -> None:
    data = step.data[layer]
    for index in range(len(step.rows)):
        span = step.span(index)
        expected = oracle.attention(
            step.queries[layer][span], data.keys[index], data.values[index], SCALE, allowed(step, index, layer)
        )
        oracle.assert_close(output[span], expected, f"layer {layer}, row {index}, {role(step.rows[index], layer)}")


def test_t2_and_t4_a_mixed_step_equals_the_oracle_in_every_layer(engine: Engine, generator: torch.Generator) -> None:
    """Dense layers are dense for any budget; sparse layers read exactly the list of the last selecting layer."""
    step = make_step(MIXED, generator)
    check(step, run(engine, step))


def test_rows_in_any_order_equal_the_oracle(engine: Engine, generator: torch.Generator) -> None:
    order = torch.randperm(len(MIXED), generator=generator).tolist()
    step = make_step([MIXED[index] for index in order], generator)
    check(step, run(engine, step))


@pytest.mark.parametrize("row", MIXED, ids=lambda row: f"{row.tokens}-of-{row.context}")
def test_a_row_alone_equals_the_oracle(engine: Engine, row: Row, generator: torch.Generator) -> None:
    step = make_step([row], generator)
    check(step, run(engine, step))


def test_adjacent_rows_are_gathered_without_a_copy() -> None:
    spans = [RowSpan(0, 3, 2, 9), RowSpan(1, 5, 4, 9), RowSpan(3, 12, 1, 9)]
    device = torch.device("cpu")
    assert gather_tokens(spans[:2], device) == slice(3, 9)
    apart = gather_tokens(spans, device)
    assert isinstance(apart, torch.Tensor)
    assert apart.tolist() == [3, 4, 5, 6, 7, 8, 12]


SPARSE_FROM = LAYERS - 2


@pytest.mark.parametrize(
    "methods",
    [
        pytest.param([Dhsa(density=0.2, dense_layers=SPARSE_FROM)], id="dhsa"),
        pytest.param(
            [
                Dhsa(density=0.2, bound_weight=0.5, candidate_factor=2, scores_per="kv_head", dense_layers=SPARSE_FROM),
                Dhsa(budget_tokens=320, key_block_tokens=16, list_per="kv_head", dense_layers=SPARSE_FROM),
                Dhsa(density=0.2, key_blocks="adaptive", bound_weight=0.0, dense_layers=SPARSE_FROM + 1),
            ],
            id="dhsa-of-other-knobs",
        ),
        pytest.param(
            [
                FlexPrefill(gamma=0.4, min_budget_tokens=0, dense_layers=SPARSE_FROM),
                Sale(tau=0.3, dense_layers=SPARSE_FROM),
                Hip(
                    stage_block_tokens=(64,),
                    stage_budget_tokens=(128,),
                    query_stride=(4,),
                    sink_tokens=16,
                    recent_tokens=32,
                    dense_layers=SPARSE_FROM,
                ),
                Streaming(recent_tokens=100, dense_layers=SPARSE_FROM),
                Dhsa(density=0.2, dense_layers=SPARSE_FROM),
            ],
            id="others",
        ),
    ],
)
def test_each_of_several_chunks_reads_what_it_would_alone(
    methods: list[PrefillMethod], engine: Engine, generator: torch.Generator
) -> None:
    """Two requests of each method between decode rows and a dense chunk, in any order, of any lengths."""

    def size(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rows = [Row(1, 300), Row(50, 200, prefilling=True), Row(1, 700, SparseParams(None, TIDAL))]
    for method in methods:
        for _ in range(2):
            tokens = size(method.min_query_tokens, 400)
            context = tokens + size(0, 500)
            rows.append(Row(tokens, context, SparseParams(method), True, context + size(0, 2) * 77))
    step = make_step([rows[index] for index in torch.randperm(len(rows), generator=generator).tolist()], generator)
    outputs = run(engine, step)
    for layer in range(SPARSE_FROM, LAYERS):
        check_layer(step, layer, outputs[layer])


def test_chunks_whose_lists_are_alike_attend_in_one_launch(
    engine: Engine, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their methods; on the CPU all pages are blocks, so only the heads that share a list tell them apart."""
    launched: list[int] = []
    attend = CpuExecutor.run

    def counted(self: CpuExecutor, launch: Launch, *args: Any) -> None:
        launched.append(launch.kept_tokens.shape[0])
        attend(self, launch, *args)

    monkeypatch.setattr(CpuExecutor, "run", counted)
    by_query_head = [Dhsa(density=0.2), Sale(tau=0.3), Dhsa(density=0.3), Sale(tau=0.3)]
    rows = [Row(300, 700, SparseParams(method), True) for method in by_query_head]
    rows += [Row(257, 600, SparseParams(Streaming(recent_tokens=100)), True)]
    run(engine, make_step(rows, generator))
    assert launched == [2 * HEADS * (3 + 5), KV_HEADS * 3] * LAYERS


def test_a_prompt_chunk_knows_where_the_prompt_ends(engine: Engine, generator: torch.Generator) -> None:
    """The tail that is dense is not the chunk's."""
    method = Dhsa(density=0.2, sink_tokens=0, recent_tokens=0, dense_layers=LAYERS - 1)
    ends = make_step([Row(384, 640, SparseParams(method), True, 640)], generator)
    goes_on = replace(ends, rows=[replace(ends.rows[0], prompt_tokens=900)])
    outputs = [run(engine, step) for step in (ends, goes_on)]
    for step, output in zip((ends, goes_on), outputs, strict=True):
        check(step, output)
    first, second = (output[-1][-128:] for output in outputs)
    assert not torch.equal(first, second)


def test_a_step_without_sparse_rows_is_the_stock_step_bit_for_bit(engine: Engine, generator: torch.Generator) -> None:
    short = SparseParams(FLEX, Tidal(budget_tokens=1024), 0)
    rows = [Row(1, 300), Row(1, 1000, short), Row(200, 900, prefilling=True), Row(100, 100, short, prefilling=True)]
    step = make_step(rows, generator)
    for sparse, stock in zip(run(engine, step), run_stock(engine, step), strict=True):
        assert torch.equal(sparse, stock)


def test_dense_rows_of_a_mixed_step_equal_the_stock_step(engine: Engine, generator: torch.Generator) -> None:
    """Within rounding only: the kernel splits long contexts by the batch it schedules, which is smaller here."""
    step = make_step(MIXED, generator)
    for layer, (sparse, stock) in enumerate(zip(run(engine, step), run_stock(engine, step), strict=True)):
        for index, row in enumerate(MIXED):
            if role(row, layer) == "dense":
                span = step.span(index)
                assert oracle.relative_error(sparse[span], stock[span]) < 2e-6


def test_t9_steps_are_independent(engine: Engine, generator: torch.Generator) -> None:
    """A step gives the same whether or not another ran before."""
    first, second = make_step(MIXED, generator), make_step(MIXED, generator)
    alone = run(engine, second)
    run(engine, first)
    after = run(engine, second)
    assert all(torch.equal(one, other) for one, other in zip(alone, after, strict=True))


@pytest.mark.parametrize(("tokens", "context"), [(1100, 1100), (1100, 1500)])
def test_tokens_before_the_minimum_read_everything(
    engine: Engine, tokens: int, context: int, generator: torch.Generator
) -> None:
    """Of a prompt chunk that passes it; the others read what a chunk does that begins there."""
    minimum = 243
    whole = make_step(
        [
            Row(1, 640, SparseParams(FLEX, TIDAL)),
            Row(tokens, context, SparseParams(FLEX, TIDAL, minimum + context - tokens), prefilling=True),
            Row(30, 300, prefilling=True),
        ],
        generator,
    )
    outputs = run(engine, whole)
    stock = run_stock(engine, whole)
    span = whole.span(1)
    before, after = slice(span.start, span.start + minimum), slice(span.start + minimum, span.stop)
    rest = [
        Paged(data.platform, data.kv_cache, data.block_table[1:2], data.keys[1:2], data.values[1:2])
        for data in whole.data
    ]
    tail = [Row(tokens - minimum, context, SparseParams(FLEX), prefilling=True)]
    queries = [query[after] for query in whole.queries]
    alone = run(engine, Step(tail, rest, queries, common_metadata(tail, rest[0].block_table)))
    for layer in range(LAYERS):
        assert oracle.relative_error(outputs[layer][before], stock[layer][before]) < 2e-6
        assert oracle.relative_error(outputs[layer][after], alone[layer]) < 2e-6
    # The lines of random heads may leave nothing out in one layer, not in all.
    differences = [oracle.relative_error(outputs[layer][after], stock[layer][after]) for layer in range(LAYERS)]
    assert max(differences) > 1e-3


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (Row(255, 900, SparseParams(FLEX), prefilling=True), "short_chunk"),
        (Row(300, 900, SparseParams(FLEX, None, 901), prefilling=True), "short_context"),
        (Row(1, 128, SparseParams(None, TIDAL)), "short_context"),
        (Row(1, 900, SparseParams(None, TIDAL, 901)), "short_context"),
    ],
)
def test_short_rows_run_dense_and_are_counted(
    engine: Engine, row: Row, reason: str, generator: torch.Generator
) -> None:
    phase, method = ("prefill", "flexprefill") if row.prefilling else ("decode", "tidal")
    labels = {"phase": phase, "method": method, "reason": reason}

    def count() -> float:
        return counted("vllm_sparse_fallbacks_total", **labels)

    step = make_step([row, Row(1, 40)], generator)
    before = count()
    run(engine, step)
    assert count() == before + 1
    for sparse, stock in zip(run(engine, step), run_stock(engine, step), strict=True):
        assert torch.equal(sparse, stock)


def test_a_request_of_the_other_phase_only_is_dense_in_this_one(engine: Engine, generator: torch.Generator) -> None:
    rows = [Row(1, 900, SparseParams(FLEX)), Row(300, 900, SparseParams(None, TIDAL), prefilling=True)]
    step = make_step(rows, generator)
    for sparse, stock in zip(run(engine, step), run_stock(engine, step), strict=True):
        assert torch.equal(sparse, stock)


def test_alibi_is_refused(engine: Engine) -> None:
    from vllm.config import set_current_vllm_config

    from vllm_sparse.backend.cpu import SparseCpuImpl

    with set_current_vllm_config(engine.config), pytest.raises(ValueError, match="does not support ALiBi"):
        SparseCpuImpl(HEADS, HEAD_SIZE, SCALE, KV_HEADS, [0.5] * HEADS, None, "auto")
