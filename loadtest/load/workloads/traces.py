"""Traces of real services, each in the format that it is published in; the first line tells which.

- Mooncake (FAST'25): JSON lines with `timestamp` (milliseconds), `input_length`, `output_length` and `hash_ids`, one
  for each 512 tokens of the prompt; equal ids at the beginning are a prefix that requests share.
- BurstGPT: CSV with `Timestamp` (seconds), `Request tokens` and `Response tokens`.
- Azure LLM inference (2023 and 2024): CSV with `TIMESTAMP` (a date), `ContextTokens` and `GeneratedTokens`.
- This project's own: JSON lines with `input_tokens`, `output_tokens` and, to replay the arrivals, `timestamp_seconds`.

Requests that generated nothing, as failed ones in BurstGPT, are left out.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt

from loadtest.load.settings import ScenarioError
from loadtest.load.workloads.files import Line, TraceLine, checked, read_lines, read_text

MOONCAKE_BLOCK_TOKENS = 512


class _Mooncake(Line):
    timestamp: FiniteFloat
    input_length: PositiveInt
    output_length: NonNegativeInt
    hash_ids: tuple[NonNegativeInt, ...] = ()


class _BurstGpt(Line):
    timestamp: FiniteFloat = Field(validation_alias="Timestamp")
    input_tokens: PositiveInt = Field(validation_alias="Request tokens")
    output_tokens: NonNegativeInt = Field(validation_alias="Response tokens")


class _Azure(Line):
    timestamp: datetime.datetime = Field(validation_alias="TIMESTAMP")
    input_tokens: PositiveInt = Field(validation_alias="ContextTokens")
    output_tokens: NonNegativeInt = Field(validation_alias="GeneratedTokens")


def read_trace(path: Path) -> list[TraceLine]:
    """The requests of a trace, by the time at which they arrived where the trace tells it.

    Raises:
        ScenarioError: it cannot be read, is in no known format, or a line is not what it should be.
    """
    text = read_text(path)
    first = next((line for line in text.split("\n") if line.strip()), "")
    columns = {column.strip() for column in first.split(",")}
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= columns:
        found = _of_csv(path, text, _azure)
    elif {"Timestamp", "Request tokens", "Response tokens"} <= columns:
        found = _of_csv(path, text, _burst_gpt)
    elif '"input_length"' in first:
        lines = [
            _line(one.timestamp / 1e3, one.input_length, one.output_length, one.hash_ids)
            for one in read_lines(path, _Mooncake)
        ]
        found = [line for line in lines if line is not None]
    elif first.startswith("{"):
        found = read_lines(path, TraceLine)
    else:
        raise ScenarioError(
            f"{path} begins with {first[:80]!r}, which is no trace of Mooncake, BurstGPT or Azure, nor JSON lines with "
            "input_tokens and output_tokens"
        )
    if not found:
        raise ScenarioError(f"{path} has no request that generated anything")
    if all(one.timestamp_seconds is not None for one in found):
        found.sort(key=lambda one: one.timestamp_seconds or 0.0)
    return found


def _azure(path: Path, place: str, row: Mapping[str, str]) -> TraceLine | None:
    one = checked(path, place, _Azure, row)
    arrived = one.timestamp if one.timestamp.tzinfo else one.timestamp.replace(tzinfo=datetime.UTC)
    return _line(arrived.timestamp(), one.input_tokens, one.output_tokens)


def _burst_gpt(path: Path, place: str, row: Mapping[str, str]) -> TraceLine | None:
    one = checked(path, place, _BurstGpt, row)
    return _line(one.timestamp, one.input_tokens, one.output_tokens)


def _of_csv(path: Path, text: str, read: Callable[[Path, str, Mapping[str, str]], TraceLine | None]) -> list[TraceLine]:
    rows = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    lines = (read(path, f"line {rows.line_num}", row) for row in rows)
    return [line for line in lines if line is not None]


def _line(
    timestamp_seconds: float, input_tokens: int, output_tokens: int, blocks: tuple[int, ...] = ()
) -> TraceLine | None:
    if not output_tokens:
        return None
    return TraceLine(
        input_tokens=input_tokens, output_tokens=output_tokens, timestamp_seconds=timestamp_seconds, blocks=blocks
    )


class _Remark(Line):
    speaker: str = Field(validation_alias="from")
    value: str


class _Conversation(Line):
    conversations: tuple[_Remark, ...]


def read_share_gpt(path: Path) -> list[list[tuple[str, str]]]:
    """The conversations of a file in ShareGPT's format: questions of a human, each with its answer.

    A conversation counts from its first question on, as far as questions and answers alternate; one without an answered
    question is left out.

    Raises:
        ScenarioError: it cannot be read, or is no JSON array of such conversations, or none has an answered question.
    """
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise ScenarioError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, list):
        raise ScenarioError(f"{path} is no JSON array of conversations, as ShareGPT's files are")
    found = [
        _answered(checked(path, f"conversation {number}", _Conversation, one).conversations)
        for number, one in enumerate(content, 1)
    ]
    answered = [one for one in found if one]
    if not answered:
        raise ScenarioError(f"{path} has no conversation with an answered question")
    return answered


def _answered(remarks: tuple[_Remark, ...]) -> list[tuple[str, str]]:
    asked = [remark.speaker in ("human", "user") for remark in remarks]
    first = asked.index(True) if True in asked else len(remarks)
    found = []
    for place in range(first, len(remarks) - 1, 2):
        question, answer = remarks[place], remarks[place + 1]
        if not asked[place] or asked[place + 1] or not question.value.strip() or not answer.value.strip():
            break
        found.append((question.value, answer.value))
    return found
