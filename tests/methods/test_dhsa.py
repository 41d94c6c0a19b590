"""DHSA: the properties D1 to D9 and D11 to D13; D10 is about lists shared by layers, which are not offered."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests import oracle
from tests.methods.lists import FIRST_LAYER, attend_chunk, chunk_allowed, same_lists
from tests.oracle import EXECUTING, PLAIN, SELECTING, Paged, Platform
from vllm_sparse.kernels.block_scores import KeyBlocks
from vllm_sparse.kernels.page_list import query_blocks
from vllm_sparse.methods.dhsa import DEFAULT_COVERAGE, PAGE_TOKENS, Dhsa
from vllm_sparse.methods.knobs import UNBOUNDED_TOKENS
from vllm_sparse.methods.prefill import Layer, mean_reach

SCALE = 0.11
# Whole prompts and chunks; chunk starts on the key grid and off it.
CHUNKS = [(1000, 1000), (1024, 1024), (512, 1024), (300, 1000), (257, 1153), (129, 700)]


def first_stage(**knobs: Any) -> Dhsa:
    """The paper's form, but for knobs given."""
    return Dhsa(**{"bound_weight": 0.0, "candidate_factor": 1.0, **knobs})


def nothing_forced(**knobs: Any) -> Dhsa:
    """Only what a row needs to be causal is forced, but for other knobs given."""
    return first_stage(**{"sink_tokens": 0, "recent_tokens": 0, "dense_tail_tokens": 0, **knobs})


def changing(
    platform: Platform, generator: torch.Generator, chunk: int, context: int, heads: int, kv_heads: int
) -> tuple[torch.Tensor, Paged]:
    """A request whose keys change at random positions, so that adaptive chunks have many lengths."""
    topics = oracle.random_tensor(platform, generator, kv_heads, context + 1, 32)
    topic = (torch.rand(context, generator=generator) < 1 / 40).cumsum(0).to(platform.device)
    keys = topics[:, topic] + oracle.random_tensor(platform, generator, kv_heads, context, 32, spread=0.3)
    query = oracle.random_tensor(platform, generator, chunk, heads, 32, spread=2)
    values = oracle.random_tensor(platform, generator, *keys.shape)
    return query, oracle.paged(platform, [keys], [values], 64, generator)


def page_mask(method: Dhsa, query: torch.Tensor, data: Paged) -> torch.Tensor:
    return method.block_mask(query, data.reader(0), SCALE, FIRST_LAYER).cpu()


def pooled(query: torch.Tensor, query_block: int) -> torch.Tensor:
    """Float64 ``sqrt(length) * mean`` of each query block: ``[heads, query_blocks, head_size]``."""
    blocks = torch.split(query.double().cpu(), query_block)
    return torch.stack([block.mean(0) * block.shape[0] ** 0.5 for block in blocks], dim=1)


def pooled_keys(keys: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Float64 ``sqrt(length) * mean`` of each chunk: ``[kv_heads, chunks, head_size]``."""
    edges = sorted({min(edge, keys.shape[1]) for edge in start.tolist()})
    lengths = [end - begin for begin, end in itertools.pairwise(edges)]
    chunks = torch.split(keys.double().cpu(), lengths, dim=1)
    return torch.stack([chunk.mean(1) * chunk.shape[1] ** 0.5 for chunk in chunks], dim=1)


def page_scores(scores: torch.Tensor, start: torch.Tensor, context: int) -> torch.Tensor:
    """Largest score of the chunks that overlap each page: ``[heads, query_blocks, pages]``."""
    chunk = torch.searchsorted(start.cpu(), torch.arange(context), right=True) - 1
    return torch.stack([page.amax(2) for page in torch.split(scores[..., chunk], PAGE_TOKENS, dim=2)], dim=2)


def forced(method: Dhsa, chunks: KeyBlocks, chunk: int, context: int) -> torch.Tensor:
    """Bool ``[query_blocks, context]``: tokens that the method promises, and may not count against the best."""
    first, last = query_blocks(chunk, context, method.query_block_tokens, torch.device("cpu"))
    position = torch.arange(context)
    end = chunks.start.cpu()[1:][torch.searchsorted(chunks.start.cpu(), position, right=True) - 1]
    is_open = end + chunks.look_ahead_tokens > last.unsqueeze(1) + 1
    tail = (last >= context - method.dense_tail_tokens).unsqueeze(1)
    local = position >= (first - method.recent_tokens).unsqueeze(1)
    return ((position < method.sink_tokens) | local | is_open | tail) & (position <= last.unsqueeze(1))


def to_pages(tokens: torch.Tensor) -> torch.Tensor:
    """Pages that hold any of the tokens."""
    return torch.stack([page.any(-1) for page in torch.split(tokens, PAGE_TOKENS, dim=-1)], dim=-1)


def budget_of(method: Dhsa, last_query: int) -> int:
    """Pages that a query block may keep."""
    return math.ceil((method.budget_tokens or method.density * (last_query + 1)) / PAGE_TOKENS)


def assert_best(method: Dhsa, mask: torch.Tensor, scores: torch.Tensor, must: torch.Tensor, last: torch.Tensor) -> None:
    """A row keeps the forced pages and the best others in its past, exactly as many as its budget leaves."""
    pages = torch.arange(mask.shape[-1])
    for head in range(mask.shape[0]):
        for row in range(mask.shape[1]):
            where = f"head {head}, query block {row}"
            causal = pages <= int(last[row]) // PAGE_TOKENS
            kept, required = mask[head, row], must[row]
            assert bool(kept[required].all()), f"{where}: forced pages are missing"
            assert not bool(kept[~causal].any()), f"{where}: pages of the future"
            wanted = min(max(budget_of(method, int(last[row])), int(required.sum())), int(causal.sum()))
            assert int(kept.sum()) == wanted, where
            others, dropped = scores[head, row][kept & ~required], scores[head, row][causal & ~kept]
            if len(others) and len(dropped):
                assert float(others.min()) >= float(dropped.max()) - 1e-4 * float(scores.abs().max()), where


MODES = [
    first_stage(budget_tokens=320, sink_tokens=64, recent_tokens=40, dense_tail_tokens=100),
    first_stage(budget_tokens=320, sink_tokens=64, recent_tokens=40, dense_tail_tokens=100, key_blocks="adaptive"),
    first_stage(
        density=0.25,
        sink_tokens=0,
        recent_tokens=0,
        dense_tail_tokens=0,
        key_block_tokens=16,
        query_block_tokens=64,
        scores_per="kv_head",
    ),
    first_stage(
        density=0.3, sink_tokens=1, recent_tokens=0, dense_tail_tokens=1, key_block_tokens=128, query_block_tokens=64
    ),
    first_stage(
        budget_tokens=224,
        sink_tokens=0,
        recent_tokens=0,
        dense_tail_tokens=0,
        key_blocks="adaptive",
        query_block_tokens=64,
        scores_per="layer",
    ),
]
modes = pytest.mark.parametrize("method", MODES, ids=["page", "adaptive", "chunk-16", "chunk-128", "adaptive-bare"])


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize(
    "method",
    [
        first_stage(density=1),
        first_stage(budget_tokens=1153, sink_tokens=0, recent_tokens=0, dense_tail_tokens=0),
        first_stage(budget_tokens=UNBOUNDED_TOKENS, key_blocks="adaptive", scores_per="kv_head"),
        first_stage(
            density=1,
            key_blocks="adaptive",
            scores_per="layer",
            list_per="kv_head",
            query_block_tokens=64,
            recent_tokens=0,
            dense_tail_tokens=0,
        ),
        first_stage(budget_tokens=2000, key_block_tokens=128, scores_per="layer", query_block_tokens=64),
    ],
    ids=repr,
)
def test_d1_a_budget_of_the_context_is_dense(platform: Platform, method: Dhsa, generator: torch.Generator) -> None:
    for chunk, context in CHUNKS[2:5]:
        query, data = changing(platform, generator, chunk, context, 4, 2)
        for page in (16, 64):
            lists = method.select(query, data.reader(0), SCALE, page, FIRST_LAYER)
            causal = oracle.causal_mask(chunk, context).expand(4, -1, -1)
            assert torch.equal(chunk_allowed(method, lists, data, 0, query), causal), f"{chunk} of {context}"


def test_d1_dense_knobs_are_known_before_any_prompt() -> None:
    assert Dhsa(density=1.0).exactly_dense
    assert first_stage(density=0.1, budget_tokens=UNBOUNDED_TOKENS).exactly_dense
    assert not first_stage(density=1.0, budget_tokens=4096).exactly_dense
    assert not first_stage(density=0.999).exactly_dense
    assert not first_stage(budget_tokens=UNBOUNDED_TOKENS - 1).exactly_dense
    assert not Dhsa(density=1.0, coverage=0.9).exactly_dense


@pytest.mark.parametrize(
    "knobs", [{}, {"density": 0.1}, {"budget_tokens": 4096}, {"density": 1.0}, {"coverage": 1.0}, {"coverage": 0.99}]
)
def test_two_stages_have_a_form_with_lists_of_candidates_and_one_without(knobs: dict[str, Any]) -> None:
    """Any request may ask for either and for lists that end, so that kernels of all are compiled at the start."""
    forms = Dhsa(**knobs).forms()
    assert {form.weighs_all_pages for form in forms} == {False, True}
    assert any(form.covered < 1 for form in forms)
    assert first_stage().forms() == (first_stage(),)


def test_lists_end_by_coverage_where_nobody_says_otherwise() -> None:
    assert Dhsa().covered == DEFAULT_COVERAGE == Dhsa(density=0.1).covered
    assert Dhsa(coverage=1.0).covered == first_stage().covered == Dhsa(density=1.0).covered == 1.0
    assert Dhsa(budget_tokens=4096).covered == 1.0, "a fixed cost"
    assert Dhsa(density=1.0, coverage=0.9).covered == 0.9


@pytest.mark.parametrize(
    ("coverage", "of_8k", "of_32k"), [(0.957, 0.27, 0.17), (0.975, 0.31, 0.21), (0.983, 0.39, 0.26)]
)
def test_costs_expect_the_density_that_was_measured(coverage: float, of_8k: float, of_32k: float) -> None:
    """Means over a prompt's chunks of 8192 tokens (docs/methods.md), and never more than the budget."""
    method = Dhsa(density=0.75, coverage=coverage, dense_tail_tokens=0)

    def density(length: int) -> float:
        ends = range(8192, length + 1, 8192)
        return statistics.mean(method.read_tokens(8192, end) / mean_reach(8192, end) for end in ends)

    assert of_8k <= density(8192) + 0.01 < of_8k + 0.05
    assert of_32k <= density(32768) < of_32k + 0.06
    assert Dhsa(density=0.1).read_tokens(8192, 32768) < 1.05 * Dhsa(density=0.1, coverage=1.0).read_tokens(8192, 32768)


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("query_block", [64, 128])
@pytest.mark.parametrize("chunks", ["page", "adaptive"])
def test_d2_keys_that_arrive_later_change_no_choice(
    platform: Platform, chunks: str, query_block: int, generator: torch.Generator
) -> None:
    """The rows of a prompt are the same whole and in chunks of the prompt, whose contexts end earlier.

    Nothing is forced here but what is not decided yet, so a chunk that competes too early shows.
    """
    context = 1100
    query, data = changing(platform, generator, context, context, 2, 1)
    method = nothing_forced(key_blocks=chunks, key_block_tokens=128, budget_tokens=256, query_block_tokens=query_block)
    whole = page_mask(method, query, data)
    for start, stop in ((0, 256), (256, 640), (640, 1100), (0, 777)):
        reader = platform.keys_of(data.kv_cache, data.block_table[0], stop)
        part = method.block_mask(query[start:stop], reader, SCALE, FIRST_LAYER).cpu()
        # The last row of a chunk of the prompt may hold fewer queries.
        rows = (stop - start) // query_block
        expected = whole[:, start // query_block :][:, :rows, : part.shape[2]]
        assert torch.equal(part[:, :rows], expected), f"queries {start} to {stop}"


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize(
    "method",
    [first_stage(key_block_tokens=16), first_stage(key_block_tokens=64), first_stage(key_blocks="adaptive")],
    ids=repr,
)
def test_d3_representations_equal_float64(platform: Platform, method: Dhsa, generator: torch.Generator) -> None:
    for context in (1, 31, 700, 1153):
        _, data = changing(platform, generator, 1, context, 2, 2)
        chunks = method.key_chunks(data.reader(0))
        expected = pooled_keys(data.keys[0], chunks.start)
        existing = chunks.representation[:, : expected.shape[1]]
        assert oracle.relative_error(existing, expected) < 1e-5


def test_d3_the_spread_of_scores_does_not_depend_on_the_chunk_length(generator: torch.Generator) -> None:
    """For independent keys; with plain means long chunks would score lower."""
    context, head_size = 65536, 32
    keys = torch.randn(1, context, head_size, generator=generator)
    data = oracle.paged(PLAIN, [keys], [keys], 64, generator)
    query = torch.randn(head_size, generator=generator)
    query /= query.norm()
    deviations = {}
    for chunk in (16, 128):
        chunks = nothing_forced(key_block_tokens=chunk).key_chunks(data.reader(0))
        deviations[chunk] = float((chunks.representation[0] @ query).std())
    # 512 chunks of 128: a standard error of 3 %.
    assert all(abs(deviation - 1) < 0.16 for deviation in deviations.values()), deviations
    plain = {chunk: deviation / chunk**0.5 for chunk, deviation in deviations.items()}
    assert plain[16] > 2 * plain[128]


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("chunk_tokens", [32, 64, 128])
def test_d4_whole_chunks_in_the_order_of_their_scores_and_one_part(
    platform: Platform, chunk_tokens: int, generator: torch.Generator
) -> None:
    """Of the pages that are not forced: all of each chunk but the last one taken, of that one the first pages."""
    chunk, context = 512, 2048
    query, data = changing(platform, generator, chunk, context, 2, 1)
    method = nothing_forced(key_block_tokens=chunk_tokens, budget_tokens=128 + 416)
    mask = page_mask(method, query, data)
    start = torch.arange(0, context + 1, chunk_tokens)
    scores = pooled(query, 128) @ pooled_keys(data.keys[0], start).transpose(1, 2)
    _, last = query_blocks(chunk, context, 128, torch.device("cpu"))
    for head in range(2):
        for row in range(4):
            past = (int(last[row]) - 127) // PAGE_TOKENS
            taken = mask[head, row, :past].view(-1, chunk_tokens // PAGE_TOKENS)
            pages_taken, order = taken.sum(1), scores[head, row, : taken.shape[0]].argsort(descending=True)
            whole, rest = divmod(416, chunk_tokens)
            expected = torch.zeros_like(pages_taken)
            expected[order[:whole]] = chunk_tokens // PAGE_TOKENS
            expected[order[whole]] = rest // PAGE_TOKENS
            assert torch.equal(pages_taken, expected)
            # The part that is taken is the chunk's beginning.
            assert bool((taken[:, :-1] >= taken[:, 1:]).all())


@modes
@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize(("chunk", "context"), CHUNKS)
def test_d4_and_d5_forced_pages_and_the_best_of_the_past_fill_the_budget(
    platform: Platform, method: Dhsa, chunk: int, context: int, generator: torch.Generator
) -> None:
    """Against float64 scores: which pages, how many, none of the future."""
    query, data = changing(platform, generator, chunk, context, 4, 2)
    chunks = method.key_chunks(data.reader(0))
    queries, keys = pooled(query, method.query_block_tokens), pooled_keys(data.keys[0], chunks.start)
    if method.scores_per != "query_head":
        queries = queries.view(2 if method.scores_per == "kv_head" else 1, -1, *queries.shape[1:]).mean(1)
    if method.scores_per == "layer":
        keys = keys.mean(0, keepdim=True)
    scores = torch.einsum("hqd,hcd->hqc", queries, keys.repeat_interleave(queries.shape[0] // keys.shape[0], dim=0))
    _, last = query_blocks(chunk, context, method.query_block_tokens, torch.device("cpu"))
    assert_best(
        method,
        page_mask(method, query, data),
        page_scores(scores, chunks.start, context),
        to_pages(forced(method, chunks, chunk, context)),
        last,
    )


def test_d5_rows_whose_past_fits_the_budget_are_dense(generator: torch.Generator) -> None:
    query, data = changing(PLAIN, generator, 1000, 1000, 2, 1)
    mask = page_mask(nothing_forced(budget_tokens=384), query, data)
    for row in range(3):
        assert bool(mask[:, row, : 4 * row + 4].all())
    assert bool((mask[:, 3:].sum(2) == 12).all())


def test_d5_open_chunks_lie_inside_the_default_band(generator: torch.Generator) -> None:
    """So the adaptive tail forces nothing beyond `local`."""
    for chunk, context in CHUNKS:
        _, data = changing(PLAIN, generator, 1, context, 1, 1)
        adaptive = first_stage(key_blocks="adaptive", sink_tokens=0, dense_tail_tokens=0)
        chunks = adaptive.key_chunks(data.reader(0))
        first, _ = query_blocks(chunk, context, 128, torch.device("cpu"))
        band = torch.arange(context) >= (first - adaptive.recent_tokens).unsqueeze(1)
        assert not bool((forced(adaptive, chunks, chunk, context) & ~band).any())


def test_equal_scores_go_to_the_lower_page(generator: torch.Generator) -> None:
    keys = torch.ones(1, 1024, 32)
    query = torch.ones(128, 1, 32)
    data = oracle.paged(PLAIN, [keys], [keys], 64, generator)
    mask = page_mask(nothing_forced(budget_tokens=320), query, data)
    assert mask[0, 0].nonzero().flatten().tolist() == [*range(6), *range(28, 32)]


@given(context=st.integers(200, 1200), seed=st.integers(0, 1 << 30))
@pytest.mark.parametrize("chunk_tokens", [16, 64])
def test_d6_length_normalisation_changes_nothing_for_chunks_of_one_length(
    chunk_tokens: int, context: int, seed: int
) -> None:
    """Bit for bit, as the factor is a power of two: against chunks of plain means."""
    query, data = changing(PLAIN, torch.Generator().manual_seed(seed), 200, context, 2, 1)
    method = nothing_forced(key_block_tokens=chunk_tokens, density=0.4, query_block_tokens=64)

    class PlainMeans(Dhsa):
        def key_chunks(self, keys: object) -> KeyBlocks:
            chunks = method.key_chunks(data.reader(0))
            return dataclasses.replace(chunks, representation=chunks.representation / chunk_tokens**0.5)

    plain = PlainMeans(**dataclasses.asdict(method))
    assert torch.equal(page_mask(plain, query, data), page_mask(method, query, data))


@given(position=st.integers(0, 105), adaptive=st.booleans(), seed=st.integers(0, 1 << 30))
def test_d7_a_chunk_of_keys_like_the_query_is_found_wherever_it_lies(position: int, adaptive: bool, seed: int) -> None:
    """At any offset to the page grid where chunks are cut at the change of keys."""
    generator = torch.Generator().manual_seed(seed)
    context = 4096
    query = torch.nn.functional.one_hot(torch.tensor(0), 32).float().expand(128, 1, -1)
    keys = torch.nn.functional.one_hot(torch.tensor(1), 32) + 0.05 * torch.randn(1, context, 32, generator=generator)
    begin = position * (37 if adaptive else PAGE_TOKENS)
    keys[:, begin : begin + PAGE_TOKENS] = query[0]
    data = oracle.paged(PLAIN, [keys], [keys], 64, generator)
    # The open chunk forces nothing beyond `local`, which leaves no more than the needle's two pages.
    method = nothing_forced(
        recent_tokens=128, key_blocks="adaptive" if adaptive else "page", budget_tokens=128 + 128 + 64
    )
    mask = page_mask(method, query, data)
    assert bool(mask[0, 0, begin // PAGE_TOKENS : (begin + PAGE_TOKENS - 1) // PAGE_TOKENS + 1].all())


@pytest.mark.parametrize("chunk_tokens", [16, 32, 64, 128])
def test_d7_one_strong_key_is_lost_in_a_long_chunk(chunk_tokens: int, generator: torch.Generator) -> None:
    """Its share of the mean is one part in the chunk's length: 24 times a rival's score is enough up to 24 tokens.

    The method does not promise such a key; short chunks are the knob.
    """
    query = torch.nn.functional.one_hot(torch.tensor(0), 32).float().expand(128, 1, -1)
    keys = torch.zeros(1, 2048, 32)
    keys[:, 1024:] = query[0] / 24
    keys[:, 300] = query[0]
    data = oracle.paged(PLAIN, [keys], [keys], 64, generator)
    mask = page_mask(nothing_forced(key_block_tokens=chunk_tokens, budget_tokens=512), query, data)
    assert bool(mask[0, 0, 300 // PAGE_TOKENS]) == (chunk_tokens < 24)


@given(chunk=st.integers(1, 500), seed=st.integers(0, 1 << 30), adaptive=st.booleans())
def test_d8_one_head_has_one_choice(chunk: int, seed: int, adaptive: bool) -> None:
    """Bit for bit in all three modes, and the lists of both row modes."""
    query, data = changing(PLAIN, torch.Generator().manual_seed(seed), chunk, 900, 1, 1)
    knobs = {"density": 0.3, "key_blocks": "adaptive" if adaptive else "page"}
    expected = nothing_forced(**knobs).select(query, data.reader(0), SCALE, 16, FIRST_LAYER)
    for heads in ("kv_head", "layer"):
        for rows in ("query_head", "kv_head"):
            method = nothing_forced(**knobs, scores_per=heads, list_per=rows)
            assert same_lists(method.select(query, data.reader(0), SCALE, 16, FIRST_LAYER), expected), (heads, rows)


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (7, 1), (2, 2), (8, 1)])
def test_d8_heads_that_share_scores_share_lists(
    platform: Platform, heads: int, kv_heads: int, generator: torch.Generator
) -> None:
    """What they share is tested with D4; here who shares, and what each row mode reads."""
    chunk, context = 300, 1000
    query, data = changing(platform, generator, chunk, context, heads, kv_heads)

    def allowed(share: str, rows: str) -> torch.Tensor:
        method = nothing_forced(density=0.3, scores_per=share, list_per=rows)
        lists = method.select(query, data.reader(0), SCALE, 32, FIRST_LAYER)
        return chunk_allowed(method, lists, data, 0, query)

    own = allowed("query_head", "query_head").view(kv_heads, -1, chunk, context)
    union = own.any(1, keepdim=True).expand_as(own).flatten(0, 1)
    assert torch.equal(allowed("query_head", "kv_head"), union)
    for share, groups in (("kv_head", kv_heads), ("layer", 1)):
        shared = allowed(share, "query_head")
        assert torch.equal(shared, allowed(share, "kv_head"))
        grouped = shared.view(groups, -1, chunk, context)
        assert torch.equal(grouped, grouped[:, :1].expand_as(grouped))


@pytest.mark.parametrize("platform", EXECUTING)
@pytest.mark.parametrize("chunks", ["page", "adaptive"])
def test_d9_the_tail_is_dense(platform: Platform, chunks: str, generator: torch.Generator) -> None:
    chunk, context, tail = 450, 1153, 80
    query, data = changing(platform, generator, chunk, context, 4, 2)
    method = first_stage(key_blocks=chunks, density=0.2, dense_tail_tokens=tail)
    lists = method.select(query, data.reader(0), SCALE, 64, FIRST_LAYER)
    causal = oracle.causal_mask(chunk, context)
    allowed = chunk_allowed(method, lists, data, 0, query)
    # The last block of queries holds 66 of the 80, so the block before it is dense too, and no other.
    assert torch.equal(allowed[:, 256:], causal[256:].expand(4, -1, -1))
    assert not torch.equal(allowed[:, 255], causal[255].expand(4, -1))
    dense = oracle.attention(query, data.keys[0], data.values[0], SCALE, causal)
    oracle.assert_close(attend_chunk(method, lists, data, 0, query)[-tail:], dense[-tail:])


def test_the_budget_replaces_the_density(generator: torch.Generator) -> None:
    query, data = changing(PLAIN, generator, 256, 1000, 1, 1)

    def kept(density: float, budget: int) -> list[int]:
        mask = page_mask(nothing_forced(density=density, budget_tokens=budget), query, data)
        return [int(row.sum()) for row in mask[0]]

    # Each query block has the density of its own reach.
    assert kept(0.25, 0) == [math.ceil(218 / PAGE_TOKENS), math.ceil(250 / PAGE_TOKENS)]
    assert kept(0.25, 417) == kept(0.9, 417) == [math.ceil(417 / PAGE_TOKENS)] * 2


TWO_STAGES = [
    nothing_forced(density=0.2, bound_weight=0.5, candidate_factor=2.0, sink_tokens=32),
    nothing_forced(budget_tokens=224, candidate_factor=1.5, recent_tokens=40, query_block_tokens=64),
    nothing_forced(density=0.25, bound_weight=1.0, candidate_factor=4.0, scores_per="kv_head", key_block_tokens=64),
    nothing_forced(density=0.3, key_blocks="adaptive", candidate_factor=2.0, scores_per="layer"),
]


EVERY_FOURTH = [[token for token in range(PAGE_TOKENS) if token // 2 % 4 == group] for group in range(4)]


def masses_of_candidates(method: Dhsa, query: torch.Tensor, data: Paged, chunk: int, context: int) -> torch.Tensor:
    """Float64 ``[score_heads, query_blocks, pages]``, those that share scores as one; -1 for pages of the others.

    Candidates are what the first stage alone keeps of a larger budget, a KV head's heads as one; all pages where that
    budget is two thirds of them or more.
    """
    first, last = query_blocks(chunk, context, method.query_block_tokens, torch.device("cpu"))
    mass = torch.full((4, len(first), -(-context // PAGE_TOKENS)), -1.0, dtype=torch.double)
    for row, (start, stop) in enumerate(zip(first.tolist(), (last + 1).tolist(), strict=True)):
        larger = dataclasses.replace(
            method,
            candidate_factor=1.0,
            coverage=1.0,
            scores_per="layer" if method.scores_per == "layer" else "kv_head",
            budget_tokens=context
            if method.weighs_all_pages
            else math.ceil(budget_of(method, stop - 1) * method.candidate_factor) * PAGE_TOKENS,
        )
        candidates = page_mask(larger, query, data)[:, row]
        positions = torch.tensor([start + (2 * sample + 1) * (stop - start) // 32 for sample in range(16)])
        past = torch.arange(context) <= positions.unsqueeze(1)
        for head in range(4):
            pages = candidates[head * len(candidates) // 4]
            readable = past & pages.repeat_interleave(PAGE_TOKENS)[:context]
            queries = query.double().cpu()[positions - context + chunk, head]
            products = queries @ data.keys[0][head // 2].double().cpu().T * SCALE
            products = products.masked_fill(~readable, float("-inf"))
            # A page counts by the largest product of every fourth pair of its keys.
            products = torch.nn.functional.pad(products, (0, -context % PAGE_TOKENS), value=float("-inf"))
            largest = torch.stack(
                [products.view(16, -1, PAGE_TOKENS)[:, :, place].amax(2) for place in EVERY_FOURTH], 2
            )
            mass[head, row] = largest.flatten(1).softmax(1).sum(0).view(-1, 4).sum(1).masked_fill(~pages, -1)
    return mass.view({"query_head": 4, "kv_head": 2, "layer": 1}[method.scores_per], -1, *mass.shape[1:]).sum(1)


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("method", TWO_STAGES, ids=["mixed", "mean", "bounds-kv-head", "adaptive-layer"])
@pytest.mark.parametrize(("chunk", "context"), CHUNKS[2:4])
def test_d11_the_second_stage_keeps_the_candidates_with_most_mass(
    platform: Platform, method: Dhsa, chunk: int, context: int, generator: torch.Generator
) -> None:
    """Against float64."""
    query, data = changing(platform, generator, chunk, context, 4, 2)
    _, last = query_blocks(chunk, context, method.query_block_tokens, torch.device("cpu"))
    mass = masses_of_candidates(method, query, data, chunk, context)
    must = to_pages(forced(method, method.key_chunks(data.reader(0)), chunk, context))
    assert_best(method, page_mask(method, query, data), mass, must, last)


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("method", TWO_STAGES, ids=["mixed", "mean", "bounds-kv-head", "adaptive-layer"])
@pytest.mark.parametrize("coverage", [0.3, 0.8, 0.97])
def test_coverage_ends_lists_that_hold_it(
    platform: Platform, method: Dhsa, coverage: float, generator: torch.Generator
) -> None:
    """Of what the budget keeps: the fewest pages with that share of the mass in float64, and forced ones."""
    chunk, context = CHUNKS[3]
    method = dataclasses.replace(method, density=0.6, budget_tokens=0)
    query, data = changing(platform, generator, chunk, context, 4, 2)
    mass = masses_of_candidates(method, query, data, chunk, context)
    must = to_pages(forced(method, method.key_chunks(data.reader(0)), chunk, context))
    whole = page_mask(method, query, data)
    kept = page_mask(dataclasses.replace(method, coverage=coverage), query, data)
    ended = 0
    for head, row in itertools.product(range(kept.shape[0]), range(kept.shape[1])):
        of_row = mass[head, row].clamp(min=0)
        order = of_row.argsort(descending=True)
        before = of_row[order].cumsum(0) - of_row[order]
        target = coverage * float(of_row.sum())
        if float((before - target).abs().min()) < 1e-4:
            continue
        covering = torch.zeros_like(must[row]).scatter_(0, order, before < target)
        assert torch.equal(kept[head, row], whole[head, row] & (covering | must[row])), f"head {head}, row {row}"
        ended += int(kept[head, row].sum() < whole[head, row].sum())
    assert ended or coverage > 0.5


@pytest.mark.parametrize("key_block_tokens", [32, 64, 128])
@pytest.mark.parametrize(("bound_weight", "candidate_factor"), [(1.0, 1.0), (0.5, 1.0), (0.5, 2.0)])
def test_d12_bounds_find_one_strong_key_in_a_long_key_block(
    key_block_tokens: int, bound_weight: float, candidate_factor: float, generator: torch.Generator
) -> None:
    """The key that means lose in D7."""
    query = torch.nn.functional.one_hot(torch.tensor(0), 32).float().expand(128, 1, -1)
    keys = torch.zeros(1, 2048, 32)
    keys[:, 1024:] = query[0] / 24
    keys[:, 300] = query[0]
    data = oracle.paged(PLAIN, [keys], [keys], 64, generator)
    knobs = {"key_block_tokens": key_block_tokens, "budget_tokens": 512}
    found = nothing_forced(**knobs, bound_weight=bound_weight, candidate_factor=candidate_factor)
    # With this scale the key has more attention than the others of its page together.
    mask = found.block_mask(query, data.reader(0), 10.0, FIRST_LAYER)
    assert bool(mask[0, 0, 300 // PAGE_TOKENS])
    assert not bool(page_mask(nothing_forced(**knobs), query, data)[0, 0, 300 // PAGE_TOKENS])


INVARIANT = [
    Dhsa(sink_tokens=32),
    first_stage(density=0.2, sink_tokens=32, recent_tokens=40, dense_tail_tokens=100),
    first_stage(
        density=0.2,
        sink_tokens=0,
        recent_tokens=0,
        bound_weight=0.5,
        candidate_factor=2.0,
        coverage=0.8,
        query_block_tokens=64,
    ),
    first_stage(budget_tokens=224, sink_tokens=0, key_blocks="adaptive", candidate_factor=1.5, dense_tail_tokens=300),
]


@given(
    length=st.integers(300, 1300),
    cuts=st.sets(st.integers(1, 10), max_size=4),
    method=st.sampled_from(INVARIANT),
    seed=st.integers(0, 1 << 30),
)
def test_d13_lists_are_the_same_for_every_chunking(length: int, cuts: set[int], method: Dhsa, seed: int) -> None:
    """Of prompt chunks that begin at multiples of a query block; the prompt's dense tail included."""
    query, data = changing(PLAIN, torch.Generator().manual_seed(seed), length, length, 2, 1)
    layer = Layer(0, 0, length)
    whole = method.block_mask(query, data.reader(0), SCALE, layer)
    edges = [0, *(cut * 128 for cut in sorted(cuts) if cut * 128 < length), length]
    for start, stop in itertools.pairwise(edges):
        reader = PLAIN.keys_of(data.kv_cache, data.block_table[0], stop)
        part = method.block_mask(query[start:stop], reader, SCALE, layer)
        rows = slice(start // method.query_block_tokens, -(-stop // method.query_block_tokens))
        assert torch.equal(part, whole[:, rows, : part.shape[2]]), f"queries {start} to {stop} of {length}"


def test_outputs_that_are_computed_again_belong_to_the_dense_tail(generator: torch.Generator) -> None:
    """A preempted request's chunk reaches beyond its prompt."""
    query, data = changing(PLAIN, generator, 1000, 1000, 2, 1)
    dense = {}
    for tail in (0, 64):
        mask = nothing_forced(dense_tail_tokens=tail).block_mask(query, data.reader(0), SCALE, Layer(0, 0, 600))
        dense[tail] = [bool(mask[:, row, : 4 * row + 4].all()) for row in range(1, 8)]
    assert dense[0] == [False] * 7
    # The prompt's last 64 tokens, 536 to 599, lie in the fifth query block.
    assert dense[64] == [False] * 3 + [True] * 4


def test_adaptive_key_blocks_have_no_bounds() -> None:
    with pytest.raises(ValidationError, match="adaptive key blocks are scored by their mean key; set it to 0"):
        Dhsa(key_blocks="adaptive")


def test_coverage_wants_a_second_stage() -> None:
    with pytest.raises(ValidationError, match="without a second stage no attention is known; set it to 1"):
        first_stage(coverage=0.9)
