"""Which blocks of a request have keys of their own: those that a sparse step may have written, and no others."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_utils import get_request_block_hasher

from tests.backend.test_forward import Row, common_metadata
from vllm_sparse.config.request import SparseParams
from vllm_sparse.config.salt import cache_salt, split_salt
from vllm_sparse.hooks import kv_cache_utils as hook
from vllm_sparse.methods.block_topk import BlockTopk
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.server.admission import first_sparse_token
from vllm_sparse.step.eligibility import why_decode_is_dense
from vllm_sparse.step.plan import PlanLimits, plan_step
from vllm_sparse.step.requests import SparseRequest

BLOCK_TOKENS = 16
LOOKS_AHEAD = "num_hash_lookahead_tokens" in inspect.signature(get_request_block_hasher).parameters
TIDAL, OTHER = SparseParams(decode=Tidal(), min_tokens=0), SparseParams(decode=Tidal(budget_tokens=99), min_tokens=0)


def keys_of(tokens: list[int], salt: str | None, **settings: int) -> list[bytes]:
    """Keys of a request's blocks, as the engine makes them; settings are those of vLLM's hasher."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import init_none_hash
    from vllm.v1.request import Request

    hook.install()
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK_TOKENS, sha256, **settings)
    request: Any = Request("r", tokens, SamplingParams(max_tokens=4), None, cache_salt=salt, block_hasher=hasher)
    return list(request.block_hashes)


def shared(left: list[bytes], right: list[bytes]) -> int:
    """Blocks at the beginning that two requests share."""
    return next((number for number, keys in enumerate(zip(left, right, strict=True)) if keys[0] != keys[1]), len(left))


@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(0, 99), min_size=1, max_size=200),
    first=st.integers(0, 220),
    user=st.sampled_from([None, "mine", "a:b|c"]),
)
def test_keys_differ_from_the_first_sparse_token_on(tokens: list[int], first: int, user: str | None) -> None:
    dense, sparse = keys_of(tokens, user), keys_of(tokens, cache_salt(TIDAL, user, first))
    assert shared(dense, sparse) == min(first // BLOCK_TOKENS, len(dense))
    assert shared(sparse, keys_of(tokens, cache_salt(TIDAL, user, first))) == len(sparse)
    assert shared(sparse, keys_of(tokens, cache_salt(OTHER, user, first))) == min(first // BLOCK_TOKENS, len(dense))
    if dense:
        assert shared(sparse, keys_of(tokens, cache_salt(TIDAL, "yours", first))) == 0


@pytest.mark.skipif(not LOOKS_AHEAD, reason="this vLLM's keys do not look ahead")
@given(
    tokens=st.lists(st.integers(0, 99), min_size=1, max_size=200),
    first=st.integers(0, 220),
    ahead=st.integers(1, 3),
)
def test_keys_that_look_ahead_differ_no_later(tokens: list[int], first: int, ahead: int) -> None:
    """With speculative decoding vLLM 0.33 puts tokens after a block into its key: what they salt, salts the block."""
    dense, sparse, other = (
        keys_of(tokens, salt, num_hash_lookahead_tokens=ahead)
        for salt in (None, cache_salt(TIDAL, None, first), cache_salt(OTHER, None, first))
    )
    assert len(dense) == max(0, (len(tokens) - ahead) // BLOCK_TOKENS)
    assert shared(dense, sparse) == shared(other, sparse) == min(max(0, first - ahead) // BLOCK_TOKENS, len(dense))
    assert shared(sparse, keys_of(tokens, cache_salt(TIDAL, None, first), num_hash_lookahead_tokens=ahead)) == len(
        sparse
    )


@given(first=st.integers(0, 1000), block_tokens=st.sampled_from([1, 16, 48, 128]), user=st.sampled_from([None, "mine"]))
def test_events_tell_the_salt_of_one_block_whatever_its_size(first: int, block_tokens: int, user: str | None) -> None:
    from vllm.v1.core import block_pool, kv_cache_utils

    hook.install()
    assert block_pool.generate_block_hash_extra_keys is kv_cache_utils.generate_block_hash_extra_keys
    salt = cache_salt(TIDAL, user, first)
    request = SimpleNamespace(cache_salt=salt, mm_features=[], lora_request=None, prompt_embeds=None)
    salts = []
    for start in range(0, 1024, block_tokens):
        keys, _ = kv_cache_utils.generate_block_hash_extra_keys(request, start, start + block_tokens, 0)
        salts += [(start, value) for _, value in keys or ()]
    own = split_salt(salt)[1] if first else salt
    expected = [(0, user)] if user and first else []
    assert salts == [*expected, (first // block_tokens * block_tokens, own)]


def request_of(prompt_tokens: int, max_tokens: int | None, resumable: bool = False) -> Any:
    """An engine request, as far as its salt depends on it."""
    params = SimpleNamespace(max_tokens=max_tokens)
    return SimpleNamespace(prompt_token_ids=[5] * prompt_tokens, resumable=resumable, sampling_params=params)


@given(
    prompt_tokens=st.integers(1, 300),
    max_tokens=st.integers(1, 300),
    min_tokens=st.integers(0, 700),
    budget=st.integers(128, 400),
)
def test_no_sparse_step_writes_before_it(prompt_tokens: int, max_tokens: int, min_tokens: int, budget: int) -> None:
    params = SparseParams(decode=Tidal(budget_tokens=budget), min_tokens=min_tokens)
    first = first_sparse_token(request_of(prompt_tokens, max_tokens), params)
    # A step with a context of so many tokens writes the last of them.
    sparse = [
        seq_len - 1
        for seq_len in range(prompt_tokens + 1, prompt_tokens + max_tokens + 1)
        if why_decode_is_dense(params.decode, min_tokens, seq_len) is None  # type: ignore[arg-type]
    ]
    assert first == (sparse[0] if sparse else None)


METHODS = (
    SparseParams(FlexPrefill(), None),
    SparseParams(FlexPrefill(), Tidal(budget_tokens=128)),
    SparseParams(FlexPrefill(), BlockTopk(budget_tokens=700)),
    SparseParams(None, Tidal(budget_tokens=128)),
    SparseParams(None, BlockTopk(budget_tokens=256)),
)
PLANNED = PlanLimits(num_layers=8)


def tokens_of_sparse_steps(params: SparseParams, computed: int, prompt: int, last: int, draw: Any) -> set[int]:
    """Tokens that a request's sparse steps write, however vLLM cuts its prompt.

    Args:
        params: of the request.
        computed: tokens found in the prefix cache.
        prompt: tokens of its prompt; after a preemption with those that it had generated.
        last: tokens when it ends.
        draw: draws numbers of a range.
    """
    request, written = SparseRequest(params), set[int]()
    while computed < last:
        in_prompt = computed < prompt
        tokens = draw(1, prompt - computed) if in_prompt else 1
        computed += tokens
        common = common_metadata([Row(tokens, computed, params, in_prompt)], torch.zeros(1, 1, dtype=torch.int32))
        plan = plan_step(common, {0: request}, PLANNED)
        for span in (*(row.span for row in plan.prefill), *(row.span for row in plan.decode)):
            written |= set(range(span.seq_len - span.query_tokens, span.seq_len))
    return written


@settings(deadline=None)
@given(
    methods=st.sampled_from(METHODS),
    prompt_tokens=st.integers(1, 1000),
    max_tokens=st.integers(1, 60),
    data=st.data(),
)
def test_no_sparse_step_writes_a_block_of_dense_requests(
    methods: SparseParams, prompt_tokens: int, max_tokens: int, data: st.DataObject
) -> None:
    """Whatever is in the prefix cache, wherever prompts are cut, and after preemptions."""
    last = prompt_tokens + max_tokens
    min_tokens = data.draw(st.integers(0, 900) | st.integers(prompt_tokens, last + 1))
    params = replace(methods, min_tokens=min_tokens)
    first = first_sparse_token(request_of(prompt_tokens, max_tokens), params)

    def draw(least: int, most: int) -> int:
        return data.draw(st.integers(least, most))

    written = tokens_of_sparse_steps(params, draw(0, prompt_tokens - 1), prompt_tokens, last, draw)
    preempted = draw(prompt_tokens, last - 1)
    written |= tokens_of_sparse_steps(params, draw(0, preempted - 1), preempted, last, draw)
    if first is None:
        assert not written
    else:
        assert min(written, default=first) >= first


@given(
    methods=st.sampled_from(METHODS[:3]),
    min_tokens=st.integers(0, 900),
    turns=st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), min_size=2, max_size=5),
)
def test_a_conversation_with_a_prompt_method_finds_all_blocks_of_its_turns(
    methods: SparseParams, min_tokens: int, turns: list[tuple[int, int]]
) -> None:
    """Turns before the minimum, across it and behind it; those before it are a dense request's too."""
    params = replace(methods, min_tokens=min_tokens)
    former: list[bytes] = []
    tokens = 0
    for question, answer in turns:
        first = first_sparse_token(request_of(tokens + question, answer), params)
        tokens += question + answer
        keys = keys_of(list(range(tokens)), None if first is None else cache_salt(params, None, first))
        dense = keys_of(list(range(tokens)), None)
        assert shared(former, keys[: len(former)]) == len(former)
        assert shared(keys, dense) == min((tokens if first is None else first) // BLOCK_TOKENS, len(dense))
        former = keys


@pytest.mark.parametrize(
    ("params", "request_", "first"),
    [
        (SparseParams(FlexPrefill(), None, 1000), request_of(900, 200), 1000),
        (SparseParams(FlexPrefill(), None, 1000), request_of(4000, 200), 1000),
        (SparseParams(FlexPrefill(), None, 1000), request_of(900, 100), None),
        (SparseParams(FlexPrefill(), None, 1000), request_of(900, None), 1000),
        (SparseParams(FlexPrefill(), None, 0), request_of(900, 200), 0),
        # The step with a context of 1000 tokens writes the token before.
        (SparseParams(FlexPrefill(), Tidal(budget_tokens=128), 1000), request_of(900, 200), 999),
        (SparseParams(FlexPrefill(), Tidal(budget_tokens=128), 1000), request_of(4000, 200), 999),
        (SparseParams(FlexPrefill(), Tidal(), 1000), request_of(4000, 200), 1000),
        (SparseParams(None, BlockTopk(), 1000), request_of(4000, 200), 4000),
        (SparseParams(None, BlockTopk(), 1000), request_of(900, 200), None),
        (SparseParams(None, Tidal(), 1000), request_of(4000, 200), 4000),
        (SparseParams(None, Tidal(), 1000), request_of(4000, None), 4000),
        (SparseParams(None, Tidal(), 1000), request_of(4000, 200, resumable=True), 0),
        (SparseParams(None, Tidal(), 1000), request_of(0, 200), 0),
    ],
)
def test_where_a_salt_begins(params: SparseParams, request_: Any, first: int | None) -> None:
    assert first_sparse_token(request_, params) == first
