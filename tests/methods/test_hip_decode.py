"""HiP's decoding: the properties H1 to H3, H7, H8 and H10 of the notes; H9 is about the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests import oracle
from tests.methods.lists import FIRST_LAYER, SCALE, check_list, same_lists
from tests.methods.test_hip import pruned, smooth, whole_numbers
from tests.oracle import PLAIN, SELECTING, Paged, Platform
from vllm_sparse.kernels.hierarchical_descent import DescentArguments, Stage
from vllm_sparse.kernels.hierarchical_descent.reference import hierarchical_descent
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.methods.hip import Hip, HipDecode
from vllm_sparse.methods.knobs import UNBOUNDED_TOKENS, KnobError
from vllm_sparse.pages import PageList
from vllm_sparse.step.roles import Role
from vllm_sparse.step.rows import ServerSize

LEAF = 16
Stages = tuple[tuple[int, int, int], ...]
# Chunk length, kept tokens and refresh of each stage: intervals that divide one another, that do not, longer ones than
# any window of these tests.
STAGES: list[Stages] = [
    ((64, 192, 8), (16, 64, 4)),
    ((256, 512, 6), (64, 256, 4), (16, 96, 4)),
    ((128, 384, 7), (32, 128, 7), (16, 64, 3)),
    ((16, 80, 5),),
    ((128, 256, 90), (32, 96, 11)),
    ((256, 512, 9), (128, 384, 7), (64, 192, 5), (16, 48, 1)),
]


def hip(*stages: tuple[int, int, int], **knobs: Any) -> HipDecode:
    """Stages of chunk length, kept tokens and refresh; nothing forced, all descend, but for other knobs given."""
    lengths, tokens, refresh = zip(*stages, strict=True)
    forced = {"sink_tokens": 0, "recent_tokens": 0, "last_stage": "representatives", **knobs}
    return HipDecode(stage_block_tokens=lengths, stage_budget_tokens=tokens, refresh_steps=refresh, **forced)


def generated(
    method: HipDecode, query: torch.Tensor, data: Paged, contexts: range, memory: LayerMemory, request: int = 0
) -> Iterator[tuple[int, PageList]]:
    """A request's lists at one step after another.

    Args:
        method: the knobs.
        query: ``[steps, heads, head_size]``, of the contexts in order.
        data: a cache that holds the last step's keys already.
        contexts: of the steps.
        memory: of the request.
        request: its place in `data`.
    """
    for step, context in enumerate(contexts):
        reader = data.platform.keys_of(data.kv_cache, data.block_table[request], context)
        yield context, method.select(query[step], reader, SCALE, 1, memory)


def tokens_of(lists: PageList) -> list[list[int]]:
    """Positions in each list, whose pages are single tokens."""
    assert lists.page_size_tokens == 1
    return [oracle.live_pages(lists, row) for row in range(lists.pages.shape[0])]


def window_start(method: HipDecode, context: int) -> int:
    """The whole window's first leaf; it starts `window` tokens before the newest of the last search's step."""
    last_search = context // method.refresh_steps[0] * method.refresh_steps[0]
    return max(last_search - 1 - method.recent_tokens, 0) // LEAF * LEAF


def expected_tokens(
    method: HipDecode, query: torch.Tensor, keys: torch.Tensor, contexts: range
) -> Iterator[list[list[int]]]:
    """The lists of a request's steps in plain Python."""
    begin = -(-method.sink_tokens // LEAF) * LEAF
    heads = query.shape[1] // keys.shape[0]
    memory: list[list[list[int]]] = [[] for _ in keys]
    for step, context in enumerate(contexts):
        end = max(context // method.refresh_steps[0] * method.refresh_steps[0] - 1 - method.recent_tokens, 0)
        lists = []
        for head, stages in enumerate(memory):
            own_query = query[step, head * heads : (head + 1) * heads].double()
            score = (own_query @ keys[head].double().T).amax(0).tolist()
            due = step == 0
            results: list[list[int]] = []
            for stage, (length, kept) in enumerate(
                zip(method.stage_block_tokens, method.stage_budget_tokens, strict=True)
            ):
                due = due or context % method.refresh_steps[stage] == 0
                parents = results[-1] if results else list(range(begin, end))
                results.append(pruned(parents, score, begin, length, kept) if due else stages[stage])
            stages[:] = results
            leaves = {token // LEAF for token in results[-1]}
            leaves |= {token // LEAF for token in [*range(min(begin, context)), *range(end, context)]}
            lists.append([token for token in range(context) if token // LEAF in leaves])
        yield lists


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize(
    "method",
    [
        hip((256, UNBOUNDED_TOKENS, 8), (16, UNBOUNDED_TOKENS, 3)),
        hip((16, 1024, 5), recent_tokens=3),
        hip((256, 1024, 70), (32, 1024, 7), sink_tokens=5, recent_tokens=3),
        hip((64, 64, 16), recent_tokens=1000),
        hip((64, 64, 16), sink_tokens=1000),
        hip((256, 1024, 8), (16, 1024, 3), last_stage="all_keys"),
    ],
    ids=lambda method: f"{method.stage_budget_tokens}-{method.refresh_steps}",
)
def test_h1_stages_that_keep_everything_are_dense(
    platform: Platform, method: HipDecode, generator: torch.Generator
) -> None:
    """At every step, also where the window is shorter than what joins it: nothing falls between search and window."""
    contexts = range(880, 1000)
    query, data = smooth(platform, generator, len(contexts), 1000, 4, 2)
    for context, lists in generated(method, query, data, contexts, LayerMemory()):
        assert tokens_of(lists) == [list(range(context))] * 2


def test_h1_a_chunk_less_than_everything_is_not_dense(generator: torch.Generator) -> None:
    query, data = smooth(PLAIN, generator, 1, 961, 2, 2)
    for method, dropped in ((hip((64, 896, 1)), 64), (hip((256, 1024, 1), (32, 928, 1)), 32), (hip((16, 944, 1)), 16)):
        lists = method.select(query[0], data.reader(0), SCALE, 1, LayerMemory())
        assert lists.kept_tokens.tolist() == [961 - dropped] * 2


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize(("sink", "window"), [(0, 0), (256, 200), (5, 1), (100, 333)])
@pytest.mark.parametrize(("page", "last_stage"), [(1, "representatives"), (16, "all_keys"), (48, "representatives")])
def test_h2_sink_window_and_newest_are_listed_once(
    platform: Platform, sink: int, window: int, page: int, last_stage: str, generator: torch.Generator
) -> None:
    method = hip((64, 256, 20), (16, 64, 6), sink_tokens=sink, recent_tokens=window, last_stage=last_stage)
    contexts = range(960, 1000)
    query, data = smooth(platform, generator, len(contexts), 1000, 4, 2)
    memory = LayerMemory()
    for step, context in enumerate(contexts):
        reader = platform.keys_of(data.kv_cache, data.block_table[0], context)
        lists = method.select(query[step], reader, SCALE, page, memory)
        for row in range(2):
            # Ascending, so without duplicates, and nothing of the future.
            check_list(lists, page, context, context - 1, context - 1, row, -(-context // page))
            kept = oracle.kept_positions(lists, row, context)
            assert bool(kept[:sink].all())
            assert bool(kept[max(context - 1 - window, 0) :].all())
            assert bool(kept[window_start(method, context) :].all())


@given(
    stages=st.sampled_from(STAGES),
    last_stage=st.sampled_from(["all_keys", "representatives"]),
    start=st.integers(500, 1200),
    seed=st.integers(0, 1 << 30),
)
def test_h3_a_stage_keeps_whole_chunks_of_what_the_stage_before_it_kept(
    stages: Stages, last_stage: str, start: int, seed: int
) -> None:
    """At every step, whenever each of them was searched."""
    method = hip(*stages, sink_tokens=20, recent_tokens=30, last_stage=last_stage)
    contexts = range(start, start + 24)
    query, data = smooth(PLAIN, torch.Generator().manual_seed(seed), len(contexts), contexts.stop, 4, 2)
    memory = LayerMemory()
    for context, _ in generated(method, query, data, contexts, memory):
        end = max(context // method.refresh_steps[0] * method.refresh_steps[0] - 1 - 30, 0)
        for head in range(2):
            outer = set(range(32, end))
            for (length, kept_tokens, _), result in zip(stages, memory.stages, strict=True):
                starts = [chunk for chunk in result[head].tolist() if chunk < end]
                assert len(starts) <= kept_tokens // length
                assert starts == sorted(set(starts))
                assert all((chunk - 32) % length == 0 for chunk in starts)
                tokens = {token for chunk in starts for token in range(chunk, min(chunk + length, end))}
                assert tokens <= outer
                outer = tokens


@given(
    stages=st.sampled_from(STAGES),
    start=st.integers(1, 900),
    group=st.sampled_from([(2, 2), (4, 1), (7, 1), (8, 2)]),
    forced=st.sampled_from([(0, 0), (37, 50), (64, 3), (0, 129)]),
    seed=st.integers(0, 1 << 30),
)
def test_h7_and_h8_every_step_equals_plain_python(
    stages: Stages, start: int, group: tuple[int, int], forced: tuple[int, int], seed: int
) -> None:
    """Which stages are searched when, what they keep meanwhile and how the window moves, bit for bit."""
    method = hip(*stages, sink_tokens=forced[0], recent_tokens=forced[1])
    contexts = range(start, start + 20)
    query, data = whole_numbers(torch.Generator().manual_seed(seed), contexts.stop, contexts.stop, *group)
    steps = generated(method, query, data, contexts, LayerMemory())
    expected = expected_tokens(method, query, data.keys[0], contexts)
    for (context, lists), tokens in zip(steps, expected, strict=True):
        assert tokens_of(lists) == tokens, f"context {context}"


@given(
    stages=st.sampled_from(STAGES),
    context=st.integers(1, 900),
    group=st.sampled_from([(2, 2), (4, 1), (7, 1), (8, 2)]),
    forced=st.sampled_from([(0, 0), (37, 50), (64, 3), (0, 129)]),
    seed=st.integers(0, 1 << 30),
)
def test_h7_without_reuse_it_is_the_uncached_algorithm(
    stages: Stages, context: int, group: tuple[int, int], forced: tuple[int, int], seed: int
) -> None:
    sink, window = forced
    method = hip(*((length, tokens, 1) for length, tokens, _ in stages), sink_tokens=sink, recent_tokens=window)
    query, data = whole_numbers(torch.Generator().manual_seed(seed), context + 3, context + 3, *group)
    uncached = [Stage(length, tokens) for length, tokens, _ in stages]
    contexts = range(context, context + 4)
    for step, lists in generated(method, query, data, contexts, LayerMemory()):
        reader = PLAIN.keys_of(data.kv_cache, data.block_table[0], step)
        newest = query[step - context].unsqueeze(0)
        leaves = hierarchical_descent(newest, reader, DescentArguments(uncached, 1, sink, window, 0), group[1])
        expected = leaves[:, 0].repeat_interleave(LEAF, dim=1)[:, :step]
        assert tokens_of(lists) == [row.nonzero().flatten().tolist() for row in expected]


def masses(query: torch.Tensor, keys: torch.Tensor, starts: list[int], length: int, end: int) -> list[float]:
    """Attention of queries ``[heads, head_size]`` to key blocks among one another, summed over heads, in float64."""
    blocks = [keys[start : min(start + length, end)] for start in starts]
    share = (query.double() @ torch.cat(blocks).double().T * SCALE).softmax(1).sum(0)
    return [float(part.sum()) for part in torch.split(share, [len(block) for block in blocks])]


@given(
    stages=st.sampled_from(STAGES),
    context=st.integers(1, 900),
    group=st.sampled_from([(2, 2), (4, 1), (7, 1), (8, 2)]),
    forced=st.sampled_from([(0, 0), (37, 50), (64, 3), (0, 129)]),
    seed=st.integers(0, 1 << 30),
)
def test_a_last_stage_of_all_keys_keeps_the_most_attention(
    stages: Stages, context: int, group: tuple[int, int], forced: tuple[int, int], seed: int
) -> None:
    """Of what the other stages keep, which is what they keep before a last stage that descends."""
    method = hip(*stages, sink_tokens=forced[0], recent_tokens=forced[1], last_stage="all_keys")
    query, data = smooth(PLAIN, torch.Generator().manual_seed(seed), 1, context, *group)
    memory, descended = LayerMemory(), LayerMemory()
    lists = method.select(query[0], data.reader(0), SCALE, 1, memory)
    replace(method, last_stage="representatives").select(query[0], data.reader(0), SCALE, 1, descended)
    begin = -(-method.sink_tokens // LEAF) * LEAF
    end = max(context // method.refresh_steps[0] * method.refresh_steps[0] - 1 - method.recent_tokens, 0)
    length, most = stages[-1][0], stages[-1][1] // stages[-1][0]
    for head in range(group[1]):
        outer = [(begin, end)]
        if len(stages) > 1:
            assert torch.equal(memory.stages[-2], descended.stages[-2])
            outer = [(start, start + stages[-2][0]) for start in memory.stages[-2][head].tolist()]
        starts = [start for first, stop in outer for start in range(first, min(stop, end), length)]
        kept = [start for start in memory.stages[-1][head].tolist() if start < end]
        assert len(kept) == min(most, len(starts))
        own_query = query[0].view(group[1], -1, query.shape[2])[head]
        if starts:
            found = dict(zip(starts, masses(own_query, data.keys[0][head], starts, length, end), strict=True))
            least = min(found[start] for start in kept)
            assert all(found[start] <= least * (1 + 1e-4) for start in starts if start not in kept)
        leaves = {token // LEAF for start in kept for token in range(start, min(start + length, end))}
        leaves |= {token // LEAF for token in [*range(min(begin, context)), *range(end, context)]}
        assert tokens_of(lists)[head] == [token for token in range(context) if token // LEAF in leaves]


@pytest.mark.parametrize(("last_stage", "finds"), [("all_keys", True), ("representatives", False)])
def test_all_keys_find_a_key_that_no_descent_passes(last_stage: str, finds: bool) -> None:
    """A leaf's descent begins with its fifth and thirteenth key, and goes from the latter away from the first one."""
    keys = torch.zeros(1, 1000, 16)
    keys[0, 320:960, 0] = 1.0
    keys[0, 160, 0] = 50.0
    keys[0, 172, 0] = 0.5
    data = oracle.paged(PLAIN, [keys], [keys], 64, torch.Generator())
    query = torch.nn.functional.one_hot(torch.tensor([0]), 16).float()
    lists = hip((16, 64, 1), last_stage=last_stage).select(query, data.reader(0), SCALE, 1, LayerMemory())
    assert (160 in tokens_of(lists)[0]) == finds


def test_heads_of_large_queries_do_not_decide_alone() -> None:
    """Masses are merged as probabilities: a head that looks at one place is heard beside one with larger products."""
    keys = torch.zeros(1, 1000, 16)
    keys[0, 320:640, 0] = 1.0
    keys[0, 800, 1] = 1.0
    data = oracle.paged(PLAIN, [keys], [keys], 64, torch.Generator())
    query = torch.zeros(2, 16)
    query[0, 0], query[1, 1] = 1000.0, 90.0
    stages = ((16, 64, 1),)
    loud = hip(*stages).select(query, data.reader(0), SCALE, 1, LayerMemory())
    assert 800 not in tokens_of(loud)[0]
    heard = hip(*stages, last_stage="all_keys").select(query, data.reader(0), SCALE, 1, LayerMemory())
    assert 800 in tokens_of(heard)[0]


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("stages", STAGES[:3], ids=str)
def test_h7_between_searches_only_the_newest_token_joins(
    platform: Platform, stages: Stages, generator: torch.Generator
) -> None:
    """Though every step asks another question."""
    method = hip(*stages, sink_tokens=20, recent_tokens=30)
    contexts = range(1200, 1264)
    query, data = smooth(platform, generator, len(contexts), contexts.stop, 4, 2)
    before: list[list[int]] = []
    changed = 0
    for context, lists in generated(method, query, data, contexts, LayerMemory()):
        tokens = tokens_of(lists)
        if before and all(context % steps for steps in method.refresh_steps):
            assert tokens == [[*row, context - 1] for row in before]
        elif before:
            changed += tokens != [[*row, context - 1] for row in before]
        before = tokens
    assert changed > 2, "searches must change lists for this test to see that others do not"


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("stages", STAGES, ids=str)
def test_h8_a_stage_brings_all_later_ones_with_it(
    platform: Platform, stages: Stages, generator: torch.Generator
) -> None:
    """A step's stages are what a search from the last one that stands gives; all of them, if the first one is due."""
    method = hip(*stages, sink_tokens=20, recent_tokens=30)
    contexts = range(1200, 1300)
    query, data = smooth(platform, generator, len(contexts), contexts.stop, 4, 2)
    memory = LayerMemory()
    standing: list[torch.Tensor] = []
    for step, (context, lists) in enumerate(generated(method, query, data, contexts, memory)):
        due = [stage for stage, steps in enumerate(method.refresh_steps) if context % steps == 0 or not standing]
        first = due[0] if due else len(stages)
        for stage in range(first):
            assert torch.equal(memory.stages[stage], standing[stage]), f"context {context}, stage {stage}"
        if first == 0:
            reader = platform.keys_of(data.kv_cache, data.block_table[0], context)
            assert same_lists(lists, method.select(query[step], reader, SCALE, 1, LayerMemory()))
        elif first < len(stages):
            # The same step again, as one at which only what is due is searched.
            again = LayerMemory([*standing[:first], *([torch.empty(0)] * (len(stages) - first))], context - 1)
            reader = platform.keys_of(data.kv_cache, data.block_table[0], context)
            assert same_lists(lists, method.select(query[step], reader, SCALE, 1, again))
        standing = memory.stages


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("context", [1003, 1024])
def test_h8_memory_that_is_not_of_the_step_before_is_not_used(
    platform: Platform, context: int, generator: torch.Generator
) -> None:
    """A first step searches everything wherever it falls, and so does one after steps that went elsewhere."""
    method = hip((64, 256, 16), (16, 64, 8), sink_tokens=20, recent_tokens=30)
    query, data = smooth(platform, generator, 1, context, 4, 2)
    expected = method.select(query[0], data.reader(0), SCALE, 1, LayerMemory())
    for former in (0, context - 2, context, context + 7):
        useless = torch.full((2, 4), 900, device=platform.device)
        memory = LayerMemory([useless, useless], former)
        assert same_lists(method.select(query[0], data.reader(0), SCALE, 1, memory), expected), f"of context {former}"


@pytest.mark.parametrize("platform", SELECTING)
def test_h8_requests_take_their_own_turns(platform: Platform, generator: torch.Generator) -> None:
    """Side by side, from different contexts on, each has the lists that it has alone."""
    method = hip((64, 256, 8), (16, 64, 4), sink_tokens=20, recent_tokens=30)
    contexts = [range(900, 930), range(741, 771), range(1003, 1033)]
    keys = [oracle.random_tensor(platform, generator, 2, steps.stop, 32) for steps in contexts]
    data = oracle.paged(platform, keys, keys, 64, generator)
    queries = [oracle.random_tensor(platform, generator, 30, 4, 32) for _ in contexts]
    requests = list(zip(queries, contexts, range(3), strict=True))
    together = zip(
        *(generated(method, query, data, steps, LayerMemory(), request) for query, steps, request in requests),
        strict=True,
    )
    alone = [list(generated(method, query, data, steps, LayerMemory(), request)) for query, steps, request in requests]
    for step, lists in enumerate(together):
        for request in range(3):
            assert same_lists(lists[request][1], alone[request][step][1])


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("heads", ["query_head", "kv_head", "layer"])
def test_h10_one_head_has_the_choice_of_every_head_mode_of_a_prompt(
    platform: Platform, heads: Any, generator: torch.Generator
) -> None:
    query, data = smooth(platform, generator, 1, 900, 1, 1)
    knobs = {"stage_block_tokens": (128, 32), "stage_budget_tokens": (512, 96), "sink_tokens": 20, "recent_tokens": 30}
    prompt = Hip(query_stride=(1, 1), dense_tail_tokens=0, scores_per=heads, **knobs)  # type: ignore[arg-type]
    step = HipDecode(refresh_steps=(1, 1), last_stage="representatives", **knobs)  # type: ignore[arg-type]
    lists = step.select(query[0], data.reader(0), SCALE, 1, LayerMemory())
    assert same_lists(lists, prompt.select(query, data.reader(0), SCALE, 1, FIRST_LAYER))


@pytest.mark.parametrize("platform", SELECTING)
def test_h10_tensor_parallelism_changes_nothing(platform: Platform, generator: torch.Generator) -> None:
    """A rank with one of two KV heads chooses what one process with both does."""
    method = hip((128, 512, 8), (32, 96, 3), sink_tokens=20, recent_tokens=30)
    contexts = range(980, 1000)
    query, data = smooth(platform, generator, len(contexts), 1000, 8, 2)
    ranks = [oracle.paged(platform, [keys[None]], [keys[None]], 64, generator) for keys in data.keys[0]]
    parts = [
        generated(method, query[:, 4 * rank : 4 * rank + 4], ranks[rank], contexts, LayerMemory()) for rank in range(2)
    ]
    whole = generated(method, query, data, contexts, LayerMemory())
    for (_, lists), (_, first), (_, second) in zip(whole, *parts, strict=True):
        assert tokens_of(lists) == [*tokens_of(first), *tokens_of(second)]


@given(
    stages=st.sampled_from(STAGES),
    sink=st.integers(0, 100),
    window=st.integers(0, 100),
    context=st.integers(1, 1500),
    seed=st.integers(0, 1 << 30),
)
def test_no_list_is_longer_than_the_budget(stages: Stages, sink: int, window: int, context: int, seed: int) -> None:
    method = hip(*stages, sink_tokens=sink, recent_tokens=window)
    query, data = smooth(PLAIN, torch.Generator().manual_seed(seed), 1, context, 2, 1)
    kept = int(method.select(query[0], data.reader(0), SCALE, 1, LayerMemory()).kept_tokens)
    assert kept <= min(method.budget_tokens, context)
    if context > method.budget_tokens:
        assert kept <= int(method.list_tokens(np.array([context]))[0]) <= method.longest_list_tokens


def test_the_budget_is_sharp() -> None:
    """At the step before the first stage is due, if the search ended at a leaf's end and the best keys lie early."""
    method = hip((64, 256, 8), (16, 64, 4), sink_tokens=17)
    context = 8 * 100 + 7
    assert window_start(method, context) == 799 - 15
    query, data = torch.ones(2, 16), torch.zeros(1, context, 16)
    data[:, 100:200] = 1
    paged = oracle.paged(PLAIN, [data], [data], 64, torch.Generator())
    lists = method.select(query, paged.reader(0), SCALE, 1, LayerMemory())
    assert lists.kept_tokens.tolist() == [method.budget_tokens] == [32 + 64 + 23]


def test_knobs_choose_layers() -> None:
    assert HipDecode(dense_layers=2).layer_roles(5) == [Role.DENSE, Role.DENSE, *[Role.WRITE_AND_READ] * 3]
    assert HipDecode().layer_roles(2) == [Role.WRITE_AND_READ, Role.WRITE_AND_READ]
    assert HipDecode(dense_layers=7).layer_roles(3) == [Role.DENSE] * 3


def test_intervals_halve_from_stage_to_stage_by_default() -> None:
    """As the paper's three do. Equal settings are equal however they are given."""
    assert HipDecode().refresh_steps == (16, 8, 4)
    assert HipDecode(refresh_steps=(16, 8, 4)) == HipDecode()
    assert HipDecode(stage_block_tokens=(16,), stage_budget_tokens=(160,)).refresh_steps == (16,)
    four = HipDecode(stage_block_tokens=(128, 64, 32, 16), stage_budget_tokens=(512, 256, 128, 64))
    assert four.refresh_steps == (16, 8, 4, 2)


def test_device_sizes_hold_what_stages_ask_for() -> None:
    """Of 1000 tokens: 16 chunks of 64, of which 12 are kept, and 48 of 16 in these, of which 32 are."""
    assert hip((64, 768, 4), (16, 512, 2)).device_sizes(1000) == (32, 48)
    assert hip((64, 4096, 4), (16, 4096, 2)).device_sizes(1000) == (63, 63)
    assert HipDecode().device_sizes(131072) == (128, 512)


@given(stages=st.sampled_from(STAGES), context=st.integers(1, 1500), seed=st.integers(0, 1 << 30))
def test_no_stage_keeps_more_than_the_device_holds(stages: Stages, context: int, seed: int) -> None:
    method = hip(*stages)
    query, data = smooth(PLAIN, torch.Generator().manual_seed(seed), 1, context, 2, 1)
    memory = LayerMemory()
    method.select(query[0], data.reader(0), SCALE, 1, memory)
    assert max(result.shape[1] for result in memory.stages) <= method.device_sizes(context)[0]


def test_knobs_of_a_row_begin_with_the_last_stage() -> None:
    """So that rows of fewer stages have those that they lack at the end."""
    assert hip((64, 192, 4), (16, 64, 2), sink_tokens=20, recent_tokens=30, last_stage="all_keys").row_knobs() == (
        20,
        30,
        1,
        16,
        64,
        2,
        64,
        192,
        4,
    )


SERVED = hip((64, 768, 4), (16, 512, 2))


@pytest.mark.parametrize(
    ("method", "served"),
    [
        (SERVED, True),
        (hip((64, 512, 9), (32, 512, 3), sink_tokens=700, recent_tokens=900, dense_layers=3), True),
        (hip((64, 512, 1)), True),
        (hip((16, 512, 1)), False),
        (hip((64, 768, 4), (16, 528, 2)), False),
        (hip((64, 704, 4), (32, 704, 4), (16, 512, 2)), False),
    ],
    ids=str,
)
def test_requests_that_the_memory_has_no_room_for_are_not_served_at_once(method: HipDecode, served: bool) -> None:
    """More stages, more chunks to choose from, more to keep; forced tokens take none."""
    assert SERVED.serves(method, 1000) == served
    assert method.serves(method, 1000)


def test_short_contexts_need_less_room() -> None:
    assert SERVED.serves(hip((64, 768, 4), (16, 528, 2)), 512)


def test_memory_has_the_size_that_it_says() -> None:
    """Two stages of 32 chunks and a count, for 2 heads of 5 requests, in 3 layers, and scores of 48 chunks."""
    size = ServerSize(requests=5, max_seq_len=1000, num_layers=3, kv_heads=2)
    layers, scratch = 4 * 5 * (2 * 2 * 33 + 1), 4 * 5 * 2 * 49
    assert SERVED.allocate(size, torch.device("cpu")).bytes == 3 * layers + scratch


@pytest.mark.parametrize(
    ("knobs", "wrong"),
    [
        ({"stage_block_tokens": ()}, "stage_block_tokens"),
        ({"stage_block_tokens": (256, 64)}, "stage_budget_tokens"),
        ({"stage_block_tokens": (256, 96, 16)}, "stage_block_tokens"),
        ({"stage_budget_tokens": (8192, 32768, 2048)}, "stage_budget_tokens"),
        ({"stage_block_tokens": (256, 128, 64, 32, 16), "stage_budget_tokens": (512,) * 5}, "stage_block_tokens"),
        ({"refresh_steps": (16, 8)}, "refresh_steps"),
        ({"refresh_steps": (16, 8, 0)}, "refresh_steps"),
        ({"refresh_steps": (1025, 8, 4)}, "refresh_steps"),
        ({"refresh_steps": (8, 16, 4)}, "refresh_steps"),
    ],
    ids=str,
)
def test_stages_that_do_not_fit_are_refused(knobs: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValidationError) as error:
        HipDecode(**knobs)
    cause = error.value.errors()[0]["ctx"]["error"]
    assert isinstance(cause, KnobError)
    assert cause.knob == wrong
    assert cause.value == list(knobs.get(wrong, getattr(HipDecode(), wrong)))
