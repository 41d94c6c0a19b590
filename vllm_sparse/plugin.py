"""The plugin's entry point into vLLM, run in every process that vLLM starts; idempotent and light."""

from __future__ import annotations

import copyreg
import functools
import importlib.metadata
import logging
import sys
from typing import Any

BACKEND_NAME = "SPARSE"
BACKEND_PATH = "vllm_sparse.backend.SparseAttentionBackend"
SUPPORTED_VLLM = ("0.32", "0.33")


def register() -> None:
    """Register the attention backend and the hooks it needs.

    Raises:
        RuntimeError: the installed vLLM is not one that this plugin was written for.
    """
    _check_version()
    _register_backend()
    _select_on_cpu()
    from vllm_sparse.server.admission import check_at_admission
    from vllm_sparse.server.stats import answer_in_workers

    check_at_admission()
    answer_in_workers()
    _check_configuration_early()


def _check_configuration_early() -> None:
    """Refuse a wrong ``"sparse"`` object while the command line is read, not in a process started minutes later.

    Only processes that build vLLM's configuration have its arguments module, which is what loaded this plugin there.
    """
    arguments = sys.modules.get("vllm.engine.arg_utils")
    create = getattr(getattr(arguments, "EngineArgs", None), "create_engine_config", None)
    if create is None or hasattr(create, "__wrapped__"):
        return

    @functools.wraps(create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_sparse.config.server import server_config, uses_sparse_backend
        from vllm_sparse.server.runtime_config import announce_directory
        from vllm_sparse.server.spans import trace_requests

        vllm_config = create(self, *args, **kwargs)
        if uses_sparse_backend(vllm_config):
            config = server_config(vllm_config)
            announce_directory()
            if vllm_config.observability_config.otlp_traces_endpoint is not None:
                trace_requests(vllm_config)
            logging.getLogger("vllm.sparse").info(
                "Sparse attention: requests may choose %s; those that name no method run prefill %s and decode %s; "
                "contexts of fewer than %d tokens run dense unless a request sets sparse_min_tokens.",
                ", ".join(config.methods),
                config.prefill,
                config.decode,
                config.min_tokens,
            )
        return vllm_config

    arguments.EngineArgs.create_engine_config = create_engine_config  # type: ignore[union-attr]


def _check_version() -> None:
    import vllm

    release = ".".join(vllm.__version__.split(".")[:2])
    if release not in SUPPORTED_VLLM:
        own = importlib.metadata.version("vllm-sparse")
        raise RuntimeError(
            f"vllm-sparse {own} works with vLLM {' and '.join(SUPPORTED_VLLM)}, found {vllm.__version__}; "
            "install a matching vLLM or uninstall vllm-sparse"
        )


def _register_backend() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND_NAME in AttentionBackendEnum.__members__:
        return
    register_backend(BACKEND_NAME, BACKEND_PATH)
    # An enum member pickles by value, and a spawned process unpickles vLLM's configuration before it loads plugins.
    copyreg.pickle(AttentionBackendEnum, _reduce_backend)


def _reduce_backend(member: Any) -> Any:
    if member.name == BACKEND_NAME:
        return _restore_backend, (member.name,)
    return member.__reduce_ex__(4)


def _restore_backend(name: str) -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    return AttentionBackendEnum.__members__[name]


def _select_on_cpu() -> None:
    """vLLM's CPU platform knows one backend and its own block size; teach it this one."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    sparse = AttentionBackendEnum.__members__[BACKEND_NAME]
    select = CpuPlatform.__dict__["get_attn_backend_cls"].__func__
    configure = CpuPlatform.__dict__["check_and_update_config"].__func__
    if hasattr(select, "__wrapped__"):
        return

    @functools.wraps(select)
    def get_attn_backend_cls(cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: Any = None) -> Any:
        if selected_backend is not sparse:
            return select(cls, selected_backend, attn_selector_config, num_heads)
        backend = sparse.get_class()
        reasons = backend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
        if reasons:
            raise ValueError(
                f"attention backend sparse does not support this configuration: {', '.join(reasons)}; "
                "serve without --attention-backend sparse"
            )
        return sparse.get_path()

    @functools.wraps(configure)
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        configure(cls, vllm_config)
        cache = vllm_config.cache_config
        if vllm_config.attention_config.backend is sparse and not cache.user_specified_block_size:
            from vllm_sparse.backend.cpu import DEFAULT_BLOCK_TOKENS

            cache.block_size = DEFAULT_BLOCK_TOKENS

    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
