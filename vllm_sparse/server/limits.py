"""Which settings of requests go beyond the server's limits (`config.limits`), so that no request harms the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_sparse.config.former_names import present_extras
from vllm_sparse.config.limits import WHERE_TO_SET, in_words, is_within, narrowed
from vllm_sparse.config.messages import SparseParamsError
from vllm_sparse.config.names import REQUEST_KEYS, knob_schema, phases_with, sparse_keys, split_key
from vllm_sparse.config.request import configured_method
from vllm_sparse.methods.prefill import PrefillMethod

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_sparse.config.request import ParamsByLength
    from vllm_sparse.config.settings import ServerConfig
    from vllm_sparse.methods.knobs import LimitName

MIB = 1 << 20


def check_limits(
    vllm_config: VllmConfig, config: ServerConfig, extras: Mapping[str, Any], settings: ParamsByLength
) -> None:
    """Refuse a request that goes beyond a limit, at any length of its prompt.

    Args:
        vllm_config: vLLM's configuration of the server.
        config: the plugin's, as it counts now.
        extras: the request's ``vllm_xargs``, found right.
        settings: what they resolve to.

    Raises:
        SparseParamsError: it is such a request. The message names the limit, what was given and what is allowed.
    """
    # Imported here: the platform must not be chosen while plugins are loaded.
    from vllm.platforms import current_platform

    given, former = present_extras(extras)
    for key in sparse_keys(given):
        if key in REQUEST_KEYS:
            continue
        name, knob = split_key(key)
        limit, allowed = limit_of_knob(name, knob, config)
        if not is_within(given[key], allowed):
            _refuse(former.get(key, key), given[key], f"limits.{limit}", in_words(allowed))
        for phase in phases_with(name, knob):
            if knob_schema(phase, name)[knob].get("compiles") and current_platform.is_cuda():
                own = getattr(configured_method(config, phase, name), knob)
                _check_kernels(former.get(key, key), given[key], own, config.limits.new_kernels)
    _check_memory(vllm_config, config, given, settings)


def limit_of_knob(name: str, knob: str, config: ServerConfig) -> tuple[LimitName | None, dict[str, Any]]:
    """What a limit leaves of a knob's values, as `config.limits.narrowed` tells it.

    A key of ``vllm_xargs`` may be of both phases, whose methods the server sets apart: it leaves what either leaves.

    Args:
        name: of the method.
        knob: without the method's name.
        config: the server's configuration.
    """
    phases = phases_with(name, knob)
    own = [getattr(configured_method(config, phase, name), knob) for phase in phases]
    left = [
        narrowed(knob_schema(phase, name)[knob], value, config.limits) for phase, value in zip(phases, own, strict=True)
    ]
    return next((one for one in left if all(is_within(value, one[1]) for value in own)), left[0])


def _check_kernels(key: str, value: Any, own: Any, new_kernels: str) -> None:
    """Refuse a value with which kernels are compiled that the server's start did not compile."""
    is_open = isinstance(value, list | tuple)
    known = set(own) if is_open else {own}
    if new_kernels == "any" or (new_kernels == "choices" and not is_open):
        return
    if (set(value) if is_open else {value}) <= known:
        return
    _refuse(
        key,
        value,
        "limits.new_kernels",
        f"{'numbers among ' if is_open else ''}{', '.join(map(repr, sorted(known)))}, for which kernels are compiled",
        f"set it to {'any' if is_open else 'choices or any'}",
    )


def _check_memory(
    vllm_config: VllmConfig, config: ServerConfig, given: Mapping[str, Any], settings: ParamsByLength
) -> None:
    """Refuse a method whose choice for the largest prompt chunk takes too much memory."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    longest = model.max_model_len
    size = (
        min(vllm_config.scheduler_config.max_num_batched_tokens, longest),
        longest,
        model.get_num_attention_heads(parallel),
        model.get_num_kv_heads(parallel),
    )
    for _, params in settings.tiers:
        if params.prefill is None:
            continue
        name = params.prefill.name
        own = configured_method(config, "prefill", name)
        assert isinstance(own, PrefillMethod)
        limit = max(config.limits.selection_mib, -(-own.selection_bytes(*size) // MIB))
        needed = -(-params.prefill.selection_bytes(*size) // MIB)
        if needed <= limit:
            continue
        keys = [key for key in (f"{name}_list_per", f"{name}_query_block_tokens") if key in given]
        key = next(iter(keys), "sparse_prefill")
        _refuse(
            key,
            given.get(key, name),
            "limits.selection_mib",
            f"{limit} MiB for a prompt chunk of {size[0]} tokens at {longest}, where this needs {needed}",
        )


def _refuse(key: str, value: Any, limit: str, allowed: str, advice: str = "raise it") -> None:
    raise SparseParamsError(
        key,
        value,
        f"{key} is {value!r}; {limit} of this server allows {allowed}; ask for less, or {advice} {WHERE_TO_SET}",
    )
