"""Tokens of one answer against a real server: when they came and how many, whatever the events look like."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from loadtest.load.client import Client, Clock
from loadtest.load.http import connections
from loadtest.load.reply import Reply
from tests.loadtest.conftest import Simulated

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def ask(simulated: Simulated, path: str, behaviour: dict[str, Any], **body: Any) -> Reply:
    """One answer of nine tokens."""
    prompt = "say answer=yes now"
    asked = {"prompt": prompt} if path == COMPLETIONS else {"messages": [{"role": "user", "content": prompt}]}
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"max_tokens": 9, "stream_options": options, "vllm_xargs": behaviour, **asked, **body}

    async def send() -> Reply:
        async with connections({}) as http:
            return await Client(http, simulated.url, 30.0, Clock()).send(path, body)

    return asyncio.run(send())


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "usage": ({}, {}),
    "token_ids": ({"continuous": False}, {"return_token_ids": True}),
    "events": ({"continuous": False}, {}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_only_tokens_count(simulated: Simulated, path: str, way: str) -> None:
    """Events before the first token and the one that says why it ended are none, however the tokens are counted."""
    behaviour, body = WAYS[way]
    timing = {"ttft_seconds": 0.8, "leading": 7, "tpot_seconds": 0.05, "finish_seconds": 0.6}
    reply = ask(simulated, path, {**timing, **behaviour}, **body)
    assert (reply.status, reply.counted_by, reply.output_tokens) == ("ok", way, 9)
    assert reply.first_token_seconds is not None
    assert reply.last_token_seconds is not None
    assert reply.first_token_seconds - reply.sent_seconds == pytest.approx(0.8, abs=0.2)
    assert reply.last_token_seconds - reply.first_token_seconds == pytest.approx(8 * 0.05, abs=0.2)
    assert len(reply.gaps_milliseconds) == 8
    assert reply.end_seconds - reply.last_token_seconds > 0.55
    assert reply.text == "yes" + 8 * " more"
    assert reply.finish_reason == "length"


@pytest.mark.parametrize("way", ["usage", "token_ids"])
def test_several_tokens_may_come_at_once(simulated: Simulated, way: str) -> None:
    behaviour, body = WAYS[way]
    reply = ask(simulated, CHAT, {"together": 4, **behaviour}, **body)
    assert (reply.output_tokens, reply.first_tokens, len(reply.gaps_milliseconds)) == (9, 4, 2)


def test_a_server_that_counts_at_the_end_is_counted_by_events(simulated: Simulated) -> None:
    """The last event, which has the number of all tokens, must not pass for the arrival of all of them."""
    reply = ask(simulated, CHAT, {"continuous": False, "together": 3, "finish_seconds": 0.3})
    assert (reply.counted_by, reply.output_tokens, len(reply.gaps_milliseconds)) == ("events", 9, 2)
    assert ask(simulated, CHAT, {"usage": False}).output_tokens is None, "events are no number of tokens"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_answer_without_a_token_has_failed(simulated: Simulated, path: str) -> None:
    reply = ask(simulated, path, {"fault": "empty", "fault_after": 0, "usage": False})
    assert (reply.status, reply.first_token_seconds) == ("empty", None)


def test_event_streams_have_more_than_data(simulated: Simulated) -> None:
    plain, dressed = (ask(simulated, CHAT, {"dressed": dressed}) for dressed in (False, True))
    for name in ("status", "text", "output_tokens", "first_tokens", "counted_by", "finish_reason", "input_tokens"):
        assert getattr(plain, name) == getattr(dressed, name), name
    assert len(dressed.gaps_milliseconds) == 8
