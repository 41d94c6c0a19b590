"""A user's own questions with known answers, from a file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from vllm_sparse.quality.tasks.task import Scoring, Task

FIELDS = ("messages", "prompt", "answers", "kind", "answer_prefix", "answer_tokens", "scoring")
SCORINGS = get_args(Scoring)
ANSWER_TOKENS = 128


def read_questions(path: Path) -> list[Task]:
    """Questions, one JSON object a line.

    An object has ``messages`` (each with ``role`` and ``content``) or a ``prompt`` (the content of one user's message),
    and ``answers`` (a list of texts, all of which should be said). It may have ``kind`` (a row of the tables; default
    ``own``), ``answer_prefix`` (the beginning of the answer), ``answer_tokens`` (room for it; default 128) and
    ``scoring`` (as of `Task`; default ``share_found``).

    Raises:
        ValueError: with the line and what is wrong with it.
    """
    tasks = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            tasks.append(_task(fields))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not tasks:
        raise ValueError(f"{path} has no question")
    return tasks


def _task(fields: Any) -> Task:
    if not isinstance(fields, Mapping):
        raise ValueError(f"a JSON object is allowed, this is {type(fields).__name__}")
    if unknown := set(fields) - set(FIELDS):
        raise ValueError(f"{', '.join(sorted(unknown))}: no such field; there are {', '.join(FIELDS)}")
    if ("messages" in fields) == ("prompt" in fields):
        raise ValueError("either messages or prompt has to be given")
    messages = fields.get("messages") or [{"role": "user", "content": fields["prompt"]}]
    for message in messages:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(part), str) for part in ("role", "content")
        ):
            raise ValueError(f"messages: each has a text role and a text content, not {message!r}")
    answers = fields.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"answers is {answers!r}; a list of one text or more is allowed")
    scoring = fields.get("scoring", "share_found")
    if scoring not in SCORINGS:
        raise ValueError(f"scoring is {scoring!r}; allowed are {', '.join(SCORINGS)}")
    answer_tokens = fields.get("answer_tokens", ANSWER_TOKENS)
    if type(answer_tokens) is not int or answer_tokens < 1:
        raise ValueError(f"answer_tokens is {answer_tokens!r}; an integer of 1 or more is allowed")
    return Task(
        kind=str(fields.get("kind", "own")),
        messages=tuple(messages),
        answer_prefix=str(fields.get("answer_prefix", "")),
        answers=tuple(answers),
        answer_tokens=answer_tokens,
        scoring=scoring,
    )
