"""Files of JSON lines, checked line by line when they are read: what is wrong is said before a run begins."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from loadtest.load.settings import ScenarioError

Checked = TypeVar("Checked", bound=BaseModel)
Json = Mapping[str, Any]
SHOWN_CHARACTERS = 80
_HUGGING_FACE = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<path>.+)")


class Line(BaseModel):
    """What all kinds of line have: no numbers without an end; fields that nobody reads are left alone."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class TextPart(Line):
    """A part of a message that is text."""

    type: Literal["text"]
    text: str


class OtherPart(BaseModel):
    """A part of a message that is no text, such as an image: sent as it is."""

    model_config = ConfigDict(frozen=True, extra="allow")

    type: str


Content = str | tuple[TextPart | OtherPart, ...]
"""Of a message, as the OpenAI API has it."""


class Message(Line):
    """A message of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: Content


def _several(answers: Any) -> Any:
    return (answers,) if isinstance(answers, str | int | float) else answers


class OwnLine(Line):
    """A prompt of the workload `jsonl`: a text or messages, of which the last one is the user's; answers, or one."""

    prompt: str | None = None
    messages: Annotated[tuple[Message, ...], Field(min_length=1)] | None = None
    output_tokens: PositiveInt | None = None
    answers: Annotated[tuple[str | int | float, ...], BeforeValidator(_several)] = ()
    ignore_eos: bool = False

    @model_validator(mode="after")
    def _either(self) -> OwnLine:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("a line needs either prompt or messages")
        if self.messages is not None and self.messages[-1].role != "user":
            raise ValueError(f"the last message must be the user's, not the role {self.messages[-1].role!r}'s")
        return self


class AgentMessage(Line):
    """A message of an agent's run; one that only calls tools has no content."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    tool_calls: tuple[dict[str, Any], ...] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> AgentMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError(f"a message of the role {self.role!r} has neither content nor tool_calls")
        return self

    @property
    def text(self) -> str:
        """What a model writes to say it, about: its text, and its calls as JSON."""
        calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in self.tool_calls or ()]
        return "\n".join([*([text_of(self.content)] if self.content else []), *calls])


class AgentLine(Line):
    """A run of the workload `agents`."""

    messages: Annotated[tuple[AgentMessage, ...], Field(min_length=2)]
    tools: tuple[dict[str, Any], ...] = ()

    @model_validator(mode="after")
    def _answered(self) -> AgentLine:
        roles = [message.role for message in self.messages]
        if "assistant" not in roles[1:] or roles[0] == "assistant":
            raise ValueError("a run begins with another message than the assistant's and has one of the assistant's")
        for number, (before, after) in enumerate(itertools.pairwise(roles), 2):
            if before == after == "assistant":
                raise ValueError(
                    f"messages {number - 1} and {number} are both the assistant's: nothing asked for the second"
                )
        return self


class TraceLine(Line):
    """A request of the workload `trace`."""

    input_tokens: PositiveInt
    output_tokens: PositiveInt
    timestamp_seconds: float | None = None
    blocks: tuple[NonNegativeInt, ...] = ()


def text_of(content: Content) -> str:
    """The text of a message."""
    if isinstance(content, str):
        return content
    return "\n".join(part.text for part in content if isinstance(part, TextPart))


def _located(file: str) -> str:
    if file.startswith("hf:") and _HUGGING_FACE.fullmatch(file) is None:
        raise ValueError(f"{file!r}: hf://datasets/OWNER/NAME/FILE or hf://datasets/OWNER/NAME@REVISION/FILE is wanted")
    return file


DataFile = Annotated[str, AfterValidator(_located)]
"""A path, or a file of a data set on Hugging Face, such as ``hf://datasets/OWNER/NAME/data/test.parquet``."""


def local(file: str) -> Path:
    """Where a `DataFile` lies on this machine; one of Hugging Face is fetched into its cache, unless it is there.

    Raises:
        ScenarioError: it cannot be fetched.
    """
    found = _HUGGING_FACE.fullmatch(file)
    if found is None:
        return Path(file)
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise ScenarioError(f"{file} needs huggingface_hub: pip install huggingface_hub") from None
    try:
        return Path(hf_hub_download(found["repo"], found["path"], repo_type="dataset", revision=found["revision"]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ScenarioError(f"{file} cannot be fetched: {error}") from None


def read_text(path: Path) -> str:
    """A file of UTF-8 text.

    Raises:
        ScenarioError: it cannot be read, or a line of it is no UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ScenarioError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ScenarioError(
            f"{path}, line {number}, is no UTF-8 (byte 0x{content[error.start]:02x}): convert it, such as with "
            "iconv -f latin1 -t utf-8"
        ) from None


def read_lines(path: Path, model: type[Checked], columns: Mapping[Any, str] | None = None) -> list[Checked]:
    """The objects of a file of JSON lines, or the rows of a Parquet file, checked; empty lines do not count.

    Args:
        path: of the file; one whose name ends in ``.parquet`` is Parquet.
        model: that checks them.
        columns: of a field of the model the name that the file has for it, where it is another one.

    Raises:
        ScenarioError: it cannot be read, is empty, or a line is not what it should be.
    """
    objects = _rows(path) if path.suffix == ".parquet" else _objects(path, read_text(path))
    found = [checked(path, place, model, _renamed(one, columns or {})) for place, one in objects]
    if not found:
        raise ScenarioError(f"{path} has no lines")
    return found


def _renamed(content: Json, columns: Mapping[Any, str]) -> Json:
    given = {field: content[column] for field, column in columns.items() if column in content}
    return {**{name: value for name, value in content.items() if name not in columns}, **given}


def _rows(path: Path) -> Iterator[tuple[str, Json]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ScenarioError(f"{path} needs pyarrow: pip install pyarrow") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ScenarioError(f"{path} cannot be read as Parquet: {error}") from None
    for number, row in enumerate(rows, 1):
        # Parquet has every column in every row.
        yield f"row {number}", {name: value for name, value in row.items() if value is not None}


def checked(path: Path, place: str, model: type[Checked], content: Any) -> Checked:
    """An object of a file as a model has it.

    Raises:
        ScenarioError: it is not that; with the place and every reason.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, part['loc']))}: {part['msg']}" if part["loc"] else part["msg"]
            for part in error.errors()
        )
        raise ScenarioError(f"{path}, {place}: {reasons}") from None


def _objects(path: Path, text: str) -> Iterator[tuple[str, Json]]:
    # Not splitlines(): a string of JSON may hold U+2028 and its kind.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            # Escapes can write half of a character, which no tokenizer takes.
            json.dumps(found, ensure_ascii=False).encode()
        except ValueError as error:
            raise ScenarioError(f"{path}, line {number}, is no JSON: {error}") from None
        if not isinstance(found, dict):
            raise ScenarioError(f"{path}, line {number}, is no JSON object: {line.strip()[:SHOWN_CHARACTERS]}")
        yield f"line {number}", found
