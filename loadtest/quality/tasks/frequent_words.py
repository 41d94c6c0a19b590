"""Frequent words: which coded words occur most often (RULER's FWE, arXiv:2404.06654, 3.3)."""

from __future__ import annotations

import math
import random
import string

from loadtest.quality.tasks.task import CountTokens, Task, fit

ANSWER_TOKENS = 50
ASKED = 3
EXPONENT = 2.0
_ZETA = math.pi**2 / 6
# Tokens of the task for each word of the vocabulary.
TOKENS_OF_A_WORD = 50


def frequent_words(seed: int, tokens_target: int, count_tokens: CountTokens) -> Task:
    """Coded words whose counts fall with the square of their rank; the first rank is noise, the next three are asked.

    Raises:
        ValueError: the text is too short for three words that differ in their counts.
    """

    def build(units: int) -> Task:
        rng = random.Random(seed)
        vocabulary = ["...", *_coded_words(rng, max(ASKED + 1, tokens_target // TOKENS_OF_A_WORD))]
        counts = [int(units / (rank**EXPONENT * _ZETA)) for rank in range(1, len(vocabulary) + 1)]
        words = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        rng.shuffle(words)
        content = (
            "Read the following coded text and count how often each coded word occurs. Ignore the dots. Then name the "
            f"three coded words that occur most often.\n\n{' '.join(words)}\n\n"
            "Question: which three coded words occur most often in the text above?"
        )
        prefix = "Answer: by the coded text above, the three words that occur most often are:"
        return Task(content, prefix, tuple(vocabulary[1 : ASKED + 1]), ANSWER_TOKENS)

    task = fit(build, tokens_target, count_tokens, tokens_target // 3)
    words = task.content.split()
    if words.count(task.answers[-1]) <= 1:
        raise ValueError(f"{tokens_target} tokens are too few for words that differ in how often they occur")
    return task


def _coded_words(rng: random.Random, count: int) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    return list(words)
