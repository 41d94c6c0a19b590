"""The door: what an HTTP request asks for is checked once it is parsed, whichever route it came by.

Streams too can be answered HTTP 400 there (`hooks.base_serving`); `server.admission` resolves the request later.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from vllm_sparse.config.messages import SparseParamsError
from vllm_sparse.config.names import sparse_keys
from vllm_sparse.config.request import ParamsByLength
from vllm_sparse.config.server import uses_sparse_backend
from vllm_sparse.server.admission import CHECKED_ATTRIBUTE, as_vllm_error, check_salt, resolve_for
from vllm_sparse.server.preset_header import with_preset

if TYPE_CHECKING:
    from vllm.config import VllmConfig

EXTRAS_FIELD = "vllm_xargs"
# Of requests that carry sampling parameters themselves, which hold the extras.
PARAMS_FIELD = "sampling_params"

# What the request that is being answered was found to ask for; each is answered in a context of its own.
_CHECKED: ContextVar[ParamsByLength | None] = ContextVar("checked sparse settings", default=None)


def check_request(vllm_config: VllmConfig, request: Any) -> None:
    """Check what a request asks for, and keep it for its sampling parameters (`keep_checked`).

    The prompt's length is not known yet, so a preset is checked for every length.

    Args:
        vllm_config: the server's configuration.
        request: of vLLM's protocol, parsed.

    Raises:
        VLLMValidationError: the settings are wrong, or in fields that vLLM ignores.
    """
    try:
        with_preset(request, EXTRAS_FIELD)
    except SparseParamsError as error:
        raise as_vllm_error(error) from error
    place, extras = _extras_of(request)
    # A batch of chats hands on what its class does not declare.
    check_body({key: value for key, value in (request.model_extra or {}).items() if key != place}, request)
    try:
        settings = resolve_for(vllm_config, extras)
        if uses_sparse_backend(vllm_config):
            check_salt(getattr(request, "cache_salt", None))
        keys = sparse_keys(extras) if getattr(request, "use_beam_search", False) else []
        if keys:
            raise SparseParamsError(
                keys[0], extras[keys[0]], f"{keys[0]} does not work with beam search; drop one of the two"
            )
    except SparseParamsError as error:
        raise as_vllm_error(error) from error
    _CHECKED.set(settings)
    if PARAMS_FIELD in type(request).model_fields:
        keep_checked(request.sampling_params)


def check_body(body: Mapping[str, Any], request: Any) -> None:
    """Refuse settings in fields of a request that vLLM ignores: it would run otherwise than its writer thinks.

    Args:
        body: the request's JSON, or fields of it.
        request: what vLLM made of it.

    Raises:
        VLLMValidationError: there are such settings.
    """
    from vllm.exceptions import VLLMValidationError

    place, extras = _extras_of(request)
    for path in ((), (EXTRAS_FIELD,), (PARAMS_FIELD,), (PARAMS_FIELD, EXTRAS_FIELD)):
        fields: Any = body
        for field in path:
            fields = fields.get(field) if isinstance(fields, Mapping) else None
        ignored = [key for key in sparse_keys(fields) if key not in extras] if isinstance(fields, Mapping) else []
        if not ignored:
            continue
        name = ".".join([*path, ignored[0]])
        advice = (
            "but this kind of request takes no sampling extras: it runs what the server's configuration says; drop the "
            "setting, or ask by a route that takes them"
            if place is None or place == ".".join(path)
            else f"where it is not read; move it to {place}"
        )
        value = fields[ignored[0]]
        raise VLLMValidationError(f"{name} is {value!r}, {advice}", parameter=name, value=value)


def keep_checked(params: Any) -> Any:
    """Let sampling parameters keep what the request that is being answered was found to ask for.

    It keeps that if the server's configuration changes before it is admitted, when a stream can no longer be refused.
    Which tier of a preset it gets is decided when its prompt's length is known.

    Returns:
        The parameters.
    """
    settings = _CHECKED.get()
    if settings is not None:
        setattr(params, CHECKED_ATTRIBUTE, settings)
    return params


def _extras_of(request: Any) -> tuple[str | None, Mapping[str, Any]]:
    """Where a request's kind has its sampling extras, None for nowhere, and the extras."""
    fields = type(request).model_fields
    if PARAMS_FIELD in fields:
        return f"{PARAMS_FIELD}.extra_args", request.sampling_params.extra_args or {}
    if EXTRAS_FIELD not in fields and not hasattr(request, "to_chat_completion_request"):
        return None, {}
    extras = getattr(request, EXTRAS_FIELD, None)
    return EXTRAS_FIELD, extras if isinstance(extras, Mapping) else {}
