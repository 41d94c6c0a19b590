"""What became of one request, and the kinds of failure."""

from __future__ import annotations

from dataclasses import dataclass, field

DETAIL_CHARACTERS = 300

FAILURES = {
    "refused": "no connection: nobody listens there",
    "disconnected": "the connection broke before the answer was complete",
    "timeout_first_token": "no token within the request timeout",
    "timeout_stream": "the stream stalled or took longer than the request timeout",
    "garbage": "the answer is no event stream of JSON",
    "stream_error": "the stream reports an error",
    "truncated": "the stream ended without [DONE]",
    "empty": "the stream ended without a token",
    "interrupted": "the load test was interrupted while it ran",
}
"""Kinds of failure beside ``http_429``, ``http_500`` and the like."""

CANCELLED = "cancelled"
"""The status of a request that the scenario breaks off, as users do."""


@dataclass
class Reply:
    """What became of a request; times are of `loadtest.load.client.Clock`.

    Attributes:
        sent_seconds: when it was sent.
        status: ``ok``, `CANCELLED`, ``http_`` with the code, or a key of `FAILURES`.
        detail: what the server or the connection said of a failure.
        first_token_seconds, last_token_seconds: of what was generated; an event without a token is not counted.
        first_tokens: how many tokens came at `first_token_seconds`.
        end_seconds: when nothing more came.
        gaps_milliseconds: between arrivals of tokens, of which several may come at once.
        input_tokens, output_tokens, cached_tokens: as the server counts, if it says so.
        counted_by: how it is known which events hold tokens: ``usage`` in every event
            (`stream_options.continuous_usage_stats`), ``token_ids`` (`return_token_ids`), or ``events`` with text,
            where tokens without text are missed; none without a token.
        text: the answer, without a reasoning part.
        finish_reason: as the server names it.
    """

    sent_seconds: float
    status: str = "ok"
    detail: str = ""
    first_token_seconds: float | None = None
    last_token_seconds: float | None = None
    first_tokens: int = 0
    end_seconds: float = 0.0
    gaps_milliseconds: list[float] = field(default_factory=list)
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    counted_by: str | None = None
    text: str = ""
    finish_reason: str | None = None

    def fail(self, status: str, detail: object = "") -> None:
        """Say how it failed."""
        self.status, self.detail = status, str(detail)[:DETAIL_CHARACTERS]
