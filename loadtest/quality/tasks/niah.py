"""Needles in a haystack: RULER's single, multi-key, multi-value and multi-query retrieval (arXiv:2404.06654, 3.1)."""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence

from loadtest.quality.tasks import haystack
from loadtest.quality.tasks.task import CountTokens, Task, fit
from loadtest.text.words import ADJECTIVES, KEY_NOUNS

ANSWER_TOKENS = 128
_NEEDLE = "One of the special {kind}s for {key} is: {value}."


def _word_key(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(KEY_NOUNS)}"


def _number(rng: random.Random) -> str:
    return str(rng.randint(1_000_000, 9_999_999))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _task(lines: Sequence[str], kind: str, keys: Sequence[str], answers: Sequence[str], joint: str) -> Task:
    listed = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
    what = f"special {kind}" if len(answers) == 1 else f"all the special {kind}s"
    be = "is" if len(answers) == 1 else "are"
    content = (
        f"Some special {kind}s are hidden in the following text. Memorize them: there will be a question about them "
        f"afterwards.\n\n{joint.join(lines)}\n\nWhat {be} {what} for {listed} mentioned in the text?"
    )
    prefix = f"The special {kind}{'' if len(answers) == 1 else 's'} for {listed} mentioned in the text {be}"
    return Task(content, prefix, tuple(answers), ANSWER_TOKENS)


def _in_prose(
    seed: int, tokens_target: int, count_tokens: CountTokens, keys: int = 1, values: int = 1, asked: int = 1
) -> Task:
    def build(units: int) -> Task:
        rng = random.Random(seed)
        names = _distinct(rng, keys)
        hidden = {name: [_number(rng) for _ in range(values)] for name in names}
        needles = [_NEEDLE.format(kind="number", key=name, value=value) for name in names for value in hidden[name]]
        rng.shuffle(needles)
        wanted = names[:asked]
        answers = [value for name in wanted for value in hidden[name]]
        lines = haystack.hide(rng, haystack.prose(rng, units), needles)
        return _task(lines, "number", wanted, answers, " ")

    return fit(build, tokens_target, count_tokens, tokens_target // 14)


def _distinct(rng: random.Random, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names[_word_key(rng)] = None
    return list(names)


def single(seed: int, tokens_target: int, count_tokens: CountTokens) -> Task:
    """One key with one number in prose."""
    return _in_prose(seed, tokens_target, count_tokens)


def multi_key(seed: int, tokens_target: int, count_tokens: CountTokens) -> Task:
    """The haystack is made of needles too, keys and values are UUIDs: RULER's hardest, `multikey_3`."""

    def build(units: int) -> Task:
        rng = random.Random(seed)
        pairs = [(_uuid(rng), _uuid(rng)) for _ in range(units)]
        key, value = pairs[0]
        lines = [_NEEDLE.format(kind="uuid", key=one, value=other) for one, other in pairs]
        rng.shuffle(lines)
        return _task(lines, "uuid", [key], [value], "\n")

    return fit(build, tokens_target, count_tokens, tokens_target // 60)


def multi_value(seed: int, tokens_target: int, count_tokens: CountTokens) -> Task:
    """One key with four numbers in prose; all four are asked for."""
    return _in_prose(seed, tokens_target, count_tokens, values=4)


def multi_query(seed: int, tokens_target: int, count_tokens: CountTokens) -> Task:
    """Four keys with a number each in prose; all four are asked for."""
    return _in_prose(seed, tokens_target, count_tokens, keys=4, asked=4)
