"""DHSA's adaptive chunks: the rule against float64, and property D2 of the notes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle
from tests.oracle import PACKED, PLAIN, Platform
from vllm_sparse.kernels.adaptive_blocks import adaptive_blocks, reference

CONTEXTS = [1, 7, 8, 12, 19, 27, 28, 64, 700, 4096, 4099, 4107]


def boundaries(scores: torch.Tensor, threshold: float) -> list[int]:
    """The chunks' first positions, by the rule read one position at a time; the last boundaries are decided or none."""
    values: list[float] = scores.tolist()
    context = len(values)

    def is_peak(position: int) -> bool:
        around = values[max(position - 8, 0) : position] + values[position + 1 : position + 9]
        return values[position] > max([threshold, *around])

    peaks = [position for position in range(context) if is_peak(position)]
    splits = []
    for begin, end in itertools.pairwise([0, *peaks, context + 64]):
        # Pieces of 57; a last piece that would be shorter than 8 joins the one before it.
        splits += [split for split in range(begin + 57, end, 57) if end - split >= 8]
    return sorted({0} | {position for position in peaks + splits if position + 19 <= context})


def starts(start: torch.Tensor, context: int) -> list[int]:
    """First positions of the chunks that exist."""
    return [position for position in start.tolist() if position < context]


@pytest.mark.parametrize("platform", PACKED)
def test_boundary_scores_equal_float64(platform: Platform, generator: torch.Generator) -> None:
    for context in CONTEXTS:
        data = oracle.random_paged(platform, generator, [context], 2, 32, 32)
        scores = reference.boundary_scores(data.reader(0)).cpu()
        keys = data.keys[0].double().cpu().transpose(0, 1).flatten(1)
        expected = torch.full((context,), float("-inf"), dtype=torch.float64)
        for position in range(8, context - 3):
            left, right = keys[position - 4 : position].mean(0), keys[position : position + 4].mean(0)
            expected[position] = 1 - torch.cosine_similarity(left, right, dim=0)
        assert torch.equal(scores.isinf(), expected.isinf()), f"context {context}"
        finite = ~expected.isinf()
        assert float((scores[finite] - expected[finite]).abs().amax() if bool(finite.any()) else 0) < 1e-5


@given(
    context=st.integers(1, 600),
    threshold=st.sampled_from([0.0, 0.5, 0.9, 2.0]),
    levels=st.sampled_from([2, 5, 1000]),
    seed=st.integers(0, 1 << 30),
)
def test_chunk_starts_follow_the_rule(context: int, threshold: float, levels: int, seed: int) -> None:
    """With ties, which are no peaks, and with long stretches without any."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels + 1, (context,), generator=generator) / levels
    scores[torch.rand(context // 100 + 1, generator=generator).mul(context).long()] += 0.5
    scores[:8] = scores[max(context - 3, 0) :] = float("-inf")
    start = reference.block_starts(scores, threshold)
    assert start.shape == (context // 8 + 2,)
    assert starts(start, context) == boundaries(scores, threshold)


@pytest.mark.parametrize("second_peak", [0.0, 2.0])
def test_d2_a_split_waits_for_all_that_may_drop_it(second_peak: float) -> None:
    """The split at 57 is dropped for the boundary at 64, unless a higher score at 72 makes that none."""
    final = [0, 57, 72] if second_peak else [0, 64]
    for context in range(1, 120):
        scores = torch.zeros(120)
        scores[64], scores[72] = 1.0, second_peak
        scores[:8] = scores[max(context - 3, 0) :] = float("-inf")
        decided = [0, *(position for position in final[1:] if position + 19 <= context)]
        assert starts(reference.block_starts(scores[:context], 0.5), context) == decided, f"context {context}"


@given(
    context=st.integers(1, 500),
    change=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    threshold=st.sampled_from([0.0, 0.1, 0.7]),
    seed=st.integers(0, 1 << 30),
)
def test_d2_chunks_partition_the_context_and_never_move(
    context: int, change: float, threshold: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    topic = (torch.rand(context, generator=generator) < change).cumsum(0)
    topics = oracle.random_tensor(PLAIN, generator, 1, context + 1, 32)
    keys = topics[:, topic] + oracle.random_tensor(PLAIN, generator, 1, context, 32, spread=0.2)
    data = oracle.paged(PLAIN, [keys], [keys], 64, generator)
    whole = adaptive_blocks(data.reader(0), threshold)
    found = starts(whole.start, context)
    assert found[0] == 0
    assert bool((whole.start[len(found) :] == context).all())
    lengths = [end - begin for begin, end in itertools.pairwise(found)]
    assert all(8 <= length <= 64 for length in lengths), lengths
    # The last chunk waits for what decides its end, and no longer.
    assert context - found[-1] < 64 + whole.look_ahead_tokens
    for shorter in {max(context - step, 1) for step in (1, 5, 19, 64, 200)}:
        part = adaptive_blocks(PLAIN.keys_of(data.kv_cache, data.block_table[0], shorter), threshold)
        decided = starts(part.start, shorter)
        assert decided == found[: len(decided)]
        # And nothing is left undecided for longer than the rule looks ahead.
        assert [0, *(later for later in found[1:] if later + whole.look_ahead_tokens <= shorter)] == decided
        closed = len(decided) - 1
        assert torch.equal(part.representation[:, :closed], whole.representation[:, :closed])


def test_a_change_of_keys_is_a_boundary_and_noise_is_none(generator: torch.Generator) -> None:
    topics = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 1]), 32).float()
    keys = topics.repeat_interleave(torch.tensor([45, 13, 100, 60]), dim=0).unsqueeze(0)
    keys = keys + 0.02 * torch.randn(keys.shape, generator=generator)
    data = oracle.paged(PLAIN, [keys], [keys], 32, generator)
    key_blocks = adaptive_blocks(data.reader(0), 0.1)
    assert starts(key_blocks.start, 218) == [0, 45, 58, 58 + 57, 158]


@pytest.mark.parametrize("platform", PACKED)
def test_representations_equal_float64(platform: Platform, generator: torch.Generator) -> None:
    """Over tile ends, which chunks straddle; chunks that do not exist are zero."""
    for context in CONTEXTS:
        data = oracle.random_paged(platform, generator, [context], 2, 32, 32)
        key_blocks = adaptive_blocks(data.reader(0), 0.1)
        found = starts(key_blocks.start, context)
        assert key_blocks.representation.shape == (2, context // 8 + 1, 32)
        for index, (begin, end) in enumerate(itertools.pairwise([*found, context])):
            expected = data.keys[0][:, begin:end].double().mean(1) * (end - begin) ** 0.5
            assert oracle.relative_error(key_blocks.representation[:, index], expected) < 1e-5
        assert bool((key_blocks.representation[:, len(found) :] == 0).all())
