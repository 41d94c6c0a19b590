"""Decode steps for all rows at once: every layer's output of every row against float64.

On a GPU with the stock kernel, elsewhere Triton's interpreter and attention in PyTorch over the same lists.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from tests import oracle
from tests.cuda_graph import captured
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from tests.oracle import Paged, Platform
from vllm_sparse.backend.decode_batch import BatchLayer, DecodeStep
from vllm_sparse.backend.decode_buffers import DecodeBuffers
from vllm_sparse.backend.executors.flash_attention import FlashAttentionExecutor
from vllm_sparse.kernels.page_summaries import page_summaries, read_summaries, store_summaries
from vllm_sparse.methods.block_topk import BlockTopk
from vllm_sparse.methods.decode import BatchDecodeMethod, LayerMemory
from vllm_sparse.methods.hip import HipDecode
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.step.guard import guarded_roles
from vllm_sparse.step.launch import Executor, Launch, LayerLaunches
from vllm_sparse.step.requests import RowSetting
from vllm_sparse.step.roles import Role
from vllm_sparse.step.rows import ServerSize

pytest.importorskip("triton")

LAYERS, HEADS, KV_HEADS, HEAD_SIZE, BLOCK, SCALE = 6, 4, 2, 64, 16, 0.12
MOST_ROWS, LIST_TOKENS = 18, 300
# Relative size of changes that stand for rounding, and how many are tried.
NOISE, ROUNDINGS = 1e-6, 12
PLATFORM = Platform("plain", DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32, None)
TIDAL = Tidal(
    budget_tokens=64, dense_layers=1, reselect_layers=(4,), sink_tokens=3, recent_tokens=9, selection_reads="everything"
)
BLOCKS = BlockTopk(budget_tokens=96, sink_tokens=5, recent_tokens=20, dense_layers=2, scores="bounds")
OWN = replace(TIDAL, selection_reads="list")
# Lists of its own in five layers; and one of fewer stages, which have other turns.
HIP = HipDecode(
    stage_block_tokens=(64, 32),
    stage_budget_tokens=(256, 64),
    refresh_steps=(4, 2),
    sink_tokens=16,
    recent_tokens=20,
    dense_layers=1,
)
FLAT = HipDecode(
    stage_block_tokens=(64,), stage_budget_tokens=(128,), refresh_steps=(3,), sink_tokens=0, recent_tokens=0
)
WIDE = Tidal(
    budget_tokens=300,
    dense_layers=0,
    reselect_layers=(2, 3),
    sink_tokens=0,
    recent_tokens=0,
    selection_reads="everything",
)


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=14)


class Gather(Executor):
    """Attention over lists in PyTorch, where there is no stock kernel for this packing."""

    def run(
        self, launch: Launch, query: torch.Tensor, output: torch.Tensor, kv_cache: torch.Tensor, scale: float
    ) -> None:
        tokens = kv_cache.view(-1, kv_cache.shape[3]).double()
        for row, kept in enumerate(launch.kept_tokens.tolist()):
            keys, values = tokens[launch.pages[row, :kept].long()].chunk(2, dim=1)
            weights = (query[row].double() @ keys.T * scale).softmax(1)
            # As FlashAttention does, a row without keys becomes 0.
            output[row] = (weights @ values).to(output.dtype)


@dataclass
class Row:
    """One row of a step.

    Attributes:
        context: tokens in its cache.
        method: or None for a dense row.
        least_context: not sparse unless the context is longer; default: the method's budget.
        guarded: layers that the guard has sent dense.
    """

    context: int
    method: BatchDecodeMethod | None = None
    least_context: int | None = None
    guarded: frozenset[int] = frozenset()

    @property
    def setting(self) -> RowSetting:
        if self.method is None:
            return RowSetting(None, 0, (), 0, False)
        least = self.method.budget_tokens if self.least_context is None else self.least_context
        roles = tuple(self.method.layer_roles(LAYERS))
        return RowSetting(self.method, least, guarded_roles(roles, self.guarded) if self.guarded else roles, 0, True)


ROWS = [
    Row(700, TIDAL),
    Row(333),
    Row(501, WIDE),
    Row(64, TIDAL),
    Row(900, TIDAL, 900),
    Row(301, WIDE),
    Row(640, replace(TIDAL, reselect_layers=(2, 5))),
    Row(1),
    Row(777, BLOCKS),
    Row(90, BLOCKS),
    Row(500, replace(BLOCKS, budget_tokens=16, sink_tokens=0, recent_tokens=0)),
    Row(444, OWN),
    Row(650, HIP),
    Row(119, HIP),
    Row(431, FLAT),
]


def settings_of(rows: list[Row]) -> list[RowSetting]:
    """Each row's, in a slot of its own."""
    return [replace(row.setting, slot=index) for index, row in enumerate(rows)]


def executor() -> Executor:
    return FlashAttentionExecutor(3) if DEVICE == "cuda" else Gather()


def make_data(rows: list[Row], generator: torch.Generator) -> list[Paged]:
    """A cache for each layer; all layers share a block table."""
    order = int(torch.randint(1 << 30, (1,), generator=generator))
    data = []
    for _ in range(LAYERS):
        keys, values = (
            [oracle.random_tensor(PLATFORM, generator, KV_HEADS, row.context, HEAD_SIZE) for row in rows]
            for _ in range(2)
        )
        data.append(oracle.paged(PLATFORM, keys, values, BLOCK, torch.Generator().manual_seed(order)))
    return data


def run_step(
    buffers: DecodeBuffers,
    rows: list[Row],
    data: list[Paged],
    queries: list[torch.Tensor],
    padding: int = 0,
    capacity: int = 1 << 20,
    all_sparse: bool = False,
    launches: list[LayerLaunches] | None = None,
) -> list[torch.Tensor]:
    """Each layer's output, by the launches that these rows need, or other ones."""
    settings = settings_of(rows)
    buffers.tell(settings)
    contexts = torch.tensor([row.context for row in rows] + [0] * padding, dtype=torch.int32, device=DEVICE)
    table = torch.nn.functional.pad(data[0].block_table, (0, 0, 0, padding))
    launches = launches or buffers.launches(settings, all_sparse)
    step = DecodeStep(buffers, len(rows) + padding, launches, contexts, table, capacity)
    outputs = []
    for layer in range(LAYERS):
        stored = stored_summaries(data[layer])
        query = torch.nn.functional.pad(queries[layer], (0, 0, 0, 0, 0, padding))
        output = torch.full_like(query, oracle.NAN)
        dense, summaries = Dense(data[layer], table), {BLOCKS.summaries: stored}
        step.attend(BatchLayer(layer, query, data[layer].kv_cache, SCALE, output, executor(), dense, summaries))
        check_newest(rows, data[layer], stored, layer)
        outputs.append(output[: len(rows)])
    return outputs


def stored_summaries(data: Paged) -> torch.Tensor:
    """What earlier steps stored: of all keys but the newest."""
    kind = BLOCKS.summaries
    shape = data.kv_cache.shape[0], KV_HEADS, BLOCK // kind.page_tokens, kind.width(HEAD_SIZE)
    stored = torch.full(shape, oracle.NAN, dtype=PLATFORM.dtype, device=DEVICE)
    for request, keys in enumerate(data.keys):
        if keys.shape[1] > 1:
            reader = PLATFORM.keys_of(data.kv_cache, data.block_table[request], keys.shape[1] - 1)
            reader.summaries = stored
            store_summaries(reader, kind, 0)
    return stored


def check_newest(rows: list[Row], data: Paged, stored: torch.Tensor, layer: int) -> None:
    """Rows of the method have their newest key summarised in the layers in which it chooses, long enough or not."""
    for request, row in enumerate(rows):
        if isinstance(row.method, BlockTopk) and layer >= row.method.dense_layers:
            reader = data.reader(request)
            expected = page_summaries(reader, BLOCKS.summaries)
            reader.summaries = stored
            assert torch.equal(read_summaries(reader, BLOCKS.summaries), expected.to(stored.dtype)), f"row {request}"


@dataclass
class Dense:
    """Whole contexts, each row with the length that it is given."""

    data: Paged
    table: torch.Tensor

    def __call__(self, query: torch.Tensor, seq_lens: torch.Tensor, output: torch.Tensor) -> None:
        rows, _, head_size = query.shape
        position = torch.arange(self.table.shape[1] * BLOCK, device=DEVICE)
        head = torch.arange(KV_HEADS, device=DEVICE).view(1, -1, 1)
        slots = (self.table[:, position // BLOCK].unsqueeze(1) * KV_HEADS + head) * BLOCK + position % BLOCK
        launch = Launch(
            torch.arange(rows * KV_HEADS + 1, dtype=torch.int32, device=DEVICE),
            1,
            slots.flatten(0, 1).int().contiguous(),
            seq_lens.repeat_interleave(KV_HEADS),
            1,
        )
        lists = rows * KV_HEADS
        executor().run(
            launch, query.view(lists, -1, head_size), output.view(lists, -1, head_size), self.data.kv_cache, SCALE
        )


def expected(
    rows: list[Row], data: list[Paged], queries: list[torch.Tensor], dense_rows: set[int]
) -> list[torch.Tensor]:
    """Each layer's output in float64, from lists chosen request by request."""
    outputs = []
    lists: dict[int, torch.Tensor] = {}
    for layer in range(LAYERS):
        layer_rows = []
        for index, row in enumerate(rows):
            query = queries[layer][index]
            setting = row.setting
            sparse = (
                setting.method is not None and row.context > setting.longest_dense_seq_len and index not in dense_rows
            )
            role = setting.roles[layer] if sparse else Role.DENSE
            if role.writes_list:
                assert setting.method is not None
                chosen = setting.method.select(query, data[layer].reader(index), SCALE, 1, LayerMemory())
                kept = [oracle.kept_positions(chosen, head, row.context) for head in range(KV_HEADS)]
                lists[index] = torch.stack(kept).repeat_interleave(HEADS // KV_HEADS, dim=0).unsqueeze(1)
                assert not bool(lists[index].all())
                (most_tokens,) = setting.method.list_tokens(np.array([row.context]))
                assert bool((chosen.kept_tokens <= int(most_tokens)).all())
            allowed = lists[index] if role.reads_list else torch.ones(row.context, dtype=torch.bool)
            layer_rows.append(
                oracle.attention(
                    query.unsqueeze(0), data[layer].keys[index], data[layer].values[index], SCALE, allowed
                )[0]
            )
        outputs.append(torch.stack(layer_rows))
    return outputs


def new_buffers() -> DecodeBuffers:
    size = ServerSize(MOST_ROWS, 1024, LAYERS, KV_HEADS)
    buffers = DecodeBuffers(MOST_ROWS, size, [TIDAL, BLOCKS, HIP], LIST_TOKENS, torch.device(DEVICE))
    # What earlier steps left over must not matter.
    buffers.lists.slots.fill_(1 << 30)
    buffers.lists.kept_tokens.fill_(17)
    buffers.contexts.kept_tokens.fill_(23)
    buffers.contexts.dense.fill_(99)
    return buffers


def draw(rows: list[Row]) -> tuple[list[Paged], list[torch.Tensor], int]:
    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    data = make_data(rows, generator)
    shape = (len(rows), HEADS, HEAD_SIZE)
    return data, [oracle.random_tensor(PLATFORM, generator, *shape, spread=2) for _ in range(LAYERS)], seed


def hangs_on_rounding(row: Row, data: list[Paged], queries: list[torch.Tensor], index: int) -> bool:
    """Whether some list of a row changes where its query changes by a few units of float32's last place.

    A step makes hundreds of lists, each with choices among hundreds of keys, so one in some fifty meets a near tie, at
    which kernel and reference may choose differently and both be right.
    """
    setting = row.setting
    if setting.method is None:
        return False
    for layer in range(LAYERS):
        if setting.roles[layer].writes_list:
            query, keys, found = queries[layer][index], data[layer].reader(index), set()
            for _ in range(ROUNDINGS):
                nearly = query * (1 + torch.randn_like(query) * NOISE)
                chosen = setting.method.select(nearly, keys, SCALE, 1, LayerMemory())
                found.add(tuple(map(tuple, chosen.pages.tolist())))
            if len(found) > 1:
                return True
    return False


def check(
    rows: list[Row],
    outputs: list[torch.Tensor],
    references: list[torch.Tensor],
    inputs: tuple[list[Paged], list[torch.Tensor], int],
) -> None:
    """Outputs are those of the reference, but in rows whose lists hang on rounding.

    Args:
        rows: of the step.
        outputs: of each layer.
        references: likewise.
        inputs: as `draw` gives them.
    """
    data, queries, seed = inputs
    for layer, (output, reference) in enumerate(zip(outputs, references, strict=True)):
        for index, row in enumerate(rows):
            try:
                oracle.assert_close(output[index], reference[index], f"layer {layer}, row {index}, seed {seed}, {rows}")
            except AssertionError:
                if not hangs_on_rounding(row, data, queries, index):
                    raise


@needs_triton
@pytest.mark.parametrize("padding", [0, 3])
def test_t2_and_t4_a_mixed_step_equals_the_oracle(padding: int) -> None:
    """Two steps in the same buffers, the second with its rows in another order."""
    buffers = new_buffers()
    for order in (list(range(len(ROWS))), random.sample(range(len(ROWS)), len(ROWS))):
        rows = [ROWS[index] for index in order]
        data, queries, seed = draw(rows)
        check(
            rows,
            run_step(buffers, rows, data, queries, padding),
            expected(rows, data, queries, set()),
            (data, queries, seed),
        )


@needs_triton
def test_rows_without_room_for_their_scores_are_dense() -> None:
    """Room for the first two sparse rows only."""
    data, queries, seed = draw(ROWS)
    outputs = run_step(new_buffers(), ROWS, data, queries, capacity=700 + 501)
    check(ROWS, outputs, expected(ROWS, data, queries, {5, 6, 8, 10, 11, 12, 14}), (data, queries, seed))


@needs_triton
@pytest.mark.parametrize(
    "rows",
    [
        [ROWS[0], Row(450, TIDAL)],
        [ROWS[0], ROWS[2], ROWS[6]],
        [ROWS[8], Row(400, BLOCKS)],
        [ROWS[8], ROWS[0]],
        [ROWS[11], Row(330, OWN)],
        [ROWS[12], ROWS[14], Row(301, HIP)],
    ],
    ids=["alike", "unlike", "choosing", "two-methods", "choosing-for-later", "hip"],
)
def test_a_step_of_sparse_rows_launches_no_more_than_it_needs(rows: list[Row]) -> None:
    """Where all rows read lists there is no dense launch; where rows differ there are both."""
    buffers = new_buffers()
    settings = [row.setting for row in rows]
    launches = buffers.launches(settings, all_sparse=True)
    assert all(
        launches[layer].dense == any(s.roles[layer].reads_everything for s in settings) for layer in range(LAYERS)
    )
    data, queries, seed = draw(rows)
    outputs = run_step(buffers, rows, data, queries, padding=2, all_sparse=True)
    check(rows, outputs, expected(rows, data, queries, set()), (data, queries, seed))


@needs_triton
def test_a_step_of_dense_rows_reads_no_list() -> None:
    rows = [Row(100), Row(64, TIDAL), Row(17)]
    data, queries, seed = draw(rows)
    check(
        rows, run_step(new_buffers(), rows, data, queries), expected(rows, data, queries, set()), (data, queries, seed)
    )


@needs_triton
@pytest.mark.parametrize("in_graph", [True, False])
def test_layers_that_the_guard_sent_dense_read_everything(in_graph: bool) -> None:
    """By the launches of a graph, which knows of no guard, or of a step; lists pass over dense layers."""
    rows = [
        Row(700, TIDAL, guarded=frozenset({2})),
        Row(650, TIDAL),
        Row(501, WIDE, guarded=frozenset({4})),
        Row(444, OWN, guarded=frozenset({1, 2})),
        Row(470, OWN, guarded=frozenset({4})),
        Row(777, BLOCKS, guarded=frozenset({2, 5})),
        # Its launches summarise the newest key of the row above in all layers; `StepExecution.work` does it otherwise.
        Row(400, BLOCKS),
        Row(640, HIP, guarded=frozenset({1, 2, 3, 4})),
    ]
    assert rows[3].setting.roles[1] is Role.DENSE_AND_WRITE
    assert rows[3].setting.roles[3] is Role.READ
    assert rows[7].setting.roles[4] is Role.DENSE
    data, queries, seed = draw(rows)
    buffers = new_buffers()
    of_graph = [replace(row, guarded=frozenset()) for row in rows] if in_graph else rows
    launches = buffers.launches(settings_of(of_graph), all_sparse=False)
    outputs = run_step(buffers, rows, data, queries, padding=1, launches=launches)
    check(rows, outputs, expected(rows, data, queries, set()), (data, queries, seed))


@needs_triton
def test_a_step_of_any_roles_equals_the_oracle() -> None:
    """By the launches that hold every role of every method in every layer, whatever those of the server."""
    rows = [
        Row(700, TIDAL),
        Row(640, replace(TIDAL, dense_layers=3, reselect_layers=(4,))),
        Row(610, replace(TIDAL, dense_layers=0, reselect_layers=(2, 3), selection_reads="list", budget_tokens=80)),
        Row(500, replace(TIDAL, dense_layers=4, reselect_layers=(5,)), guarded=frozenset({5})),
        Row(333),
        Row(777, replace(BLOCKS, dense_layers=0)),
        Row(560, replace(BLOCKS, dense_layers=5, budget_tokens=48, recent_tokens=7)),
        Row(90, replace(BLOCKS, dense_layers=1)),
        Row(650, replace(HIP, dense_layers=3)),
        Row(431, FLAT, guarded=frozenset({1})),
    ]
    assert len({row.setting.roles for row in rows}) == len(rows)
    buffers = new_buffers()
    data, queries, seed = draw(rows)
    outputs = run_step(buffers, rows, data, queries, padding=2, launches=buffers.launches_of_any_roles())
    check(rows, outputs, expected(rows, data, queries, set()), (data, queries, seed))


@needs_triton
def test_a_row_alone_equals_the_oracle() -> None:
    for row in (ROWS[0], ROWS[2], ROWS[7], ROWS[8], ROWS[12]):
        data, queries, seed = draw([row])
        check(
            [row],
            run_step(new_buffers(), [row], data, queries),
            expected([row], data, queries, set()),
            (data, queries, seed),
        )


@oracle.needs_cuda
def test_t8_a_graph_gives_what_eager_steps_give() -> None:
    """Bit for bit, with other rows, contexts and lengths than were captured."""
    data, queries, seed = draw(ROWS)
    generator = torch.Generator().manual_seed(seed)
    buffers = new_buffers()
    settings = settings_of(ROWS)
    launches = buffers.launches(settings, all_sparse=False)
    contexts = torch.ones(len(ROWS), dtype=torch.int32, device=DEVICE)
    table = data[0].block_table
    step = DecodeStep(buffers, len(ROWS), launches, contexts, table, 1 << 14)
    outputs = [torch.full_like(query, oracle.NAN) for query in queries]

    summaries = [{BLOCKS.summaries: stored_summaries(layer_data)} for layer_data in data]

    def attend() -> None:
        for layer in range(LAYERS):
            dense = Dense(data[layer], table)
            kv_cache = data[layer].kv_cache
            step.attend(
                BatchLayer(layer, queries[layer], kv_cache, SCALE, outputs[layer], executor(), dense, summaries[layer])
            )

    replay = captured(attend)
    for _ in range(4):
        order = torch.randperm(len(ROWS), generator=generator).tolist()
        buffers.tell([settings[index] for index in order])
        lengths = [int(torch.randint(1, row.context + 1, (1,), generator=generator)) for row in ROWS]
        lengths[-1] = 0
        contexts.copy_(torch.tensor(lengths, dtype=torch.int32))
        replay()
        replayed = [output.clone() for output in outputs]
        for output in outputs:
            output.fill_(oracle.NAN)
        attend()
        for layer, (first, second) in enumerate(zip(replayed, outputs, strict=True)):
            assert torch.equal(first[:-1], second[:-1]), f"layer {layer}, seed {seed}"
            assert not bool(first.isnan().any()), f"layer {layer}, seed {seed}"
