"""Settings of a request: what its sampling extras and the server's defaults together ask for.

Extras are flat (`vllm_xargs` takes scalars and lists): ``sparse_prefill``, ``sparse_decode``, ``sparse_min_tokens``,
``sparse_min_recall`` and ``<method>_<knob>``. Knobs, their ranges and their defaults stand in the method's own file.
Where one name is a method of both phases, a knob sets that of each phase which has it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from vllm_sparse.config.former_names import present_extras
from vllm_sparse.config.messages import SparseParamsError, allowed_values, how_to_choose, knob_error, knob_list
from vllm_sparse.config.names import (
    DENSE,
    METHODS,
    PHASES,
    REQUEST_KEYS,
    is_request_knob,
    is_sparse_key,
    knob_schema,
    phases_of,
    phases_with,
    split_key,
)
from vllm_sparse.config.settings import ServerConfig
from vllm_sparse.methods.decode import DecodeMethod
from vllm_sparse.methods.knobs import KnobError
from vllm_sparse.methods.prefill import PrefillMethod

# Where admission leaves the resolved parameters for the workers. Clients cannot send it: unknown sparse_* keys are
# refused.
RESOLVED_KEY = "sparse_resolved"


@dataclasses.dataclass(frozen=True)
class SparseParams:
    """What one request runs: resolved, defaults applied.

    Attributes:
        prefill: method of its prompt, or None for dense.
        decode: method of its generation, or None for dense.
        min_tokens: contexts shorter than this run dense.
        min_recall: layers whose lists keep a smaller share of the attention mass go dense; 0: nothing is checked.
    """

    prefill: PrefillMethod | None = None
    decode: DecodeMethod | None = None
    min_tokens: int = 0
    min_recall: float = 0.0

    @property
    def is_dense(self) -> bool:
        """Nothing of the request is sparse."""
        return self.prefill is None and self.decode is None

    def serialize(self) -> str:
        """Canonical JSON: equal parameters give equal text."""
        fields: dict[str, Any] = {"min_tokens": self.min_tokens, "min_recall": self.min_recall}
        for phase, method in (("prefill", self.prefill), ("decode", self.decode)):
            if method is not None:
                fields[phase] = [method.name, dataclasses.asdict(method)]  # type: ignore[call-overload]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))


ALL_DENSE = SparseParams()


@lru_cache(maxsize=1024)
def deserialize(text: str) -> SparseParams:
    """Inverse of `SparseParams.serialize`; cached, because a worker sees few distinct settings."""
    fields = json.loads(text)
    methods: dict[str, Any] = {}
    for phase, known in PHASES.items():
        if phase in fields:
            name, knobs = fields[phase]
            methods[phase] = known[name](**knobs)
    return SparseParams(min_tokens=fields["min_tokens"], min_recall=fields["min_recall"], **methods)


def resolve(extras: Mapping[str, Any], config: ServerConfig, num_layers: int) -> SparseParams:
    """Resolve a request's sampling extras against the server's configuration.

    Args:
        extras: the request's ``vllm_xargs``; keys without a prefix of ours belong to others and are left alone.
        config: the server's configuration.
        num_layers: attention layers of the model.

    Raises:
        SparseParamsError: unknown method or knob, a knob of a method that is not chosen, wrong type, out of range, or
            a knob under its former and its present name.
    """
    extras, former = present_extras(extras)
    try:
        return _resolve(extras, config, num_layers)
    except SparseParamsError as error:
        if error.key not in former:
            raise
        key = former[error.key]
        raise SparseParamsError(key, error.value, f"{key} is the former name of {error.key}: {error}") from error


def _resolve(extras: Mapping[str, Any], config: ServerConfig, num_layers: int) -> SparseParams:
    """Resolve extras whose knobs have their present names."""
    chosen = {phase: _method_name(phase, extras, config) for phase in PHASES}
    knobs: dict[str, dict[str, Any]] = {phase: {} for phase in PHASES}
    for key, value in extras.items():
        if not is_sparse_key(key) or key in REQUEST_KEYS:
            continue
        knob, using = _knob_of(key, value, chosen)
        for phase in using:
            knobs[phase][knob] = value
    min_tokens = extras.get("sparse_min_tokens", config.min_tokens)
    if not isinstance(min_tokens, int) or isinstance(min_tokens, bool) or min_tokens < 0:
        raise SparseParamsError(
            "sparse_min_tokens",
            min_tokens,
            f"sparse_min_tokens is {min_tokens!r}; an integer of 0 or more is allowed (tokens of context)",
        )
    min_recall = extras.get("sparse_min_recall", config.min_recall)
    if not isinstance(min_recall, int | float) or isinstance(min_recall, bool) or not 0 <= min_recall <= 1:
        raise SparseParamsError(
            "sparse_min_recall",
            min_recall,
            f"sparse_min_recall is {min_recall!r}; a number from 0 to 1 is allowed (share of the attention mass that "
            "lists have to keep; 0 checks nothing)",
        )
    methods: dict[str, Any] = {
        phase: _build(phase, name, config, knobs[phase]) for phase, name in chosen.items() if name != DENSE
    }
    params = SparseParams(min_tokens=min_tokens, min_recall=float(min_recall), **methods)
    if params.decode is not None:
        try:
            roles = params.decode.layer_roles(num_layers)
        except KnobError as error:
            raise knob_error(params.decode.name, error) from error
        if set(roles) == {DENSE}:
            params = dataclasses.replace(params, decode=None)
    if params.prefill is not None and (params.prefill.exactly_dense or params.prefill.dense_layers >= num_layers):
        params = dataclasses.replace(params, prefill=None)
    return ALL_DENSE if params.is_dense else params


def _knob_of(key: str, value: Any, chosen: Mapping[str, str]) -> tuple[str, list[str]]:
    """The knob that a request key sets, and the phases whose chosen method has it.

    Args:
        key: of the request.
        value: its value, for messages.
        chosen: the request's method in each phase.

    Raises:
        SparseParamsError: there is no such knob, a request may not set it, or its method is not chosen.
    """
    name, knob = split_key(key)
    if not name:
        raise SparseParamsError(
            key,
            value,
            f"{key} is no setting; there are {', '.join(REQUEST_KEYS)} and the knobs of the chosen methods "
            f"({', '.join(f'{method}_...' for method in METHODS)})",
        )
    having = phases_with(name, knob)
    if not having:
        raise SparseParamsError(
            key,
            value,
            f"{key} is no knob; a request chooses {name} by {how_to_choose(name, phases_of(name))} and may set "
            f"{knob_list(name, of_requests=True)}",
        )
    if not any(is_request_knob(phase, name, knob) for phase in having):
        raise SparseParamsError(
            key,
            value,
            f"{key} is a setting of the server (--additional-config, object sparse.{name}); a request may set "
            f"{knob_list(name, of_requests=True)}",
        )
    using = [phase for phase in having if chosen[phase] == name]
    if not using:
        used_for = "" if having == phases_of(name) else f" for {' or '.join(having)}"
        raise SparseParamsError(
            key,
            value,
            f"{key} is a knob of {name}{used_for}, which this request does not use; "
            f"add {how_to_choose(name, having)} or drop the knob",
        )
    return knob, using


def configured_method(config: ServerConfig, phase: str, name: str) -> PrefillMethod | DecodeMethod:
    """A phase's method with the knobs that the server's configuration gives it."""
    return _build(phase, name, config, {})


def _method_name(phase: str, extras: Mapping[str, Any], config: ServerConfig) -> str:
    """The method that a request uses in a phase, or `DENSE`."""
    key = f"sparse_{phase}"
    name = extras.get(key, config.default_method(phase))
    known = PHASES[phase]
    enabled = [DENSE, *(method for method in known if method in config.methods)]
    if isinstance(name, str) and name in enabled:
        return name
    hint = ""
    if isinstance(name, str) and name in METHODS:
        if name in known:
            hint = ' (this server\'s configuration does not enable it; its "methods" list those that it does)'
        else:
            hint = f" (it is a method of {' and '.join(f'sparse_{other}' for other in phases_of(name))})"
    raise SparseParamsError(key, name, f"{key} is {name!r}{hint}; allowed are {', '.join(enabled)}")


def _build(phase: str, name: str, config: ServerConfig, requested: Mapping[str, Any]) -> PrefillMethod | DecodeMethod:
    """Construct a phase's method from its configured and requested knobs; the requested ones win."""
    schema = knob_schema(phase, name)
    configured = {knob: value for knob, value in config.knobs(name).items() if knob in schema}
    knobs = {**configured, **requested}
    for knob, value in knobs.items():
        # vLLM turns JSON's true into 1 before a plugin sees it.
        if schema[knob].get("type") == "boolean" and type(value) is int and value in (0, 1):
            knobs[knob] = bool(value)
    try:
        return PHASES[phase][name](**knobs)
    except ValidationError as error:
        detail = error.errors()[0]
        if not detail["loc"]:
            raise knob_error(name, detail["ctx"]["error"]) from error
        knob = str(detail["loc"][0])
        key = f"{name}_{knob}"
        raise SparseParamsError(
            key, knobs[knob], f"{key} is {knobs[knob]!r}; {allowed_values(schema[knob])} is allowed"
        ) from error
