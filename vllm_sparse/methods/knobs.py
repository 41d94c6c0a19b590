"""Knobs that several methods have, under one name, and the error for a value that does not fit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

# Knobs are checked strictly: a string is no number, a typo is no knob.
KNOBS = ConfigDict(extra="forbid", strict=True)
# A number of tokens that no context reaches: where a knob takes it, it means "all".
UNBOUNDED_TOKENS = 1 << 24

# Limits of the server for knobs of requests (`config.limits`); a knob's JSON schema says which one it has.
LimitName = Literal["budget_tokens", "stages", "list_per", "query_block_tokens"]
LIMITED_BUDGET = Field(json_schema_extra={"limit": "budget_tokens"})
LIMITED_STAGES = Field(json_schema_extra={"limit": "stages"})
# On a GPU other values need other kernels.
COMPILES = Field(json_schema_extra={"compiles": True})

DenseLayers = Annotated[int, Field(ge=0, le=1024, description="first layers, left dense")]
QueryBlockTokens = Annotated[
    Literal[64, 128],
    Field(
        description="query tokens that share a list",
        json_schema_extra={"limit": "query_block_tokens", "compiles": True},
    ),
]
ListPer = Annotated[
    Literal["query_head", "kv_head"],
    Field(
        description="heads that share a list; kv_head reads what any query head of its group chose",
        json_schema_extra={"limit": "list_per", "compiles": True},
    ),
]
ScoresPer = Annotated[
    Literal["query_head", "kv_head", "layer"],
    Field(description="heads that share scores: none, a KV head's query heads, all"),
    COMPILES,
]
BudgetTokens = Annotated[
    int, Field(ge=16, le=UNBOUNDED_TOKENS, description="tokens read by a sparse layer"), LIMITED_BUDGET
]
Coverage = Annotated[
    float,
    Field(
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="share of the candidates' attention at which a list ends before its budget; 1: none does",
    ),
]
SinkTokens = Annotated[int, Field(ge=0, le=1 << 16, description="first tokens, always read"), LIMITED_BUDGET]
RecentTokens = Annotated[int, Field(ge=0, le=1 << 16, description="last tokens, always read"), LIMITED_BUDGET]
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
    int,
    Field(ge=0, le=1 << 16, description="last queries of each chunk, whose query blocks read everything"),
    LIMITED_BUDGET,
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
