"""What a client sends in one session: one prompt, or several turns of a conversation."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Message = Mapping[str, Any]

Content = str | Sequence[Mapping[str, Any]]
"""Of a message: its text, or its parts as the OpenAI API has them."""

Endpoint = Literal["chat", "completions"]
"""Which of the OpenAI API's endpoints a scenario's requests go to."""


@dataclass(frozen=True)
class Turn:
    """One request.

    Attributes:
        content: the user's message, as text or in parts, or the text to complete.
        max_tokens: of the answer.
        answer_prefix: beginning of the answer that the model goes on with.
        ignore_eos: generate exactly `max_tokens`.
        score: share (0..1) that is right of an answer's text; none: there is no right answer.
        results: messages in place of the user's, such as what tools answered.
        answer: message with which the conversation goes on in place of the answer that came; none: that one.
    """

    content: Content
    max_tokens: int
    answer_prefix: str = ""
    ignore_eos: bool = False
    score: Callable[[str], float] | None = None
    results: tuple[Message, ...] = ()
    answer: Message | None = None

    @property
    def asked(self) -> list[Message]:
        """What the turn adds to the conversation before its answer."""
        return list(self.results) or [{"role": "user", "content": self.content}]


@dataclass(frozen=True)
class Prompt:
    """A session's requests, without the method.

    Attributes:
        name: the same for equal prompts of a scenario and a seed.
        turns: in order; each goes on with the conversation so far.
        input_tokens: of the first turn, as planned; the server says how many it really had.
        history: messages before the first turn.
        think_seconds: between an answer and the user's next turn.
        tool_seconds: between an answer and the results of tools.
        tools: that the requests offer.
        adapter: name of the LoRA adapter that answers; none: the model itself.
        cancel_after_seconds: when the client breaks its requests off; none: never.
        shared: what it may share blocks in the prefix cache by, with sessions of the same method; none: nothing.
    """

    name: str
    turns: tuple[Turn, ...]
    input_tokens: int
    history: tuple[Message, ...] = ()
    think_seconds: float = 0.0
    tool_seconds: float = 0.0
    tools: tuple[Message, ...] = ()
    adapter: str | None = None
    shared: str | None = None
    cancel_after_seconds: float | None = None

    @functools.cached_property
    def digest(self) -> str:
        """Tells whether two runs sent the same."""
        turns = [[turn.content, turn.answer_prefix, *turn.results] for turn in self.turns]
        content = json.dumps([list(self.history), turns, *self.tools, *([self.adapter] if self.adapter else [])])
        return hashlib.sha256(content.encode()).hexdigest()[:16]
