"""Admission of requests: check and resolve their sparse settings, count them, salt the prefix cache.

`admit` runs where vLLM turns any request, online or offline, into an engine request (`hooks.input_processor`). HTTP
streams have begun by then, so `check_parsed` is the same check where a request is still answered with a status code
(`hooks.request_protocol`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import prometheus_client

from vllm_sparse.config.messages import SparseParamsError
from vllm_sparse.config.names import DENSE, is_sparse_key
from vllm_sparse.config.request import ALL_DENSE, RESOLVED_KEY, ParamsByLength, SparseParams, resolve_by_length
from vllm_sparse.config.salt import SALT_MARK, cache_salt
from vllm_sparse.config.server import server_config, uses_sparse_backend
from vllm_sparse.server.decode_room import check_request
from vllm_sparse.server.runtime_config import running_config

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vllm.config import VllmConfig

REQUESTS = prometheus_client.Counter(
    "vllm_sparse_requests", "Requests admitted, by the method that each phase asks for.", ["phase", "method"]
)
PRESETS_USED = prometheus_client.Counter(
    "vllm_sparse_presets", "Requests admitted, by the preset that chooses in a phase.", ["preset"]
)

# On sampling parameters (`keep_checked`).
CHECKED_ATTRIBUTE = "_sparse_checked"


def _sparse_keys(extras: Mapping[str, Any]) -> list[str]:
    return [key for key in extras if is_sparse_key(key)]


def _check_salt(salt: str | None) -> None:
    """Refuse a client's salt that imitates a sparse request's, which would open its cached blocks to others.

    Raises:
        SparseParamsError: the salt holds the plugin's mark.
    """
    if SALT_MARK in (salt or ""):
        raise SparseParamsError(
            "cache_salt", salt, f"cache_salt is {salt!r}; any salt without {SALT_MARK!r} is allowed"
        )


def resolve_for(vllm_config: VllmConfig, extras: Mapping[str, Any]) -> ParamsByLength:
    """Resolve a request's extras for a server, for prompts of every length.

    Raises:
        SparseParamsError: the settings are wrong, the server runs another attention backend, or its CUDA graphs have no
            room for the request.
    """
    if not uses_sparse_backend(vllm_config):
        keys = _sparse_keys(extras)
        if keys:
            raise SparseParamsError(
                keys[0],
                extras[keys[0]],
                f"{keys[0]} is set, but this server runs dense attention; "
                "start it with --attention-backend sparse or drop the setting",
            )
        return ParamsByLength(DENSE, ((0, ALL_DENSE),))
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    settings = resolve_by_length(extras, running_config(server_config(vllm_config)).config, num_layers)
    check_request(vllm_config, extras, settings)
    return settings


def _as_vllm_error(error: SparseParamsError) -> Exception:
    from vllm.exceptions import VLLMValidationError

    parameter = error.key if error.key == "cache_salt" else f"vllm_xargs.{error.key}"
    vllm_error: Exception = VLLMValidationError(str(error), parameter=parameter, value=error.value)
    return vllm_error


def admit(vllm_config: VllmConfig, params: Any, build: Callable[[], Any]) -> Any:
    """Build an engine request with its sparse settings resolved.

    Args:
        vllm_config: the server's configuration.
        params: vLLM's sampling or pooling parameters of the request; left as they are.
        build: makes the engine request, which holds its own copy of the parameters.

    Raises:
        VLLMValidationError: the request's settings are wrong; nothing reaches the engine.
    """
    if not hasattr(params, "extra_args"):
        return build()
    try:
        settings = getattr(params, CHECKED_ATTRIBUTE, None) or resolve_for(vllm_config, params.extra_args or {})
        request = build()
        if uses_sparse_backend(vllm_config):
            _check_salt(request.cache_salt)
    except SparseParamsError as error:
        raise _as_vllm_error(error) from error
    if not uses_sparse_backend(vllm_config):
        return request
    resolved = settings.at(_prompt_tokens(request))
    if settings.preset != DENSE:
        PRESETS_USED.labels(settings.preset).inc()
    REQUESTS.labels("prefill", resolved.prefill.name if resolved.prefill else DENSE).inc()
    REQUESTS.labels("decode", resolved.decode.name if resolved.decode else DENSE).inc()
    if not resolved.is_dense:
        extra_args = dict(request.sampling_params.extra_args or {})
        extra_args[RESOLVED_KEY] = resolved.serialize()
        request.sampling_params.extra_args = extra_args
        if _may_become_sparse(request, resolved):
            request.cache_salt = cache_salt(resolved, request.cache_salt)
    return request


def _prompt_tokens(request: Any) -> int:
    """Length of the prompt, of which vLLM knows the tokens or their embeddings."""
    return len(request.prompt_embeds if request.prompt_token_ids is None else request.prompt_token_ids)


def _may_become_sparse(request: Any, resolved: SparseParams) -> bool:
    """Whether the request can reach `min_tokens`; else each of its steps is dense, and so are its cached blocks."""
    if not request.prompt_token_ids or request.resumable or request.sampling_params.max_tokens is None:
        return True
    return bool(len(request.prompt_token_ids) + request.sampling_params.max_tokens >= resolved.min_tokens)


def check_parsed(
    vllm_config: VllmConfig, extras: Mapping[str, Any], salt: str | None, beam_search: bool
) -> ParamsByLength:
    """Check a request's settings while it is parsed, when a stream too can still be answered HTTP 400.

    The prompt's length is not known yet, so a preset is checked for every length.

    Args:
        vllm_config: the server's configuration.
        extras: the request's ``vllm_xargs``.
        salt: its ``cache_salt``.
        beam_search: it asks for beam search, which drops sampling extras.

    Raises:
        VLLMValidationError: the settings are wrong.
    """
    try:
        settings = resolve_for(vllm_config, extras)
        if uses_sparse_backend(vllm_config):
            _check_salt(salt)
        keys = _sparse_keys(extras) if beam_search else []
        if keys:
            raise SparseParamsError(
                keys[0], extras[keys[0]], f"{keys[0]} does not work with beam search; drop one of the two"
            )
    except SparseParamsError as error:
        raise _as_vllm_error(error) from error
    return settings


def keep_checked(params: Any, settings: ParamsByLength) -> None:
    """Let a request's sampling parameters keep what it was found to ask for when it was parsed.

    It keeps that if the server's configuration changes before it is admitted, when a stream can no longer be refused.
    Which tier of a preset it gets is decided when its prompt's length is known.
    """
    setattr(params, CHECKED_ATTRIBUTE, settings)
