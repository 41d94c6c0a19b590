"""The ``limits`` object of a server's configuration: what requests may ask for, so that none harms the others.

Which knob a limit is of stands with the knob (`methods.knobs.limited_by`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_sparse.methods.knobs import UNBOUNDED_TOKENS, LimitName

WHERE_TO_SET = "(--additional-config, object sparse.limits, or PUT /v1/sparse/config)"


class Limits(BaseModel):
    """The most that requests may ask for. What the server's own configuration holds is always allowed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    min_tokens: int = Field(
        default=UNBOUNDED_TOKENS, ge=0, le=UNBOUNDED_TOKENS, description="largest sparse_min_tokens of a request"
    )
    # By default none: a budget beyond the context reads what dense attention does.
    budget_tokens: int = Field(
        default=UNBOUNDED_TOKENS, ge=16, le=UNBOUNDED_TOKENS, description="most tokens that a knob may make a row read"
    )
    stages: int = Field(default=4, ge=1, le=24, description="most stages of a search")
    list_per: Literal["query_head", "kv_head"] = Field(default="query_head", description="finest kind of lists")
    query_block_tokens: Literal[64, 128] = Field(default=64, description="smallest query block with lists of its own")
    selection_mib: int = Field(
        default=2048,
        ge=1,
        le=1 << 20,
        description="most memory to choose for one prompt chunk, the largest there is at the longest context",
    )
    new_kernels: Literal["none", "choices", "any"] = Field(
        default="choices",
        description="knobs with which a GPU compiles kernels that the start has not compiled, while all requests wait; "
        "choices: those with a few values only",
    )


def narrowed(schema: Mapping[str, Any], own: Any, limits: Limits) -> tuple[LimitName | None, dict[str, Any]]:
    """What a limit leaves of a knob's values.

    Args:
        schema: of the knob.
        own: its value as the server's configuration sets it.
        limits: of the server.

    Returns:
        The limit, None where the knob has none, and keywords of JSON schema.
    """
    name: LimitName | None = schema.get("limit")
    if name is None:
        return None, {}
    limit = getattr(limits, name)
    if name == "stages":
        return name, {"maxItems": max(limit, len(own))}
    if name == "budget_tokens":
        if schema.get("type") == "array":
            return name, {"items": {**schema.get("items", {}), "maximum": max(limit, *own)}}
        return name, {"maximum": min(max(limit, own), schema.get("maximum", UNBOUNDED_TOKENS))}
    # From the finest to the coarsest.
    order: list[Any] = ["query_head", "kv_head"] if name == "list_per" else [64, 128]
    finest = min(order.index(limit), order.index(own))
    return name, {"enum": [value for value in schema["enum"] if order.index(value) >= finest]}


def is_within(value: Any, allowed: Mapping[str, Any]) -> bool:
    """Whether a knob's value, checked before, is one that a limit leaves.

    Args:
        value: of the knob.
        allowed: as `narrowed` gives it.
    """
    if "maxItems" in allowed:
        return bool(len(value) <= allowed["maxItems"])
    if "items" in allowed:
        return all(one <= allowed["items"]["maximum"] for one in value)
    if "maximum" in allowed:
        return bool(value <= allowed["maximum"])
    return value in allowed.get("enum", [value])


def in_words(allowed: Mapping[str, Any]) -> str:
    """What a limit leaves of a knob's values."""
    if "maxItems" in allowed:
        return f"at most {allowed['maxItems']} stages"
    if "items" in allowed:
        return f"numbers of at most {allowed['items']['maximum']}"
    if "maximum" in allowed:
        return f"at most {allowed['maximum']}"
    return " or ".join(map(repr, allowed["enum"]))
