"""A server's configuration: read from vLLM's, checked against the model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from vllm_sparse.config.former_names import present_settings
from vllm_sparse.config.limits import Limits
from vllm_sparse.config.messages import SparseParamsError, knob_error, knob_list, readable
from vllm_sparse.config.model_layers import sparse_layers
from vllm_sparse.config.names import METHODS, PHASES, phases_of, phases_with
from vllm_sparse.config.presets import PRESETS
from vllm_sparse.config.request import configured_method, resolve_by_length
from vllm_sparse.config.settings import ServerConfig
from vllm_sparse.methods.knobs import KnobError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.sparse")


def parse_server_config(additional_config: object, num_layers: int, num_query_heads: int) -> ServerConfig:
    """Read and check the server's configuration.

    Args:
        additional_config: vLLM's ``additional_config``; other keys than ``"sparse"`` belong to others.
        num_layers: attention layers of the model that may be sparse.
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

    Knobs may have former names; the configuration has the present ones.

    Args:
        settings: the object.
        num_layers: attention layers of the model that may be sparse.
        num_query_heads: query heads of the model.
    """
    try:
        present = present_settings(settings) if isinstance(settings, Mapping) else settings
    except SparseParamsError as error:
        raise ValueError(f"object sparse: {error}") from error
    try:
        config = _with_methods_of_preset(ServerConfig.model_validate(present))
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(["sparse", *(str(part) for part in detail["loc"])])
        known = (Limits if key.startswith("sparse.limits.") else ServerConfig).model_fields
        allowed = f"; there are {', '.join(known)}" if detail["type"] == "extra_forbidden" else ""
        raise ValueError(readable(f"{key} is {detail.get('input')!r}: {detail['msg']}{allowed}")) from error
    for name in METHODS:
        # Knobs in the configuration are checked as a request's would be, whether or not the method is a default.
        try:
            for knob, value in config.knobs(name).items():
                if not phases_with(name, knob):
                    key = f"{name}_{knob}"
                    raise SparseParamsError(key, value, f"{key} is no knob; there are {knob_list(name)}")
            for phase in phases_of(name):
                configured_method(config, phase, name).check_defaults(num_layers, num_query_heads)
        except (SparseParamsError, KnobError) as error:
            named = knob_error(name, error) if isinstance(error, KnobError) else error
            raise ValueError(f"object sparse.{name}: {named}") from error
    try:
        resolve_by_length({}, config, num_layers)
    except SparseParamsError as error:
        raise ValueError(f"object sparse: {error}") from error
    return config


def _with_methods_of_preset(config: ServerConfig) -> ServerConfig:
    """The configuration with the methods enabled that its default preset needs, where it lists no methods itself."""
    if "methods" in config.model_fields_set or config.preset not in PRESETS:
        return config
    preset = PRESETS[config.preset]
    needed = [name for phase in PHASES if config.default_method(phase) is None for name in preset.methods(phase)]
    missing = [name for name in needed if name not in config.methods]
    if not missing:
        return config
    logger.info(
        "Sparse attention: %s is enabled because preset %s needs it and no methods are listed; it is not enabled by "
        'default because it costs memory beside the KV cache. List "methods" to decide yourself.',
        ", ".join(missing),
        config.preset,
    )
    return config.model_copy(update={"methods": (*config.methods, *missing)})


def uses_sparse_backend(vllm_config: VllmConfig) -> bool:
    """Whether the server was started with this attention backend, for all layers or for one kind."""
    attention = vllm_config.attention_config
    backends = [attention.backend, *(getattr(attention, "backend_per_kind", None) or {}).values()]
    return any(getattr(backend, "name", None) == "SPARSE" for backend in backends)


class _ParsedSettings(dict[str, Any]):
    """A ``"sparse"`` object of vLLM's ``additional_config``, with what it was parsed to.

    It goes wherever that goes: to processes that start later, and to copies, such as that of the text part of a model
    that reads images. vLLM makes such a copy from the fields of its configuration alone, and fails where there is
    another attribute.
    """

    config: ServerConfig


def server_config(vllm_config: VllmConfig) -> ServerConfig:
    """The configuration that the server was started with, parsed once; processes started later get it with vLLM's.

    Raises:
        ValueError: it is wrong.
    """
    additional = vllm_config.additional_config
    settings = additional.get("sparse", {}) if isinstance(additional, dict) else {}
    if isinstance(settings, _ParsedSettings):
        return settings.config
    model = vllm_config.model_config
    config = parse_server_config(additional, sparse_layers(model), model.model_arch_config.total_num_attention_heads)
    if isinstance(additional, dict):
        parsed = _ParsedSettings(settings)
        parsed.config = config
        vllm_config.additional_config = {**additional, "sparse": parsed}
    return config
