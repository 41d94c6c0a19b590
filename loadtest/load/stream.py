"""The event stream of one answer: when tokens came, and how many, counted as well as the server lets us.

An event is no token: the first one may name the role, some hold nothing yet, the last one may only say why the answer
ended, and one may hold several tokens. So each way to count has a name, and the report says which one was used.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

import aiohttp
import httpx2
import msgspec

from loadtest.load.reply import Reply

CountedBy = Literal["usage", "token_ids", "events"]
DONE = "[DONE]"
SHOWN_CHARACTERS = 100


class StreamError(Exception):
    """A stream that is no answer.

    Args:
        status: a key of `loadtest.load.reply.FAILURES`.
        detail: what came instead.
    """

    def __init__(self, status: str, detail: object = "") -> None:
        super().__init__(detail)
        self.status = status


class _PromptTokens(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptTokens | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


async def read_answer(response: aiohttp.ClientResponse, reply: Reply, clock: Callable[[], float]) -> None:
    """Read a stream to its end.

    Args:
        response: whose body has not been read.
        reply: takes what comes, also when the stream fails.
        clock: of all times.

    Raises:
        StreamError: it is no answer of an OpenAI-compatible server, or not a whole one, or holds no token.
        aiohttp.ClientError, ConnectionError: the connection broke.
    """
    answer = _Answer(reply)
    arrived_seconds = 0.0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal arrived_seconds
        async for piece in response.content.iter_any():
            # Of all events in the piece: parsing the first ones must not delay the others.
            arrived_seconds = clock()
            yield piece

    # The parser is httpx2's own; it reads any response, and aiohttp's transport costs a third of httpx2's an event.
    content_type = response.headers.get("Content-Type", "")
    if content_type.partition(";")[0].strip().lower() != "text/event-stream":
        raise StreamError("garbage", f"{content_type or 'no content type'}: {(await response.content.read(4096))!r}")
    parsed = httpx2.Response(
        200,
        headers={"Content-Type": "text/event-stream"},
        content=pieces(),
        request=httpx2.Request("POST", str(response.url)),
    )
    try:
        async for event in httpx2.EventSource(parsed, max_event_size=None):
            if event.data == DONE:
                break
            # Events that only say `id` or `retry`.
            if event.data:
                answer.take(_parse(event.data), arrived_seconds)
        else:
            raise StreamError("truncated")
    finally:
        answer.finish()
    if reply.first_token_seconds is None:
        said = "" if reply.output_tokens is None else f"the server counted {reply.output_tokens}"
        raise StreamError("empty", said)


def _parse(data: str) -> _Event:
    try:
        return _decode(data)
    except msgspec.MsgspecError as error:
        raise StreamError("garbage", f"{data[:SHOWN_CHARACTERS]} ({error})") from None


class _Answer:
    """Adds events up in a reply."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._texts: list[str] = []
        self._tokens = 0

    def take(self, event: _Event, seconds: float) -> None:
        """Add an event that arrived then."""
        if event.error:
            raise StreamError("stream_error", event.error)
        fresh = self._fresh_tokens(event)
        for choice in event.choices or ():
            self._reply.finish_reason = choice.finish_reason or self._reply.finish_reason
            if text := choice.text or (choice.delta.content if choice.delta else None):
                self._texts.append(text)
        if event.usage is not None:
            self._count(event.usage)
        if fresh > 0:
            self._tokens += fresh
            self._arrived(fresh, seconds)

    def finish(self) -> None:
        """Nothing more comes."""
        self._reply.text = "".join(self._texts)
        if self._reply.output_tokens is None and self._reply.counted_by not in (None, "events"):
            self._reply.output_tokens = self._tokens

    def _fresh_tokens(self, event: _Event) -> int:
        """Tokens that came with an event, by the best count that it allows."""
        for way, count in self._counts(event).items():
            # One way throughout: a server may count only in the last event, which then is no arrival of all tokens.
            if count > 0 and self._reply.counted_by in (None, way):
                self._reply.counted_by = way
                return count
        return 0

    def _counts(self, event: _Event) -> dict[CountedBy, int]:
        if not event.choices:
            return {}
        so_far = None if event.usage is None else event.usage.completion_tokens
        return {
            "usage": 0 if so_far is None else so_far - self._tokens,
            "token_ids": sum(len(choice.token_ids or ()) for choice in event.choices),
            "events": int(any(map(_holds_something, event.choices))),
        }

    def _count(self, usage: _Usage) -> None:
        reply = self._reply
        reply.input_tokens = usage.prompt_tokens if usage.prompt_tokens is not None else reply.input_tokens
        reply.output_tokens = usage.completion_tokens if usage.completion_tokens is not None else reply.output_tokens
        if usage.prompt_tokens_details is not None:
            reply.cached_tokens = usage.prompt_tokens_details.cached_tokens

    def _arrived(self, tokens: int, seconds: float) -> None:
        reply = self._reply
        if reply.last_token_seconds is None:
            reply.first_token_seconds = seconds
            reply.first_tokens = tokens
        else:
            reply.gaps_milliseconds.append(round((seconds - reply.last_token_seconds) * 1e3, 2))
        reply.last_token_seconds = seconds


def _holds_something(choice: _Choice) -> bool:
    delta = choice.delta
    return bool(
        choice.text
        or (delta is not None and (delta.content or delta.reasoning or delta.reasoning_content or delta.tool_calls))
    )
