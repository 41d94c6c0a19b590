"""HiP's decode kernels list for all rows what the method lists for each: compiled on a GPU, interpreted elsewhere."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import oracle
from tests.kernels.hopper import compile_for_hopper, spilled_bytes
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from tests.oracle import Paged, Platform
from vllm_sparse.kernels.hip_decode import (
    ROW_KNOBS,
    STAGE_KNOBS,
    RowMemory,
    StageMemory,
    StageScratch,
    decode_leaves,
    token_lists,
)
from vllm_sparse.kernels.page_list import ListGrid, block_lists
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.methods.hip import HipDecode
from vllm_sparse.step.rows import DecodeRows, TokenLists

pytest.importorskip("triton")

PLATFORM = Platform("plain-float32", DEVICE, torch.float32, None, executes=False)
SCALE = 0.1
UNTOUCHED = -7

Stages = tuple[tuple[int, int, int], ...]


def hip(stages: Stages, sink: int, window: int, last_stage: Any = "representatives") -> HipDecode:
    lengths, tokens, refresh = zip(*stages, strict=True)
    return HipDecode(
        last_stage=last_stage,
        stage_block_tokens=lengths,
        stage_budget_tokens=tokens,
        refresh_steps=refresh,
        sink_tokens=sink,
        recent_tokens=window,
    )


ONE = hip(((16, 80, 3),), 0, 0)
TWO = hip(((64, 192, 4), (16, 64, 2)), 20, 30)
THREE = hip(((128, 256, 90), (32, 96, 6), (16, 48, 4)), 16, 3)
ALL_OF_ONE = replace(ONE, last_stage="all_keys")
ALL_OF_TWO = replace(TWO, stage_block_tokens=(64, 32), last_stage="all_keys")
ALL_OF_THREE = replace(THREE, last_stage="all_keys")


@dataclass
class Request:
    """A request of the test.

    Attributes:
        method: its knobs.
        context: at its next step.
        slot: of the memory.
        fresh: it has had no step.
        memory: of the method that its lists are compared with.
    """

    method: HipDecode
    context: int
    slot: int
    fresh: bool = True
    memory: LayerMemory = field(default_factory=LayerMemory)


class Decoding:
    """Steps of requests through the kernels, each of which is compared with the method.

    Args:
        generator: draws keys, queries, blocks and the order of rows.
        heads: query heads.
        kv_heads: KV heads.
        head_size: numbers of a key.
        longest: tokens of which each request of the cache has keys.
        requests: how many of them.
        stages: of the memory.
    """

    def __init__(
        self,
        generator: torch.Generator,
        heads: int,
        kv_heads: int,
        head_size: int,
        longest: int,
        requests: int,
        stages: int,
    ) -> None:
        self.generator = generator
        # Exact scores, many of them equal.
        self.keys = [
            torch.randint(-2, 3, (kv_heads, longest, head_size), generator=generator).float().to(DEVICE)
            for _ in range(requests)
        ]
        self.data: Paged = oracle.paged(PLATFORM, self.keys, self.keys, 48, generator)
        self.heads, self.kv_heads, self.head_size = heads, kv_heads, head_size
        self.memory = StageMemory.allocate(stages, requests + 1, kv_heads, 40, DEVICE)
        self.memory.key_blocks.fill_(UNTOUCHED)
        self.scratch = StageScratch.allocate(requests + 2, kv_heads, 64, DEVICE)
        self.scratch.scores.fill_(oracle.NAN)
        self.lists = TokenLists(
            torch.full(((requests + 2) * kv_heads, longest), UNTOUCHED, dtype=torch.int32, device=DEVICE),
            torch.full(((requests + 2) * kv_heads,), UNTOUCHED, dtype=torch.int32, device=DEVICE),
        )

    def step(self, running: dict[int, Request]) -> None:
        """One step of some requests, by their numbers in the cache, among rows that do not take part."""
        rows = self.lists.kept_tokens.shape[0] // self.kv_heads
        places = torch.randperm(rows, generator=self.generator).tolist()
        row_of = dict(zip(running, places, strict=False))
        stages = self.memory.key_blocks.shape[0]
        queries = torch.randint(-2, 3, (rows, self.heads, self.head_size), generator=self.generator).float()
        contexts = torch.zeros(rows, dtype=torch.int32)
        # What rows that do not take part hold must not matter. All lies side by side, as a server's settings do.
        settings = torch.randint(
            -5, 5, (rows, 2 + ROW_KNOBS + STAGE_KNOBS * stages + 1), generator=self.generator
        ).int()
        slots, fresh, knobs = settings[:, 0], settings[:, 1], settings[:, 2:]
        slots[:] = torch.randint(-(1 << 30), 1 << 30, (rows,), generator=self.generator)
        table = torch.full((rows, self.data.block_table.shape[1]), 1 << 30, dtype=torch.int32)
        for number, row in row_of.items():
            request = running[number]
            contexts[row], slots[row], fresh[row] = request.context, request.slot, request.fresh
            own = request.method.row_knobs()
            knobs[row, : ROW_KNOBS + STAGE_KNOBS * stages] = 0
            knobs[row, : len(own)] = torch.tensor(own)
            table[row] = self.data.block_table[number].cpu()
        queries, contexts, settings, table = (tensor.to(DEVICE) for tensor in (queries, contexts, settings, table))
        before = self.lists.slots.clone(), self.lists.kept_tokens.clone(), self.memory.key_blocks.clone()
        token_lists(
            DecodeRows(queries, self.data.kv_cache, table, contexts, SCALE),
            settings[:, 2:], RowMemory(settings[:, 0], settings[:, 1], self.memory, self.scratch), self.lists,
        )  # fmt: skip

        assert not bool(self.scratch.arrived.any()), "the next launch counts from 0"
        idle = torch.ones(rows, self.kv_heads, dtype=torch.bool)
        unused = torch.ones(self.memory.key_blocks.shape[1], dtype=torch.bool)
        for number, row in row_of.items():
            idle[row], unused[running[number].slot] = False, False
        for now, then in zip((self.lists.slots, self.lists.kept_tokens), before, strict=False):
            assert torch.equal(now.cpu()[idle.flatten()], then.cpu()[idle.flatten()]), (
                "the list of a row without a step"
            )
        assert torch.equal(self.memory.key_blocks.cpu()[:, unused], before[2].cpu()[:, unused]), (
            "the memory of other slots"
        )
        for number, row in row_of.items():
            self.check(running[number], number, row, queries[row], before[0])

    def check(self, request: Request, number: int, row: int, query: torch.Tensor, former: torch.Tensor) -> None:
        """Compare a row's lists with the method's and what follows them with former ones, and go on a step."""
        reader = PLATFORM.keys_of(self.data.kv_cache, self.data.block_table[number], request.context)
        before = request.memory.stages
        expected = request.method.select(query, reader, SCALE, 1, request.memory)
        if request.method.last_stage == "all_keys":
            searched = not before or request.memory.stages[-1] is not before[-1]
            self.take_over_last_stage(request, number, query.cpu() if searched else None)
            _, leaves = decode_leaves(query, reader, request.memory.stages, request.method.search(SCALE))
            expected = block_lists(leaves.unsqueeze(1), ListGrid(1, request.context, 1, 16, 1, self.kv_heads))
        block_size = self.data.block_size
        for head in range(self.kv_heads):
            positions = torch.tensor(oracle.live_pages(expected, head))
            physical = self.data.block_table[number].cpu()[positions // block_size]
            places = (physical * self.kv_heads + head) * block_size + positions % block_size
            index = row * self.kv_heads + head
            where = f"request {number} at {request.context}, head {head}"
            kept = int(self.lists.kept_tokens[index])
            assert kept == len(places), where
            assert torch.equal(self.lists.slots[index, :kept].cpu(), places), where
            assert torch.equal(self.lists.slots[index, kept:], former[index, kept:]), where
        request.context += 1
        request.fresh = False

    def take_over_last_stage(self, request: Request, number: int, query: torch.Tensor | None) -> None:
        """Put into a request's memory what the kernels keep of the last stage: as before, or if searched the best.

        In what they keep, key blocks that are equal but for rounding may stand for one another.

        Args:
            request: with what the other stages keep.
            number: of its keys.
            query: of the step, if the stage is searched in it.
        """
        length, parent_length = request.method.stage_block_tokens[-1], ([0, *request.method.stage_block_tokens])[-2]
        first_refresh = request.method.refresh_steps[0]
        begin = -(-request.method.sink_tokens // 16) * 16
        end = max(request.context // first_refresh * first_refresh - 1 - request.method.recent_tokens, 0)
        stages = request.memory.stages
        for head in range(self.kv_heads):
            stored = self.memory.key_blocks[-1, request.slot, head].cpu()
            kept = stored[1 : 1 + int(stored[0])].tolist()
            chosen = [start for start in stages[-1][head].tolist() if start < end]
            assert len(kept) == len(chosen)
            if query is None:
                assert kept == chosen
                continue
            if parent_length:
                parents = [(start, start + parent_length) for start in stages[-2][head].tolist()]
            else:
                parents = [(begin, end)]
            starts = [start for first, stop in parents for start in range(first, min(stop, end), length)]
            tokens = [token for start in starts for token in range(start, min(start + length, end))]
            if not tokens:
                continue
            own = query.view(self.kv_heads, -1, self.head_size)[head].double()
            mass = (own @ self.keys[number][head, tokens].cpu().double().T * SCALE).softmax(1).sum(0)
            masses = dict.fromkeys(starts, 0.0)
            for token, share in zip(tokens, mass.tolist(), strict=True):
                masses[starts[bisect.bisect_right(starts, token) - 1]] += share
            least = min(masses[start] for start in kept)
            assert sorted(set(kept)) == kept
            assert all(masses[start] <= least * (1 + 1e-4) for start in starts if start not in kept)
            stages[-1][head, : len(kept)] = stored[1 : 1 + len(kept)]


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=11)


@needs_triton
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size"), [(2, 2, 16), (7, 1, 80), (16, 2, 32)], ids=lambda value: str(value)
)
def test_lists_equal_the_methods(heads: int, kv_heads: int, head_size: int, generator: torch.Generator) -> None:
    """Rows of one to three stages, from one token on, with steps of their own, in any order."""
    decoding = Decoding(generator, heads, kv_heads, head_size, 520, 5, 3)
    running = {
        number: Request(method, context, slot)
        for number, (method, context, slot) in enumerate(
            [(THREE, 509, 3), (TWO, 411, 0), (ONE, 306, 5), (TWO, 1, 1), (THREE, 177, 4)]
        )
    }
    for _ in range(4):
        decoding.step(running)


@needs_triton
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size"), [(2, 2, 16), (7, 1, 80), (16, 2, 32)], ids=lambda value: str(value)
)
def test_last_stages_score_all_keys_where_a_row_wants_it(
    heads: int, kv_heads: int, head_size: int, generator: torch.Generator
) -> None:
    """Beside rows whose last stage descends; key blocks of one leaf and of two, the last one cut by the window."""
    decoding = Decoding(generator, heads, kv_heads, head_size, 520, 5, 3)
    running = {
        number: Request(method, context, slot)
        for number, (method, context, slot) in enumerate(
            [(ALL_OF_THREE, 509, 3), (ALL_OF_TWO, 411, 0), (ALL_OF_ONE, 306, 5), (THREE, 177, 1), (ALL_OF_TWO, 1, 4)]
        )
    }
    for _ in range(4):
        decoding.step(running)


@needs_triton
def test_rows_come_and_go(generator: torch.Generator) -> None:
    """A slot's second request, whose context goes on where the first one's ended; a request that pauses."""
    decoding = Decoding(generator, 4, 2, 16, 420, 3, 2)
    first, second, pausing = Request(TWO, 401, 2), Request(TWO, 405, 2), Request(TWO, 333, 0)
    for step in range(7):
        running = {0: first} if step < 4 else {1: second}
        if step not in (2, 5):
            running[2] = pausing
        decoding.step(running)


@needs_triton
def test_a_slot_that_a_step_has_passed_by_is_searched_anew(generator: torch.Generator) -> None:
    """As after steps that ran dense: what the slot holds is of an older step, and nobody says so."""
    decoding = Decoding(generator, 2, 1, 16, 420, 1, 2)
    request = Request(TWO, 401, 0)
    decoding.step({0: request})
    request.context += 5
    decoding.step({0: request})
    decoding.step({0: request})


@needs_triton
@pytest.mark.parametrize("last_stage", ["representatives", "all_keys"])
def test_several_programs_and_tiles(
    last_stage: Any, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """Chunks of one search in programs with several tiles, in programs with none; ties across the edges of tiles."""
    from vllm_sparse.kernels.hip_decode import triton as hip_triton

    monkeypatch.setattr(hip_triton, "KEY_BLOCK_TILE", 16)
    monkeypatch.setattr(hip_triton, "SELECT_TILE", 8)
    monkeypatch.setattr(hip_triton, "LARGEST_ROW_TILE", 16)
    monkeypatch.setattr(hip_triton, "LIST_TILE", 32)
    monkeypatch.setattr(hip_triton, "PROGRAMS", 12)
    decoding = Decoding(generator, 2, 1, 16, 900, 2, 2)
    monkeypatch.setattr(hip_triton, "MASS_NUMBERS", 32)
    many = hip(((16, 256, 4),), 5, 0, last_stage)
    running = {0: Request(many, 881, 1), 1: Request(replace(TWO, last_stage=last_stage), 300, 0)}
    for _ in range(4):
        decoding.step(running)


@needs_triton
def test_whole_contexts(generator: torch.Generator) -> None:
    """Stages that keep everything; a sink and a window that cover everything."""
    decoding = Decoding(generator, 2, 1, 16, 420, 3, 2)
    everything = hip(((32, 512, 4), (16, 512, 4)), 5, 3, "all_keys")
    running = {
        0: Request(everything, 397, 0),
        1: Request(hip(((16, 16, 4),), 500, 0), 397, 1),
        2: Request(hip(((16, 16, 4),), 0, 500), 397, 2),
    }
    for _ in range(2):
        decoding.step(running)


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("last_stage", ["representatives", "all_keys"])
def test_h9_a_replayed_graph_equals_eager_steps(last_stage: Any, rows: int, generator: torch.Generator) -> None:
    """One capture for all steps: due or not, fresh or not, with rows of padding."""
    kv_heads, steps, longest = 2, 40, 3000
    keys = [oracle.random_tensor(PLATFORM, generator, kv_heads, longest, 128).bfloat16() for _ in range(rows)]
    platform = Platform("plain-bfloat16", DEVICE, torch.bfloat16, None, executes=False)
    data = oracle.paged(platform, keys, keys, 64, generator)
    method = hip(((256, 1024, 16), (64, 512, 8), (16, 256, 4)), 64, 100, last_stage)
    knobs = torch.tensor([method.row_knobs()] * rows, dtype=torch.int32, device=DEVICE)
    slot = torch.randperm(rows, generator=generator).int().to(DEVICE)
    queries = torch.randn(steps, rows, 8, 128, generator=generator).bfloat16().to(DEVICE)
    starts = torch.randint(1500, longest - steps, (rows,), generator=generator).int().to(DEVICE)
    starts[rows // 2 + 1 :] = 0
    live = starts > 0

    def make() -> tuple[Any, ...]:
        rows_of_step = DecodeRows(
            torch.zeros_like(queries[0]), data.kv_cache, data.block_table, torch.zeros_like(starts), SCALE
        )
        lists = TokenLists(
            torch.zeros(rows * kv_heads, method.budget_tokens, dtype=torch.int32, device=DEVICE),
            torch.zeros(rows * kv_heads, dtype=torch.int32, device=DEVICE),
        )
        fresh = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
        memory = StageMemory.allocate(3, rows, kv_heads, method.device_sizes(longest)[0], DEVICE)
        scratch = StageScratch.allocate(rows, kv_heads, method.device_sizes(longest)[1], DEVICE)
        return rows_of_step, knobs, RowMemory(slot, fresh, memory, scratch), lists

    eager, captured = make(), make()
    token_lists(*captured)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token_lists(*captured)
    for step in range(steps):
        for rows_of_step, _, row_memory, _ in (eager, captured):
            rows_of_step.query.copy_(queries[step])
            rows_of_step.seq_lens.copy_(torch.where(live, starts + step, 0))
            row_memory.fresh.fill_(int(step in (0, 21)))
        token_lists(*eager)
        graph.replay()
        assert torch.equal(eager[-1].slots, captured[-1].slots)
        assert torch.equal(eager[-1].kept_tokens, captured[-1].kept_tokens)
    assert bool((captured[-1].kept_tokens.view(rows, -1)[live] > 0).all())


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
@pytest.mark.parametrize(("members", "head_size"), [(4, 128), (1, 64), (8, 256)])
def test_kernels_compile_for_hopper(members: int, head_size: int, tmp_path: Path) -> None:
    from vllm_sparse.kernels.hip_decode import triton as hip_triton

    shapes = {"STAGES": 3, "STAGE_KNOBS": STAGE_KNOBS, "LEAF": 16, "CACHE_BLOCK": 128}
    integers = ("slots", "list_width", "knobs_row_stride", "slot_stride", "table_row_stride")
    pointers = ("block_table", "context", "knobs", "slot", "seen", "key_blocks")
    types = {**dict.fromkeys(integers, "i32"), **{f"{name}_pointer": "*i32" for name in pointers}}
    strides = ("query_row_stride", "cache_block_stride", "cache_head_stride", "cache_token_stride")
    for stage in range(3):
        compiled = compile_for_hopper(
            hip_triton.stage_kernel,
            {
                **types,
                **dict.fromkeys(("score_width", *strides), "i32"),
                **dict.fromkeys(("query_pointer", "cache_pointer"), "*bf16"),
                **dict.fromkeys(("score_pointer", "mass_pointer"), "*fp32"),
                "scale": "fp32",
                "arrived_pointer": "*i32",
                "fresh_pointer": "*i32",
            },
            {
                **shapes,
                "STAGE": stage,
                "MEMBERS": members,
                "HEAD_SIZE": head_size,
                "HEAD_TILE": head_size,
                "QUERY_TILE": 16,
                "MEMBER_TILE": members,
                "TILE": hip_triton.KEY_BLOCK_TILE,
                "LEAF_TILE": hip_triton.leaves_at_once(head_size),
                "MASS_TILE": hip_triton.MASS_NUMBERS // members,
                "ROW_TILE": hip_triton.LARGEST_ROW_TILE,
                "SELECT_TILE": hip_triton.SELECT_TILE,
            },
            num_warps=4,
            num_stages=1,
        )
        assert spilled_bytes(compiled, tmp_path) == 0, f"stage {stage}"
    compiled = compile_for_hopper(
        hip_triton.lists_kernel,
        {**types, "width": "i32", "token_pointer": "*i32", "kept_tokens_pointer": "*i32"},
        {**shapes, "TILE": hip_triton.LIST_TILE},
    )
    assert spilled_bytes(compiled, tmp_path) == 0
