"""What the robustness commands judge by, and what they draw."""

from __future__ import annotations

import random

import pytest

from loadtest.robustness.client import Answer, Choice
from loadtest.robustness.differential import documented
from loadtest.robustness.extras import is_refused, random_extras
from loadtest.robustness.judge import NEAR_TIE_NATS, Likeness, judge
from loadtest.robustness.server import CONFIG, LAYERS
from loadtest.robustness.soak import grows
from loadtest.robustness.traffic import Asked, asked
from vllm_sparse.config.names import PHASES


def answer(tokens: str, likely: dict[str, float] | None = None) -> Answer:
    """One choice whose tokens are letters, each place with the same likely tokens."""
    shared = dict.fromkeys(tokens, -1.0) if likely is None else likely
    return Answer({0: Choice(list(tokens), [{**shared} for _ in tokens])})


def test_equal_tokens_are_the_same_and_the_shift_is_told() -> None:
    found = judge(answer("ab", {"a": -1.0, "b": -1.0}), answer("ab", {"a": -1.25, "b": -1.0}))
    assert (found.likeness, found.shift_nats) == (Likeness.SAME, 0.25)


@pytest.mark.parametrize(
    ("preferred", "likeness"), [(NEAR_TIE_NATS / 2.1, Likeness.NEAR_TIE), (NEAR_TIE_NATS, Likeness.DIFFERENT)]
)
def test_answers_may_part_at_a_near_tie_only(preferred: float, likeness: Likeness) -> None:
    alone = answer("xa", {"x": -1.0, "a": -1.0, "b": -1.0 - preferred})
    mixed = answer("xb", {"x": -1.0, "b": -1.0, "a": -1.0 - preferred})
    assert judge(alone, mixed).likeness == likeness


def test_a_token_that_the_other_answer_finds_unlikely_is_a_difference() -> None:
    assert judge(answer("a", {"a": -1.0}), answer("b", {"b": -1.0, "a": -1.0})).likeness == Likeness.DIFFERENT


def test_a_shorter_answer_is_a_difference_unless_the_client_went_away() -> None:
    assert judge(answer("ab"), answer("a")).likeness == Likeness.DIFFERENT
    assert judge(answer("ab"), answer("a"), aborted=True).likeness == Likeness.SAME
    assert judge(answer("a"), answer("ab"), aborted=True).likeness == Likeness.DIFFERENT
    assert judge(answer("a"), Answer()).likeness == Likeness.DIFFERENT


def test_the_worst_choice_counts() -> None:
    same, other = answer("a").choices[0], answer("b").choices[0]
    assert judge(Answer({0: same, 1: same}), Answer({0: same, 1: other})).likeness == Likeness.DIFFERENT


def test_traffic_is_the_seeds_and_holds_every_method_and_feature() -> None:
    seed = random.randrange(1 << 32)
    requests = [asked(seed, number) for number in range(400)]
    assert requests[7] == asked(seed, 7)
    kinds = {kind for request in requests for kind in request.kinds}
    features = {"n > 1", "priority", "structured", "shared prefix", "aborted", "guarded", "all dense"}
    assert kinds == features | {f"{phase} {name}" for phase, known in PHASES.items() for name in [*known, "dense"]}


def test_random_extras_are_taken() -> None:
    draw = random.Random()
    for _ in range(200):
        extras = random_extras(draw, CONFIG, LAYERS)
        assert not is_refused(extras, CONFIG, LAYERS), extras


def test_growth_counts_after_the_beginning_and_beyond_noise() -> None:
    draw = random.Random(0)
    flat = [100.0 * step for step in range(10)] + [1000.0 + draw.uniform(-20, 20) for _ in range(50)]
    assert not grows("resident worker, MiB", flat)
    assert grows("resident worker, MiB", [1000.0 + 2 * step + draw.uniform(-20, 20) for step in range(60)])


@pytest.mark.parametrize(
    ("kinds", "whole", "preempted", "allowed"),
    [
        (("all dense", "prefill dense", "guarded"), False, True, False),
        (("prefill dense", "decode tidal"), False, False, False),
        (("prefill dense", "decode tidal"), False, True, True),
        (("prefill sale", "decode dense"), False, False, True),
        (("prefill sale", "decode dense"), True, False, False),
        (("prefill sale", "guarded"), True, False, True),
    ],
)
def test_differences_that_are_documented_do_not_fail(
    kinds: tuple[str, ...], whole: bool, preempted: bool, allowed: bool
) -> None:
    assert documented(Asked(0, {}, None, kinds), whole, preempted) == allowed
