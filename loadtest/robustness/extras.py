"""Random sampling extras that a server takes: methods, knobs and their ranges come from the registry's schemas."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

from vllm_sparse.config.messages import SparseParamsError
from vllm_sparse.config.names import DENSE, PHASES, knob_schema, split_key
from vllm_sparse.config.request import resolve_by_length
from vllm_sparse.config.settings import ServerConfig
from vllm_sparse.server.routes.methods import enabled, request_knobs

# Less than most prompts here have, so that lists leave keys out.
MOST_TOKENS = 1024
DENSE_SHARE, KNOB_SHARE, GUARD_SHARE = 0.4, 0.6, 0.05


def random_extras(draw: random.Random, config: ServerConfig, num_layers: int) -> dict[str, Any]:
    """Extras of a request, each of its phases dense or with a method whose knobs are partly set.

    Args:
        draw: gives all choices.
        config: of the server.
        num_layers: of the model.
    """
    extras: dict[str, Any] = {"sparse_min_tokens": draw.choice([0, 0, 0, 256, 1000])}
    if draw.random() < GUARD_SHARE:
        extras["sparse_min_recall"] = draw.random()
    known_kernels = config.limits.new_kernels == "none"
    for phase in PHASES:
        name = DENSE if draw.random() < DENSE_SHARE else draw.choice(enabled(phase, config))
        extras[f"sparse_{phase}"] = name
        for key, schema in request_knobs(phase, name, config).items() if name != DENSE else ():
            if draw.random() > KNOB_SHARE or (known_kernels and compiles(phase, key)):
                continue
            # As many dense layers as the model has would leave nothing sparse.
            layers = {"maximum": num_layers // 2} if key.endswith("_dense_layers") else {}
            tried = {**extras, key: random_value(draw, {**schema, **layers}, num_layers)}
            # What knobs have to meet together no schema says.
            if not is_refused(tried, config, num_layers):
                extras = tried
    return extras


def compiles(phase: str, key: str) -> bool:
    """Whether another value of a knob wants kernels of its own on a GPU."""
    name, knob = split_key(key)
    return bool(knob_schema(phase, name)[knob].get("compiles"))


def random_value(draw: random.Random, schema: Mapping[str, Any], num_layers: int) -> Any:
    """A value that a knob's schema allows; small numbers of tokens and large ones are equally likely."""
    if "enum" in schema:
        return draw.choice(schema["enum"])
    kind = schema["type"]
    if kind == "boolean":
        return draw.random() < 0.5
    if kind == "array":
        return sorted({draw.choice([draw.randrange(num_layers), 1 << draw.randrange(3, 11)]) for _ in range(3)})
    least = schema.get("minimum", schema.get("exclusiveMinimum", 0))
    if kind == "number":
        return draw.uniform(least, min(schema.get("maximum", 1.0), 1.0)) or 0.5
    most = min(schema.get("maximum", MOST_TOKENS), MOST_TOKENS)
    value = round(math.exp(draw.uniform(math.log(max(least, 1)), math.log(max(most, 1)))))
    step = schema.get("multipleOf", 1)
    return max(least, value // step * step)


def is_refused(extras: Mapping[str, Any], config: ServerConfig, num_layers: int) -> bool:
    """Whether a server would refuse the extras."""
    try:
        resolve_by_length(extras, config, num_layers)
    except SparseParamsError:
        return True
    return False
