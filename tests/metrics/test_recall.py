"""Attention-mass recall against float64 softmax over whole contexts."""

from __future__ import annotations

import weakref

import pytest
import torch

from vllm_sparse.kernels.page_list.reference import ListGrid, block_lists
from vllm_sparse.keys import PlainKeys
from vllm_sparse.metrics import recall
from vllm_sparse.metrics.recall import SAMPLED_QUERIES, attention_recall
from vllm_sparse.metrics.row_recall import GraphRecall, TakenRow
from vllm_sparse.pages import PageList
from vllm_sparse.step.rows import DecodeRows, TokenLists

BLOCK, HEAD_SIZE, SCALE = 32, 16, 0.3


def make_keys(context: int, kv_heads: int, generator: torch.Generator) -> PlainKeys:
    blocks = -(-context // BLOCK)
    cache = torch.randn(blocks + 3, kv_heads, BLOCK, 2 * HEAD_SIZE, generator=generator)
    table = torch.randperm(blocks + 3, generator=generator)[:blocks].int()
    return PlainKeys(cache, table, context)


def true_recall(
    query: torch.Tensor, keys: PlainKeys, allowed: torch.Tensor, tokens: list[int], soft_cap: float = 0.0
) -> torch.Tensor:
    """Per query head, mean over query tokens; `allowed` is bool ``[list_heads, chunk, context]``."""
    chunk, query_heads, _ = query.shape
    context = keys.seq_len
    every = keys.read(0, context).double().repeat_interleave(query_heads // keys.num_kv_heads, dim=0)
    logits = torch.einsum("thd,hnd->htn", query.double(), every) * SCALE
    if soft_cap:
        logits = soft_cap * (logits / soft_cap).tanh()
    future = torch.arange(context) > (context - chunk + torch.arange(chunk)).unsqueeze(1)
    shares = logits.masked_fill(future, float("-inf")).softmax(2)
    allowed = allowed.repeat_interleave(query_heads // allowed.shape[0], dim=0)
    return (shares * allowed).sum(2)[:, tokens].mean(1)


def allowed_by(lists: PageList, chunk: int, context: int, query_block: int) -> torch.Tensor:
    """Tokens in each query's list, row by row: bool ``[list_heads, chunk, context]``."""
    blocks = -(-chunk // query_block)
    allowed = torch.zeros(lists.pages.shape[0] // blocks, chunk, context, dtype=torch.bool)
    for row, (pages, live) in enumerate(zip(lists.pages.tolist(), lists.kept_pages.tolist(), strict=True)):
        head, first_query = row // blocks, row % blocks * query_block
        for page in pages[:live]:
            first = page * lists.page_size_tokens
            allowed[head, first_query : first_query + query_block, first : first + lists.page_size_tokens] = True
    return allowed


@pytest.mark.parametrize("segment", [64, 100, 8192])
@pytest.mark.parametrize(
    ("chunk", "context", "query_heads", "kv_heads", "list_heads", "page"),
    [(300, 701, 4, 2, 4, 32), (129, 629, 7, 1, 1, 16), (2, 450, 8, 8, 8, 32), (512, 1000, 8, 2, 2, 16)],
)
def test_chunk(
    chunk: int,
    context: int,
    query_heads: int,
    kv_heads: int,
    list_heads: int,
    page: int,
    segment: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recall, "SEGMENT_TOKENS", segment)
    generator = torch.Generator().manual_seed(chunk + segment)
    keys = make_keys(context, kv_heads, generator)
    query = torch.randn(chunk, query_heads, HEAD_SIZE, generator=generator) * 2
    mask = torch.rand(list_heads, -(-chunk // 64), -(-context // page), generator=generator) < 0.4
    lists = block_lists(mask, ListGrid(chunk, context, 64, page, page, list_heads))
    sampled = min(SAMPLED_QUERIES, chunk)
    tokens = [(2 * index + 1) * chunk // (2 * sampled) for index in range(sampled)]
    expected = true_recall(query, keys, allowed_by(lists, chunk, context, 64), tokens)
    found = attention_recall(query, keys, lists, 64, SCALE)
    assert found.shape == (query_heads,)
    assert (found - expected).abs().max() < 1e-5
    assert 0.05 < float(expected.mean()) < 0.95


def test_a_soft_cap_flattens_the_mass() -> None:
    generator = torch.Generator().manual_seed(3)
    keys = make_keys(300, 2, generator)
    query = torch.randn(1, 4, HEAD_SIZE, generator=generator) * 4
    mask = torch.rand(4, 1, 10, generator=generator) < 0.5
    lists = block_lists(mask, ListGrid(1, 300, 1, 32, 32, 4))
    allowed = allowed_by(lists, 1, 300, 1)
    capped, plain = (true_recall(query, keys, allowed, [0], cap) for cap in (1.0, 0.0))
    assert (capped - plain).abs().max() > 1e-2
    assert (attention_recall(query, keys, lists, 1, SCALE, 1.0) - capped).abs().max() < 1e-5


def test_decode_row_reads_the_same_list_in_all_heads_of_a_group() -> None:
    generator = torch.Generator().manual_seed(3)
    keys = make_keys(333, 2, generator)
    query = torch.randn(1, 8, HEAD_SIZE, generator=generator)
    # Entries past the live part are left over.
    pages = torch.tensor([[0, 4, 10, 7, 7], [2, 3, 5, 10, 0]], dtype=torch.int32)
    lists = PageList(pages, torch.tensor([2 * 32 + 13, 3 * 32 + 13], dtype=torch.int32), 32)
    allowed = allowed_by(lists, 1, 333, 1)
    expected = true_recall(query, keys, allowed, [0])
    assert (attention_recall(query, keys, lists, 1, SCALE) - expected).abs().max() < 1e-5


def test_everything_kept_is_one() -> None:
    generator = torch.Generator().manual_seed(4)
    keys = make_keys(500, 2, generator)
    query = torch.randn(100, 4, HEAD_SIZE, generator=generator)
    lists = block_lists(torch.ones(2, 2, 16, dtype=torch.bool), ListGrid(100, 500, 64, 32, 32, 2))
    assert attention_recall(query, keys, lists, 64, SCALE).tolist() == pytest.approx([1.0] * 4)


def test_a_graph_keeps_no_queries_but_those_it_takes() -> None:
    """Those of all rows lie in the graph's memory, which later layers need."""
    lists = TokenLists(torch.arange(24, dtype=torch.int32).view(6, 4), torch.arange(6, dtype=torch.int32))
    taken = TakenRow(lists, kv_heads=2)
    taken.row.fill_(2)
    rows = DecodeRows(
        torch.randn(3, 4, 8), torch.zeros(5, 2, 16, 16), torch.zeros(3, 5).int(), torch.full((3,), 9).int(), 1.0
    )
    expected, queries = rows.query[2].clone(), weakref.ref(rows.query)
    captured = GraphRecall(0, taken)
    captured.take(rows, lists)
    del rows
    assert queries() is None
    assert taken.query is not None
    assert torch.equal(taken.query[0], expected)
    assert taken.slots[0].tolist() == [[16, 17, 18, 19], [20, 21, 22, 23]]
