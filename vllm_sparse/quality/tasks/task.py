"""What a task is, and how an answer is scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

CountTokens = Callable[[Sequence[Mapping[str, str]]], int]
"""Tokens of a conversation (``role`` and ``content`` of each message) as the served model's chat template writes it."""

Scoring = Literal["share_found", "number", "words_in_order"]


@dataclass(frozen=True)
class Task:
    """A question about a long text, with a known answer.

    Attributes:
        kind: which kind of question, such as ``one_needle``.
        messages: ``role`` and ``content`` of each message; the question ends the last one.
        answer_prefix: the beginning of the answer, which the model completes.
        answers: what has to be said.
        answer_tokens: room for the answer.
        scoring: how an answer is compared (`score`).
        depth: where in the text that stands what is asked for, 0 at its beginning to 1 at its end; None if in many
            places.
    """

    kind: str
    messages: tuple[Mapping[str, str], ...]
    answer_prefix: str
    answers: tuple[str, ...]
    answer_tokens: int
    scoring: Scoring = "share_found"
    depth: float | None = None


@dataclass(frozen=True)
class Document:
    """A long text, and tasks that ask about it: their messages are equal up to the question."""

    name: str
    tasks: tuple[Task, ...]
