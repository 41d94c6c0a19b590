"""A completion as a stream: its tokens with their log probabilities, and a client that may go away early."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import aiohttp

# Requests of low priority wait for all others.
REQUEST_SECONDS = 600.0


@dataclasses.dataclass
class Choice:
    """One answer's tokens, and for each the most likely tokens with their log probabilities, itself among them."""

    tokens: list[str] = dataclasses.field(default_factory=list)
    likely: list[dict[str, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Answer:
    """What came of a request.

    Attributes:
        choices: by their index.
        error: why there is no whole answer; None: there is, or the client went away.
    """

    choices: dict[int, Choice] = dataclasses.field(default_factory=dict)
    error: str | None = None


async def complete(
    session: aiohttp.ClientSession, url: str, body: Mapping[str, Any], aborted_after_events: int | None = None
) -> Answer:
    """Ask for a completion with ``logprobs``; no error leaves this function.

    Args:
        session: for the connection.
        url: of the server.
        body: of the request, without ``stream``.
        aborted_after_events: close the connection after so many events; 0: as soon as the answer begins.
    """
    answer = Answer()
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            await _read(answer, session, url, body, aborted_after_events)
    except TimeoutError:
        answer.error = f"no whole answer in {REQUEST_SECONDS:g} s"
    except (aiohttp.ClientError, OSError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


async def _read(
    answer: Answer, session: aiohttp.ClientSession, url: str, body: Mapping[str, Any], aborted_after_events: int | None
) -> None:
    events = 0
    async with session.post(f"{url}/v1/completions", json={**body, "stream": True}) as response:
        if response.status != 200:
            answer.error = f"HTTP {response.status}: {await response.text()}"
            return
        if aborted_after_events == 0:
            response.close()
            return
        async for line in response.content:
            data = line.decode().strip().removeprefix("data: ")
            if data == "[DONE]":
                return
            if not data:
                continue
            event = json.loads(data)
            if "error" in event:
                answer.error = json.dumps(event["error"])
                return
            for choice in event["choices"]:
                _add(answer.choices.setdefault(choice["index"], Choice()), choice["logprobs"])
            events += 1
            if events == aborted_after_events:
                response.close()
                return
    answer.error = "the stream ended before its end was announced"


def _add(choice: Choice, logprobs: Mapping[str, Any] | None) -> None:
    if logprobs is None:
        return
    choice.tokens += logprobs["tokens"]
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        choice.likely.append({**top, token: value})
