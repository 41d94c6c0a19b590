"""Sampling extras of a request and the server's configuration: validation, defaults, resolution.

Extras are flat (`vllm_xargs` takes scalars and lists): ``sparse_prefill``, ``sparse_decode``, ``sparse_min_tokens``
and ``<method>_<knob>``. The server's configuration is the ``"sparse"`` object of ``--additional-config``. Knobs,
their ranges and their defaults stand in the method's own file. Where one name is a method of both phases, a knob sets
that of each phase which has it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from vllm_sparse.methods.base import DecodeMethod, KnobError, PrefillMethod
from vllm_sparse.methods.registry import DECODE_METHODS, PREFILL_METHODS, SUMMARISING_METHODS

DENSE = "dense"
PHASES: dict[str, Mapping[str, type[PrefillMethod] | type[DecodeMethod]]] = {
    "prefill": PREFILL_METHODS,
    "decode": DECODE_METHODS,
}
# Names of methods, each once; one name may be a method of both phases.
METHODS = tuple(dict.fromkeys(name for methods in PHASES.values() for name in methods))

REQUEST_KEYS = ("sparse_prefill", "sparse_decode", "sparse_min_tokens")

_OWN_KEY = re.compile(rf"(?i:sparse|(?:{'|'.join(METHODS)})(?-i:(?![a-z])))")

# Where admission leaves the resolved parameters for the workers. Clients cannot send it: unknown sparse_* keys are
# refused.
RESOLVED_KEY = "sparse_resolved"
# Part of the prefix-cache salt of sparse requests; clients may not use it in theirs.
SALT_MARK = "|sparse:"
# Raise when the same knobs begin to choose other pages, so that cached blocks of the older choice are not reused.
SELECTION_VERSION = 1


class SparseParamsError(ValueError):
    """A request's sparse settings are wrong. The message names the key, the value and what is allowed.

    Attributes:
        key: the offending key.
        value: its value.
    """

    def __init__(self, key: str, value: object, message: str) -> None:
        super().__init__(message)
        self.key = key
        self.value = value


class ServerConfig(BaseModel):
    """The ``"sparse"`` object of ``--additional-config``.

    Attributes:
        prefill: method of requests that name none.
        decode: likewise for decoding.
        methods: methods that requests may choose; by default those that need no memory beside the KV cache.
        min_tokens: contexts shorter than this run dense, unless the request says otherwise.
        decode_in_batches: on a GPU, serve the sparse decode rows of a step at once, inside CUDA graphs; false saves
            their memory and start-up time, and serves one request after the other between PIECEWISE graphs.
        decode_list_tokens: tokens of the longest decode list that a GPU server keeps room for and CUDA graphs hold;
            requests that read more decode without them.
        timing_interval_steps: in one of so many steps with sparse rows, selection and attention are timed; 0: never.
        recall_interval_steps: in one of so many with sparse rows of a phase, the recall of one row in one layer is
            measured; 0: never.
        flexprefill, sale, dhsa, hip, tidal, blocktopk: default knobs of a method, each an object that
            serves all its phases.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prefill: str = DENSE
    decode: str = DENSE
    methods: tuple[str, ...] = Field(
        default=tuple(method for method in METHODS if method not in SUMMARISING_METHODS), strict=False
    )
    min_tokens: int = Field(default=8192, ge=0)
    decode_in_batches: bool = True
    decode_list_tokens: int = Field(default=4352, ge=16, le=1 << 24)
    timing_interval_steps: int = Field(default=100, ge=0)
    recall_interval_steps: int = Field(default=200, ge=0)
    flexprefill: dict[str, Any] = {}
    sale: dict[str, Any] = {}
    dhsa: dict[str, Any] = {}
    hip: dict[str, Any] = {}
    tidal: dict[str, Any] = {}
    blocktopk: dict[str, Any] = {}

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        for method in methods:
            if method not in METHODS:
                raise ValueError(f"{method!r} is no method; there are {', '.join(METHODS)}")
        return methods


@dataclasses.dataclass(frozen=True)
class SparseParams:
    """What one request runs: resolved, defaults applied.

    Attributes:
        prefill: method of its prompt, or None for dense.
        decode: method of its generation, or None for dense.
        min_tokens: contexts shorter than this run dense.
    """

    prefill: PrefillMethod | None = None
    decode: DecodeMethod | None = None
    min_tokens: int = 0

    @property
    def is_dense(self) -> bool:
        """Nothing of the request is sparse."""
        return self.prefill is None and self.decode is None

    def serialize(self) -> str:
        """Canonical JSON: equal parameters give equal text."""
        fields: dict[str, Any] = {"min_tokens": self.min_tokens}
        for phase, method in (("prefill", self.prefill), ("decode", self.decode)):
            if method is not None:
                fields[phase] = [method.name, dataclasses.asdict(method)]  # type: ignore[call-overload]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    def cache_salt(self, user_salt: str | None) -> str | None:
        """Prefix-cache salt: the user's own for a dense request, else one that only equal settings share.

        Covers both phases: blocks written while decoding are cached too. Covers what files hold that settings name.
        """
        if self.is_dense:
            return user_salt
        fingerprints = [method.fingerprint for method in (self.prefill, self.decode) if method is not None]
        identity = "".join([self.serialize(), *fingerprints])
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return f"{user_salt or ''}{SALT_MARK}{SELECTION_VERSION}:{digest}"


ALL_DENSE = SparseParams()


@lru_cache(maxsize=1024)
def deserialize(text: str) -> SparseParams:
    """Inverse of `SparseParams.serialize`. Cached: a worker sees few distinct settings."""
    fields = json.loads(text)
    methods: dict[str, Any] = {}
    for phase, known in PHASES.items():
        if phase in fields:
            name, knobs = fields[phase]
            methods[phase] = known[name](**knobs)
    return SparseParams(min_tokens=fields["min_tokens"], **methods)


def parse_server_config(additional_config: object, num_layers: int, num_query_heads: int) -> ServerConfig:
    """Read and check the server's configuration.

    Args:
        additional_config: vLLM's ``additional_config``; other keys than ``"sparse"`` belong to others.
        num_layers: attention layers of the model.
        num_query_heads: query heads of the model, those of all processes.

    Raises:
        ValueError: with the setting, what was given and what is allowed.
    """
    settings = additional_config.get("sparse", {}) if isinstance(additional_config, Mapping) else {}
    try:
        return check_settings(settings, num_layers, num_query_heads)
    except ValueError as error:
        raise ValueError(f"--additional-config: {error}") from error


def check_settings(settings: object, num_layers: int, num_query_heads: int) -> ServerConfig:
    """Check a ``"sparse"`` object; arguments and errors otherwise as in `parse_server_config`.

    Args:
        settings: the object.
        num_layers: attention layers of the model.
        num_query_heads: query heads of the model.
    """
    try:
        config = ServerConfig.model_validate(settings)
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(["sparse", *(str(part) for part in detail["loc"])])
        allowed = f"; there are {', '.join(ServerConfig.model_fields)}" if detail["type"] == "extra_forbidden" else ""
        raise ValueError(f"{key} is {detail.get('input')!r}: {detail['msg']}{allowed}") from error
    for name in METHODS:
        # Knobs in the configuration are checked as a request's would be, whether or not the method is a default.
        try:
            for knob, value in getattr(config, name).items():
                if not _phases_with(name, knob):
                    key = f"{name}_{knob}"
                    raise SparseParamsError(key, value, f"{key} is no knob; there are {_listed(name)}")
            for phase in _phases_of(name):
                configured_method(config, phase, name).check_defaults(num_layers, num_query_heads)
        except (SparseParamsError, KnobError) as error:
            named = _knob_error(name, error) if isinstance(error, KnobError) else error
            raise ValueError(f"object sparse.{name}: {named}") from error
    try:
        resolve({}, config, num_layers)
    except SparseParamsError as error:
        raise ValueError(f"object sparse: {error}") from error
    return config


def resolve(extras: Mapping[str, Any], config: ServerConfig, num_layers: int) -> SparseParams:
    """Resolve a request's sampling extras against the server's configuration.

    Args:
        extras: the request's ``vllm_xargs``; keys without a prefix of ours belong to others and are left alone.
        config: the server's configuration.
        num_layers: attention layers of the model.

    Raises:
        SparseParamsError: unknown method or knob, a knob of a method that is not chosen, wrong type, out of range.
    """
    chosen = {phase: _method_name(phase, extras, config) for phase in PHASES}
    knobs: dict[str, dict[str, Any]] = {phase: {} for phase in PHASES}
    for key, value in extras.items():
        if not is_sparse_key(key) or key in REQUEST_KEYS:
            continue
        name, _, knob = key.partition("_")
        if name not in METHODS:
            raise SparseParamsError(
                key,
                value,
                f"{key} is no setting; there are {', '.join(REQUEST_KEYS)} and the knobs of the chosen methods "
                f"({', '.join(f'{method}_...' for method in METHODS)})",
            )
        having = _phases_with(name, knob)
        if not having:
            raise SparseParamsError(
                key,
                value,
                f"{key} is no knob; a request chooses {name} by {_choices(name, _phases_of(name))} and may set "
                f"{_listed(name, of_requests=True)}",
            )
        if not any(_is_request_knob(phase, name, knob) for phase in having):
            raise SparseParamsError(
                key,
                value,
                f"{key} is a setting of the server (--additional-config, object sparse.{name}); a request may set "
                f"{_listed(name, of_requests=True)}",
            )
        using = [phase for phase in having if chosen[phase] == name]
        if not using:
            used_for = "" if having == _phases_of(name) else f" for {' or '.join(having)}"
            raise SparseParamsError(
                key,
                value,
                f"{key} is a knob of {name}{used_for}, which this request does not use; "
                f"add {_choices(name, having)} or drop the knob",
            )
        for phase in using:
            knobs[phase][knob] = value
    min_tokens = extras.get("sparse_min_tokens", config.min_tokens)
    if not isinstance(min_tokens, int) or isinstance(min_tokens, bool) or min_tokens < 0:
        raise SparseParamsError(
            "sparse_min_tokens",
            min_tokens,
            f"sparse_min_tokens is {min_tokens!r}; an integer of 0 or more is allowed (tokens of context)",
        )
    methods: dict[str, Any] = {
        phase: _build(phase, name, config, knobs[phase]) for phase, name in chosen.items() if name != DENSE
    }
    params = SparseParams(min_tokens=min_tokens, **methods)
    if params.decode is not None:
        try:
            roles = params.decode.layer_roles(num_layers)
        except KnobError as error:
            raise _knob_error(params.decode.name, error) from error
        if set(roles) == {DENSE}:
            params = dataclasses.replace(params, decode=None)
    if params.prefill is not None and (params.prefill.exactly_dense or params.prefill.dense_layers >= num_layers):
        params = dataclasses.replace(params, prefill=None)
    return ALL_DENSE if params.is_dense else params


def configured_method(config: ServerConfig, phase: str, name: str) -> PrefillMethod | DecodeMethod:
    """A phase's method with the knobs that the server's configuration gives it."""
    return _build(phase, name, config, {})


def is_sparse_key(key: str) -> bool:
    """Whether a sampling extra is meant for this plugin.

    Misspelt ones such as ``sparse-decode`` and ``tidalBudget`` are; words that only begin like a method, such as
    ``hipster``, are not.
    """
    return _OWN_KEY.match(key) is not None


def _knob_error(name: str, error: KnobError) -> SparseParamsError:
    key = f"{name}_{error.knob}"
    return SparseParamsError(key, error.value, f"{key} is {error.value!r}; {error}")


def _method_name(phase: str, extras: Mapping[str, Any], config: ServerConfig) -> str:
    """The method that a request uses in a phase, or `DENSE`."""
    key = f"sparse_{phase}"
    name = extras.get(key, getattr(config, phase))
    known = PHASES[phase]
    enabled = [DENSE, *(method for method in known if method in config.methods)]
    if isinstance(name, str) and name in enabled:
        return name
    hint = ""
    if isinstance(name, str) and name in METHODS:
        if name in known:
            hint = ' (this server\'s configuration does not enable it; its "methods" list those that it does)'
        else:
            hint = f" (it is a method of {' and '.join(f'sparse_{other}' for other in _phases_of(name))})"
    raise SparseParamsError(key, name, f"{key} is {name!r}{hint}; allowed are {', '.join(enabled)}")


def _phases_of(name: str) -> list[str]:
    """Phases for which there is a method of this name."""
    return [phase for phase, known in PHASES.items() if name in known]


def _phases_with(name: str, knob: str) -> list[str]:
    """Phases whose method of this name has a knob."""
    return [phase for phase in _phases_of(name) if knob in knob_schema(phase, name)]


def _is_request_knob(phase: str, name: str, knob: str) -> bool:
    return knob not in PHASES[phase][name].server_knobs


def _choices(name: str, phases: list[str]) -> str:
    """How a request chooses a method, in one of some phases."""
    return " or ".join(f'"sparse_{phase}": "{name}"' for phase in phases)


def _listed(name: str, of_requests: bool = False) -> str:
    """Knobs of a method, those that only one of its phases has with the phase.

    Args:
        name: of the method.
        of_requests: leave out those that only the server may set.
    """
    phases = _phases_of(name)
    having: dict[str, list[str]] = {}
    for phase in phases:
        for knob in knob_schema(phase, name):
            if not of_requests or _is_request_knob(phase, name, knob):
                having.setdefault(knob, []).append(phase)
    return ", ".join(
        f"{name}_{knob}" + ("" if holders == phases else f" ({' and '.join(holders)})")
        for knob, holders in having.items()
    )


def _build(phase: str, name: str, config: ServerConfig, requested: Mapping[str, Any]) -> PrefillMethod | DecodeMethod:
    """Construct a phase's method from its configured and requested knobs; the requested ones win."""
    schema = knob_schema(phase, name)
    configured = {knob: value for knob, value in getattr(config, name).items() if knob in schema}
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
            raise _knob_error(name, detail["ctx"]["error"]) from error
        knob = str(detail["loc"][0])
        key = f"{name}_{knob}"
        raise SparseParamsError(
            key, knobs[knob], f"{key} is {knobs[knob]!r}; {_allowed(schema[knob])} is allowed"
        ) from error


@lru_cache
def knob_schema(phase: str, name: str) -> dict[str, dict[str, Any]]:
    """JSON schema of each knob of a phase's method, its default included."""
    properties: dict[str, dict[str, Any]] = TypeAdapter(PHASES[phase][name]).json_schema()["properties"]
    return properties


def _allowed(schema: Mapping[str, Any]) -> str:
    """A knob's JSON schema in words."""
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
    return " ".join([text, " and ".join(bounds)]).strip() + f" ({schema.get('description', '')})"
