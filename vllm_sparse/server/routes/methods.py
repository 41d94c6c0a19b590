"""``/v1/sparse/methods``: what requests may ask for, with ranges and this server's defaults, as JSON schema; presets
with what they pick."""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter, Response

from vllm_sparse.config.names import DENSE, METHODS, PHASES, UNPROFITABLE, former_keys, knob_schema
from vllm_sparse.config.presets import PRESETS, Preset, Tier
from vllm_sparse.config.request import configured_method
from vllm_sparse.config.settings import ServerConfig
from vllm_sparse.methods.method import Method
from vllm_sparse.server.limits import limit_of_knob
from vllm_sparse.server.routes.served import ServedSparsely
from vllm_sparse.server.runtime_config import running_config

router = APIRouter(prefix="/v1/sparse", tags=["sparse attention"])

DIALECT = "https://json-schema.org/draft/2020-12/schema"
# Keywords of a knob's schema that say what a value may be.
CONSTRAINTS = ("type", "enum", "items", "maxItems", "minimum", "exclusiveMinimum", "maximum", "multipleOf")


@router.get("/methods")
def read_methods(served: ServedSparsely, response: Response) -> dict[str, Any]:
    """Which layers may be sparse, presets, methods of both phases with their knobs, and a JSON schema of a request's
    ``vllm_xargs``."""
    running = running_config(served.start)
    response.headers["ETag"] = running.etag
    return {
        "version": running.version,
        "layers": list(served.layers),
        "preset": {
            "default": running.config.preset,
            "presets": {name: described(preset, running.config) for name, preset in PRESETS.items()},
        },
        **{phase: _phase(phase, running.config) for phase in PHASES},
        "vllm_xargs": extras_schema(running.config),
    }


def described(preset: Preset, config: ServerConfig) -> dict[str, Any]:
    """What a preset is for, what was measured of it, and what prompts of each length get by it.

    ``methods_not_enabled`` are those that it needs in each phase and this server does not enable: requests can use the
    preset only if they name a method for such a phase themselves.
    """
    return {
        "description": preset.description,
        "quality": preset.quality,
        "tiers": [
            {"from_prompt_tokens": tier.from_tokens, "vllm_xargs": tier.extras()} for tier in (Tier(0), *preset.tiers)
        ],
        "methods_not_enabled": {
            phase: [name for name in preset.methods(phase) if name not in config.methods] for phase in PHASES
        },
    }


def _phase(phase: str, config: ServerConfig) -> dict[str, Any]:
    """A phase's default method, None where the default preset chooses it, and what each method is and takes."""
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
        _, allowed = limit_of_knob(name, knob, config)
        constraints |= allowed
        flat |= {keyword: constraints[keyword] for keyword in CONSTRAINTS if keyword in constraints}
        if getattr(method, knob) is not None:
            flat["default"] = getattr(method, knob)
        knobs[f"{name}_{knob}"] = flat
    return knobs


def extras_schema(config: ServerConfig) -> dict[str, Any]:
    """A JSON schema that a request's ``vllm_xargs`` have to meet; keys of other plugins pass.

    It does not say what several knobs have to meet together, such as a budget that holds the tokens always read, nor
    what depends on the model's depth, on memory or on what kernels were compiled.
    """
    properties: dict[str, Any] = {
        "sparse_preset": {
            "description": "methods and knobs of both phases by the prompt's length; what else is set wins over it",
            "enum": [DENSE, *PRESETS],
            "default": config.preset,
        }
    }
    for phase, what in (("prefill", "the prompt"), ("decode", "the generation")):
        method = config.default_method(phase)
        properties[f"sparse_{phase}"] = {
            "description": f"method of {what}",
            "enum": [DENSE, *enabled(phase, config)],
            # Without one, the default preset chooses.
            **({} if method is None else {"default": method}),
        }
    properties["sparse_min_tokens"] = {
        "description": "contexts of fewer tokens run dense",
        "type": "integer",
        "minimum": 0,
        "maximum": max(config.limits.min_tokens, config.min_tokens),
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
    properties["sparse_unprofitable"] = {
        "description": "what runs where the costs of the server's GPU say that sparse attention would take longer",
        "enum": list(UNPROFITABLE),
        "default": config.unprofitable,
    }
    uses: dict[str, Any] = {}
    replaced: dict[str, Any] = {}
    users: dict[str, list[dict[str, str]]] = {}
    for phase in PHASES:
        for name in enabled(phase, config):
            uses[f"{phase}_{name}"] = _uses(phase, name, config)
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
    # A preset needs its methods, or others in their place.
    replacements = [
        {
            "if": {"properties": {"sparse_preset": {"const": name}}, "required": ["sparse_preset"]},
            "then": {"required": [f"sparse_{phase}"]},
        }
        for name, preset in PRESETS.items()
        for phase in PHASES
        if not set(preset.methods(phase)) <= set(config.methods)
    ]
    return {
        "$schema": DIALECT,
        "type": "object",
        "properties": properties,
        # A knob needs its method, named by the request or the server, or chosen by a preset; its former name excludes
        # the present.
        "dependentSchemas": {key: {"anyOf": phases, **replaced.get(key, {})} for key, phases in users.items()},
        "propertyNames": {"anyOf": [{"enum": list(properties)}, {"not": {"pattern": _own_key_pattern()}}]},
        **({"allOf": replacements} if replacements else {}),
        "$defs": uses,
    }


def _uses(phase: str, name: str, config: ServerConfig) -> dict[str, Any]:
    """A JSON schema of extras with which a request uses a method in a phase, at some length of its prompt."""
    key = f"sparse_{phase}"
    presets = [preset for preset, content in PRESETS.items() if name in content.methods(phase)]
    default = config.default_method(phase)
    is_default = config.preset in presets if default is None else default == name
    by_preset: dict[str, Any] = {"properties": {key: False, "sparse_preset": {"enum": presets} if presets else False}}
    if not is_default:
        by_preset["required"] = ["sparse_preset"]
    return {"anyOf": [{"properties": {key: {"const": name}}, "required": [key]}, by_preset]}


def _own_key_pattern() -> str:
    """Keys meant for this plugin, as `vllm_sparse.config.names.is_sparse_key` knows them, in JavaScript's regular
    expressions, which have no switch for upper and lower case."""

    def any_case(word: str) -> str:
        return "".join(f"[{letter}{letter.upper()}]" if letter.isalpha() else letter for letter in word)

    return f"^({any_case('sparse')}|({'|'.join(map(any_case, METHODS))})(?![a-z]))"
