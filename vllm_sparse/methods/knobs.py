"""Knobs that several methods have, under one name, and the error for a value that does not fit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

# Knobs are checked strictly: a string is no number, a typo is no knob.
KNOBS = ConfigDict(extra="forbid", strict=True)
# A number of tokens that no context reaches: where a knob takes it, it means "all".
UNBOUNDED_TOKENS = 1 << 24

DenseLayers = Annotated[int, Field(ge=0, le=1024, description="first layers, left dense")]
QueryBlockTokens = Annotated[Literal[64, 128], Field(description="query tokens that share a list")]
ListPer = Annotated[
    Literal["query_head", "kv_head"],
    Field(description="heads that share a list; kv_head reads what any query head of its group chose"),
]
ScoresPer = Annotated[
    Literal["query_head", "kv_head", "layer"],
    Field(description="heads that share scores: none, a KV head's query heads, all"),
]
BudgetTokens = Annotated[int, Field(ge=16, le=UNBOUNDED_TOKENS, description="tokens read by a sparse layer")]
SinkTokens = Annotated[int, Field(ge=0, le=1 << 16, description="first tokens, always read")]
RecentTokens = Annotated[int, Field(ge=0, le=1 << 16, description="last tokens, always read")]
DenseEverySteps = Annotated[
    int,
    Field(
        ge=0,
        le=1 << 16,
        description="one decode step of so many reads everything in all layers: that at which the context, its token "
        "included, is a multiple; 0: none",
    ),
]
DenseTailTokens = Annotated[
    int, Field(ge=0, le=1 << 16, description="last queries of each chunk, whose query blocks read everything")
]


def heads_with_scores(scores_per: str, query_heads: int, kv_heads: int) -> int:
    """Number of heads that have scores of their own, by the knob `ScoresPer`."""
    return {"query_head": query_heads, "kv_head": kv_heads, "layer": 1}[scores_per]


class KnobError(ValueError):
    """A knob's value does not go with the model or with another knob.

    Attributes:
        knob: its name.
        value: its value.
    """

    def __init__(self, knob: str, value: object, message: str) -> None:
        super().__init__(message)
        self.knob = knob
        self.value = value
