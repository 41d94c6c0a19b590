"""The generator of needle prompts."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.text import words
from loadtest.text.needles import Style, filler, needle_prompt, score, sentence
from loadtest.text.tokenizer import build_tokenizer, count_tokens

TOKENIZER = build_tokenizer()
STYLES: tuple[Style, ...] = ("prose", "stock", "rare")


def tokens_of(text: str) -> int:
    return count_tokens(TOKENIZER, text)


@given(
    seed=st.integers(0, 10**6),
    target=st.integers(300, 3000),
    needles=st.integers(1, 12),
    style=st.sampled_from(STYLES),
)
@settings(max_examples=40, deadline=None)
def test_prompt_has_its_length_and_each_needle_once(seed: int, target: int, needles: int, style: Style) -> None:
    asked = min(needles, 3)
    prompt = needle_prompt(random.Random(seed), target, tokens_of, needles, asked, style=style)
    # One sentence that has to be spelled may take some 60 tokens.
    assert target - 80 <= tokens_of(prompt.content) <= target + 2
    assert len(set(prompt.keys)) == len(prompt.answers) == asked
    for key, value in zip(prompt.keys, prompt.answers, strict=True):
        assert re.fullmatch(r"\d{5}", value)
        holding = [line for line in re.split(r"(?<=\.)\s", prompt.text) if value in line and " code " in line]
        assert len(holding) == 1
        assert re.search(rf"\bthe {key}\b", holding[0], re.IGNORECASE)
        assert re.search(rf"\bthe {key}\b", prompt.question)


def test_same_seed_same_prompt_and_other_seed_another() -> None:
    one, same, other = (needle_prompt(random.Random(seed), 400, tokens_of, 3, 2) for seed in (1, 1, 2))
    assert one == same
    assert one.keys != other.keys
    assert one.text != other.text


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needle_stands_at_the_depth_wanted(depth: float) -> None:
    prompt = needle_prompt(random.Random(5), 4000, tokens_of, 8, 1, depths=[depth])
    assert abs(prompt.depths[0] - depth) < 0.05


@pytest.mark.parametrize(
    ("target", "needles", "asked", "depths"),
    [
        (400, 1, 2, None),
        (400, 1, 0, None),
        (400, 10_000, 1, None),
        (40, 8, 1, None),
        (400, 2, 2, [0.5]),
        (400, 1, 1, [2.0]),
    ],
)
def test_impossible_prompts_are_refused(target: int, needles: int, asked: int, depths: list[float] | None) -> None:
    with pytest.raises(ValueError, match=r"must be|do not fit"):
        needle_prompt(random.Random(0), target, tokens_of, needles, asked, depths=depths)


def test_score_counts_the_values_asked_for() -> None:
    prompt = needle_prompt(random.Random(3), 500, tokens_of, 6, 3)
    assert score(prompt, prompt.reference) == 1.0
    assert score(prompt, "") == 0.0
    assert score(prompt, f"It is {prompt.answers[1]}.") == pytest.approx(1 / 3)
    assert score(prompt, " ".join("1" + answer for answer in prompt.answers)) == 0.0


def test_completion_prompt_and_reference_share_the_wording() -> None:
    prompt = needle_prompt(random.Random(4), 300, tokens_of)
    assert prompt.completion_prompt.endswith(f"\n\nThe code of the {prompt.keys[0]} is")
    assert prompt.reference == f"The code of the {prompt.keys[0]} is {prompt.answers[0]}."


@given(seed=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_sentences_end_once_and_filler_tells_no_code(seed: int) -> None:
    rng = random.Random(seed)
    for style in STYLES:
        text = sentence(rng, style)
        assert text[0].isupper()
        assert text.index(".") == len(text) - 1
    made = filler(rng, 50)
    assert " code " not in made
    assert made.endswith(".\n\n")


def test_word_lists_are_large_and_plain() -> None:
    assert len(words.KEY_NOUNS) >= 500
    assert len({*words.MOTION_VERBS, *words.ACTION_VERBS}) >= 150
    assert len(words.ADJECTIVES) >= 200
    assert all(word.isascii() and word.isalpha() for word in words.KEY_NOUNS)
    assert not {"code", "codes"} & set(words.KEY_NOUNS)
