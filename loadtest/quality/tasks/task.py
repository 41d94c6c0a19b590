"""What a task is, how it is scored, and how it is brought to a length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

CountTokens = Callable[[str], int]
"""Tokens of a text, special tokens not counted."""

# Rounds of `fit` before the best one so far is taken; texts are nearly linear in their filler, so two or three do.
ROUNDS = 8


@dataclass(frozen=True)
class Task:
    """A prompt with a known answer.

    Attributes:
        content: the user's message.
        answer_prefix: the beginning of the answer, which the model completes.
        answers: each has to occur in the output.
        answer_tokens: room for the output.
    """

    content: str
    answer_prefix: str
    answers: tuple[str, ...]
    answer_tokens: int


def share_found(answers: Sequence[str], output_text: str) -> float:
    """Share (0..1) of the answers that occur in the output, whatever their case: RULER's `string_match_all`."""
    text = output_text.lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def fit(build: Callable[[int], Task], tokens_target: int, count_tokens: CountTokens, first_guess: int) -> Task:
    """The longest task that fits into a number of tokens together with its answer, nearly.

    Args:
        build: makes the task with so many units of filler (1 or more); more filler, more tokens.
        tokens_target: of content, answer prefix and output, at most.
        count_tokens: of a text.
        first_guess: units to begin with.

    Raises:
        ValueError: not even one unit fits.
    """
    best: Task | None = None
    fits, too_many = 0, None
    units = max(1, first_guess)
    for _ in range(ROUNDS):
        task = build(units)
        tokens = count_tokens(task.content) + count_tokens(task.answer_prefix) + task.answer_tokens
        if tokens <= tokens_target:
            best, fits = task, units
        else:
            too_many = units
        # Within half a percent there is nothing to gain; otherwise on by proportion, inside what is known.
        if tokens_target * 0.995 <= tokens <= tokens_target or too_many == fits + 1:
            break
        units = max(fits + 1, int(units * tokens_target / tokens))
        if too_many is not None and units >= too_many:
            units = (fits + too_many) // 2
    if best is None:
        raise ValueError(f"the task does not fit into {tokens_target} tokens")
    return best
