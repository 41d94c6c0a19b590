"""A conversation of several turns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random

from vllm_sparse.quality.corpus import Corpus
from vllm_sparse.quality.tasks.draft import Draft, Message, Planted, Question, fill, spread
from vllm_sparse.quality.tasks.words import Words

KINDS = ("conversation",)

_TURNS = 6


def draft(rng: Random, number: int, tokens: int, corpus: Corpus, kinds: Collection[str]) -> Draft:
    """Real text from the user in each turn, which ends with a fact; the last turn asks for one of them."""
    words = Words(rng)
    keys = [(words.key(), words.number()) for _ in range(_TURNS)]
    facts = [f"Please remember this: the number of the {key} is {value}." for key, value in keys]

    def render(parts: Sequence[str]) -> Sequence[Message]:
        messages = []
        turn: list[str] = []
        for part in parts:
            turn.append(part)
            if part in facts:
                messages += [
                    {"role": "user", "content": "\n\n".join(turn)},
                    {"role": "assistant", "content": "I will remember it. Please go on."},
                ]
                turn = []
        turn.append("That was all.")
        return (*messages, {"role": "user", "content": "\n\n".join(turn)})

    asked = number % _TURNS
    key, value = keys[asked]
    question = Question(
        "conversation",
        f"What is the number of the {key}?",
        f"The number of the {key} is",
        (value,),
        16,
        place=facts[asked],
    )
    planted = [Planted(depth, fact) for depth, fact in zip(spread(rng, _TURNS), facts, strict=True)]
    return Draft(fill(corpus.paragraphs, rng, tokens, sorted(words.given)), planted, [question], render)
