"""The exact choice among candidate pages, for all rows of a step: equal to the definition in float64, row by row."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import oracle
from tests.cuda_graph import captured
from tests.kernels.hopper import compile_for_hopper, spilled_bytes
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from tests.oracle import Platform
from vllm_sparse.kernels.page_summaries import store_summaries
from vllm_sparse.methods.block_topk import BlockTopk
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.pages import to_logical
from vllm_sparse.step.rows import DecodeRows, RowScores, RowsPlace, TokenLists

pytest.importorskip("triton")

PLATFORM = Platform("plain", DEVICE, torch.float32, None)
SCALE = 0.125
POISON = -7


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=5)


def expected_list(
    query: torch.Tensor, keys: torch.Tensor, page_scores: list[float], page: int, method: BlockTopk
) -> tuple[list[int], set[int]]:
    """The list of one KV head by the definition, in float64, and the tokens that rounding may take for others.

    Args:
        query: ``[group, head_size]``.
        keys: ``[context, head_size]``.
        page_scores: of its pages.
        page: tokens of a page.
        method: with the row's knobs.
    """
    context, pages = keys.shape[0], len(page_scores)
    sink, recent = method.sink_tokens, max(method.recent_tokens, 1)
    forced = {position for position in range(context) if position < sink or position >= context - recent}
    forced_pages = {position // page for position in forced}
    best = sorted(set(range(pages)) - forced_pages, key=lambda number: (-page_scores[number], number))
    more = max(-(-method.budget_tokens * method.candidate_factor // page) - len(forced_pages), 0)
    kept_pages = forced_pages | set(best[:more])
    candidates = [position for position in range(context) if position // page in kept_pages]
    logits = query.double() @ keys[candidates].double().T * SCALE
    merged = dict(zip(candidates, logits.softmax(1).sum(0).tolist(), strict=True))
    order = sorted(candidates, key=lambda position: (position not in forced, -merged[position], position))
    most = len(candidates) if method.candidate_factor == 1 else min(method.budget_tokens, len(candidates))
    count, mass = len(forced), sum(merged[position] for position in forced)
    target = method.coverage * query.shape[0]
    reached = [mass]
    while count < most and (mass < target or method.coverage == 1):
        mass += merged[order[count]]
        reached.append(mass)
        count += 1
    cut = merged[order[count - 1]]
    doubtful = {position for position in candidates if abs(merged[position] / cut - 1) < 1e-4} - forced
    if min(abs(mass - target) for mass in reached[-2:]) < 1e-5:
        doubtful |= set(order[count - 1 : count + 1]) - forced
    return sorted(order[:count]), doubtful


def positions_of(lists: TokenLists, index: int, table: torch.Tensor, block_size: int, kv_heads: int) -> list[int]:
    """Positions in a list; its places must be those of the list's own head."""
    slots = lists.slots[index : index + 1, : int(lists.kept_tokens[index])]
    assert bool((slots // block_size % kv_heads == index % kv_heads).all())
    found: list[int] = to_logical(slots, table, block_size, kv_heads)[0].tolist()
    return found


def empty_lists(lists: int, width: int) -> TokenLists:
    slots = torch.full((lists, width), POISON, dtype=torch.int32, device=DEVICE)
    return TokenLists(slots, torch.full((lists,), POISON, dtype=torch.int32, device=DEVICE))


def row_knobs(methods: list[BlockTopk]) -> torch.Tensor:
    """As the server's settings: a row's lie in a wider row."""
    return torch.tensor([(9, *method.row_knobs(), 9) for method in methods], dtype=torch.int32, device=DEVICE)[:, 1:-1]


METHODS = [
    BlockTopk(budget_tokens=100, candidate_factor=4),
    BlockTopk(budget_tokens=100, candidate_factor=2, coverage=0.8, sink_tokens=0, recent_tokens=0),
    BlockTopk(budget_tokens=96, candidate_factor=4, coverage=0.3, sink_tokens=3, recent_tokens=9),
    BlockTopk(budget_tokens=128),
    BlockTopk(budget_tokens=128, coverage=0.6, sink_tokens=0, recent_tokens=1),
    BlockTopk(budget_tokens=80, candidate_factor=3, coverage=0.999999),
    BlockTopk(budget_tokens=90, candidate_factor=3, coverage=0.01, sink_tokens=50, recent_tokens=40),
]


@needs_triton
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "block_size", "page"),
    [
        pytest.param(2, 2, 32, 32, 32, id="no-groups"),
        pytest.param(8, 2, 64, 128, 16, id="group-of-4"),
        pytest.param(7, 1, 80, 64, 64, id="group-of-7"),
    ],
)
def test_lists_equal_the_definition(
    heads: int, kv_heads: int, head_size: int, block_size: int, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ragged batch of rows with other knobs, one of which stands by; a list's scores do not fit into registers."""
    from vllm_sparse.kernels.candidate_tokens import triton as candidate_tokens

    monkeypatch.setattr(candidate_tokens, "MOST_ROW_ENTRIES", 256)
    monkeypatch.setattr(candidate_tokens, "TILE", 64)
    monkeypatch.setattr(candidate_tokens, "threshold_tile", lambda entries: (128, 4))
    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    contexts = [1, 1000, 700, 300, 129, 901, 128, 333]
    random.shuffle(contexts)
    methods = random.choices(METHODS, k=len(contexts))
    data = oracle.random_paged(PLATFORM, generator, contexts, kv_heads, head_size, block_size)
    query = oracle.random_tensor(PLATFORM, generator, len(contexts), heads, head_size, spread=2)
    seq_lens = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    idle = random.randrange(len(contexts))
    seq_lens[idle] = 0
    rows = DecodeRows(query, data.kv_cache, data.block_table, seq_lens, SCALE)
    most_pages = -(-max(contexts) // page)
    values = torch.randn(len(contexts), kv_heads, most_pages, generator=generator).to(DEVICE)
    page_starts = torch.arange(len(contexts), device=DEVICE) * kv_heads * most_pages
    scores = RowScores(values, page_starts, most_pages, page)
    starts = (seq_lens.cumsum(0) - seq_lens).long()
    room = candidate_tokens.CandidateRoom(starts, int(seq_lens.sum()), 4, True)
    lists = empty_lists(len(contexts) * kv_heads, 128 + 2 * page)
    candidate_tokens.best_candidates(scores, rows, row_knobs(methods), room, lists)
    group = heads // kv_heads
    for row, context in enumerate(contexts):
        for head in range(kv_heads):
            index = row * kv_heads + head
            if row == idle:
                assert int(lists.kept_tokens[index]) == POISON
                assert bool((lists.slots[index] == POISON).all())
                continue
            found = positions_of(lists, index, data.block_table[row, : -(-context // block_size)], block_size, kv_heads)
            assert found == sorted(set(found))
            own = query[row, head * group : (head + 1) * group].cpu()
            worth = values[row, head, : -(-context // page)].tolist()
            expected, doubtful = expected_list(own, data.keys[row][head].cpu(), worth, page, methods[row])
            different = set(found) ^ set(expected)
            assert different <= doubtful, f"row {row}, head {head}, {methods[row]}, seed {seed}"
            assert len(different) <= 2


@needs_triton
@pytest.mark.parametrize("server", [METHODS[0], METHODS[2]], ids=["budgets", "coverage"])
def test_a_method_chooses_for_rows_as_for_one_request(server: BlockTopk) -> None:
    """Small integers, of which every implementation finds the same products: from stored summaries to lists."""
    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    kv_heads, head_size, block_size = 2, 32, 64
    contexts = [500, 129, 1000, 77, 640, 300]
    methods = [method for method in METHODS if server.serves(method, 1000)]
    methods = [methods[row % len(methods)] for row in range(len(contexts))]
    keys = [
        torch.randint(-3, 4, (kv_heads, context, head_size), generator=generator).float().to(DEVICE)
        for context in contexts
    ]
    data = oracle.paged(PLATFORM, keys, keys, block_size, generator)
    query = torch.randint(-2, 3, (len(contexts), kv_heads, head_size), generator=generator).float().to(DEVICE)
    seq_lens = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    rows = DecodeRows(query, data.kv_cache, data.block_table, seq_lens, SCALE)
    shape = data.kv_cache.shape[0], kv_heads, block_size // 16, server.summaries.width(head_size)
    summaries = torch.full(shape, oracle.NAN, device=DEVICE)
    expected = []
    for row, method in enumerate(methods):
        request = data.reader(row)
        request.summaries = summaries
        store_summaries(request, server.summaries, 0)
        chosen = method.select(query[row], request, SCALE, 1, LayerMemory())
        expected += [oracle.live_pages(chosen, head) for head in range(kv_heads)]
    starts = (seq_lens.cumsum(0) - seq_lens).long()
    zeros = torch.zeros_like(seq_lens)
    place = RowsPlace(starts, sum(contexts), zeros, zeros, seq_lens, 0, summaries, None)
    lists = empty_lists(len(contexts) * kv_heads, 160)
    server.choose_rows(rows, row_knobs(methods), place, lists)
    for index, positions in enumerate(expected):
        row = index // kv_heads
        table = data.block_table[row, : -(-contexts[row] // block_size)]
        assert positions_of(lists, index, table, block_size, kv_heads) == positions, f"{methods[row]}, seed {seed}"


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
@pytest.mark.parametrize("rows", [1, 8])
def test_a_replayed_graph_equals_eager_steps(rows: int, generator: torch.Generator) -> None:
    """One capture for all steps, from summaries to lists, with rows that stand by."""
    kv_heads, head_size, longest = 2, 128, 3000
    server = BlockTopk(budget_tokens=256, candidate_factor=4, coverage=0.9, scores="float8_bounds")
    platform = Platform("plain-bfloat16", DEVICE, torch.bfloat16, None, executes=False)
    data = oracle.random_paged(platform, generator, [longest] * rows, kv_heads, head_size, 64)
    shape = data.kv_cache.shape[0], kv_heads, 4, server.summaries.width(head_size)
    summaries = torch.zeros(shape, dtype=server.summaries.dtype(torch.bfloat16), device=DEVICE)
    for row in range(rows):
        request = data.reader(row)
        request.summaries = summaries
        store_summaries(request, server.summaries, 0)
    query = torch.zeros(rows, 8, head_size, dtype=torch.bfloat16, device=DEVICE)
    seq_lens = torch.ones(rows, dtype=torch.int32, device=DEVICE)
    starts = torch.arange(rows, device=DEVICE) * longest
    own = DecodeRows(query, data.kv_cache, data.block_table, seq_lens, SCALE)
    zeros = torch.zeros_like(seq_lens)

    def make() -> tuple[TokenLists, Callable[[], None]]:
        lists = empty_lists(rows * kv_heads, 300)
        place = RowsPlace(starts, rows * longest, zeros, zeros, seq_lens, 0, summaries, None)
        return lists, functools.partial(server.choose_rows, own, row_knobs([server] * rows), place, lists)

    (eager, choose), (replayed, call) = make(), make()
    replay = captured(call)
    choose()
    for _ in range(5):
        query.copy_(torch.randn(query.shape, generator=generator))
        seq_lens.copy_(torch.randint(600, longest, (rows,), generator=generator))
        seq_lens[rows // 2 + 1 :] = 0
        choose()
        replay()
        assert torch.equal(eager.kept_tokens, replayed.kept_tokens)
        for index, kept in enumerate(eager.kept_tokens.tolist()):
            assert torch.equal(eager.slots[index, :kept], replayed.slots[index, :kept])
    assert bool((eager.kept_tokens[: kv_heads * (rows // 2 + 1)] >= 80).all())


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """And have registers for what they hold of a list."""
    from vllm_sparse.kernels.candidate_tokens import triton as candidate_tokens
    from vllm_sparse.kernels.common.triton import threshold_tile

    compile_for_hopper(
        candidate_tokens.candidate_rows_kernel,
        {
            **dict.fromkeys(("context_pointer", "knob_pointer", "page_context_pointer", "page_knob_pointer"), "*i32"),
            **dict.fromkeys(("list_context_pointer", "list_knob_pointer"), "*i32"),
            **dict.fromkeys(("start_pointer", "list_start_pointer"), "*i64"),
            "knob_row_stride": "i32",
        },
        {"KV_HEADS": 8, "HEAD_TILE": 8, "PAGE": 16},
        num_warps=1,
    )
    for most in (4096, candidate_tokens.MOST_ROW_ENTRIES):
        entries, num_warps = threshold_tile(most)
        compiled = compile_for_hopper(
            candidate_tokens.covering_budget_kernel,
            {
                **dict.fromkeys(("context_pointer", "row_knob_pointer", "list_knob_pointer"), "*i32"),
                **dict.fromkeys(("row_knob_stride", "kv_heads"), "i32"),
                "score_pointer": "*fp32",
                "start_pointer": "*i64",
            },
            {"GROUP": 4, "ROW_TILE": entries, "TILE": min(entries, candidate_tokens.TILE)},
            num_warps=num_warps,
        )
        assert spilled_bytes(compiled, tmp_path) == 0
