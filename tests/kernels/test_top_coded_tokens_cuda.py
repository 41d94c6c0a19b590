"""From codes to token lists in one launch: what the specification keeps, on a Hopper GPU."""

from __future__ import annotations

import dataclasses
import functools
import random

import pytest
import torch

from tests import oracle
from tests.cuda_graph import captured
from tests.kernels.test_code_scores_triton import poisoned, with_summaries
from tests.oracle import Platform, has_hopper
from vllm_sparse.kernels.code_scores import code_scores
from vllm_sparse.kernels.page_summaries import SummaryKind, coded_keys, read_summaries, store_summaries
from vllm_sparse.kernels.top_coded_tokens import cuda
from vllm_sparse.pages import to_logical
from vllm_sparse.step.rows import DecodeRows, RowsPlace, TokenLists

pytestmark = pytest.mark.skipif(not has_hopper(), reason="no Hopper GPU")

DEVICE = "cuda"
SCALE = 0.1
POISON = -7
# Of natural logarithms: a step of 1/32 bit, and products of 16 bits less what a page's tokens share.
SLACK = 0.06


class Batch:
    """Rows of random keys with their codes, and room for their lists.

    The specification reads an FP8 cache's numbers from a wider cache that holds the same.
    """

    def __init__(
        self,
        contexts: list[int],
        heads: int,
        kv_heads: int,
        head_size: int,
        page: int,
        dtype: torch.dtype,
        longest: int,
        spread: float = 1.0,
        float8: bool = False,
    ) -> None:
        self.seed = random.randrange(1 << 30)
        generator = torch.Generator().manual_seed(self.seed)
        platform = Platform("plain", DEVICE, dtype, None, executes=False)
        self.kind = SummaryKind(page, "codes")
        self.data = oracle.random_paged(platform, generator, contexts, kv_heads, head_size, 128)
        cache = self.data.kv_cache
        if float8:
            cache = cache.to(torch.float8_e4m3fn)
            self.data.kv_cache.copy_(cache)
        self.summaries = poisoned(self.data, self.kind)
        for row, context in enumerate(contexts):
            # What the newest token fills is not coded yet, unless it is part of a block.
            if context > 1 or page < 128:
                keys = platform.keys_of(self.data.kv_cache, self.data.block_table[row], context - (page == 128))
                keys.summaries = self.summaries
                store_summaries(keys, self.kind, 0)
            if context % page == 0 and page == 128:
                self.summaries[self.data.block_table[row, context // 128 - 1].long()] = 0xFF
        query = oracle.random_tensor(platform, generator, len(contexts), heads, head_size, spread=spread)
        self.contexts = contexts
        seq_lens = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
        # Entries past a row's context are stale, and must not be read.
        table = torch.full((len(contexts), longest // 128), 1 << 30, dtype=torch.int32, device=DEVICE)
        for row, context in enumerate(contexts):
            blocks = -(-context // 128)
            table[row, :blocks] = self.data.block_table[row, :blocks]
        self.rows = DecodeRows(query, cache, table, seq_lens, SCALE)
        starts = (seq_lens.cumsum(0) - seq_lens).long()
        zeros = torch.zeros_like(seq_lens)
        self.place = RowsPlace(starts, sum(contexts), zeros, zeros, seq_lens, 0, self.summaries, None)
        self.knobs = torch.tensor(
            [[random.randint(1, 3000), random.randint(0, 40), random.randint(0, 200)] for _ in contexts],
            dtype=torch.int32,
            device=DEVICE,
        )

    def lists(self) -> TokenLists:
        count = self.rows.query.shape[0] * self.rows.kv_cache.shape[1]
        return TokenLists(
            torch.full((count, 3100), POISON, dtype=torch.int32, device=DEVICE),
            torch.full((count,), POISON, dtype=torch.int32, device=DEVICE),
        )

    def choose(self, lists: TokenLists) -> None:
        assert cuda.can_run(self.rows, self.kind)
        cuda.top_coded_tokens(self.rows, self.knobs, self.kind, self.place, lists)

    def check(self, lists: TokenLists) -> None:
        kv_heads = self.rows.kv_cache.shape[1]
        for row, context in enumerate(self.rows.seq_lens.tolist()):
            own = slice(row * kv_heads, (row + 1) * kv_heads)
            if context == 0:
                assert bool((lists.slots[own] == POISON).all())
                assert bool((lists.kept_tokens[own] == POISON).all())
                continue
            scores = code_scores(self.rows.query[row], with_summaries(self.data, row, self.summaries), self.kind, SCALE)
            budget, sink, recent = self.knobs[row].tolist()
            position = torch.arange(context, device=DEVICE)
            recent = max(recent, 1, context % self.kind.page_tokens)
            forced = (position < sink) | (position >= context - recent)
            kept = min(max(budget, int(forced.sum())), context)
            table = self.data.block_table[row, : -(-context // 128)]
            for head in range(kv_heads):
                where = f"row {row}, head {head}, context {context}, knobs {budget, sink, recent}, seed {self.seed}"
                index = row * kv_heads + head
                assert int(lists.kept_tokens[index]) == kept, where
                found = to_logical(lists.slots[index : index + 1, :kept], table, 128, kv_heads)[0].to(DEVICE)
                assert bool((found[1:] > found[:-1]).all()), where
                assert bool((lists.slots[index, kept:] == POISON).all()), where
                chosen = torch.zeros(context, dtype=torch.bool, device=DEVICE)
                chosen[found] = True
                assert bool(chosen[forced].all()), where
                competing = scores[head].masked_fill(forced, float("-inf"))
                wanted = kept - int(forced.sum())
                if wanted:
                    least = float(competing.topk(wanted).values[-1])
                    assert float(scores[head][chosen & ~forced].min()) > least - SLACK, where
                    assert bool(chosen[competing > least + SLACK].all()), where


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "page", "dtype"),
    [
        pytest.param(2, 2, 128, 128, torch.bfloat16, id="no-groups"),
        pytest.param(8, 2, 128, 64, torch.bfloat16, id="group-of-4"),
        pytest.param(14, 2, 64, 128, torch.bfloat16, id="group-of-7"),
        pytest.param(8, 1, 64, 32, torch.float16, id="group-of-8"),
        pytest.param(6, 2, 128, 32, torch.float16, id="group-of-3"),
    ],
)
@pytest.mark.parametrize("longest", [1 << 15, 1 << 20], ids=["room-for-32K", "room-for-1M"])
@pytest.mark.parametrize("float8", [False, True], ids=["as-queries", "float8"])
def test_lists_hold_the_best_tokens(
    heads: int, kv_heads: int, head_size: int, page: int, dtype: torch.dtype, longest: int, float8: bool
) -> None:
    """A ragged batch in permuted blocks, from one token to several thread blocks; one row stands by."""
    contexts = [1, 130, 1025, 9000, 20001, 300, 4096, 2048]
    random.shuffle(contexts)
    batch = Batch(contexts, heads, kv_heads, head_size, page, dtype, longest, float8=float8)
    batch.rows.seq_lens[random.randrange(len(contexts))] = 0
    lists = batch.lists()
    batch.choose(lists)
    batch.check(lists)


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_few_and_many_rows(rows: int) -> None:
    """One request of 16 thread blocks a list, and lists that fill the device."""
    contexts = [random.randint(2, 24000 if row < 3 else 2000) for row in range(rows)]
    batch = Batch(contexts, 32, 8, 128, 128, torch.bfloat16, 1 << 17)
    lists = batch.lists()
    batch.choose(lists)
    batch.check(lists)


@pytest.mark.parametrize("float8", [False, True], ids=["as-queries", "float8"])
def test_codes_of_a_filled_page_are_stored(float8: bool) -> None:
    """Of rows that choose, and of rows that are still too short for it; not of pages that are not full."""
    batch = Batch([256, 1280, 1281, 1279, 128], 8, 2, 128, 128, torch.bfloat16, 1 << 15, float8=float8)
    expected = [coded_keys(read_summaries(batch.data.reader(row), batch.kind), 128) for row in range(5)]
    batch.rows.seq_lens[0], batch.rows.seq_lens[4] = 0, 0
    members = torch.tensor(batch.contexts, dtype=torch.int32, device=DEVICE)
    before = batch.summaries.clone()
    batch.place = dataclasses.replace(batch.place, members=members)
    batch.choose(batch.lists())
    for row in (0, 1, 4):
        keys = with_summaries(batch.data, row, batch.summaries)
        found = coded_keys(read_summaries(keys, batch.kind), 128)
        # A number between two codes may get either.
        assert bool(((found - expected[row]).abs() < 1e-3).float().mean() > 0.999), f"row {row}, seed {batch.seed}"
        assert oracle.relative_error(found, expected[row]) < 1e-2, f"row {row}, seed {batch.seed}"
    changed = {int(block) for block in (before != batch.summaries).flatten(1).any(1).nonzero()}
    filled = {int(batch.data.block_table[row, batch.contexts[row] // 128 - 1]) for row in (0, 1, 4)}
    assert changed == filled, f"seed {batch.seed}"


def test_large_queries_and_many_ties() -> None:
    """Attention on a handful of tokens: all others have less than 2^-32 of it and are equal."""
    batch = Batch([12345, 5000], 8, 2, 128, 64, torch.bfloat16, 1 << 15, spread=60.0)
    lists = batch.lists()
    batch.choose(lists)
    kept = lists.kept_tokens.tolist()
    for index, count in enumerate(kept):
        row = index // 2
        table = batch.data.block_table[row, : -(-batch.contexts[row] // 128)]
        found = to_logical(lists.slots[index : index + 1, :count], table, 128, 2)[0].to(DEVICE)
        assert bool((found[1:] > found[:-1]).all()), f"seed {batch.seed}"
        keys = with_summaries(batch.data, row, batch.summaries)
        scores = code_scores(batch.rows.query[row], keys, batch.kind, SCALE)[index % 2]
        best = int(scores.argmax())
        assert best in found.tolist(), f"seed {batch.seed}"


def test_a_replayed_graph_equals_eager_steps() -> None:
    """One capture for all contexts, with rows that stand by."""
    batch = Batch([20000] * 6, 32, 8, 128, 128, torch.bfloat16, 1 << 17)
    eager, replayed = batch.lists(), batch.lists()
    replay = captured(functools.partial(batch.choose, replayed))
    for _ in range(4):
        batch.rows.query.copy_(torch.randn_like(batch.rows.query))
        batch.rows.seq_lens.copy_(torch.randint(600, 20000, (6,)))
        batch.rows.seq_lens[random.randrange(6)] = 0
        batch.choose(eager)
        replay()
        for index, kept in enumerate(eager.kept_tokens.tolist()):
            if kept >= 0:
                assert int(replayed.kept_tokens[index]) == kept
                assert torch.equal(eager.slots[index, :kept], replayed.slots[index, :kept])
