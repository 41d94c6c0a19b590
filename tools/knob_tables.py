"""Write the tables of knobs in docs/configuration.md from the methods' own types, and that of presets.

Usage: python tools/knob_tables.py    (in the environment of `make setup`; `make docs` runs it)
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from vllm_sparse.config.names import DENSE, METHODS, PHASES, is_request_knob, knob_schema, phases_of
from vllm_sparse.config.presets import PRESETS, Choice, Tier

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
UNLIMITED_TOKENS = 1 << 24
TYPES = {"integer": "integer", "number": "number", "boolean": "`true` or `false`", "string": "text"}


def tables() -> str:
    """A section a method, with a table of its knobs."""
    return "\n\n".join(_section(method) for method in METHODS)


def with_tables(page: str) -> str:
    """A page with its tables replaced by today's.

    Raises:
        ValueError: the page has not exactly one place for those of knobs, or of presets.
    """
    page = _replaced(page, "knob tables", tables())
    return _replaced(page, "presets", preset_table())


def _replaced(page: str, what: str, text: str) -> str:
    """A page with the text between two comments that name it replaced."""
    begin, end = f"<!-- {what}: begin, written by tools/knob_tables.py -->", f"<!-- {what}: end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    new, places = pattern.subn(lambda _: f"{begin}\n\n{text}\n\n{end}", page)
    if places != 1:
        raise ValueError(f"{PAGE.name} has {places} places for {what}; one {begin!r} and one {end!r} are needed")
    return new


def preset_table() -> str:
    """A table of what each preset picks at which length, and a list of what each is for and loses."""
    lines = [_line(["preset", "tokens of the prompt", "prompt", "generation"]), "|---|---|---|---|"]
    for name, preset in PRESETS.items():
        tiers = (Tier(0), *preset.tiers)
        ends = [*(f"to {tier.from_tokens - 1:,}" for tier in tiers[1:]), "and more"]
        for tier, end in zip(tiers, ends, strict=True):
            choices = [_choice(tier.choice(phase)) for phase in PHASES]
            lines.append(_line([f"`{name}`", f"{tier.from_tokens:,} {end}", *choices]))
    notes = [f"* `{name}`: {preset.description} {preset.quality}" for name, preset in PRESETS.items()]
    return "\n".join([*lines, "", *notes])


def _choice(choice: Choice) -> str:
    """What a tier runs in a phase."""
    knobs = "".join(f", `{knob}` {_text(value)}" for knob, value in choice.knobs.items())
    return (f"`{choice.method}`" if choice.method != DENSE else DENSE) + knobs


def _section(method: str) -> str:
    """Heading and table of a method; a knob whose type differs between the phases has a line for each."""
    phases = phases_of(method)
    holders: dict[tuple[str, str], list[str]] = {}
    for phase in phases:
        for knob, schema in knob_schema(phase, method).items():
            holders.setdefault((knob, json.dumps(schema, sort_keys=True)), []).append(phase)
    two_phases = len(phases) > 1
    titles = ["key", *(["phase"] if two_phases else []), "allowed", "default", "meaning"]
    lines = [f"### `{method}` ({', '.join(phases)})", "", _line(titles), "|---" * len(titles) + "|"]
    for (knob, text), having in holders.items():
        schema = json.loads(text)
        meaning = schema.get("description", "")
        if not any(is_request_knob(phase, method, knob) for phase in having):
            meaning = f"{meaning} (server only: object `sparse.{method}`)"
        phase_cell = [", ".join(having)] if two_phases else []
        lines.append(_line([f"`{method}_{knob}`", *phase_cell, _allowed(schema), _default(schema), meaning]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _allowed(schema: dict[str, Any]) -> str:
    """What a knob's schema admits, in words."""
    # A knob that may be left to the method is a union with null.
    schema = {**schema, **next(iter(schema.get("anyOf", ())), {})}
    if "enum" in schema:
        return ", ".join(f"`{_text(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{_text(schema['const'])}`"
    if schema.get("type") == "array":
        return f"list of {TYPES.get(schema.get('items', {}).get('type', ''), 'value')}s"
    words = TYPES.get(schema.get("type", ""), "value")
    bounds = [
        f"{word} {_text(schema[key])}"
        for key, word in (("exclusiveMinimum", "above"), ("minimum", "from"), ("maximum", "to"))
        if key in schema and not (key == "maximum" and schema[key] == UNLIMITED_TOKENS)
    ]
    multiple = [f"a multiple of {_text(schema['multipleOf'])}"] if "multipleOf" in schema else []
    return ", ".join([f"{words} {' '.join(bounds)}".strip(), *multiple])


def _default(schema: dict[str, Any]) -> str:
    value = schema.get("default")
    if value is None or value == "":
        return "none"
    return "no limit" if value == UNLIMITED_TOKENS else f"`{_text(value)}`"


def _text(value: object) -> str:
    """As a client writes it in JSON, names without quotes, whole numbers without a fraction."""
    if isinstance(value, str):
        return value
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


def main() -> None:
    """Command line."""
    page = PAGE.read_text()
    new = with_tables(page)
    if new != page:
        PAGE.write_text(new)
        print(f"wrote {PAGE}", file=sys.stderr)


if __name__ == "__main__":
    main()
