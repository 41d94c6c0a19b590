"""Variable tracking: a chain of assignments hidden in noise (RULER, arXiv:2404.06654, 3.2)."""

from __future__ import annotations

import itertools
import random
import string

from loadtest.quality.tasks import haystack
from loadtest.quality.tasks.task import CountTokens, Task, fit

HOPS = 4
ANSWER_TOKENS = 30
# Lines of the solved example in front of the task.
EXAMPLE_LINES = 10


def _names(rng: random.Random, letters: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) <= HOPS:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(names)


def _chain(rng: random.Random, letters: int, units: int) -> tuple[str, str, list[str]]:
    names = _names(rng, letters)
    value = str(rng.randint(10_000, 99_999))
    first = f"VAR {names[0]} = {value}."
    later = [f"VAR {name} = VAR {before}." for before, name in itertools.pairwise(names)]
    text = "\n".join(haystack.hide(rng, haystack.noise(units), [first, *later]))
    task = (
        "Keep track of the chains of variable assignments that are hidden in the following text.\n\n"
        f"{text}\n\nQuestion: find all variables that hold the value {value} in the text above."
    )
    prefix = f"Answer: by the chains of assignments in the text, {HOPS + 1} variables hold the value {value}, they are:"
    return task, prefix, names


def variable_tracking(seed: int, tokens_target: int, count_tokens: CountTokens) -> Task:
    """One chain of four copies; all five names that hold its number are asked for. A solved example precedes it."""

    def build(units: int) -> Task:
        rng = random.Random(seed)
        example, example_prefix, example_names = _chain(rng, 3, EXAMPLE_LINES)
        task, prefix, names = _chain(rng, 5, units)
        content = f"{example}\n{example_prefix} {' '.join(example_names)}\n\n{task}"
        return Task(content, prefix, tuple(names), ANSWER_TOKENS)

    return fit(build, tokens_target, count_tokens, tokens_target // 26)
