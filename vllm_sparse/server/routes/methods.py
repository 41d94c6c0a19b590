"""``/v1/sparse/methods``: what requests may ask for, with ranges and this server's defaults, as JSON schema."""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter, Response

from vllm_sparse.config.names import DENSE, METHODS, PHASES, former_keys, knob_schema
from vllm_sparse.config.request import configured_method
from vllm_sparse.config.settings import ServerConfig
from vllm_sparse.methods.method import Method
from vllm_sparse.server.routes.served import ServedSparsely
from vllm_sparse.server.runtime_config import running_config

router = APIRouter(prefix="/v1/sparse", tags=["sparse attention"])

DIALECT = "https://json-schema.org/draft/2020-12/schema"
# Keywords of a knob's schema that say what a value may be.
CONSTRAINTS = ("type", "enum", "items", "minimum", "exclusiveMinimum", "maximum", "multipleOf")


@router.get("/methods")
def read_methods(served: ServedSparsely, response: Response) -> dict[str, Any]:
    """Methods of both phases with their knobs, and a JSON schema of a request's ``vllm_xargs``."""
    running = running_config(served.start)
    response.headers["ETag"] = running.etag
    return {
        "version": running.version,
        **{phase: _phase(phase, running.config) for phase in PHASES},
        "vllm_xargs": extras_schema(running.config),
    }


def _phase(phase: str, config: ServerConfig) -> dict[str, Any]:
    """A phase's default method, and what each method is and takes."""
    methods = {
        name: {
            "description": _summary(PHASES[phase][name]),
            "knobs": request_knobs(phase, name, config),
        }
        for name in enabled(phase, config)
    }
    return {"default": config.default_method(phase), "methods": methods}


def enabled(phase: str, config: ServerConfig) -> list[str]:
    """Methods of a phase that requests may choose beside dense."""
    return [name for name in PHASES[phase] if name in config.methods]


def _summary(method: type[Method]) -> str:
    """The first paragraph of a method's description, as plain text."""
    paragraph = (method.__doc__ or "").strip().partition("\n\n")[0]
    return re.sub(r"\s+", " ", paragraph).replace("`", "")


def request_knobs(phase: str, name: str, config: ServerConfig) -> dict[str, dict[str, Any]]:
    """JSON schema of each knob that a request may set, by its key in ``vllm_xargs``, with the server's default.

    Args:
        phase: ``prefill`` or ``decode``.
        name: of the method.
        config: the server's configuration.
    """
    method = configured_method(config, phase, name)
    knobs: dict[str, dict[str, Any]] = {}
    for knob, schema in knob_schema(phase, name).items():
        if knob in method.server_knobs:
            continue
        # A request cannot say null, which leaves the choice to the method: it leaves the knob out.
        constraints = {**schema, **next(iter(schema.get("anyOf", ())), {})}
        flat = {"description": schema["description"]}
        flat |= {keyword: constraints[keyword] for keyword in CONSTRAINTS if keyword in constraints}
        if getattr(method, knob) is not None:
            flat["default"] = getattr(method, knob)
        knobs[f"{name}_{knob}"] = flat
    return knobs


def extras_schema(config: ServerConfig) -> dict[str, Any]:
    """A JSON schema that a request's ``vllm_xargs`` have to meet; keys of other plugins pass.

    It does not say what several knobs have to meet together, such as a budget that holds the tokens always read, nor
    what depends on the model's depth.
    """
    properties: dict[str, Any] = {
        f"sparse_{phase}": {
            "description": f"method of {what}",
            "enum": [DENSE, *enabled(phase, config)],
            "default": config.default_method(phase),
        }
        for phase, what in (("prefill", "the prompt"), ("decode", "the generation"))
    }
    properties["sparse_min_tokens"] = {
        "description": "contexts of fewer tokens run dense",
        "type": "integer",
        "minimum": 0,
        "default": config.min_tokens,
    }
    properties["sparse_min_recall"] = {
        "description": "share of the attention mass that lists have to keep; where a sampled row keeps less, the "
        "request's layer goes dense; 0 checks nothing",
        "type": "number",
        "minimum": 0,
        "maximum": 1,
        "default": config.min_recall,
    }
    uses: dict[str, Any] = {}
    replaced: dict[str, Any] = {}
    users: dict[str, list[dict[str, str]]] = {}
    for phase in PHASES:
        for name in enabled(phase, config):
            chosen: dict[str, Any] = {"properties": {f"sparse_{phase}": {"const": name}}}
            if config.default_method(phase) != name:
                chosen["required"] = [f"sparse_{phase}"]
            uses[f"{phase}_{name}"] = chosen
            knobs = request_knobs(phase, name, config)
            for former, present in former_keys(phase, name).items():
                if present in knobs:
                    constraints = {
                        keyword: value for keyword, value in knobs[present].items() if keyword in CONSTRAINTS
                    }
                    description = f"former name of {present}, accepted for one release"
                    knobs[former] = {"description": description, "deprecated": True, **constraints}
                    replaced[former] = {"not": {"required": [present]}}
            for key, schema in knobs.items():
                properties.setdefault(key, schema)
                users.setdefault(key, []).append({"$ref": f"#/$defs/{phase}_{name}"})
    return {
        "$schema": DIALECT,
        "type": "object",
        "properties": properties,
        # A knob needs its method, named by the request or the server's default; its former name excludes the present.
        "dependentSchemas": {key: {"anyOf": phases, **replaced.get(key, {})} for key, phases in users.items()},
        "propertyNames": {"anyOf": [{"enum": list(properties)}, {"not": {"pattern": _own_key_pattern()}}]},
        "$defs": uses,
    }


def _own_key_pattern() -> str:
    """Keys meant for this plugin, as `vllm_sparse.config.names.is_sparse_key` knows them, in JavaScript's regular
    expressions, which have no switch for upper and lower case."""

    def any_case(word: str) -> str:
        return "".join(f"[{letter}{letter.upper()}]" if letter.isalpha() else letter for letter in word)

    return f"^({any_case('sparse')}|({'|'.join(map(any_case, METHODS))})(?![a-z]))"
