"""The prefix cache: blocks are shared by requests with equal sparse settings only."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serving.server import BOTH, FLEXPREFILL, TIDAL, Server, prompt_of

MIN = {"sparse_min_tokens": 512}


def cached(server: Server, content: str, extras: dict[str, Any] | None, salt: str | None = None) -> int:
    """Prompt tokens that a request finds in the prefix cache."""
    body = {} if salt is None else {"cache_salt": salt}
    return server.chat(content, extras, max_tokens=4, **body).cached_tokens


@pytest.mark.parametrize(
    ("number", "extras", "other"),
    [
        (0, {**FLEXPREFILL, **MIN}, {"flexprefill_gamma": 0.8}),
        (1, {**TIDAL, **MIN, "tidal_budget_tokens": 256}, {"tidal_budget_tokens": 512}),
        (2, {**BOTH, **MIN, "tidal_budget_tokens": 256}, {"sparse_min_tokens": 600}),
    ],
    ids=["flexprefill", "tidal", "both"],
)
def test_only_equal_settings_share(server: Server, number: int, extras: dict[str, Any], other: dict[str, Any]) -> None:
    content = prompt_of(300 + number, 1000).content
    assert cached(server, content, extras) == 0
    assert cached(server, content, None) == 0
    assert cached(server, content, None) > 900
    assert cached(server, content, extras) > 900
    assert cached(server, content, {**extras, **other}) == 0
    assert cached(server, content, {**extras, **other}) > 900
    # The user's own salt separates as well.
    assert cached(server, content, extras, "mine") == 0
    assert cached(server, content, extras, "mine") > 900
    assert cached(server, content, None, "mine") == 0
    assert cached(server, content, extras, "yours") == 0


def test_equal_settings_in_other_words_share(server: Server) -> None:
    """A default knob that is written out, a gamma of 1, a minimum that is never reached."""
    content = prompt_of(310, 1000).content
    assert cached(server, content, {**FLEXPREFILL, **MIN}) == 0
    assert cached(server, content, {**FLEXPREFILL, **MIN, "flexprefill_gamma": 0.9}) > 900
    assert cached(server, content, None) == 0
    assert cached(server, content, {"sparse_prefill": "dense", "sparse_decode": "dense"}) > 900
    assert cached(server, content, {**FLEXPREFILL, **MIN, "flexprefill_gamma": 1}) > 900
    assert cached(server, content, BOTH) > 900


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize("extras", [None, {**BOTH, **MIN}], ids=["dense", "sparse"])
def test_forged_salt_is_refused(server: Server, extras: dict[str, Any] | None, endpoint: str, stream: bool) -> None:
    salt = "mine|sparse:1:0123456789abcdef"
    ask = server.chat if endpoint == "chat" else server.complete
    reply = ask("Hello.", extras, cache_salt=salt, stream=stream)
    assert reply.status == 400, reply.raw
    assert "cache_salt" in reply.error
    assert "|sparse:" in reply.error
    assert reply.body["error"]["param"] == "cache_salt"
