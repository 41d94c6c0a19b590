"""Settings of a request: what its sampling extras and the server's defaults together ask for.

Extras are flat (`vllm_xargs` takes scalars and lists): ``sparse_preset``, ``sparse_prefill``, ``sparse_decode``,
``sparse_min_tokens``, ``sparse_min_recall``, ``sparse_unprofitable`` and ``<method>_<knob>``. Knobs, their ranges and
their defaults stand in the method's own file. Where one name is a method of both phases, a knob sets that of each phase
which has it. With a preset (`config.presets`) what a request runs depends on the length of its prompt.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from vllm_sparse.config.former_names import present_extras
from vllm_sparse.config.limits import WHERE_TO_SET
from vllm_sparse.config.messages import SparseParamsError, allowed_values, how_to_choose, knob_error, knob_list
from vllm_sparse.config.names import (
    DENSE,
    METHODS,
    PHASES,
    REQUEST_KEYS,
    UNPROFITABLE,
    is_request_knob,
    is_sparse_key,
    knob_schema,
    phases_of,
    phases_with,
    split_key,
)
from vllm_sparse.config.presets import PRESETS, Choice, Tier
from vllm_sparse.config.settings import ServerConfig
from vllm_sparse.methods.decode import DecodeMethod
from vllm_sparse.methods.knobs import UNBOUNDED_TOKENS, KnobError
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
        unprofitable: ``dense``: what would take longer sparse than dense runs dense; ``sparse``: it runs as asked.
    """

    prefill: PrefillMethod | None = None
    decode: DecodeMethod | None = None
    min_tokens: int = 0
    min_recall: float = 0.0
    unprofitable: str = "dense"

    @property
    def is_dense(self) -> bool:
        """Nothing of the request is sparse."""
        return self.prefill is None and self.decode is None

    def serialize(self) -> str:
        """Canonical JSON: equal parameters give equal text."""
        fields: dict[str, Any] = {
            "min_tokens": self.min_tokens,
            "min_recall": self.min_recall,
            "unprofitable": self.unprofitable,
        }
        for phase, method in (("prefill", self.prefill), ("decode", self.decode)):
            if method is not None:
                fields[phase] = [method.name, dataclasses.asdict(method)]  # type: ignore[arg-type]
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
    settings = {key: value for key, value in fields.items() if key not in PHASES}
    return SparseParams(**methods, **settings)


@dataclasses.dataclass(frozen=True)
class ParamsByLength:
    """What one request runs, before the length of its prompt is known.

    Attributes:
        preset: that it or the server names, or ``dense`` where there is none or both phases have a method of their own.
        tiers: least tokens of the prompt, rising from 0, and what a prompt of this length runs.
    """

    preset: str
    tiers: tuple[tuple[int, SparseParams], ...]

    def at(self, prompt_tokens: int) -> SparseParams:
        """What it runs with a prompt of so many tokens."""
        return next(params for from_tokens, params in reversed(self.tiers) if from_tokens <= prompt_tokens)


def resolve(
    extras: Mapping[str, Any], config: ServerConfig, num_layers: int, prompt_tokens: int | None = None
) -> SparseParams:
    """What a request runs with a prompt of a length; arguments and errors otherwise as in `resolve_by_length`.

    Args:
        extras: as there.
        config: as there.
        num_layers: as there.
        prompt_tokens: of the request's prompt; None where neither the request nor the server names a preset.

    Raises:
        ValueError: the length is not given and counts.
    """
    settings = resolve_by_length(extras, config, num_layers)
    if prompt_tokens is None and len(settings.tiers) > 1:
        raise ValueError(f"preset {settings.preset} needs the length of the prompt")
    return settings.at(prompt_tokens or 0)


def resolve_by_length(extras: Mapping[str, Any], config: ServerConfig, num_layers: int) -> ParamsByLength:
    """Resolve a request's sampling extras against the server's configuration, for prompts of every length.

    Args:
        extras: the request's ``vllm_xargs``; keys without a prefix of ours belong to others and are left alone.
        config: the server's configuration.
        num_layers: attention layers of the model that may be sparse.

    Raises:
        SparseParamsError: unknown preset, method or knob, a knob of a method that is used at no length, a preset's
            method that the server does not enable, wrong type, out of range, or a knob under its former and its present
            name.
    """
    extras, former = present_extras(extras)
    try:
        return _resolve(extras, config, num_layers)
    except SparseParamsError as error:
        if error.key not in former:
            raise
        key = former[error.key]
        raise SparseParamsError(key, error.value, f"{key} is the former name of {error.key}: {error}") from error


def _resolve(extras: Mapping[str, Any], config: ServerConfig, num_layers: int) -> ParamsByLength:
    """Resolve extras whose knobs have their present names."""
    preset = _preset_name(extras, config)
    named = {phase: _named_method(phase, extras, config) for phase in PHASES}
    if None not in named.values():
        # Nothing is left to a preset.
        preset = DENSE
    for phase, name in named.items():
        if name is None and preset != DENSE:
            _check_enabled(preset, phase, config)
    tiers = (Tier(0), *(PRESETS[preset].tiers if preset != DENSE else ()))
    choices = [
        {phase: tier.choice(phase) if name is None else Choice(name) for phase, name in named.items()} for tier in tiers
    ]
    chosen = {phase: {choice[phase].method for choice in choices} for phase in PHASES}
    knobs: dict[tuple[str, str], dict[str, Any]] = {}
    for key, value in extras.items():
        if not is_sparse_key(key) or key in REQUEST_KEYS:
            continue
        name, knob, using = _knob_of(key, value, chosen)
        for phase in using:
            knobs.setdefault((phase, name), {})[knob] = value
    min_tokens = extras.get("sparse_min_tokens", config.min_tokens)
    if not isinstance(min_tokens, int) or isinstance(min_tokens, bool) or min_tokens < 0:
        raise SparseParamsError(
            "sparse_min_tokens",
            min_tokens,
            f"sparse_min_tokens is {min_tokens!r}; an integer of 0 or more is allowed (tokens of context)",
        )
    most = max(config.limits.min_tokens, config.min_tokens)
    if min_tokens > most:
        raise SparseParamsError(
            "sparse_min_tokens",
            min_tokens,
            f"sparse_min_tokens is {min_tokens!r}; limits.min_tokens of this server allows at most {most} tokens; ask "
            f"for less, or raise it up to {UNBOUNDED_TOKENS} {WHERE_TO_SET}",
        )
    min_recall = extras.get("sparse_min_recall", config.min_recall)
    if not isinstance(min_recall, int | float) or isinstance(min_recall, bool) or not 0 <= min_recall <= 1:
        raise SparseParamsError(
            "sparse_min_recall",
            min_recall,
            f"sparse_min_recall is {min_recall!r}; a number from 0 to 1 is allowed (share of the attention mass that "
            "lists have to keep; 0 checks nothing)",
        )
    unprofitable = extras.get("sparse_unprofitable", config.unprofitable)
    if unprofitable not in UNPROFITABLE:
        raise SparseParamsError(
            "sparse_unprofitable",
            unprofitable,
            f"sparse_unprofitable is {unprofitable!r}; {' or '.join(map(repr, UNPROFITABLE))} is allowed (what runs "
            "where sparse attention would take longer than dense)",
        )
    params = []
    for tier, choice in zip(tiers, choices, strict=True):
        try:
            methods: dict[str, Any] = {
                phase: _build(phase, one.method, config, {**one.knobs, **knobs.get((phase, one.method), {})})
                for phase, one in choice.items()
                if one.method != DENSE
            }
            resolved = _without_dense(
                SparseParams(min_tokens=min_tokens, min_recall=float(min_recall), unprofitable=unprofitable, **methods),
                num_layers,
            )
        except SparseParamsError as error:
            if preset == DENSE or error.key in extras:
                raise
            # The preset's knob and another one, of the request or the server, exclude each other.
            raise SparseParamsError(
                "sparse_preset",
                preset,
                f"sparse_preset is {preset!r}, which for prompts of {tier.from_tokens} tokens or more asks for "
                f"{tier.extras()}: {error}",
            ) from error
        params.append((tier.from_tokens, resolved))
    return ParamsByLength(preset, tuple(params))


def _without_dense(params: SparseParams, num_layers: int) -> SparseParams:
    """Parameters whose phases that read everything in each layer are dense."""
    if params.decode is not None:
        try:
            roles = params.decode.layer_roles(num_layers)
        except KnobError as error:
            raise knob_error(params.decode.name, error) from error
        if set(roles) == {DENSE} or params.decode.dense_every_steps == 1:
            params = dataclasses.replace(params, decode=None)
    if params.prefill is not None and (params.prefill.exactly_dense or params.prefill.dense_layers >= num_layers):
        params = dataclasses.replace(params, prefill=None)
    return ALL_DENSE if params.is_dense else params


def _knob_of(key: str, value: Any, chosen: Mapping[str, Collection[str]]) -> tuple[str, str, list[str]]:
    """The method and the knob that a request key sets, and the phases in which the method is chosen and has it.

    Args:
        key: of the request.
        value: its value, for messages.
        chosen: the request's methods in each phase, those of all lengths.

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
    using = [phase for phase in having if name in chosen[phase]]
    if not using:
        used_for = "" if having == phases_of(name) else f" for {' or '.join(having)}"
        raise SparseParamsError(
            key,
            value,
            f"{key} is a knob of {name}{used_for}, which this request does not use; "
            f"add {how_to_choose(name, having)} or drop the knob",
        )
    return name, knob, using


def configured_method(config: ServerConfig, phase: str, name: str) -> PrefillMethod | DecodeMethod:
    """A phase's method with the knobs that the server's configuration gives it."""
    return _build(phase, name, config, {})


def _preset_name(extras: Mapping[str, Any], config: ServerConfig) -> str:
    """The preset that a request uses, or `DENSE`."""
    name = extras.get("sparse_preset", config.preset)
    if isinstance(name, str) and (name == DENSE or name in PRESETS):
        return name
    raise SparseParamsError(
        "sparse_preset", name, f"sparse_preset is {name!r}; allowed are {', '.join([DENSE, *PRESETS])}"
    )


def _check_enabled(preset: str, phase: str, config: ServerConfig) -> None:
    """Refuse a preset that needs a method in a phase which the server does not enable, whatever the prompt's length.

    Raises:
        SparseParamsError: it is such.
    """
    missing = [name for name in PRESETS[preset].methods(phase) if name not in config.methods]
    if missing:
        methods = json.dumps([*config.methods, *missing])
        raise SparseParamsError(
            "sparse_preset",
            preset,
            f"sparse_preset is {preset!r}, whose {phase} method {' and '.join(missing)} this server does not enable; "
            f'start the server with "methods": {methods}, or name a sparse_{phase} beside the preset '
            f"(allowed are {', '.join(_enabled_names(phase, config))})",
        )


def _enabled_names(phase: str, config: ServerConfig) -> list[str]:
    """What ``sparse_prefill`` or ``sparse_decode`` may name: dense, and the phase's methods that the server enables."""
    return [DENSE, *(method for method in PHASES[phase] if method in config.methods)]


def _named_method(phase: str, extras: Mapping[str, Any], config: ServerConfig) -> str | None:
    """The method that a request or else the server names for a phase, or `DENSE`; None: the preset chooses.

    A request's preset comes before the server's method.
    """
    key = f"sparse_{phase}"
    default = None if "sparse_preset" in extras else config.default_method(phase)
    if key not in extras and default is None:
        return None
    name = extras.get(key, default)
    known = PHASES[phase]
    enabled = _enabled_names(phase, config)
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
    knobs = {**PHASES[phase][name].knobs_of_files(knobs), **knobs}
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
