"""Random request bodies: by the server's OpenAPI document, with this plugin's settings, and with what fits nowhere."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loadtest.robustness.extras import random_extras
from loadtest.robustness.server import CONFIG, LAYERS, MODEL_NAME
from vllm_sparse.config.names import METHODS, PHASES, REQUEST_KEYS, knob_schema
from vllm_sparse.config.presets import PRESETS
from vllm_sparse.config.settings import ServerConfig

MOST_DEPTH = 4
# Of a schema's optional properties, and of all values those that fit nowhere.
OPTIONAL_SHARE, MISFIT_SHARE, BROKEN_SHARE = 0.1, 0.03, 0.02
CHATS = [{"role": "user", "content": "Hello."}]
SHORT = {"max_tokens": 2}
# A body of each route that is answered; what is drawn is laid over it.
BASES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hello.", **SHORT},
    "/v1/chat/completions": {"messages": CHATS, **SHORT},
    "/v1/chat/completions/batch": {"messages": [CHATS] * 2, **SHORT},
    "/v1/responses": {"input": "Hello.", "max_output_tokens": 16},
    "/v1/messages": {"messages": CHATS, **SHORT},
    "/v1/messages/count_tokens": {"messages": CHATS},
    "/generative_scoring": {"query": "Hello.", "items": ["Yes.", "No."], "label_token_ids": [5, 6]},
    "/inference/v1/generate": {"token_ids": [5] * 80, "sampling_params": {**SHORT}},
    "/tokenize": {"prompt": "Hello."},
    "/detokenize": {"tokens": [5, 6]},
    "/v1/completions/render": {"prompt": "Hello.", **SHORT},
    "/v1/chat/completions/render": {"messages": CHATS, **SHORT},
    "/v1/sparse/config": {},
}
CONFIG_ROUTE, TOKENS_ROUTE = "/v1/sparse/config", "/inference/v1/generate"
# A body may be anything but long work.
CLAMPED = {"max_tokens": 4, "max_completion_tokens": 4, "max_output_tokens": 16, "min_tokens": 4, "n": 3, "best_of": 3}
KEYS = (
    *REQUEST_KEYS,
    *(f"{name}_{knob}" for phase, known in PHASES.items() for name in known for knob in knob_schema(phase, name)),
    *("sparse_resolved", "Sparse_Decode", "sparse-decode", "tidalBudget", "sparse", "hip", "hipster", "seed"),
)


@dataclass(frozen=True)
class Body:
    """A request: its route, and the bytes of its body."""

    method: str
    path: str
    content: bytes


def random_body(draw: random.Random, document: Mapping[str, Any]) -> Body:
    """A request to one of the routes.

    Args:
        draw: gives all choices.
        document: the server's OpenAPI document.
    """
    path = draw.choice([path for path in BASES if path in document["paths"]])
    method = "put" if path == CONFIG_ROUTE else "post"
    schema = document["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"]
    body = {**BASES[path], "model": MODEL_NAME, **_part(draw, _resolved(schema, document), document)}
    if path == CONFIG_ROUTE:
        body = random_settings(draw)
    elif path == TOKENS_ROUTE and isinstance(body["sampling_params"], dict):
        body["sampling_params"]["extra_args"] = requested_extras(draw)
    elif draw.random() < 0.8:
        body["vllm_xargs"] = requested_extras(draw)
    for holder in (body, body.get("sampling_params")):
        for key, most in CLAMPED.items():
            if isinstance(holder, dict) and isinstance(holder.get(key), int | float) and not holder[key] <= most:
                holder[key] = most
    content = json.dumps(body if draw.random() > MISFIT_SHARE else misfit(draw)).encode()
    if draw.random() < BROKEN_SHARE:
        place = draw.randrange(len(content) + 1)
        content = content[:place] + draw.randbytes(draw.randrange(4)) + content[place + 1 :]
    return Body(method.upper(), path, content)


def requested_extras(draw: random.Random) -> Any:
    """Sampling extras: right ones, ones with something wrong, or anything."""
    extras: dict[str, Any] = random_extras(draw, CONFIG, LAYERS) if draw.random() < 0.7 else {}
    if draw.random() < 0.1:
        extras["sparse_preset"] = draw.choice([*PRESETS, "dense"])
    if draw.random() < 0.6:
        for _ in range(draw.randint(1, 3)):
            key = draw.choice(KEYS) if draw.random() < 0.9 else misfit_text(draw)
            extras[key] = misfit(draw)
    return extras if draw.random() > MISFIT_SHARE else misfit(draw)


def random_settings(draw: random.Random) -> dict[str, Any]:
    """A ``"sparse"`` object of a server's configuration, or nearly one."""
    settings: dict[str, Any] = {}
    names = [*ServerConfig.model_fields, "limits", "unknown"]
    for name in draw.sample(names, draw.randint(0, 3)):
        if name in METHODS and draw.random() < 0.9:
            knobs = [knob for phase, known in PHASES.items() if name in known for knob in knob_schema(phase, name)]
            settings[name] = {draw.choice(knobs): misfit(draw) for _ in range(draw.randint(0, 2))}
        elif name in ("preset", *PHASES):
            settings[name] = draw.choice(["dense", *METHODS, *PRESETS])
        else:
            settings[name] = misfit(draw)
    return settings


def misfit(draw: random.Random, depth: int = MOST_DEPTH) -> Any:
    """Any JSON, numbers that JSON has no name for among it."""
    kind = draw.randrange(8 if depth else 6)
    if kind == 0:
        return draw.choice([None, True, False])
    if kind == 1:
        return draw.choice([0, 1, -1, 16, 64, 128, 1000, 1 << 24, 1 << 31, 1 << 63, 1 << 64, 1 << 70, -(1 << 63)])
    if kind == 2:
        return draw.choice([0.0, -0.0, 0.5, 1.0, 1.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")])
    if kind == 3:
        return draw.choice(["dense", "kv_head", "query_head", *METHODS, *PRESETS])
    if kind in (4, 5):
        return misfit_text(draw)
    if kind == 6:
        return [misfit(draw, depth - 1) for _ in range(draw.randrange(4))]
    return {misfit_text(draw): misfit(draw, depth - 1) for _ in range(draw.randrange(4))}


def misfit_text(draw: random.Random) -> str:
    """Text of any characters, lone surrogates and control characters among them, at times a long one."""
    if draw.random() < 0.05:
        return draw.choice(string.ascii_letters) * draw.choice([1000, 100_000])
    return "".join(
        draw.choice([draw.choice(string.printable), chr(draw.randrange(0x3000)), chr(draw.randrange(0xD800, 0xE000))])
        for _ in range(draw.randrange(6))
    )


def _resolved(schema: Mapping[str, Any], document: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema without reference, one of its alternatives."""
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    for alternatives in ("anyOf", "oneOf", "allOf"):
        if alternatives in schema:
            return _resolved(schema[alternatives][0], document)
    return schema


def _part(draw: random.Random, schema: Mapping[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
    """Some of an object's properties; those that the base has more rarely."""
    return {
        name: fitting(draw, inner, document)
        for name, inner in schema.get("properties", {}).items()
        if draw.random() < OPTIONAL_SHARE * (0.3 if name in schema.get("required", ()) else 1)
    }


def fitting(draw: random.Random, schema: Any, document: Mapping[str, Any], depth: int = MOST_DEPTH) -> Any:
    """A value that a JSON schema mostly allows; at times anything."""
    if not isinstance(schema, Mapping) or not schema or draw.random() < MISFIT_SHARE or not depth:
        return misfit(draw, min(depth, 2))
    for alternatives in ("anyOf", "oneOf", "allOf"):
        if alternatives in schema:
            return fitting(draw, draw.choice(schema[alternatives]), document, depth)
    if "$ref" in schema:
        return fitting(draw, _resolved(schema, document), document, depth)
    if "enum" in schema:
        return draw.choice(schema["enum"])
    if "const" in schema:
        return schema["const"]
    kind = schema.get("type")
    if kind == "object":
        properties = schema.get("properties", {})
        kept = [name for name in properties if name in schema.get("required", ()) or draw.random() < OPTIONAL_SHARE]
        return {name: fitting(draw, properties[name], document, depth - 1) for name in kept}
    if kind == "array":
        return [fitting(draw, schema.get("items", {}), document, depth - 1) for _ in range(draw.randrange(3))]
    if kind in ("integer", "number"):
        least = schema.get("minimum", schema.get("exclusiveMinimum", -2))
        value = draw.choice([least, least + 1, schema.get("maximum", 5), draw.uniform(0, 2)])
        return int(value) if kind == "integer" else value
    if kind == "boolean":
        return draw.random() < 0.5
    if kind == "null":
        return None
    return draw.choice(["Hello.", "", "5", misfit_text(draw)])
