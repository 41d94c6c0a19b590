"""Admission of requests: check and resolve their sparse settings, count them, salt the prefix cache.

`admit` runs where vLLM turns any request, online or offline, into an engine request (`hooks.input_processor`). HTTP
streams have begun by then, so `server.door` makes the same check where a request is still answered with a status code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import prometheus_client

from vllm_sparse.config.messages import SparseParamsError, readable
from vllm_sparse.config.model_layers import sparse_layers
from vllm_sparse.config.names import DENSE, sparse_keys
from vllm_sparse.config.request import ALL_DENSE, RESOLVED_KEY, ParamsByLength, SparseParams, resolve_by_length
from vllm_sparse.config.salt import SALT_MARK, cache_salt
from vllm_sparse.config.server import server_config, uses_sparse_backend
from vllm_sparse.server.decode_room import check_request
from vllm_sparse.server.limits import check_limits
from vllm_sparse.server.runtime_config import running_config
from vllm_sparse.step.eligibility import longest_dense_seq_len

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vllm.config import VllmConfig

# vLLM counts each of the n answers that a request asks for, and so do the histograms of latency.
REQUESTS = prometheus_client.Counter(
    "vllm_sparse_requests",
    "Answers admitted (n for a request that asks for n), by the method that each phase asks for.",
    ["model_name", "phase", "method"],
)
PRESETS_USED = prometheus_client.Counter(
    "vllm_sparse_presets",
    "Answers admitted (n for a request that asks for n), by the preset that chooses in a phase.",
    ["model_name", "preset"],
)

# On sampling parameters (`server.door.keep_checked`).
CHECKED_ATTRIBUTE = "_sparse_checked"


def check_salt(salt: str | None) -> None:
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
        SparseParamsError: the settings are wrong or beyond the server's limits, it runs another attention backend, or
            its CUDA graphs have no room for the request.
    """
    if not uses_sparse_backend(vllm_config):
        keys = sparse_keys(extras)
        if keys:
            raise SparseParamsError(
                keys[0],
                extras[keys[0]],
                f"{keys[0]} is set, but this server runs dense attention; "
                "start it with --attention-backend sparse or drop the setting",
            )
        return ParamsByLength(DENSE, ((0, ALL_DENSE),))
    num_layers = sparse_layers(vllm_config.model_config)
    config = running_config(server_config(vllm_config)).config
    settings = resolve_by_length(extras, config, num_layers)
    check_limits(vllm_config, config, extras, settings)
    check_request(vllm_config, extras, settings)
    return settings


def as_vllm_error(error: SparseParamsError) -> Exception:
    """The error as vLLM answers it: HTTP 400 that names the parameter."""
    parameter = error.key if error.key == "cache_salt" else f"vllm_xargs.{error.key}"
    return validation_error(str(error), parameter, error.value)


def validation_error(message: str, parameter: str, value: object) -> Exception:
    """vLLM's error for a wrong request, which tells parameter and value beside the message."""
    from vllm.exceptions import VLLMValidationError

    told = value if value is None else readable(str(value))
    error: Exception = VLLMValidationError(readable(message), parameter=readable(parameter), value=told)
    return error


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
            check_salt(request.cache_salt)
    except SparseParamsError as error:
        raise as_vllm_error(error) from error
    if not uses_sparse_backend(vllm_config):
        return request
    resolved = settings.at(_prompt_tokens(request))
    model_name = vllm_config.model_config.served_model_name
    if settings.preset != DENSE:
        PRESETS_USED.labels(model_name, settings.preset).inc(params.n)
    for phase, method in (("prefill", resolved.prefill), ("decode", resolved.decode)):
        REQUESTS.labels(model_name, phase, method.name if method else DENSE).inc(params.n)
    if not resolved.is_dense:
        extra_args = dict(request.sampling_params.extra_args or {})
        extra_args[RESOLVED_KEY] = resolved.serialize()
        request.sampling_params.extra_args = extra_args
        first_token = first_sparse_token(request, resolved)
        if first_token is not None:
            request.cache_salt = cache_salt(resolved, request.cache_salt, first_token)
    return request


def _prompt_tokens(request: Any) -> int:
    """Length of the prompt, of which vLLM knows the tokens or their embeddings."""
    return len(request.prompt_embeds if request.prompt_token_ids is None else request.prompt_token_ids)


def first_sparse_token(request: Any, resolved: SparseParams) -> int | None:
    """Index of the first token that a sparse step may write; None: each of the request's steps is dense.

    Prompts are dense before `min_tokens`. Where the prompt has a method it is told by the settings alone, so that all
    requests with these settings share blocks, whatever their prompts: a preempted request comes back with what it
    generated as part of its prompt, and the next turn of a conversation with all of the turn before. Where the
    generation alone is sparse it is not before the prompt's end.

    Args:
        request: vLLM's engine request.
        resolved: what it runs.
    """
    if not request.prompt_token_ids or request.resumable:
        return 0
    prompt_tokens, max_tokens = len(request.prompt_token_ids), request.sampling_params.max_tokens
    longest = None if max_tokens is None else prompt_tokens + max_tokens
    # A step with a context of so many tokens and one more writes the token of this index.
    decoded = None if resolved.decode is None else longest_dense_seq_len(resolved.decode, resolved.min_tokens)
    if resolved.prefill is not None:
        first = resolved.min_tokens if decoded is None else min(resolved.min_tokens, decoded)
    else:
        assert decoded is not None, "something of the request is sparse"
        first = max(prompt_tokens, decoded)
    return None if longest is not None and first >= longest else first
