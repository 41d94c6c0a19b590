"""HiP's prefill: the properties H1 to H6 and H10 of the notes. H11 is about the first version."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests import oracle
from tests.methods.lists import FIRST_LAYER, SCALE, attend_chunk, check_list, chunk_allowed, same_lists
from tests.oracle import EXECUTING, PLAIN, SELECTING, Paged, Platform
from vllm_sparse.kernels.page_list import query_blocks
from vllm_sparse.methods.hip import Hip
from vllm_sparse.methods.knobs import UNBOUNDED_TOKENS, KnobError

LEAF = 16
# Whole prompts and chunks; search ranges that end anywhere in a chunk of keys.
CHUNKS = [(1000, 1000), (512, 1024), (300, 1000), (257, 1153), (129, 700)]


def hip(*stages: tuple[int, ...], **knobs: Any) -> Hip:
    """Stages of chunk length, kept tokens and query stride; nothing forced, blocks of 64, but for other knobs given."""
    lengths, tokens, strides = zip(*(stage if len(stage) == 3 else (*stage, 1) for stage in stages), strict=True)
    forced = {"sink_tokens": 0, "recent_tokens": 0, "dense_tail_tokens": 0, "query_block_tokens": 64, **knobs}
    return Hip(stage_block_tokens=lengths, stage_budget_tokens=tokens, query_stride=strides, **forced)


def whole_numbers(
    generator: torch.Generator, chunk: int, context: int, heads: int, kv_heads: int
) -> tuple[torch.Tensor, Paged]:
    """A request of small whole numbers: float32 is exact, means of up to four queries too, and ties abound."""
    query = 12.0 * torch.randint(-2, 3, (chunk, heads, 16), generator=generator)
    keys = torch.randint(-2, 3, (kv_heads, context, 16), generator=generator).float()
    return query, oracle.paged(PLAIN, [keys], [keys], 64, generator)


def smooth(
    platform: Platform, generator: torch.Generator, chunk: int, context: int, heads: int, kv_heads: int
) -> tuple[torch.Tensor, Paged]:
    """A request whose keys change slowly with the position."""
    keys = torch.randn(kv_heads, context, 32, generator=generator).cumsum(1) / 8
    keys = keys.to(platform.dtype).to(platform.device)
    values = oracle.random_tensor(platform, generator, *keys.shape)
    query = oracle.random_tensor(platform, generator, chunk, heads, 32)
    return query, oracle.paged(platform, [keys], [values], 64, generator)


def planted(score: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, Paged]:
    """64 equal queries of one head after the keys given, each of which scores as given."""
    axis = torch.nn.functional.one_hot(torch.tensor(0), 32).float()
    others = torch.randn(score.shape[0] + 64, 32, generator=generator)
    others[:, 0] = torch.nn.functional.pad(score, (0, 64))
    return axis.expand(64, 1, -1), oracle.paged(PLAIN, [others[None]], [others[None]], 64, generator)


def leaf_mask(method: Hip, query: torch.Tensor, data: Paged) -> torch.Tensor:
    return method.block_mask(query, data.reader(0), SCALE, FIRST_LAYER).cpu()


def block_ends(method: Hip, chunk: int, context: int) -> list[tuple[int, int]]:
    """First and last position of each query block."""
    first, last = query_blocks(chunk, context, method.query_block_tokens, torch.device("cpu"))
    return list(zip(first.tolist(), last.tolist(), strict=True))


def descend(score: list[float], start: int, stop: int) -> float:
    """Largest score on the way to a single key."""
    best = score[start] if stop - start == 1 else float("-inf")
    while stop - start > 1:
        middle = stop - (stop - start) // 2
        left, right = score[start + (middle - start) // 2], score[middle + (stop - middle) // 2]
        best = max(best, left, right)
        start, stop = (start, middle) if left >= right else (middle, stop)
    return best


def searched(method: Hip, query: torch.Tensor, keys: torch.Tensor, begin: int, end: int) -> list[int]:
    """Tokens that the stages keep, in plain Python.

    Args:
        method: the knobs.
        query: ``[queries of a block, heads of a list, head_size]``.
        keys: ``[heads of a list, context, head_size]``.
        begin: first token of the search range.
        end: the token after it.
    """
    tokens = list(range(begin, end))
    knobs = zip(method.stage_block_tokens, method.stage_budget_tokens, method.query_stride, strict=True)
    for length, kept_tokens, stride in knobs:
        means = torch.stack([part.double().mean(0) for part in torch.split(query, stride)])
        score = torch.einsum("rhd,hkd->rhk", means, keys.double()).amax((0, 1)).tolist()
        tokens = pruned(tokens, score, begin, length, kept_tokens)
    return tokens


def pruned(tokens: list[int], score: list[float], begin: int, length: int, kept_tokens: int) -> list[int]:
    """Tokens that one stage keeps, given every token's score."""
    chunks: dict[int, list[int]] = {}
    for token in tokens:
        chunks.setdefault((token - begin) // length, []).append(token)
    if len(chunks) <= kept_tokens // length:
        return tokens
    scores = {number: descend(score, chunk[0], chunk[-1] + 1) for number, chunk in chunks.items()}
    best = sorted(chunks, key=lambda number: (-scores[number], number))[: kept_tokens // length]
    return [token for number in sorted(best) for token in chunks[number]]


def expected_mask(method: Hip, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The method in plain Python: bool ``[lists, query_blocks, leaves]``."""
    chunk, heads, _ = query.shape
    kv_heads, context, _ = keys.shape
    lists = {"query_head": heads, "kv_head": kv_heads, "layer": 1}[method.scores_per]
    own_keys = keys.repeat_interleave(heads // kv_heads, dim=0)
    blocks = block_ends(method, chunk, context)
    mask = torch.zeros(lists, len(blocks), -(-context // LEAF), dtype=torch.bool)
    for number in range(lists):
        members = slice(number * heads // lists, (number + 1) * heads // lists)
        for row, (first, last) in enumerate(blocks):
            begin = -(-method.sink_tokens // LEAF) * LEAF
            window_start = 0 if last >= context - method.dense_tail_tokens else max(first - method.recent_tokens, 0)
            block_query = query[first - context + chunk : last + 1 - context + chunk, members]
            tokens = searched(method, block_query, own_keys[members], begin, window_start)
            tokens += [*range(min(begin, last + 1)), *range(window_start, last + 1)]
            mask[number, row, torch.tensor(tokens) // LEAF] = True
    return mask


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize(
    "method",
    [
        hip((256, UNBOUNDED_TOKENS), (64, UNBOUNDED_TOKENS), (16, UNBOUNDED_TOKENS)),
        hip((16, 1152)),
        hip((256, 1280), (32, 1280), query_block_tokens=128, list_per="query_head"),
        # What is left beside the sink and the window.
        hip((128, 640), (64, 640), sink_tokens=256, recent_tokens=260, scores_per="query_head", list_per="query_head"),
        hip((64, 64), dense_tail_tokens=1 << 16, scores_per="layer"),
        hip((64, 64), recent_tokens=1 << 16),
        hip((64, 64), sink_tokens=1 << 16),
    ],
    ids=lambda method: f"{method.stage_block_tokens}-{method.stage_budget_tokens}",
)
def test_h1_stages_that_keep_everything_are_dense(platform: Platform, method: Hip, generator: torch.Generator) -> None:
    for chunk, context in CHUNKS:
        query, data = smooth(platform, generator, chunk, context, 4, 2)
        for page in (16, 64):
            lists = method.select(query, data.reader(0), SCALE, page, FIRST_LAYER)
            causal = oracle.causal_mask(chunk, context).expand(4, -1, -1)
            assert torch.equal(chunk_allowed(method, lists, data, 0, query), causal), f"{chunk} of {context}"


def test_h1_a_chunk_less_than_everything_is_not_dense(generator: torch.Generator) -> None:
    """Of 960 tokens before the last query block, one chunk is dropped: the limit of the test above is sharp."""
    query, data = smooth(PLAIN, generator, 1000, 1000, 2, 2)
    for method, leaves in ((hip((64, 896)), 4), (hip((256, 1024), (32, 928)), 2), (hip((16, 944)), 1)):
        assert leaf_mask(method, query, data)[:, -1].logical_not().sum(1).tolist() == [leaves, leaves]


def test_h1_dense_knobs_are_known_before_any_prompt() -> None:
    assert hip((256, UNBOUNDED_TOKENS), (16, UNBOUNDED_TOKENS)).exactly_dense
    assert not hip((256, UNBOUNDED_TOKENS), (16, UNBOUNDED_TOKENS - 16)).exactly_dense


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize(("sink", "window"), [(0, 0), (256, 200), (5, 1), (100, 333)])
def test_h2_sink_window_and_diagonal_are_kept_and_nothing_of_the_future(
    platform: Platform, sink: int, window: int, generator: torch.Generator
) -> None:
    method = hip(
        (64, 256, 2), (16, 64), sink_tokens=sink, recent_tokens=window, list_per="query_head", scores_per="query_head"
    )
    for chunk, context in CHUNKS:
        query, data = smooth(platform, generator, chunk, context, 4, 2)
        mask = leaf_mask(method, query, data)
        lists = method.select(query, data.reader(0), SCALE, LEAF, FIRST_LAYER)
        blocks = block_ends(method, chunk, context)
        for row, (first, last) in enumerate(blocks):
            assert bool(mask[:, row, : min(-(-sink // LEAF), last // LEAF + 1)].all())
            assert bool(mask[:, row, max(first - window, 0) // LEAF : last // LEAF + 1].all())
            assert not bool(mask[:, row, last // LEAF + 1 :].any())
            for head in range(4):
                # Ascending, so without duplicates.
                check_list(lists, LEAF, context, first, last, head * len(blocks) + row, -(-context // LEAF))


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("heads", ["query_head", "kv_head", "layer"])
def test_h3_a_stage_keeps_whole_chunks_of_what_the_stage_before_it_kept(
    platform: Platform, heads: str, generator: torch.Generator
) -> None:
    """What the first stages keep is what a method of only these keeps."""
    stages = [(256, 1024, 4), (64, 512, 2), (16, 256, 1)]
    chunk, context, sink, window = 300, 2777, 20, 30
    query, data = smooth(platform, generator, chunk, context, 4, 2)
    outer: torch.Tensor | None = None
    for number, (length, tokens, _) in enumerate(stages):
        method = hip(*stages[: number + 1], sink_tokens=sink, recent_tokens=window, scores_per=heads)
        mask = leaf_mask(method, query, data)
        for row, (first, _) in enumerate(block_ends(method, chunk, context)):
            # From the sink's last leaf on; the leaf in which the window starts may be kept for its sake.
            leaves = mask[:, row, 32 // LEAF : (first - window) // LEAF]
            padded = torch.nn.functional.pad(leaves, (0, -leaves.shape[1] % (length // LEAF)))
            chunks = padded.view(padded.shape[0], -1, length // LEAF)
            assert bool((chunks[:, :-1].all(2) == chunks[:, :-1].any(2)).all()), f"stage {number}: parts of chunks"
            assert bool((chunks.any(2).sum(1) <= tokens // length).all()), f"stage {number}: too many chunks"
            # One of them may be the leaf or the chunk at the end.
            assert bool((chunks.any(2).sum(1) >= tokens // length - 1).all()), f"stage {number}: too few chunks"
        assert outer is None or not bool((mask & ~outer).any()), f"stage {number} brings keys back"
        outer = mask


@given(
    chunk=st.integers(1, 200),
    past=st.integers(0, 900),
    stages=st.sampled_from(
        [
            ((256, 512, 4), (64, 256, 2), (16, 96, 1)),
            ((64, 192, 4), (32, 128, 4)),
            ((128, 384, 1), (16, 160, 4)),
            ((16, 208, 2),),
            ((512, 512, 1), (256, 256, 1), (128, 128, 2), (64, 64, 4)),
        ]
    ),
    heads=st.sampled_from(["query_head", "kv_head", "layer"]),
    group=st.sampled_from([(2, 2), (4, 1), (7, 1), (4, 2)]),
    forced=st.sampled_from([(0, 0, 0), (37, 50, 0), (64, 0, 70), (0, 129, 1)]),
    query_block=st.sampled_from([64, 128]),
    seed=st.integers(0, 1 << 30),
)
def test_h4_descents_equal_plain_python(
    chunk: int,
    past: int,
    stages: tuple[tuple[int, int, int], ...],
    heads: str,
    group: tuple[int, int],
    forced: tuple[int, int, int],
    query_block: int,
    seed: int,
) -> None:
    """Scores, ties and all stages, bit for bit."""
    sink, window, dense_tail = forced
    knobs = {
        "sink_tokens": sink,
        "recent_tokens": window,
        "dense_tail_tokens": dense_tail,
        "scores_per": heads,
        "query_block_tokens": query_block,
    }
    method = hip(*stages, **knobs)
    query, data = whole_numbers(torch.Generator().manual_seed(seed), chunk, past + chunk, *group)
    assert torch.equal(leaf_mask(method, query, data), expected_mask(method, query, data.keys[0]))


@given(peak=st.integers(0, 4095), seed=st.integers(0, 1 << 30))
def test_h5_the_peak_of_a_smooth_score_is_found(peak: int, seed: int) -> None:
    """A score that falls with the distance to one key leads every descent towards it."""
    score = -(torch.arange(4096) - peak).abs().float()
    query, data = planted(score, torch.Generator().manual_seed(seed))
    mask = leaf_mask(hip((256, 256), (64, 64), (16, 16)), query, data)
    assert bool(mask[0, 0, peak // LEAF])


@given(begin=st.integers(0, 4096 - 256), seed=st.integers(0, 1 << 30))
def test_h5_a_run_of_good_keys_is_found_wherever_it_lies(begin: int, seed: int) -> None:
    """As long as the first stage's chunk, it fills half of some chunk, which the first step sees.

    Whole chunks of the first stage are then wholly kept, as far as the run fills them and the budget goes.
    """
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(4096, generator=generator)
    score[begin : begin + 256] = 2.0
    query, data = planted(score, generator)
    mask = leaf_mask(hip((256, 512), (64, 512), (16, 256)), query, data)[0, 0]
    kept = [leaf for leaf in mask.nonzero().flatten().tolist() if begin < (leaf + 1) * LEAF and leaf < 4096 // LEAF]
    kept = [leaf for leaf in kept if leaf * LEAF < begin + 256]
    assert len(kept) >= 128 // LEAF


@pytest.mark.parametrize("offset", [64, 192])
def test_h5_one_good_key_is_found_where_the_first_step_looks(offset: int, generator: torch.Generator) -> None:
    """Its chunk stays though the descent goes on to worse keys."""
    for number in (0, 7, 15):
        score = torch.rand(4096, generator=generator)
        score[256 * number + offset] = 2.0
        query, data = planted(score, generator)
        mask = leaf_mask(hip((256, 256)), query, data)[0, 0, : 4096 // LEAF]
        assert mask.nonzero().flatten().tolist() == list(range(16 * number, 16 * number + 16))


def test_h5_one_good_key_elsewhere_is_not_promised(generator: torch.Generator) -> None:
    score = torch.zeros(4096)
    score[1024:1280] = 1.0
    score[300] = 2.0
    query, data = planted(score, generator)
    assert not bool(leaf_mask(hip((256, 256)), query, data)[0, 0, 300 // LEAF])


@given(chunk=st.integers(1, 300), past=st.integers(0, 1500), leaves=st.integers(1, 40), seed=st.integers(0, 1 << 30))
def test_h6_one_stage_of_leaves_is_the_exact_block_top_k(chunk: int, past: int, leaves: int, seed: int) -> None:
    """For keys that are equal within a leaf, so that every key of it is as good as the best one."""
    generator = torch.Generator().manual_seed(seed)
    query, data = whole_numbers(generator, chunk, past + chunk, 2, 1)
    leaf_keys = data.keys[0][:, ::LEAF]
    keys = leaf_keys.repeat_interleave(LEAF, dim=1)[:, : past + chunk]
    mask = leaf_mask(hip((16, 16 * leaves)), query, oracle.paged(PLAIN, [keys], [keys], 64, generator))
    for row, (first, _) in enumerate(block_ends(Hip(query_block_tokens=64), chunk, past + chunk)):
        before = leaf_keys[0, : -(-first // LEAF)]
        score = torch.einsum("rhd,kd->rhk", query[64 * row : 64 * row + 64], before).amax((0, 1))
        best = score.sort(descending=True, stable=True).indices[:leaves]
        # The last of these leaves may hold tokens of the query block itself.
        whole = first // LEAF
        assert mask[0, row, :whole].nonzero().flatten().tolist() == sorted(set(best.tolist()) - {whole})


@given(chunk=st.integers(1, 300), seed=st.integers(0, 1 << 30))
def test_h10_one_head_has_one_choice(chunk: int, seed: int) -> None:
    """Bit for bit in all three modes, and the lists of both row modes."""
    query, data = smooth(PLAIN, torch.Generator().manual_seed(seed), chunk, 900, 1, 1)
    stages = ((128, 512, 4), (32, 96, 1))
    expected = hip(*stages).select(query, data.reader(0), SCALE, 16, FIRST_LAYER)
    for heads in ("query_head", "kv_head", "layer"):
        for rows in ("query_head", "kv_head"):
            method = hip(*stages, scores_per=heads, list_per=rows)
            assert same_lists(method.select(query, data.reader(0), SCALE, 16, FIRST_LAYER), expected), (heads, rows)


@pytest.mark.parametrize("platform", SELECTING)
def test_h10_tensor_parallelism_changes_nothing_but_for_lists_of_a_layer(
    platform: Platform, generator: torch.Generator
) -> None:
    """A rank with one of two KV heads chooses what one process with both does."""
    query, data = smooth(platform, generator, 300, 1000, 8, 2)
    ranks = [oracle.paged(platform, [keys[None]], [keys[None]], 64, generator) for keys in data.keys[0]]

    def whole_and_parts(heads: str) -> tuple[torch.Tensor, torch.Tensor]:
        method = hip((128, 512, 4), (32, 96, 1), scores_per=heads)
        parts = [leaf_mask(method, query[:, 4 * rank : 4 * rank + 4], ranks[rank]) for rank in range(2)]
        return leaf_mask(method, query, data), torch.cat(parts)

    for heads in ("query_head", "kv_head"):
        whole, parts = whole_and_parts(heads)
        assert torch.equal(whole, parts), heads
    whole, parts = whole_and_parts("layer")
    assert not torch.equal(whole.expand_as(parts), parts)


def test_the_choice_is_the_same_for_every_chunking(generator: torch.Generator) -> None:
    """For chunks that start at multiples of a query block, whose last one may hold fewer queries."""
    context = 1100
    query, data = whole_numbers(generator, context, context, 4, 2)
    method = hip((128, 256, 4), (32, 128, 2), (16, 64), sink_tokens=16, recent_tokens=30)
    whole = leaf_mask(method, query, data)
    for start, stop in ((0, 256), (256, 640), (640, 1100), (0, 777)):
        reader = PLAIN.keys_of(data.kv_cache, data.block_table[0], stop)
        part = method.block_mask(query[start:stop], reader, SCALE, FIRST_LAYER)
        rows = (stop - start) // 64
        assert torch.equal(part[:, :rows], whole[:, start // 64 :][:, :rows, : part.shape[2]]), f"{start} to {stop}"


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (7, 1), (2, 2)])
def test_heads_that_share_scores_share_lists(
    platform: Platform, heads: int, kv_heads: int, generator: torch.Generator
) -> None:
    """What they share is tested with H4; here who shares, and what each row mode reads."""
    chunk, context = 300, 1000
    query, data = smooth(platform, generator, chunk, context, heads, kv_heads)

    def allowed(share: str, rows: str) -> torch.Tensor:
        method = hip((64, 256), (16, 128), scores_per=share, list_per=rows)
        lists = method.select(query, data.reader(0), SCALE, LEAF, FIRST_LAYER)
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
def test_the_tail_is_dense(platform: Platform, generator: torch.Generator) -> None:
    chunk, context, tail = 450, 1153, 80
    query, data = smooth(platform, generator, chunk, context, 4, 2)
    method = hip((64, 256), (16, 128), dense_tail_tokens=tail)
    lists = method.select(query, data.reader(0), SCALE, 64, FIRST_LAYER)
    causal = oracle.causal_mask(chunk, context)
    allowed = chunk_allowed(method, lists, data, 0, query)
    # The last query block holds 2 of the 80, the one before it 64, the one before that 14, and no other any.
    assert torch.equal(allowed[:, 320:], causal[320:].expand(4, -1, -1))
    assert not torch.equal(allowed[:, 319], causal[319].expand(4, -1))
    dense = oracle.attention(query, data.keys[0], data.values[0], SCALE, causal)
    oracle.assert_close(attend_chunk(method, lists, data, 0, query)[-tail:], dense[-tail:])


@pytest.mark.parametrize(
    ("knobs", "wrong"),
    [
        ({"stage_block_tokens": ()}, "stage_block_tokens"),
        ({"stage_block_tokens": (256, 64)}, "stage_budget_tokens"),
        ({"query_stride": (1,)}, "query_stride"),
        ({"query_stride": (4, 4, 3)}, "query_stride"),
        ({"query_stride": (128, 4, 4)}, "query_stride"),
        ({"query_stride": (4, 4, 0)}, "query_stride"),
        ({"stage_block_tokens": (256, 64, 8)}, "stage_block_tokens"),
        ({"stage_block_tokens": (256, 96, 16)}, "stage_block_tokens"),
        ({"stage_block_tokens": (256, 256, 16)}, "stage_block_tokens"),
        ({"stage_block_tokens": (64, 256, 16)}, "stage_block_tokens"),
        ({"stage_budget_tokens": (8192, 32768, 2048)}, "stage_budget_tokens"),
        ({"stage_budget_tokens": (32768, 8192, 2056)}, "stage_budget_tokens"),
        ({"stage_budget_tokens": (32768, 8192, 0)}, "stage_budget_tokens"),
        ({"stage_budget_tokens": (2 * UNBOUNDED_TOKENS, 8192, 2048)}, "stage_budget_tokens"),
    ],
    ids=str,
)
def test_stages_that_do_not_fit_are_refused(knobs: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValidationError) as error:
        Hip(**knobs)
    cause = error.value.errors()[0]["ctx"]["error"]
    assert isinstance(cause, KnobError)
    assert cause.knob == wrong
    assert cause.value == list(knobs.get(wrong, getattr(Hip(), wrong)))
