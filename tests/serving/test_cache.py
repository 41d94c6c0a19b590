"""The prefix cache: blocks are shared by requests with equal sparse settings only."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from loadtest.text.needles import NeedlePrompt, score
from tests.serving.server import BOTH, FLEXPREFILL, MODEL_NAME, TIDAL, Server, prompt_of

MIN = {"sparse_min_tokens": 512}


def cached(server: Server, content: str, extras: dict[str, Any] | None, salt: str | None = None) -> int:
    """Prompt tokens that a request finds in the prefix cache."""
    body = {} if salt is None else {"cache_salt": salt}
    return server.chat(content, extras, max_tokens=4, **body).cached_tokens


@pytest.mark.parametrize(
    ("number", "extras", "other"),
    [
        (0, {**FLEXPREFILL, **MIN}, {"flexprefill_gamma": 0.8}),
        (2, {**BOTH, **MIN, "tidal_budget_tokens": 256}, {"sparse_min_tokens": 600}),
    ],
    ids=["flexprefill", "both"],
)
def test_only_equal_settings_share(server: Server, number: int, extras: dict[str, Any], other: dict[str, Any]) -> None:
    content = prompt_of(300 + number, 1000).content
    # Tokens before the minimum are dense, whatever the settings.
    dense = range(512 - 64, 513)
    assert cached(server, content, extras) == 0
    assert cached(server, content, None) in dense
    assert cached(server, content, None) > 900
    assert cached(server, content, extras) > 900
    assert cached(server, content, {**extras, **other}) in range(512 - 64, other.get("sparse_min_tokens", 512) + 1)
    assert cached(server, content, {**extras, **other}) > 900
    # The user's own salt separates as well.
    assert cached(server, content, extras, "mine") == 0
    assert cached(server, content, extras, "mine") > 900
    assert cached(server, content, None, "mine") in dense
    assert cached(server, content, extras, "yours") == 0


def test_a_dense_prompt_is_shared_whatever_its_generation(server: Server) -> None:
    """Of a request whose generation alone is sparse, what sparse steps wrote is its own."""
    extras = {**TIDAL, **MIN, "tidal_budget_tokens": 256}
    tokens = tokens_of(server, prompt_of(301, 1000))
    first = continued(server, tokens, extras, max_tokens=100)
    assert first.cached == 0
    for others in ({**TIDAL, **MIN, "tidal_budget_tokens": 512}, {"sparse_decode": "dense"}, extras):
        assert len(tokens) - 64 < continued(server, tokens, others).cached < len(tokens)
        # Nothing of the 100 tokens that were generated.
        assert continued(server, [*tokens, *first.tokens], others).cached <= len(tokens)
        tokens = [*tokens, 5]
    # The user's own salt separates as well.
    assert continued(server, tokens, extras, "mine").cached == 0
    assert continued(server, tokens, {"sparse_decode": "dense"}, "mine").cached > 900
    assert continued(server, tokens, extras, "yours").cached == 0


def test_equal_settings_in_other_words_share(server: Server) -> None:
    """A default knob that is written out, a gamma of 1, a minimum that is never reached."""
    content = prompt_of(310, 1000).content
    assert cached(server, content, {**FLEXPREFILL, **MIN}) == 0
    assert cached(server, content, {**FLEXPREFILL, **MIN, "flexprefill_gamma": 0.9}) > 900
    assert cached(server, content, None) <= 512
    assert cached(server, content, {"sparse_prefill": "dense", "sparse_decode": "dense"}) > 900
    assert cached(server, content, {**FLEXPREFILL, **MIN, "flexprefill_gamma": 1}) > 900
    assert cached(server, content, BOTH) > 900


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize("extras", [None, {**BOTH, **MIN}], ids=["dense", "sparse"])
def test_forged_salt_is_refused(server: Server, extras: dict[str, Any] | None, endpoint: str, stream: bool) -> None:
    salt = "mine|sparse:1:0123456789abcdef"
    ask = server.chat if endpoint == "chat" else server.complete
    reply = ask("Hello.", extras, cache_salt=salt, stream=stream)
    assert reply.status == 400, reply.raw
    assert "cache_salt" in reply.error
    assert "|sparse:" in reply.error
    assert reply.body["error"]["param"] == "cache_salt"


# More than rounding moves an answer's log probabilities, less than keys of other settings or places would.
SAME_ANSWER = 0.2
# Methods of both phases. What flexprefill reads depends on where a prompt chunk ends, and so on what is in the cache;
# with these it does not.
PAIRS: dict[str, dict[str, Any]] = {
    "sale-tidal": {"sparse_prefill": "sale", "sale_tau": 0.03, **TIDAL, "tidal_budget_tokens": 256},
    "dhsa-hip": {
        "sparse_prefill": "dhsa",
        "dhsa_density": 0.4,
        "sparse_decode": "hip",
        "hip_stage_block_tokens": [64, 16],
        "hip_stage_budget_tokens": [1024, 512],
        "hip_sink_tokens": 64,
        "hip_recent_tokens": 256,
        "hip_dense_layers": 2,
    },
    "hip-dense": {
        "sparse_prefill": "hip",
        "hip_stage_budget_tokens": [1024, 768, 512],
        "hip_recent_tokens": 256,
    },
}
SUMMARISING = {"sparse_prefill": "dense", "sparse_decode": "blocktopk", "blocktopk_budget_tokens": 256}


class Answer(NamedTuple):
    """What a request with token ids got: the text, its tokens, their log probabilities, and prompt tokens cached."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    cached: int


def continued(
    server: Server, tokens: list[int], extras: dict[str, Any], salt: str | None = None, max_tokens: int = 7
) -> Answer:
    """Continue token ids for just so many tokens."""
    body: dict[str, Any] = {} if salt is None else {"cache_salt": salt}
    body |= {"prompt": tokens, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": 1, "return_token_ids": True}
    reply = server.post("/v1/completions", {**body, "vllm_xargs": extras})
    return Answer(reply.text, reply.body["choices"][0]["token_ids"], reply.logprobs, reply.cached_tokens)


def tokens_of(server: Server, prompt: NeedlePrompt) -> list[int]:
    """Token ids of a prompt that ends where its answer begins."""
    body = {"model": MODEL_NAME, "prompt": prompt.completion_prompt}
    tokens: list[int] = server.call("POST", "/tokenize", json=body).json()["tokens"]
    return tokens


def check_same_answer(prompt: NeedlePrompt, found: Answer, computed: Answer) -> None:
    """Two answers are the right one, with equal certainty."""
    assert found.text == computed.text
    assert score(prompt, found.text) == 1
    differences = [abs(left - right) for left, right in zip(found.logprobs, computed.logprobs, strict=True)]
    assert max(differences) < SAME_ANSWER


def check_answers_after_a_hit(server: Server, seed: int, extras: dict[str, Any]) -> None:
    """A prompt of which a part, and then nearly all, is in the cache is answered as one that is computed."""
    extras = {**extras, **MIN}
    prompt = prompt_of(seed, 1800)
    tokens = tokens_of(server, prompt)
    computed = continued(server, tokens, extras, server.fresh_salt())
    assert continued(server, tokens[:1200], extras).cached == computed.cached == 0
    part = continued(server, tokens, extras)
    assert 1100 < part.cached <= 1200
    check_same_answer(prompt, part, computed)
    most = continued(server, tokens, extras)
    assert len(tokens) - 64 < most.cached < len(tokens)
    check_same_answer(prompt, most, computed)


@pytest.mark.parametrize("methods", PAIRS)
def test_answers_after_a_hit_are_those_without_one(server: Server, answers_known: None, methods: str) -> None:
    check_answers_after_a_hit(server, 820 + list(PAIRS).index(methods), PAIRS[methods])


def check_answers_across_the_minimum(server: Server, seed: int, extras: dict[str, Any], found_tokens: int) -> None:
    """A conversation whose first turn is dense, and whose generation passes the minimum, goes on as one computed.

    Args:
        server: a server.
        seed: of the prompt.
        extras: of the requests.
        found_tokens: tokens of the first turn that the second one finds, the last block aside.
    """
    extras = {**extras, "sparse_min_tokens": 1000}
    prompt = prompt_of(seed, 1600)
    tokens = tokens_of(server, prompt)
    first = continued(server, tokens[:900], extras, max_tokens=200)
    assert len(first.tokens) == 200
    turn = [*tokens[:900], *first.tokens, *tokens[900:]]
    computed = continued(server, turn, extras, server.fresh_salt())
    assert computed.cached == 0
    found = continued(server, turn, extras)
    assert found_tokens - 64 < found.cached <= found_tokens
    check_same_answer(prompt, found, computed)


@pytest.mark.parametrize("methods", PAIRS)
def test_answers_across_the_minimum_are_those_without_a_hit(server: Server, answers_known: None, methods: str) -> None:
    # Blocks of both sides of the minimum.
    check_answers_across_the_minimum(server, 840 + list(PAIRS).index(methods), PAIRS[methods], 1100)


def test_page_summaries_across_the_minimum(configured_server: Server, answers_known: None) -> None:
    """Dense steps summarise as well."""
    # What the generation wrote sparsely is not found by a prompt, which is dense.
    check_answers_across_the_minimum(configured_server, 850, SUMMARISING, 1000)


def test_a_hit_brings_its_page_summaries(configured_server: Server, answers_known: None) -> None:
    """They are kept beside the cache, and written for blocks that are found."""
    check_answers_after_a_hit(configured_server, 830, SUMMARISING)


DENSE_PROMPT = {"sparse_prefill": "dense", "sparse_min_tokens": 1100}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"sparse_prefill": "dense", "sparse_decode": "dense"},
    "tidal": {**DENSE_PROMPT, **TIDAL, "tidal_budget_tokens": 256},
    "blocktopk": {**DENSE_PROMPT, "sparse_decode": "blocktopk", "blocktopk_budget_tokens": 256},
    "tokentopk": {**DENSE_PROMPT, "sparse_decode": "tokentopk", "tokentopk_budget_tokens": 256},
    "flexprefill": {**FLEXPREFILL, "sparse_min_tokens": 1100, "flexprefill_gamma": 0.95},
}
CACHE_BLOCK_TOKENS = 32


def test_conversations_of_all_kinds_share_a_system_prompt(sharing_server: Server, answers_known: None) -> None:
    """It is computed once, and each conversation's second turn finds its first one; answers are those without hits."""
    server = sharing_server
    prompt = prompt_of(861, 1600)
    tokens = tokens_of(server, prompt)
    system, question = tokens[:1000], tokens[1000:]
    before = server.metrics()
    least_hits, asked_tokens = 0, 0
    turns: dict[str, tuple[list[int], Answer]] = {}
    for number, (kind, extras) in enumerate(KINDS.items()):
        first_turn = [*system, *tokens[40 * number + 5 : 40 * number + 45]]
        first = continued(server, first_turn, extras, max_tokens=120)
        shared = len(system) // CACHE_BLOCK_TOKENS * CACHE_BLOCK_TOKENS if number else 0
        assert first.cached == shared, kind
        second_turn = [*first_turn, *first.tokens, *question]
        second = continued(server, second_turn, extras)
        # Of the first turn, whose last token was not computed, all but what a sparse generation wrote: that may be read
        # by no dense prompt.
        found = 1100 if extras.get("sparse_min_tokens") and "sparse_decode" in extras else len(first_turn) + 119
        found = found // CACHE_BLOCK_TOKENS * CACHE_BLOCK_TOKENS
        assert second.cached == found, kind
        least_hits += shared + found
        asked_tokens += len(first_turn) + len(second_turn)
        turns[kind] = second_turn, second
    after = server.metrics()
    hits, queries = (
        after.total(f"vllm:prefix_cache_{name}_total") - before.total(f"vllm:prefix_cache_{name}_total")
        for name in ("hits", "queries")
    )
    assert (hits, queries) == (least_hits, asked_tokens)
    assert hits / queries > 0.6
    for kind, (turn, answer) in turns.items():
        check_same_answer(prompt, answer, continued(server, turn, KINDS[kind], server.fresh_salt()))
