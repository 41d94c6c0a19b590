"""FlexPrefill: the properties F1 to F12 of the notes, in strict mode, and the faithful mode."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests import oracle
from tests.methods import flex_reference as reference
from tests.methods.lists import FIRST_LAYER, attend_chunk, chunk_allowed, same_lists
from tests.oracle import EXECUTING, PLAIN, SELECTING, Paged, Platform
from vllm_sparse.kernels.coverage.reference import coverage_count, top_mask
from vllm_sparse.kernels.flex_pattern.reference import jensen_shannon_distance
from vllm_sparse.methods.flexprefill import FlexPrefill

SCALE = 0.11
B = 128
FARTHEST = math.sqrt(math.log(2))
# Whole prompts and chunks; chunk starts on the key grid and off it.
CHUNKS = [(1000, 1000), (1024, 1024), (512, 1024), (300, 1000), (257, 1153), (129, 700)]
# Reference and method differ by float32 rounding: the set for gamma lies between the reference's sets around it.
SLACK = 1e-4


def peaked(
    platform: Platform, generator: torch.Generator, chunk: int, context: int, heads: int, kv_heads: int
) -> tuple[torch.Tensor, Paged]:
    """A request whose attention has columns, diagonals and noise, so that no family is trivial."""
    head_size = 32
    keys = oracle.random_tensor(platform, generator, kv_heads, context, head_size)
    query = oracle.random_tensor(platform, generator, chunk, heads, head_size)
    hot = torch.randint(0, context, (5,), generator=generator)
    keys[:, hot] += 1.5
    query += 1.0
    query += 1.5 * keys[:, context - chunk :].transpose(0, 1).repeat_interleave(heads // kv_heads, dim=1)
    data = oracle.paged(platform, [keys], [oracle.random_tensor(platform, generator, *keys.shape)], 64, generator)
    return query, data


def block_mask(method: FlexPrefill, query: torch.Tensor, data: Paged, request: int = 0) -> torch.Tensor:
    return method.block_mask(query, data.reader(request), SCALE, FIRST_LAYER).cpu()


def assert_between(low: torch.Tensor, mask: torch.Tensor, high: torch.Tensor, what: str) -> None:
    """Low is within mask is within high."""
    assert not bool((low & ~mask).any()), f"{what}: blocks are missing: {(low & ~mask).nonzero().tolist()}"
    assert not bool((mask & ~high).any()), f"{what}: blocks too many: {(mask & ~high).nonzero().tolist()}"


@pytest.mark.parametrize("platform", EXECUTING)
@pytest.mark.parametrize(("chunk", "context"), CHUNKS)
def test_f1_gamma_of_one_is_dense(platform: Platform, chunk: int, context: int, generator: torch.Generator) -> None:
    query, data = peaked(platform, generator, chunk, context, 4, 2)
    causal = oracle.causal_mask(chunk, context)
    dense = oracle.attention(query, data.keys[0], data.values[0], SCALE, causal)
    for page in platform.page_sizes(data.block_size):
        method = FlexPrefill(gamma=1.0)
        lists = method.select(query, data.reader(0), SCALE, page, FIRST_LAYER)
        assert torch.equal(chunk_allowed(method, lists, data, 0, query), causal.expand(4, -1, -1))
        oracle.assert_close(attend_chunk(method, lists, data, 0, query), dense)


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("faithful", [False, True], ids=["strict", "faithful"])
def test_f2_min_budget_of_the_context_is_dense(platform: Platform, faithful: bool, generator: torch.Generator) -> None:
    for chunk, context in CHUNKS:
        query, data = peaked(platform, generator, chunk, context, 4, 2)
        method = FlexPrefill(gamma=0.05, divergence_threshold=0.0, min_budget_tokens=context, faithful=faithful)
        lists = method.select(query, data.reader(0), SCALE, 16, FIRST_LAYER)
        causal = oracle.causal_mask(chunk, context).expand(4, -1, -1)
        assert torch.equal(chunk_allowed(method, lists, data, 0, query), causal), f"{chunk} of {context}"


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("faithful", [False, True], ids=["strict", "faithful"])
def test_f3_sink_and_diagonal_are_kept_and_nothing_above_it(
    platform: Platform, tau: float, faithful: bool, generator: torch.Generator
) -> None:
    for chunk, context in CHUNKS:
        query, data = peaked(platform, generator, chunk, context, 4, 2)
        mask = block_mask(
            FlexPrefill(gamma=0.1, divergence_threshold=tau, min_budget_tokens=0, faithful=faithful), query, data
        )
        for block in range(mask.shape[1]):
            first = context - chunk + block * B
            last = min(first + B, context) - 1
            assert bool(mask[:, block, 0].all())
            assert bool(mask[:, block, first // B : last // B + 1].all()), f"{chunk} of {context}, query block {block}"
            assert not bool(mask[:, block, last // B + 1 :].any()), f"{chunk} of {context}, query block {block}"


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("gamma", [0.3, 0.7, 0.95])
@pytest.mark.parametrize(("chunk", "context"), CHUNKS)
def test_f4_and_f5_the_lines_cover_gamma_with_no_block_too_many(
    platform: Platform, gamma: float, chunk: int, context: int, generator: torch.Generator
) -> None:
    """Against the float64 transcription, which includes every block that a band touches and nothing else."""
    query, data = peaked(platform, generator, chunk, context, 2, 1)
    mask = block_mask(FlexPrefill(gamma=gamma, divergence_threshold=0.0, min_budget_tokens=0), query, data)
    always = reference.forced(chunk, context)
    for head in range(2):
        low = reference.strict_lines(query, data.keys[0], head, SCALE, gamma - SLACK) | always
        high = reference.strict_lines(query, data.keys[0], head, SCALE, gamma + SLACK) | always
        assert_between(low, mask[head], high, f"head {head}")


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("gamma", [0.5, 0.9])
@pytest.mark.parametrize(("chunk", "context"), CHUNKS)
def test_f4_the_list_covers_gamma_of_the_sample(
    platform: Platform, gamma: float, chunk: int, context: int, generator: torch.Generator
) -> None:
    """Measured on the exported tokens: mean mass of the sampled rows, for every head."""
    query, data = peaked(platform, generator, chunk, context, 4, 2)
    method = FlexPrefill(gamma=gamma, divergence_threshold=0.0, min_budget_tokens=0)
    lists = method.select(query, data.reader(0), SCALE, 64, FIRST_LAYER)
    kept = chunk_allowed(method, lists, data, 0, query)[:, -B:]
    rows = kept.shape[1]
    mass = oracle.probabilities(query[-B:], data.keys[0], SCALE, oracle.causal_mask(rows, context))
    covered = (mass * kept).sum(2).mean(1)
    assert float(covered.min()) >= gamma - 1e-5, covered


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("gamma", [0.3, 0.7, 0.95])
@pytest.mark.parametrize(("chunk", "context"), CHUNKS)
def test_f4_and_f5_the_pooled_map_covers_gamma_with_no_block_too_many(
    platform: Platform, gamma: float, chunk: int, context: int, generator: torch.Generator
) -> None:
    query, data = peaked(platform, generator, chunk, context, 2, 1)
    mask = block_mask(FlexPrefill(gamma=gamma, divergence_threshold=1.0, min_budget_tokens=0), query, data)
    for head in range(2):
        # The least budget of lines is one column and one band here, which stay beside the pooled map.
        least = reference.strict_lines(query, data.keys[0], head, SCALE, 1e-9)
        always = reference.forced(chunk, context) | least
        low = reference.strict_pooled(query, data.keys[0], head, SCALE, gamma - SLACK) | always
        high = reference.strict_pooled(query, data.keys[0], head, SCALE, gamma + SLACK) | always
        assert_between(low, mask[head], high, f"head {head}")


@given(
    masses=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60).filter(lambda masses: sum(masses) > 1e-3),
    gamma=st.floats(0.01, 0.999),
)
def test_f5_the_cumulative_list_is_the_shortest(masses: list[float], gamma: float) -> None:
    mass = torch.tensor([masses], dtype=torch.float64)
    mass /= mass.sum()
    keep = top_mask(mass, coverage_count(mass, torch.tensor([gamma], dtype=torch.float64)))
    covered = float(mass[keep].sum())
    assert covered >= gamma - 1e-12
    assert covered - float(mass[keep].min()) < gamma + 1e-12
    assert float(mass[keep].min()) >= float(mass[~keep].max()) if bool((~keep).any()) else True


@given(low=st.floats(0.05, 0.99), high=st.floats(0.05, 0.99), budget=st.integers(0, 700), faithful=st.booleans())
@pytest.mark.parametrize("tau", [0.0, 1.0], ids=["lines", "pooled"])
def test_f6_more_gamma_or_budget_keeps_more(tau: float, low: float, high: float, budget: int, faithful: bool) -> None:
    query, data = peaked(PLAIN, torch.Generator().manual_seed(budget), 400, 900, 2, 1)
    low, high = sorted((low, high))

    def mask(gamma: float, min_budget: int) -> torch.Tensor:
        return block_mask(
            FlexPrefill(gamma=gamma, divergence_threshold=tau, min_budget_tokens=min_budget, faithful=faithful),
            query,
            data,
        )

    least = mask(low, 0)
    assert not bool((least & ~mask(high, 0)).any())
    assert not bool((least & ~mask(low, budget)).any())


def test_f6_ties_go_to_the_lower_index() -> None:
    keep = top_mask(torch.tensor([[0.2, 0.3, 0.2, 0.3, 0.2]]), torch.tensor([3]))
    assert keep.tolist() == [[True, True, False, True, False]]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_f7_the_distance_is_symmetric_and_bounded(pairs: list[tuple[float, float]]) -> None:
    both = torch.tensor(pairs, dtype=torch.float64).T + torch.tensor([[0.0], [0.0]])
    both = torch.nn.functional.pad(both, (0, 1), value=0.1)
    first, second = (both / both.sum(1, keepdim=True)).unsqueeze(1)
    forward = float(jensen_shannon_distance(first, second))
    assert forward == pytest.approx(float(jensen_shannon_distance(second, first)), abs=1e-9)
    assert 0 <= forward <= FARTHEST + 1e-9
    assert float(jensen_shannon_distance(first, first)) == pytest.approx(0, abs=1e-6)


def test_f7_disjoint_distributions_are_farthest_and_zeros_are_guarded() -> None:
    first, second = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert float(jensen_shannon_distance(first, second)) == pytest.approx(FARTHEST)
    # The official code computes 0 * log 0, whose NaN compares false: never query-aware.
    assert float(jensen_shannon_distance(first, second, guard_zeros=False)) == math.inf


def test_f7_tau_switches_the_pattern(generator: torch.Generator) -> None:
    """Zero never trusts the pooled map, 1 always does, and in between the float64 distance decides."""
    query, data = peaked(PLAIN, generator, 700, 1000, 2, 1)
    gamma = 0.6
    masks = {
        tau: block_mask(FlexPrefill(gamma=gamma, divergence_threshold=tau, min_budget_tokens=0), query, data)
        for tau in (0.0, 1.0)
    }
    assert not torch.equal(masks[0.0], masks[1.0]), "the patterns must differ for this test to tell them apart"
    for head in range(2):
        distance = reference.sample(query, data.keys[0], head, SCALE).js_distance
        for tau in (distance * 0.999, distance * 1.001):
            mask = block_mask(
                FlexPrefill(gamma=gamma, divergence_threshold=min(tau, 1.0), min_budget_tokens=0), query, data
            )
            assert torch.equal(mask[head], masks[1.0 if tau > distance else 0.0][head])


def test_f7_identical_keys_in_each_block_are_query_aware(generator: torch.Generator) -> None:
    """Then pooling loses nothing, and the pooled map is trusted at the smallest tau."""
    context = 1024
    blocks = oracle.random_tensor(PLAIN, generator, 1, context // B, 32)
    blocks[:, -1] = -2.0
    keys = blocks.repeat_interleave(B, dim=1)
    query = (oracle.random_tensor(PLAIN, generator, 1, 2, 32) + 2.0).expand(context, -1, -1).contiguous()
    data = oracle.paged(PLAIN, [keys], [keys], 32, generator)
    pooled = block_mask(FlexPrefill(gamma=0.6, divergence_threshold=1.0, min_budget_tokens=0), query, data)
    assert torch.equal(
        block_mask(FlexPrefill(gamma=0.6, divergence_threshold=0.01, min_budget_tokens=0), query, data), pooled
    )


@pytest.mark.parametrize("min_budget", [0, 256, 500])
@pytest.mark.parametrize("faithful", [False, True], ids=["strict", "faithful"])
def test_f8_a_sink_head_keeps_forced_blocks_and_the_minimum(
    min_budget: int, faithful: bool, generator: torch.Generator
) -> None:
    context = 1024
    keys = torch.zeros(1, context, 32)
    keys[:, 0] = 1.0
    query = torch.ones(context, 1, 32)
    data = oracle.paged(PLAIN, [keys], [keys], 32, generator)
    method = FlexPrefill(gamma=0.95, divergence_threshold=0.0, min_budget_tokens=min_budget, faithful=faithful)
    mask = method.block_mask(query, data.reader(0), 30.0, FIRST_LAYER)[0]
    expected = reference.forced(context, context)
    if faithful:
        # The official scale, 1/sqrt(head_size), leaves this head less sharp; only the forced blocks are certain.
        assert bool(mask[expected].all())
        return
    floor = max(-(-min_budget // B), 1)
    # All columns but the first and all bands but the farthest tie at no mass: the lower index wins.
    columns, bands = list(range(floor)), [7, *range(floor - 1)]
    for row in range(8):
        expected[row, [column for column in columns if column <= row]] = True
        for band in bands:
            # A band of 128 distances reaches back into the block before its own.
            expected[row, [block for block in (row - band - 1, row - band) if block >= 0]] = True
    assert torch.equal(mask, expected), (mask.int(), expected.int())


@pytest.mark.parametrize("platform", EXECUTING)
@pytest.mark.parametrize("offset", [0, 1, 200, 384])
def test_f8_a_diagonal_head_is_followed(platform: Platform, offset: int, generator: torch.Generator) -> None:
    """Each query attends to the key at one distance: few blocks, no error."""
    context, chunk, start = 1536, 1100, 436
    # Of equal length: a query whose own key is short would look elsewhere too.
    keys = 8 * torch.nn.functional.normalize(oracle.random_tensor(platform, generator, 1, context, 64), dim=-1)
    values = oracle.random_tensor(platform, generator, 1, context, 64)
    query = (keys[0, start - offset : context - offset].unsqueeze(1) * 8).contiguous()
    data = oracle.paged(platform, [keys], [values], 64, generator)
    method = FlexPrefill(gamma=0.9, divergence_threshold=0.0, min_budget_tokens=0)
    lists = method.select(query, data.reader(0), SCALE, 64, FIRST_LAYER)
    allowed = chunk_allowed(method, lists, data, 0, query)
    # The first block, the diagonal and one or two bands.
    assert int(allowed.sum(2).max()) <= 7 * B
    dense = oracle.attention(query, keys, values, SCALE, oracle.causal_mask(chunk, context))
    oracle.assert_close(attend_chunk(method, lists, data, 0, query), dense)


@pytest.mark.parametrize("platform", SELECTING)
def test_f9_selection_is_invariant(platform: Platform, generator: torch.Generator) -> None:
    """Physical order, block size and neighbours leave the block map unchanged bit for bit, in every mode."""
    keys = oracle.random_tensor(platform, generator, 2, 1153, 32)
    query = oracle.random_tensor(platform, generator, 400, 4, 32, spread=3)
    for method in (
        FlexPrefill(gamma=0.5, min_budget_tokens=0),
        FlexPrefill(gamma=0.5, divergence_threshold=1.0, min_budget_tokens=0, faithful=True),
    ):
        expected: torch.Tensor | None = None
        for block_size in (16, 32, 48, 64, 128, 256):
            neighbour = oracle.random_tensor(platform, generator, 2, 333, 32)
            data = oracle.paged(platform, [neighbour, keys], [neighbour, keys], block_size, generator)
            mask = block_mask(method, query, data, request=1)
            expected = mask if expected is None else expected
            assert torch.equal(mask, expected), f"block size {block_size}"


@pytest.mark.parametrize("platform", EXECUTING)
@pytest.mark.parametrize("gamma", [0.3, 0.6])
def test_f10_the_error_is_bounded_by_the_uncovered_mass(
    platform: Platform, gamma: float, generator: torch.Generator
) -> None:
    chunk, context, heads = 300, 1500, 4
    query, data = peaked(platform, generator, chunk, context, heads, 2)
    method = FlexPrefill(gamma=gamma, divergence_threshold=0.0, min_budget_tokens=0)
    lists = method.select(query, data.reader(0), SCALE, 64, FIRST_LAYER)
    kept = chunk_allowed(method, lists, data, 0, query)
    causal = oracle.causal_mask(chunk, context)
    missed = (oracle.probabilities(query, data.keys[0], SCALE, causal) * ~kept).sum(2).T
    dense = oracle.attention(query, data.keys[0], data.values[0], SCALE, causal)
    error = (attend_chunk(method, lists, data, 0, query).double().cpu() - dense).abs().amax(2)
    largest_value = float(data.values[0].abs().max())
    assert float(missed[-B:].max()) > 0.01, "the bound must bind for this test to say anything"
    slack = 4 * oracle.TOLERANCE[platform.dtype] * largest_value
    assert bool((error <= 2 * missed * largest_value + slack).all())


@pytest.mark.parametrize("platform", EXECUTING)
def test_f11_output_equals_the_softmax_over_the_exported_set(platform: Platform, generator: torch.Generator) -> None:
    """The shared matrix tests this over all settings; here on a map with structure, at chunk starts off the grid."""
    for chunk, context in CHUNKS:
        query, data = peaked(platform, generator, chunk, context, 4, 2)
        method = FlexPrefill(gamma=0.5, min_budget_tokens=0)
        lists = method.select(query, data.reader(0), SCALE, 64, FIRST_LAYER)
        allowed = chunk_allowed(method, lists, data, 0, query)
        expected = oracle.attention(query, data.keys[0], data.values[0], SCALE, allowed)
        oracle.assert_close(attend_chunk(method, lists, data, 0, query), expected, f"{chunk} of {context}")


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("length", [1024, 1000, 1153, 300])
@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("min_budget", [0, 300])
def test_faithful_mode_reproduces_the_official_counts(
    platform: Platform, length: int, tau: float, min_budget: int, generator: torch.Generator
) -> None:
    query, data = peaked(platform, generator, length, length, 2, 1)
    for gamma in (0.4, 0.9):
        method = FlexPrefill(gamma=gamma, divergence_threshold=tau, min_budget_tokens=min_budget, faithful=True)
        # The model's scale must not matter: the official code samples with its own.
        mask = method.block_mask(query, data.reader(0), 123.0, FIRST_LAYER).cpu()
        for head in range(2):
            low = reference.faithful(query, data.keys[0], head, gamma - 1e-5, tau, min_budget)
            high = reference.faithful(query, data.keys[0], head, gamma + 1e-5, tau, min_budget)
            assert_between(low, mask[head], high, f"gamma {gamma}, head {head}")


@pytest.mark.parametrize("platform", SELECTING)
def test_max_budget_caps_each_family(platform: Platform, generator: torch.Generator) -> None:
    query, data = peaked(platform, generator, 128, 1024, 1, 1)
    mask = block_mask(
        FlexPrefill(gamma=0.99, divergence_threshold=0.0, min_budget_tokens=0, max_budget_tokens=128), query, data
    )
    # One column, one band over two blocks, the first block and the own block.
    assert int(mask.sum()) <= 5


def test_strict_lists_ignore_what_lies_behind_the_context(generator: torch.Generator) -> None:
    """A reader of a shorter context over the same pages selects as if the rest did not exist."""
    keys = oracle.random_tensor(PLAIN, generator, 1, 1000, 32)
    query = oracle.random_tensor(PLAIN, generator, 300, 2, 32, spread=3)
    whole = oracle.paged(PLAIN, [keys], [keys], 64, generator)
    part = oracle.paged(PLAIN, [keys[:, :777]], [keys[:, :777]], 64, generator)
    method = FlexPrefill(gamma=0.4, min_budget_tokens=0)
    reader = PLAIN.keys_of(whole.kv_cache, whole.block_table[0], 777)
    expected = method.select(query, part.reader(0), SCALE, 16, FIRST_LAYER)
    assert same_lists(method.select(query, reader, SCALE, 16, FIRST_LAYER), expected)


EVERY = 512
STRETCHES = [
    FlexPrefill(gamma=0.5, divergence_threshold=0.0, min_budget_tokens=0, sample_every_tokens=EVERY),
    FlexPrefill(gamma=0.5, divergence_threshold=1.0, min_budget_tokens=0, sample_every_tokens=EVERY),
    FlexPrefill(gamma=0.7, min_budget_tokens=128, query_block_tokens=64, sample_every_tokens=EVERY),
]


def parts_of(
    method: FlexPrefill, query: torch.Tensor, data: Paged, edges: list[int]
) -> list[tuple[int, int, torch.Tensor]]:
    """Start, end and map of each chunk of a prompt."""
    parts = []
    for start, stop in itertools.pairwise(edges):
        reader = PLAIN.keys_of(data.kv_cache, data.block_table[0], stop)
        parts.append((start, stop, method.block_mask(query[start:stop], reader, SCALE, FIRST_LAYER)))
    return parts


@given(
    length=st.integers(1, 2500),
    cuts=st.sets(st.integers(1, 4)),
    method=st.sampled_from(STRETCHES),
    seed=st.integers(0, 1 << 30),
)
def test_f12_stretches_choose_the_same_for_every_chunking(
    length: int, cuts: set[int], method: FlexPrefill, seed: int
) -> None:
    """Of prompt chunks that begin at multiples of `sample_every_tokens`."""
    query, data = peaked(PLAIN, torch.Generator().manual_seed(seed), length, length, 2, 1)
    whole = block_mask(method, query, data)
    edges = [0, *(cut * EVERY for cut in sorted(cuts) if cut * EVERY < length), length]
    for start, stop, part in parts_of(method, query, data, edges):
        rows = slice(start // method.query_block_tokens, -(-stop // method.query_block_tokens))
        assert torch.equal(part, whole[:, rows, : part.shape[2]]), f"queries {start} to {stop} of {length}"


@given(length=st.integers(1, 1800), cuts=st.sets(st.integers(1, 14), max_size=4), seed=st.integers(0, 1 << 30))
def test_f12_a_chunk_that_ends_within_a_stretch_changes_no_other_lines(length: int, cuts: set[int], seed: int) -> None:
    """Lines of a stretch are the same in each chunk that holds its end and the query block before it."""
    method = STRETCHES[0]
    query, data = peaked(PLAIN, torch.Generator().manual_seed(seed), length, length, 2, 1)
    whole = block_mask(method, query, data)
    edges = [0, *(cut * B for cut in sorted(cuts) if cut * B < length), length]
    for start, stop, part in parts_of(method, query, data, edges):
        # The prompt's end ends its last stretch, whose sample a chunk has that begins a query block before it; another
        # chunk may leave its last stretch to the next.
        has_sample = start == 0 or stop - start >= B
        ended = stop if stop == length and has_sample else max(stop // EVERY * EVERY, start)
        first, count = start // B, -(-(ended - start) // B)
        expected = whole[:, first : first + count, : part.shape[2]]
        assert torch.equal(part[:, :count], expected), f"queries {start} to {ended} of a chunk to {stop}"


@given(
    length=st.integers(1, 1500), chunk=st.integers(1, 1500), tau=st.sampled_from([0.0, 0.1, 1.0]), seed=st.integers()
)
def test_f12_a_chunk_within_one_stretch_has_the_paper_s_sample(length: int, chunk: int, tau: float, seed: int) -> None:
    query, data = peaked(PLAIN, torch.Generator().manual_seed(seed % (1 << 30)), min(chunk, length), length, 2, 1)
    for every in (1536, 1 << 24):
        masks = [
            block_mask(
                FlexPrefill(gamma=0.5, divergence_threshold=tau, min_budget_tokens=0, sample_every_tokens=tokens),
                query,
                data,
            )
            for tokens in (0, every)
        ]
        assert torch.equal(*masks)


def test_stretches_follow_attention_that_changes_within_a_prompt() -> None:
    """The first half of the queries attends to one key block, the second half to another."""
    context, first_block, second_block = 2048, 3, 5
    keys, query = torch.zeros(1, context, 32), torch.zeros(context, 1, 32)
    keys[:, first_block * B : (first_block + 1) * B, 0] = 1
    keys[:, second_block * B : (second_block + 1) * B, 1] = 1
    query[: context // 2, 0, 0] = 1
    query[context // 2 :, 0, 1] = 1
    data = oracle.paged(PLAIN, [keys], [keys], 64, torch.Generator().manual_seed(0))
    masks = {}
    for every in (0, context // 2):
        method = FlexPrefill(gamma=0.9, divergence_threshold=0.0, min_budget_tokens=0, sample_every_tokens=every)
        masks[every] = method.block_mask(query, data.reader(0), 30.0, FIRST_LAYER)[0]
    one, two = masks.values()
    # Past their own blocks, before which the first half's first queries have no such key.
    assert not bool(one[first_block + 1 : 8, first_block].any())
    assert bool(two[first_block + 1 : 8, first_block].all())
    assert torch.equal(one[8:], two[8:]), "the last sample is the same"
    assert bool(two[8:, second_block].all())


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"sample_every_tokens": 128}, "samples so close cost more than they save; set it to 512 or more, or to 0"),
        ({"sample_every_tokens": 600}, "multiple of 128"),
        ({"sample_every_tokens": -512}, "greater than or equal to 0"),
        ({"sample_every_tokens": 512, "faithful": True}, "has one sample; set it to 0, or faithful to false"),
    ],
)
def test_stretches_that_cannot_be_are_refused(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        FlexPrefill(**knobs)
