"""Whether two answers to one request are the same, but for rounding, by which a near tie may go the other way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from loadtest.robustness.client import Answer, Choice

# Log probabilities, in nats, by which both answers together prefer their own token where they part.
NEAR_TIE_NATS = 0.05


class Likeness(StrEnum):
    """How alike two answers are."""

    SAME = "same tokens"
    NEAR_TIE = "near tie"
    DIFFERENT = "different"


@dataclass(frozen=True)
class Judgement:
    """How alike two answers are.

    Attributes:
        likeness: of their tokens.
        shift_nats: largest change of a token's log probability as long as the tokens are the same.
        where: for reports: the choice, the token's place and what both answers hold there.
    """

    likeness: Likeness
    shift_nats: float = 0.0
    where: str = ""


def judge(alone: Answer, other: Answer, aborted: bool = False) -> Judgement:
    """Compare a whole answer with another one of the same request.

    Args:
        alone: the whole answer.
        other: the other one.
        aborted: the other one was broken off, so that it may be shorter.
    """
    shift = 0.0
    found = Judgement(Likeness.SAME)
    if not aborted and alone.choices.keys() != other.choices.keys():
        return Judgement(Likeness.DIFFERENT, where=f"choices {sorted(alone.choices)} and {sorted(other.choices)}")
    for index, choice in other.choices.items():
        judged = _judge_choice(alone.choices[index], choice, aborted)
        shift = max(shift, judged.shift_nats)
        if list(Likeness).index(judged.likeness) > list(Likeness).index(found.likeness):
            found = Judgement(judged.likeness, where=f"choice {index}, {judged.where}")
    return Judgement(found.likeness, shift, found.where)


def _judge_choice(alone: Choice, other: Choice, aborted: bool) -> Judgement:
    shift = 0.0
    pairs = zip(alone.tokens, other.tokens, alone.likely, other.likely, strict=False)
    for place, (token, others, likely, others_likely) in enumerate(pairs):
        if token != others:
            gap = _preference(likely, token, others) + _preference(others_likely, others, token)
            likeness = Likeness.NEAR_TIE if gap <= NEAR_TIE_NATS else Likeness.DIFFERENT
            return Judgement(likeness, shift, f"token {place}: {token} and {others}, {gap:.3f} nats apart")
        shift = max(shift, abs(likely[token] - others_likely[token]))
    lengths = len(alone.tokens), len(other.tokens)
    if lengths[0] < lengths[1] or (lengths[0] > lengths[1] and not aborted):
        return Judgement(Likeness.DIFFERENT, shift, f"{lengths[0]} and {lengths[1]} tokens")
    return Judgement(Likeness.SAME, shift)


def _preference(likely: dict[str, float], token: str, other: str) -> float:
    """By how many nats a token is preferred; infinite where the other one is not among the likely ones."""
    return likely[token] - likely.get(other, -math.inf)
