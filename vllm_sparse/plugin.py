"""The plugin's entry points into vLLM, run in every process that vLLM starts; idempotent and light."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from vllm_sparse.hooks import (
    attention_backend_enum,
    attention_selector,
    cpu_platform,
    engine_args,
    input_processor,
    kv_cache_utils,
    worker_base,
)

BACKEND_NAME = "SPARSE"
BACKEND_PATH = "vllm_sparse.backend.SparseAttentionBackend"
SUPPORTED_VLLM = ("0.32", "0.33")


def register() -> None:
    """Register the attention backend and the hooks it needs (group ``vllm.general_plugins``).

    Raises:
        RuntimeError: the installed vLLM is not one that this plugin was written for.
    """
    _check_version()
    attention_backend_enum.install(BACKEND_NAME, BACKEND_PATH, restore_backend)
    attention_selector.install(BACKEND_NAME)
    cpu_platform.install(BACKEND_NAME)
    input_processor.install()
    kv_cache_utils.install()
    worker_base.install()
    engine_args.install()


def restore_backend(name: str) -> Any:
    """Where pickles of the backend's enum member enter a process, perhaps before vLLM has loaded its plugins."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    return AttentionBackendEnum.__members__[name]


def _check_version() -> None:
    import vllm

    release = ".".join(vllm.__version__.split(".")[:2])
    if release not in SUPPORTED_VLLM:
        own = importlib.metadata.version("vllm-sparse")
        raise RuntimeError(
            f"vllm-sparse {own} works with vLLM {' and '.join(SUPPORTED_VLLM)}, found {vllm.__version__}; "
            "install a matching vLLM or uninstall vllm-sparse"
        )
