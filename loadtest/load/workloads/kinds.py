"""The kinds of workload that a scenario may name, with their settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from loadtest.load.settings import NotNegative, Strict
from loadtest.load.workloads.files import DataFile
from loadtest.load.workloads.lengths import Lengths
from loadtest.quality.tasks.ruler import TASKS


class Cancelled(Strict):
    """Users that go away: a share of the prompts whose requests the client breaks off, the same for every method.

    What was broken off counts neither as failed nor in latencies and goodput; the server has worked for it.
    """

    share: Annotated[float, Field(gt=0, le=1)]
    after_seconds: NotNegative


class LoraMix(Strict):
    """LoRA adapters that answer a share of the prompts, the same for every method.

    Attributes:
        adapters: weight of each, by the name that the server serves it by.
        share: of the prompts; the model itself answers the others.
    """

    adapters: Annotated[Mapping[str, PositiveFloat], Field(min_length=1)]
    share: Annotated[float, Field(gt=0, le=1)] = 1.0


class _Workload(Strict):
    """What all kinds have.

    Attributes:
        name: shown in the report.
        weight: its share of the sessions, relative to the others' weights; a group of paired requests counts as one.
        methods: weight of each method; none: all of the scenario's methods alike.
        paired: every prompt goes to each of `methods` (their weights do not count then).
        cancelled: which of its requests are broken off; none: none.
        lora: which of its prompts adapters answer; none: none.
        distinct_prompts: prompts that are made; they repeat, under fresh cache salts, when more are sent.
    """

    name: str
    weight: PositiveFloat = 1.0
    methods: Mapping[str, PositiveFloat] | None = None
    paired: bool
    cancelled: Cancelled | None = None
    lora: LoraMix | None = None
    distinct_prompts: PositiveInt = 100


class NeedleWorkload(_Workload):
    """The bundled model's own task (`loadtest.text.needles`), counted in its tokens."""

    kind: Literal["needle"]
    paired: bool = True
    input_tokens: Lengths
    needles: PositiveInt = 3
    asked: Annotated[int, Field(ge=1, le=4)] = 1


class RulerWorkload(_Workload):
    """RULER-style tasks (`loadtest.quality.tasks`) in turn."""

    kind: Literal["ruler"]
    paired: bool = True
    input_tokens: Lengths
    tasks: Annotated[tuple[str, ...], Field(min_length=1)] = tuple(TASKS)

    @model_validator(mode="after")
    def _known(self) -> RulerWorkload:
        unknown = sorted(set(self.tasks) - set(TASKS))
        if unknown:
            raise ValueError(f"tasks: {unknown} are not known; allowed: {list(TASKS)}")
        return self


class DocumentWorkload(_Workload):
    """Conversations about long documents: `turns` questions each, every one with a known answer in the document.

    Sessions of one method share the document's blocks in the prefix cache with those of the same method.
    """

    kind: Literal["documents"]
    paired: bool = True
    input_tokens: Lengths
    turns: Annotated[int, Field(ge=1, le=40)] = 4
    sessions_per_document: PositiveInt = 2
    think_seconds: NotNegative = 0.0


class TextWorkload(_Workload):
    """Text without a question: background chats, long generations. Generates exactly `output_tokens`."""

    kind: Literal["text"]
    paired: bool = False
    input_tokens: Lengths
    output_tokens: Lengths


class TraceWorkload(_Workload):
    """Text with the lengths of a trace (`loadtest.load.workloads.traces`), and its shared prefixes if it has any."""

    kind: Literal["trace"]
    paired: bool = False
    file: DataFile


class ShareGptWorkload(_Workload):
    """Conversations in ShareGPT's format: the questions are sent, each for as many tokens as its answer has."""

    kind: Literal["sharegpt"]
    paired: bool = False
    file: DataFile
    turns: PositiveInt = 1
    think_seconds: NotNegative = 0.0


class AgentWorkload(_Workload):
    """Recorded runs of agents that call tools (`loadtest.load.workloads.files.AgentLine`).

    Each message of the assistant is a request, for as many tokens as it has; the conversation goes on with the recorded
    message, so that every method reads the same. Runs of one method share what their beginnings have in common, such as
    tools and instructions, in the prefix cache.

    Attributes:
        file: JSON lines with `messages` and `tools`, as the OpenAI API has them.
        turns: requests of a run, at most.
        think_seconds: before a user's next message.
        tool_seconds: before the results of tools.
    """

    kind: Literal["agents"]
    paired: bool = False
    file: DataFile
    turns: PositiveInt = 50
    think_seconds: NotNegative = 0.0
    tool_seconds: NotNegative = 0.0


class JsonlWorkload(_Workload):
    """Your own prompts: JSON lines with `prompt` or `messages`, and optionally `output_tokens` and `answers`.

    Attributes:
        file: of the lines; Parquet, as data sets on Hugging Face have it, where its name ends so.
        columns: what the file calls a field, where it is another name, such as ``{prompt: question}``.
    """

    kind: Literal["jsonl"]
    paired: bool = True
    file: DataFile
    columns: Mapping[Literal["prompt", "messages", "output_tokens", "answers"], str] = {}
    output_tokens: PositiveInt = 128


Workload = Annotated[
    NeedleWorkload
    | RulerWorkload
    | DocumentWorkload
    | TextWorkload
    | TraceWorkload
    | ShareGptWorkload
    | AgentWorkload
    | JsonlWorkload,
    Field(discriminator="kind"),
]
