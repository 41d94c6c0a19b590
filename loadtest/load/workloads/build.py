"""Prompts of each kind of workload."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loadtest.load.settings import ScenarioError
from loadtest.load.workloads.kinds import (
    DocumentWorkload,
    JsonlWorkload,
    NeedleWorkload,
    RulerWorkload,
    TextWorkload,
    TraceWorkload,
    Workload,
)
from loadtest.load.workloads.lengths import draw
from loadtest.load.workloads.prompt import Endpoint, Prompt, Turn
from loadtest.load.workloads.tokens import estimated_counter
from loadtest.quality.tasks.haystack import prose
from loadtest.quality.tasks.ruler import TASKS
from loadtest.quality.tasks.task import CountTokens, Task, fit, share_found
from loadtest.text.needles import QUESTION_SEPARATOR, ask, filler, needle_prompt, score
from loadtest.text.tokenizer import build_tokenizer
from loadtest.text.tokenizer import count_tokens as count_bundled_tokens

# The chat template's own tokens, with room to spare, and what an answer of the bundled model's task takes.
TEMPLATE_TOKENS = 32
NEEDLE_ANSWER_TOKENS = 16


class PromptMaker:
    """Makes the prompts of one workload; number `n` is the same whenever it is asked for.

    Args:
        workload: what to make.
        count_tokens: as the served model counts.
        seed: of the scenario; equal seeds make equal prompts.
        endpoint: that the prompts are sent to.

    Raises (when asked for a prompt):
        ScenarioError: a file of the workload cannot be read, or a task does not fit into its length.
    """

    def __init__(self, workload: Workload, count_tokens: CountTokens, seed: int, endpoint: Endpoint) -> None:
        self._workload = workload
        self._count_tokens = count_tokens
        self._seed = seed
        self._endpoint = endpoint
        self._made: dict[int, Prompt] = {}

    @functools.cached_property
    def distinct(self) -> int:
        """How many prompts there are before they repeat."""
        if isinstance(self._workload, TraceWorkload | JsonlWorkload):
            return len(self._lines)
        return self._workload.distinct_prompts

    @functools.cached_property
    def _lines(self) -> list[dict[str, Any]]:
        assert isinstance(self._workload, TraceWorkload | JsonlWorkload)
        return read_json_lines(self._workload.file)

    def __call__(self, number: int) -> Prompt:
        """Prompt `number`, 0 or more; they repeat after `distinct`."""
        number %= self.distinct
        if number not in self._made:
            try:
                self._made[number] = self._make(number)
            except KeyError as error:
                raise ScenarioError(f"workload {self._workload.name!r}, line {number + 1} lacks {error}") from None
            except (ValueError, LookupError) as error:
                raise ScenarioError(f"workload {self._workload.name!r}, prompt {number}: {error}") from None
        return self._made[number]

    def _rng(self, number: int) -> random.Random:
        return random.Random(f"{self._seed}/{self._workload.name}/{number}")

    def _make(self, number: int) -> Prompt:
        rng = self._rng(number)
        name = f"{self._workload.name}/{number}"
        workload = self._workload
        if isinstance(workload, NeedleWorkload):
            return self._needle(name, workload, rng)
        if isinstance(workload, RulerWorkload):
            tokens = draw(workload.input_tokens, rng)
            task = TASKS[workload.tasks[number % len(workload.tasks)]](rng.getrandbits(32), tokens, self._count_tokens)
            return Prompt(name, (_turn_of(task),), tokens)
        if isinstance(workload, DocumentWorkload):
            return self._document(name, workload, number)
        if isinstance(workload, TextWorkload):
            return self._text(name, draw(workload.input_tokens, rng), draw(workload.output_tokens, rng), rng)
        line = self._lines[number]
        if isinstance(workload, TraceWorkload):
            return self._text(name, int(line["input_tokens"]), int(line["output_tokens"]), rng)
        return self._own(name, line, workload.output_tokens)

    def _needle(self, name: str, workload: NeedleWorkload, rng: random.Random) -> Prompt:
        tokens = draw(workload.input_tokens, rng)
        needle = needle_prompt(rng, tokens - TEMPLATE_TOKENS, _bundled_counter(), workload.needles, workload.asked)
        score_text = functools.partial(score, needle)
        if self._endpoint == "completions":
            turn = Turn(needle.completion_prompt, NEEDLE_ANSWER_TOKENS * workload.asked, score=score_text)
        else:
            turn = Turn(needle.content, NEEDLE_ANSWER_TOKENS * workload.asked + 8, score=score_text)
        return Prompt(name, (turn,), tokens)

    def _document(self, name: str, workload: DocumentWorkload, number: int) -> Prompt:
        """One of the sessions about a document: each asks for needles of its own."""
        document_number, session = divmod(number, workload.sessions_per_document)
        rng = self._rng(document_number * workload.sessions_per_document)
        tokens = draw(workload.input_tokens, rng)
        needles = workload.turns * workload.sessions_per_document
        count = estimated_counter(self._count_tokens, filler(random.Random(0), 400))
        document = needle_prompt(rng, tokens - TEMPLATE_TOKENS, count, needles, needles)
        asked = slice(session * workload.turns, (session + 1) * workload.turns)
        questions = [ask(rng, [key]) for key in document.keys[asked]]
        questions[0] = document.text + QUESTION_SEPARATOR + questions[0]
        turns = [
            Turn(question, 2 * NEEDLE_ANSWER_TOKENS, score=functools.partial(share_found, (value,)))
            for question, value in zip(questions, document.answers[asked], strict=True)
        ]
        shared = f"{workload.name}/document {document_number}"
        return Prompt(name, tuple(turns), tokens, think_seconds=workload.think_seconds, shared=shared)

    def _text(self, name: str, input_tokens: int, output_tokens: int, rng: random.Random) -> Prompt:
        seed = rng.getrandbits(32)

        def build(sentences: int) -> Task:
            return Task(" ".join(prose(random.Random(seed), sentences)), "", (), 0)

        try:
            content = fit(build, max(1, input_tokens - TEMPLATE_TOKENS), self._count_tokens, input_tokens // 14).content
        except ValueError:
            # Shorter than a sentence.
            content = "Tell me a story."
        return Prompt(name, (Turn(content, output_tokens, ignore_eos=True),), input_tokens)

    def _own(self, name: str, line: dict[str, Any], output_tokens: int) -> Prompt:
        if ("prompt" in line) == ("messages" in line):
            raise ValueError("a line needs either prompt or messages")
        history: list[dict[str, Any]] = []
        content = line.get("prompt", "")
        if "messages" in line:
            if self._endpoint == "completions":
                raise ValueError("messages need endpoint: chat")
            *history, last = line["messages"]
            content = last["content"]
        answers = [str(answer) for answer in line.get("answers", ())]
        turn = Turn(
            content,
            int(line.get("output_tokens", output_tokens)),
            ignore_eos=bool(line.get("ignore_eos", False)),
            score=functools.partial(share_found, answers) if answers else None,
        )
        tokens = self._count_tokens("\n".join([*(str(one["content"]) for one in history), content]))
        return Prompt(name, (turn,), tokens, tuple(history))


def _turn_of(task: Task) -> Turn:
    return Turn(
        task.content, task.answer_tokens, task.answer_prefix, score=functools.partial(share_found, task.answers)
    )


@functools.cache
def _bundled_counter() -> Callable[[str], int]:
    return functools.partial(count_bundled_tokens, build_tokenizer())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; empty lines do not count.

    Raises:
        ScenarioError: there is no such file, it is empty, or a line is no JSON object.
    """
    return list(_objects(path)) or _no_lines(path)


def _no_lines(path: Path) -> list[dict[str, Any]]:
    raise ScenarioError(f"{path} has no lines")


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ScenarioError(f"{path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ScenarioError(f"{path}, line {number}, is no JSON: {error}") from None
        if not isinstance(found, dict):
            raise ScenarioError(f"{path}, line {number}, is no JSON object")
        yield found
