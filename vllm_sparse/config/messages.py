"""Errors of sparse settings, worded for the person who sent them: the key, what was given, what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_sparse.config.names import is_request_knob, knob_schema, phases_of
from vllm_sparse.methods.knobs import KnobError

# Of a message; beyond them somebody sent a page.
MOST_CHARACTERS = 2000


def readable(text: str) -> str:
    """Text as any answer and log can hold it.

    Lone surrogates, which JSON can send and UTF-8 cannot write, are escaped; a very long text loses its middle.
    """
    text = text.encode(errors="backslashreplace").decode()
    half = MOST_CHARACTERS // 2
    return text if len(text) <= MOST_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


class SparseParamsError(ValueError):
    """A request's sparse settings are wrong. The message names the key, the value and what is allowed.

    Attributes:
        key: the offending key.
        value: its value.
    """

    def __init__(self, key: str, value: object, message: str) -> None:
        super().__init__(readable(message))
        self.key = key
        self.value = value


def knob_error(name: str, error: KnobError) -> SparseParamsError:
    """The error of a method's knob, named by its request key.

    Args:
        name: of the method.
        error: as the method raised it.
    """
    key = f"{name}_{error.knob}"
    return SparseParamsError(key, error.value, f"{key} is {error.value!r}; {error}")


def how_to_choose(name: str, phases: list[str]) -> str:
    """What a request sends to choose a method in one of some phases."""
    return " or ".join(f'"sparse_{phase}": "{name}"' for phase in phases)


def knob_list(name: str, of_requests: bool = False) -> str:
    """Request keys of a method's knobs, separated by commas; a knob of one phase only is followed by the phase.

    Args:
        name: of the method.
        of_requests: leave out those that only the server may set.
    """
    phases = phases_of(name)
    having: dict[str, list[str]] = {}
    for phase in phases:
        for knob in knob_schema(phase, name):
            if not of_requests or is_request_knob(phase, name, knob):
                having.setdefault(knob, []).append(phase)
    return ", ".join(
        f"{name}_{knob}" + ("" if holders == phases else f" ({' and '.join(holders)})")
        for knob, holders in having.items()
    )


def allowed_values(schema: Mapping[str, Any]) -> str:
    """What a knob may be set to, from its JSON schema, in words."""
    # A knob that may be left to the method is a union with null.
    schema = {**schema, **next(iter(schema.get("anyOf", ())), {})}
    if "enum" in schema:
        return "one of " + ", ".join(map(repr, schema["enum"]))
    words = {"integer": "an integer", "number": "a number", "boolean": "true or false", "array": "a list of integers"}
    text = words.get(schema.get("type", ""), "a value")
    low, above, high = schema.get("minimum"), schema.get("exclusiveMinimum"), schema.get("maximum")
    bounds = [f"of at least {low}"] if low is not None else [f"above {above}"] if above is not None else []
    if high is not None:
        bounds.append(f"at most {high}")
    if "multipleOf" in schema:
        bounds.append(f"a multiple of {schema['multipleOf']}")
    return " ".join([text, " and ".join(bounds)]).strip() + f" ({schema.get('description', '')})"
