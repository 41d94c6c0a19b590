"""A document before its length is known: text to fill it, what is planted in it, and the questions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from vllm_sparse.quality.tasks.task import CountTokens, Document, Scoring, Task

Message = Mapping[str, str]

STRATA = 10
"""Depths are drawn from so many equal parts of the text; documents with consecutive numbers go through all of them."""

# No tokenizer takes more characters of prose or code into a token on average.
_CHARS_PER_TOKEN = 6
_LEAST_FILLED = 0.97
_COUNTS = 6
# Attempts that end with a line or a word, as the draft asks; later ones end anywhere.
_WHOLE_PARTS = 2


@dataclass(frozen=True)
class Planted:
    """Text that stands at a depth of the document, 0 to 1."""

    depth: float
    text: str


@dataclass(frozen=True)
class Question:
    """A task without its text.

    Attributes:
        kind, answer_prefix, answers, answer_tokens, scoring: as of `Task`.
        question: how the last message ends.
        place: the planted text that holds the answer, if it is one.
    """

    kind: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    answer_tokens: int
    scoring: Scoring = "share_found"
    place: str | None = None

    @property
    def tail(self) -> str:
        """What this question adds to the common text."""
        return f"Question: {self.question}\n{self.answer_prefix}"


@dataclass(frozen=True)
class Draft:
    """What a document is made of.

    Attributes:
        filler: real text, in order; the document takes as much from its beginning as it has room for.
        planted: facts, in the order in which those of one depth stand.
        questions: about them.
        render: messages of the parts of the text, the last one open for a question.
        last_part: how the last of the filler may be cut: at any ``word``, at the end of a ``line``.
    """

    filler: Sequence[str]
    planted: Sequence[Planted]
    questions: Sequence[Question]
    render: Callable[[Sequence[str]], Sequence[Message]]
    last_part: Literal["word", "line"] = "word"


def depth_of(rng: Random, number: int, offset: int = 0) -> float:
    """A depth in the stratum of a document's number; 7 and 10 share no factor, so ten numbers meet ten strata."""
    return ((7 * number + offset) % STRATA + rng.random()) / STRATA


def spread(rng: Random, count: int) -> list[float]:
    """Depths of `count` facts, ascending, one in each of as many equal parts of the text."""
    return [(part + rng.random()) / count for part in range(count)]


def in_one_text(introduction: str) -> Callable[[Sequence[str]], Sequence[Message]]:
    """Renders one message of a user: an introduction, then the parts as paragraphs."""

    def render(parts: Sequence[str]) -> Sequence[Message]:
        return ({"role": "user", "content": "\n\n".join([introduction, *parts])},)

    return render


def fill(pool: Sequence[str], rng: Random, tokens: int, forbidden: Iterable[str]) -> list[str]:
    """Real text for a document, in random order, without any text that contains something forbidden, in any case."""
    banned = re.compile("|".join(re.escape(each) for each in forbidden) or r"(?!)", re.IGNORECASE)
    found = []
    chars = 0
    for text in rng.sample(pool, len(pool)):
        if chars > _CHARS_PER_TOKEN * tokens:
            break
        if not banned.search(text):
            found.append(text)
            chars += len(text)
    return found


def to_length(name: str, origin: str, draft: Draft, tokens: int, count: CountTokens) -> Document:
    """The document whose longest task has `tokens` tokens with its answer, or up to 3 % fewer.

    Args:
        name: of the document.
        origin: of the filler, as errors name it.
        draft: what it is made of.
        tokens: of prompt, answer prefix and answer together.
        count: as of `CountTokens`, asked at most six times.

    Raises:
        ValueError: there is too little real text, or too little room for what is planted.
    """
    room = _room(draft.questions, count)
    low, high = math.ceil(_LEAST_FILLED * tokens) + _slack(tokens, room), tokens
    planted_chars = sum(len(each.text) for each in draft.planted)
    available = sum(map(len, draft.filler))
    chars = int(3.5 * (tokens - room)) - planted_chars
    before: tuple[int, int] | None = None
    for attempt in range(_COUNTS - 1):
        if chars > available:
            raise ValueError(
                f"{origin}: a document of {tokens:,} tokens of the kinds {_kinds(draft)} needs {chars:,} characters of"
                f" different text, {available:,} found; add files or ask for a shorter length"
            )
        # A single line, or a word of code, may be longer than what a document may vary by.
        filler = _taken(draft, max(chars, 0), draft.last_part if attempt < _WHOLE_PARTS else "character")
        parts = _placed(draft, filler)
        messages = draft.render(parts)
        length = count(messages)
        if low <= length + room <= high:
            return Document(name, tuple(_task(question, messages) for question in draft.questions))
        if chars <= 0 and length + room > high:
            raise ValueError(
                f"{tokens:,} tokens are too few for the kinds {_kinds(draft)}, which need {length + room:,} without"
                " any text around them; ask for a greater length or fewer kinds"
            )
        chars = sum(map(len, filler))
        written = sum(len(message["content"]) for message in messages)
        tokens_per_char = length / written
        if before is not None and abs(chars - before[0]) > 200 and length != before[1]:
            tokens_per_char = (length - before[1]) / (chars - before[0])
        before = chars, length
        chars = max(0, round(chars + ((low + high) / 2 - room - length) / tokens_per_char))
    raise ValueError(
        f"{name}: its length was not brought to {tokens:,} tokens; the last attempt has {length + room:,};"
        " ask for a greater length"
    )


def _slack(tokens: int, room: int) -> int:
    """Tokens by which a `_room` may overestimate; no document is shorter than 0.97 of what is asked for by it."""
    return max(tokens // 200, room // 8 + 5)


def _room(questions: Sequence[Question], count: CountTokens) -> int:
    """Tokens that the longest question, its answer prefix and its answer take, not less than they do.

    One count tells the tokens of a character of all questions; it is made of a text so long that what a chat template
    adds to it is small.
    """
    together = "\n".join(question.tail for question in questions)
    together = "\n".join([together] * math.ceil(2000 / len(together)))
    tokens_per_char = count(({"role": "user", "content": together},)) / len(together)
    return max(math.ceil(1.1 * tokens_per_char * len(each.tail)) + 4 + each.answer_tokens for each in questions)


def _kinds(draft: Draft) -> str:
    return ", ".join(dict.fromkeys(question.kind for question in draft.questions))


def _taken(draft: Draft, chars: int, last_part: Literal["character", "word", "line"]) -> list[str]:
    """So many characters from the beginning of the filler, whose last part stays whole."""
    found = []
    for text in draft.filler:
        if len(text) >= chars:
            end = chars if last_part == "character" else text.rfind("\n" if last_part == "line" else " ", 0, chars)
            if end > 0:
                found.append(text[:end])
            break
        found.append(text)
        chars -= len(text)
    return found


def _placed(draft: Draft, filler: Sequence[str]) -> list[str]:
    """Filler and what is planted, which stands where the filler before it is nearest to its depth."""
    total = sum(map(len, filler))
    parts: list[str] = []
    passed = 0
    waiting = sorted(draft.planted, key=lambda each: each.depth)
    for text in filler:
        while waiting and waiting[0].depth * total <= passed + len(text) / 2:
            parts.append(waiting.pop(0).text)
        parts.append(text)
        passed += len(text)
    return parts + [each.text for each in waiting]


def _task(question: Question, messages: Sequence[Message]) -> Task:
    whole = "".join(message["content"] for message in messages)
    *earlier, last = messages
    asked = {**last, "content": f"{last['content']}\n\nQuestion: {question.question}"}
    return Task(
        question.kind,
        (*earlier, asked),
        question.answer_prefix,
        question.answers,
        question.answer_tokens,
        question.scoring,
        None if question.place is None else whole.index(question.place) / len(whole),
    )
