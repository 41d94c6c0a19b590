"""Block top-k decode: which pages its lists hold. What is kept from step to step is tested in ``tests/backend``."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle
from tests.oracle import PLAIN, SELECTING, Paged, Platform
from vllm_sparse.kernels.page_scores import page_scores
from vllm_sparse.kernels.page_summaries import read_summaries, store_summaries
from vllm_sparse.methods.block_topk import BlockTopk
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.methods.knobs import KnobError
from vllm_sparse.methods.oracle import OracleDecode
from vllm_sparse.pages import page_mask
from vllm_sparse.step.roles import Role

SCALE = 0.15
both_scores = pytest.mark.parametrize("scores", ["mean", "bounds"])


def plain(budget: int, **knobs: Any) -> BlockTopk:
    """Nothing forced but the newest token's page."""
    return BlockTopk(budget_tokens=budget, **{"sink_tokens": 0, "recent_tokens": 0, **knobs})


def live(method: BlockTopk, query: torch.Tensor, data: Paged, page: int = 16, scale: float = SCALE) -> list[list[int]]:
    """Pages of each list."""
    lists = method.select(query, data.reader(0), scale, page, LayerMemory())
    return [oracle.live_pages(lists, row) for row in range(lists.pages.shape[0])]


def logits(method: BlockTopk, query: torch.Tensor, data: Paged) -> torch.Tensor:
    """Float64 ``[query_heads, pages]`` from the definitions."""
    product = query.double().cpu().unsqueeze(1)
    columns = []
    for page in torch.split(oracle.expand(data.keys[0], query.shape[0]), method.page_tokens, dim=1):
        if method.scores == "mean":
            columns.append((product * page.mean(1, keepdim=True)).sum(2))
        else:
            ends = product * page.amin(1, keepdim=True), product * page.amax(1, keepdim=True)
            columns.append(torch.maximum(*ends).sum(2))
    return torch.cat(columns, dim=1)


def merged(method: BlockTopk, query: torch.Tensor, data: Paged) -> torch.Tensor:
    """Float64 ``[kv_heads, pages]``: the largest probability of a head of the group."""
    probabilities = (logits(method, query, data) * SCALE).softmax(1)
    return probabilities.view(data.num_kv_heads, -1, probabilities.shape[1]).amax(1)


def assert_best(found: list[int], scores: torch.Tensor, count: int) -> None:
    """The newest page and the `count` - 1 best others; only pages within rounding of the cut may differ."""
    newest = scores.shape[0] - 1
    order = sorted(range(newest), key=lambda page: (-float(scores[page]), page))[: count - 1]
    assert len(found) == min(count, newest + 1)
    assert found[-1] == newest
    if set(found) != {*order, newest}:
        cut = float(scores[order[-1]])
        apart = [float(scores[page]) / cut - 1 for page in set(found) ^ {*order, newest}]
        assert max(map(abs, apart)) < 1e-4, apart


@both_scores
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("context", [17, 129, 1000, 4099])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (7, 1)])
def test_the_list_holds_the_best_pages(
    scores: str, block: int, context: int, heads: int, kv_heads: int, generator: torch.Generator
) -> None:
    data = oracle.random_paged(PLAIN, generator, [context], kv_heads, 32, 64)
    query = oracle.random_tensor(PLAIN, generator, heads, 32, spread=2)
    method = plain(192, page_tokens=block, scores=scores)
    expected = merged(method, query, data)
    for row, pages in enumerate(live(method, query, data, block)):
        assert_best(pages, expected[row], 192 // block)


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("context", [1, 97, 1000])
def test_bounds_never_underestimate_a_key(block: int, context: int, generator: torch.Generator) -> None:
    """A last page of one key is scored exactly, which gives the logits of the others their origin."""
    context = (context // block) * block + 1
    for platform in (PLAIN, Platform("plain-bfloat16", "cpu", torch.bfloat16, None)):
        data = oracle.random_paged(platform, generator, [context], 1, 32, 64)
        query = oracle.random_tensor(platform, generator, 1, 32, spread=3)
        method = plain(16, page_tokens=block, scores="bounds")
        scores = page_scores(query, read_summaries(data.reader(0), method.summaries), 1.0)[0].double()
        products = (data.keys[0][0].double() * query[0].double()).sum(1)
        bounds = scores - scores[-1] + products[-1]
        largest = torch.stack([part.max() for part in torch.split(products, block)])
        assert bool((bounds >= largest - 1e-4 * (1 + scores.abs().max())).all())


@given(page=st.integers(0, 60), seed=st.integers(0, 1 << 30))
def test_bounds_find_a_key_that_its_page_hides(page: int, seed: int) -> None:
    """One key like the query among keys that point the other way: the mean sees nothing of it."""
    generator = torch.Generator().manual_seed(seed)
    query = oracle.random_tensor(PLAIN, generator, 1, 32)
    keys = oracle.random_tensor(PLAIN, generator, 1, 1000, 32, spread=0.1)
    keys[:, page * 16 : page * 16 + 16] -= 2 * query
    keys[:, page * 16 + int(torch.randint(16, (), generator=generator))] = 3 * query
    data = oracle.paged(PLAIN, [keys], [keys], 64, generator)
    assert page in live(plain(32), query, data)[0]
    assert page not in live(plain(32, scores="mean"), query, data)[0]


@pytest.mark.parametrize("platform", SELECTING)
@both_scores
@pytest.mark.parametrize("page", [1, 16, 48, 64])
def test_forced_tokens_are_in_every_list(
    platform: Platform, scores: Any, page: int, generator: torch.Generator
) -> None:
    """Even where the scores are against them; without forcing only the newest token's page is certain."""
    context, sink, recent = 1000, 21, 37
    keys = oracle.random_tensor(platform, generator, 2, context, 32)
    keys[:, :32] = -9
    keys[:, -48:] = -9
    data = oracle.paged(platform, [keys], [keys], 192, generator)
    query = torch.ones(4, 32, dtype=platform.dtype, device=platform.device)
    forced = {*range(sink), *range(context - recent, context)}
    for method, expected in (
        (BlockTopk(budget_tokens=128, sink_tokens=sink, recent_tokens=recent, scores=scores), forced),
        (plain(128, scores=scores), {context - 1}),
    ):
        lists = method.select(query, data.reader(0), SCALE, page, LayerMemory())
        for row in range(2):
            tokens = set(oracle.kept_positions(lists, row, context).nonzero().flatten().tolist())
            assert expected <= tokens
            assert len(tokens) <= 128 + 2 * max(page, 16)
            if expected != forced and page <= 16:
                assert tokens.isdisjoint(range(sink))


@both_scores
@pytest.mark.parametrize("context", [16, 100, 1000])
def test_a_budget_of_the_context_is_everything(scores: Any, context: int, generator: torch.Generator) -> None:
    data = oracle.random_paged(PLAIN, generator, [context], 2, 32, 64)
    query = oracle.random_tensor(PLAIN, generator, 4, 32)
    for page in (1, 16, 64):
        lists = plain(context, scores=scores).select(query, data.reader(0), SCALE, page, LayerMemory())
        assert lists.kept_tokens.tolist() == [context] * 2


@pytest.mark.parametrize("platform", SELECTING)
@both_scores
def test_ties_go_to_the_lower_page(platform: Platform, scores: Any, generator: torch.Generator) -> None:
    """Pages of equal keys with small integers: many exactly equal scores, on both sides of the cut."""
    pages, budget = 63, 20
    values = torch.randint(0, 3, (pages,), generator=generator)
    keys = torch.zeros(1, pages * 16, 32, dtype=platform.dtype)
    keys[0, :, 0] = values.repeat_interleave(16).to(platform.dtype)
    data = oracle.paged(platform, [keys.to(platform.device)], [keys.to(platform.device)], 64, generator)
    query = torch.ones(2, 32, dtype=platform.dtype, device=platform.device)
    expected = sorted(range(pages - 1), key=lambda page: (-int(values[page]), page))[: budget - 1]
    assert live(plain(budget * 16, scores=scores), query, data) == [sorted([*expected, pages - 1])]


@both_scores
def test_heads_are_merged_by_probability(scores: Any, generator: torch.Generator) -> None:
    """A head with large logits must not drown its neighbour, whose probabilities are the sharper ones."""
    data = oracle.random_paged(PLAIN, generator, [800], 1, 32, 64)
    # An offset common to all keys raises a head's logits and leaves its probabilities alone.
    data.keys[0][:, :, 0] = 8
    data = oracle.paged(PLAIN, data.keys, data.values, 64, generator)
    query = oracle.random_tensor(PLAIN, generator, 2, 32, spread=4)
    query[0] /= 40
    query[0, 0] = 50
    method = plain(80, scores=scores)
    (pages,) = live(method, query, data)
    assert_best(pages, merged(method, query, data)[0], 5)
    raw = logits(method, query, data).amax(0)[:-1].topk(4).indices.tolist()
    assert set(pages[:-1]) != set(raw), "raw logits would choose the same here, so the test shows nothing"


@both_scores
@pytest.mark.parametrize("block", [16, 32])
def test_finer_pages_keep_the_same_tokens(scores: Any, block: Any, generator: torch.Generator) -> None:
    data = oracle.random_paged(PLAIN, generator, [1003], 2, 32, 64)
    query = oracle.random_tensor(PLAIN, generator, 8, 32)
    method = BlockTopk(budget_tokens=224, page_tokens=block, scores=scores)
    kept = []
    for page in (1, 16, block):
        lists = method.select(query, data.reader(0), SCALE, page, LayerMemory())
        kept.append(torch.stack([oracle.kept_positions(lists, row, 1003) for row in range(2)]))
    assert torch.equal(kept[0], kept[-1])
    assert torch.equal(kept[1], kept[-1])


@both_scores
@pytest.mark.parametrize(("block", "page"), [(16, 32), (16, 128), (32, 48), (64, 48), (64, 96)])
def test_a_coarser_page_is_worth_its_best_scored_page(
    scores: Any, block: Any, page: int, generator: torch.Generator
) -> None:
    context = 1000
    data = oracle.random_paged(PLAIN, generator, [context], 1, 32, 192)
    query = oracle.random_tensor(PLAIN, generator, 2, 32)
    method = plain(2 * page, page_tokens=block, scores=scores)
    by_token = merged(method, query, data)[0].repeat_interleave(block)[:context]
    worth = torch.stack([part.max() for part in torch.split(by_token, page)])
    (pages,) = live(method, query, data, page)
    # A scored page may lie in two of the executor's, which are then worth the same.
    assert_best(pages, worth, 2)


@pytest.mark.parametrize("scores", ["mean", "bounds", "float8_bounds"])
def test_only_summaries_are_read_where_they_are_kept(scores: Any, generator: torch.Generator) -> None:
    data = oracle.random_paged(PLAIN, generator, [1000], 2, 32, 64)
    query = oracle.random_tensor(PLAIN, generator, 8, 32)
    method = BlockTopk(budget_tokens=256, scores=scores)
    expected = live(method, query, data)
    keys = data.reader(0)
    shape = data.kv_cache.shape[0], 2, 64 // method.page_tokens, method.summaries.width(32)
    keys.summaries = torch.full(shape, oracle.NAN, dtype=method.summaries.dtype(torch.float32))
    store_summaries(keys, method.summaries, 0)
    data.kv_cache.fill_(oracle.NAN)
    lists = method.select(query, keys, SCALE, 16, LayerMemory())
    assert [oracle.live_pages(lists, row) for row in range(2)] == expected


def test_roles_follow_the_knob() -> None:
    assert BlockTopk().layer_roles(4) == [Role.DENSE, Role.DENSE, Role.WRITE_AND_READ, Role.WRITE_AND_READ]
    assert BlockTopk(dense_layers=0).layer_roles(2) == [Role.WRITE_AND_READ, Role.WRITE_AND_READ]
    with pytest.raises(KnobError, match="2 layers, so 0 to 1 are allowed") as caught:
        BlockTopk().layer_roles(2)
    assert caught.value.knob == "dense_layers"


def test_a_budget_that_does_not_hold_the_forced_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="64 tokens do not hold sink_tokens 16 and recent_tokens 64"):
        BlockTopk(budget_tokens=64)


shapes = st.sampled_from([(2, 2), (8, 2), (7, 1)])


def kept_and_attention(
    method: BlockTopk | OracleDecode, query: torch.Tensor, data: Paged
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of the lists, bool ``[kv_heads, context]``, and float64 attention over the whole context, summed over the
    heads of a group."""
    context = data.keys[0].shape[1]
    kept = page_mask(method.select(query, data.reader(0), SCALE, 1, LayerMemory()), context)
    weight = oracle.probabilities(query.unsqueeze(0), data.keys[0], SCALE, torch.ones(context, dtype=torch.bool))[:, 0]
    return kept, weight.view(data.num_kv_heads, -1, context).sum(1)


@given(shape=shapes, context=st.integers(200, 700), scores=st.sampled_from(["mean", "bounds"]), seed=st.integers(0))
def test_with_every_token_a_candidate_it_chooses_as_the_oracle(
    shape: tuple[int, int], context: int, scores: Any, seed: int
) -> None:
    heads, kv_heads = shape
    generator = torch.Generator().manual_seed(seed % (1 << 30))
    data = oracle.random_paged(PLAIN, generator, [context], kv_heads, 32, 64)
    query = oracle.random_tensor(PLAIN, generator, heads, 32, spread=3)
    method = BlockTopk(budget_tokens=100, candidate_factor=16, scores=scores)
    kept, attention = kept_and_attention(method, query, data)
    expected, _ = kept_and_attention(OracleDecode(budget_tokens=100), query, data)
    assert bool((kept.sum(1) == 100).all())
    for row in range(kv_heads):
        apart = attention[row, kept[row] ^ expected[row]]
        assert apart.numel() == 0 or float(apart.max() / apart.min()) < 1 + 1e-4


@given(
    shape=shapes,
    factor=st.sampled_from([1, 2, 16]),
    coverages=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    seed=st.integers(0),
)
def test_more_coverage_keeps_more_and_never_more_than_the_budget(
    shape: tuple[int, int], factor: int, coverages: tuple[float, float], seed: int
) -> None:
    heads, kv_heads = shape
    generator = torch.Generator().manual_seed(seed % (1 << 30))
    data = oracle.random_paged(PLAIN, generator, [500], kv_heads, 32, 64)
    query = oracle.random_tensor(PLAIN, generator, heads, 32, spread=3)
    kept = [
        kept_and_attention(BlockTopk(budget_tokens=160, candidate_factor=factor, coverage=coverage), query, data)[0]
        for coverage in (*sorted(coverages), 1)
    ]
    for fewer, more in itertools.pairwise(kept):
        assert bool((more | ~fewer).all())
    # Of whole pages the last one is short, and sink and recent tokens lie in pages of their own.
    assert bool((kept[-1].sum(1) == (148 if factor == 1 else 160)).all())


@given(shape=shapes, coverage=st.floats(0.05, 0.99), seed=st.integers(0))
def test_a_list_ends_where_it_covers_its_share(shape: tuple[int, int], coverage: float, seed: int) -> None:
    """With every token a candidate: the share is reached, and would not be without the least of the chosen tokens."""
    heads, kv_heads = shape
    generator = torch.Generator().manual_seed(seed % (1 << 30))
    data = oracle.random_paged(PLAIN, generator, [900], kv_heads, 32, 64)
    query = oracle.random_tensor(PLAIN, generator, heads, 32, spread=3)
    method = plain(899, candidate_factor=2, coverage=coverage)
    kept, attention = kept_and_attention(method, query, data)
    group = heads // kv_heads
    for row in range(kv_heads):
        share = float(attention[row, kept[row]].sum()) / group
        assert share > coverage - 1e-5
        chosen = attention[row, :-1][kept[row, :-1]]
        assert chosen.numel() == 0 or share - float(chosen.min()) / group < coverage + 1e-5


def test_candidates_find_a_key_that_bounds_rank_low(generator: torch.Generator) -> None:
    """Pages whose bounds promise more than their keys hold push the page of the best key out of a short list."""
    query = torch.ones(1, 32)
    keys = torch.zeros(1, 1000, 32)
    for page in range(20):
        # One dimension of each key: together a bound of 16, each key worth 1.
        keys[0, page * 16 : page * 16 + 16, :16] = torch.eye(16)
    keys[0, 500] = 0.4
    data = oracle.paged(PLAIN, [keys], [keys], 64, generator)
    for factor, found in ((1, False), (4, False), (16, True)):
        kept, attention = kept_and_attention(plain(32, candidate_factor=factor), query, data)
        assert int(attention[0].argmax()) == 500
        assert bool(kept[0, 500]) == found, f"factor {factor}"


def test_a_server_serves_rows_of_which_it_has_the_launches() -> None:
    pages, candidates, covering = BlockTopk(), BlockTopk(candidate_factor=4), BlockTopk(coverage=0.9)
    both = BlockTopk(candidate_factor=8, coverage=0.5)
    served = {
        (server, row)
        for server in (pages, candidates, covering, both)
        for row in (pages, candidates, covering, both)
        if server.serves(row, 1 << 20)
    }
    assert served == {
        *((pages, row) for row in (pages,)),
        *((candidates, row) for row in (pages, candidates)),
        *((covering, row) for row in (pages, covering)),
        *((both, row) for row in (pages, candidates, covering, both)),
    }
