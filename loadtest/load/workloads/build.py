"""Prompts of each kind of workload."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from dataclasses import replace

from loadtest.load.settings import ScenarioError
from loadtest.load.workloads.files import AgentLine, OwnLine, TraceLine, local, read_lines, text_of
from loadtest.load.workloads.kinds import (
    AgentWorkload,
    DocumentWorkload,
    JsonlWorkload,
    NeedleWorkload,
    RulerWorkload,
    ShareGptWorkload,
    TextWorkload,
    TraceWorkload,
    Workload,
)
from loadtest.load.workloads.lengths import draw
from loadtest.load.workloads.prompt import Endpoint, Message, Prompt, Turn
from loadtest.load.workloads.tokens import estimated_counter
from loadtest.load.workloads.traces import MOONCAKE_BLOCK_TOKENS, read_share_gpt, read_trace
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
        if isinstance(self._workload, TraceWorkload):
            return len(self._requests)
        if isinstance(self._workload, ShareGptWorkload):
            return len(self._conversations)
        if isinstance(self._workload, AgentWorkload):
            return len(self._runs)
        return len(self._lines) if isinstance(self._workload, JsonlWorkload) else self._workload.distinct_prompts

    @functools.cached_property
    def _requests(self) -> list[TraceLine]:
        assert isinstance(self._workload, TraceWorkload)
        return read_trace(local(self._workload.file))

    @functools.cached_property
    def _conversations(self) -> list[list[tuple[str, str]]]:
        assert isinstance(self._workload, ShareGptWorkload)
        return read_share_gpt(local(self._workload.file))

    @functools.cached_property
    def _runs(self) -> list[AgentLine]:
        assert isinstance(self._workload, AgentWorkload)
        return read_lines(local(self._workload.file), AgentLine)

    @functools.cached_property
    def _lines(self) -> list[OwnLine]:
        assert isinstance(self._workload, JsonlWorkload)
        return read_lines(local(self._workload.file), OwnLine, self._workload.columns)

    def __call__(self, number: int) -> Prompt:
        """Prompt `number`, 0 or more; they repeat after `distinct`."""
        number %= self.distinct
        if number not in self._made:
            try:
                self._made[number] = self._adapted(self._cancelled(self._make(number)))
            except (ValueError, LookupError) as error:
                raise ScenarioError(f"workload {self._workload.name!r}, prompt {number}: {error}") from None
        return self._made[number]

    def _adapted(self, prompt: Prompt) -> Prompt:
        """The prompt with the adapter that answers it, if any does."""
        lora = self._workload.lora
        rng = random.Random(f"{self._seed}/lora/{prompt.name}")
        if lora is None or rng.random() >= lora.share:
            return prompt
        (adapter,) = rng.choices(list(lora.adapters), list(lora.adapters.values()))
        return replace(prompt, adapter=adapter)

    def _cancelled(self, prompt: Prompt) -> Prompt:
        """The prompt, broken off if it is one of those."""
        cancelled = self._workload.cancelled
        if cancelled is None or random.Random(f"{self._seed}/cancelled/{prompt.name}").random() >= cancelled.share:
            return prompt
        return replace(prompt, cancel_after_seconds=cancelled.after_seconds)

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
        if isinstance(workload, TraceWorkload):
            request = self._requests[number]
            if request.blocks:
                return self._of_blocks(name, request, rng)
            return self._text(name, request.input_tokens, request.output_tokens, rng)
        if isinstance(workload, ShareGptWorkload):
            return self._conversation(name, workload, self._conversations[number][: workload.turns])
        if isinstance(workload, AgentWorkload):
            return self._agent(name, workload, self._runs[number])
        return self._own(name, self._lines[number], workload.output_tokens)

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

    def _of_blocks(self, name: str, request: TraceLine, rng: random.Random) -> Prompt:
        """Text in which equal blocks at the beginning are equal text, so that the prefix cache finds them."""
        texts = []
        rest = request.input_tokens
        # What a trace gives no block for is the request's own.
        for block in (*request.blocks, f"of {name}"):
            tokens = min(rest, MOONCAKE_BLOCK_TOKENS) if isinstance(block, int) else rest
            characters = round(tokens * self._characters_per_token)
            source = random.Random(f"{self._seed}/{self._workload.name}/block {block}")
            text = ""
            while len(text) < characters:
                text += " ".join(prose(source, 20)) + " "
            texts.append(text[:characters])
            rest -= tokens
        turn = Turn("".join(texts), request.output_tokens, ignore_eos=True)
        return Prompt(name, (turn,), request.input_tokens, shared=f"{self._workload.name}/trace")

    @functools.cached_property
    def _characters_per_token(self) -> float:
        sample = " ".join(prose(random.Random(0), 400))
        return len(sample) / self._count_tokens(sample)

    def _conversation(self, name: str, workload: ShareGptWorkload, asked: list[tuple[str, str]]) -> Prompt:
        turns = [Turn(question, max(1, self._count_tokens(answer)), ignore_eos=True) for question, answer in asked]
        tokens = self._count_tokens(asked[0][0])
        return Prompt(name, tuple(turns), tokens, think_seconds=workload.think_seconds)

    def _agent(self, name: str, workload: AgentWorkload, run: AgentLine) -> Prompt:
        turns: list[Turn] = []
        asked: list[Message] = []
        for message in run.messages:
            # As it was written: what the line does not have is not sent.
            said = message.model_dump(exclude_unset=True)
            if message.role == "assistant":
                tokens = max(1, self._count_tokens(message.text))
                turns.append(Turn("", tokens, ignore_eos=True, results=tuple(asked), answer=said))
                asked = []
            else:
                asked.append(said)
        first = json.dumps([list(run.tools), list(turns[0].results)], ensure_ascii=False)
        return Prompt(
            name,
            tuple(turns[: workload.turns]),
            self._count_tokens(first),
            think_seconds=workload.think_seconds,
            tool_seconds=workload.tool_seconds,
            tools=run.tools,
            shared=f"{workload.name}/agents",
        )

    def _own(self, name: str, line: OwnLine, output_tokens: int) -> Prompt:
        if line.messages is not None and self._endpoint == "completions":
            raise ValueError("messages need endpoint: chat")
        messages = [message.model_dump() for message in line.messages or ()]
        texts = [text_of(message.content) for message in line.messages or ()] or [str(line.prompt)]
        answers = [str(answer) for answer in line.answers]
        turn = Turn(
            messages[-1]["content"] if messages else str(line.prompt),
            line.output_tokens or output_tokens,
            ignore_eos=line.ignore_eos,
            score=functools.partial(share_found, answers) if answers else None,
        )
        return Prompt(name, (turn,), self._count_tokens("\n".join(texts)), tuple(messages[:-1]))


def _turn_of(task: Task) -> Turn:
    return Turn(
        task.content, task.answer_tokens, task.answer_prefix, score=functools.partial(share_found, task.answers)
    )


@functools.cache
def _bundled_counter() -> Callable[[str], int]:
    return functools.partial(count_bundled_tokens, build_tokenizer())
