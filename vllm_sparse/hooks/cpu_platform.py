"""vLLM's `CpuPlatform`: it knows one attention backend and one block size.

vLLM 0.32 chooses the block size with the configuration, vLLM 0.33 again when the layers and their backends are known.
Not needed any more once the CPU platform looks registered backends up, and takes its default from them.
"""

from __future__ import annotations

from typing import Any

from vllm_sparse.hooks.wrapping import is_wrapped, wraps


def install(name: str) -> None:
    """Let the CPU platform select the backend.

    Args:
        name: of its member in `AttentionBackendEnum`.
    """
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    sparse = AttentionBackendEnum.__members__[name]
    select = CpuPlatform.__dict__["get_attn_backend_cls"].__func__
    configure = CpuPlatform.__dict__["check_and_update_config"].__func__
    prefer = CpuPlatform._preferred_block_size_for_backends.__func__
    if is_wrapped(select):
        return

    @wraps(select)
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

    @wraps(configure)
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        configure(cls, vllm_config)
        cache = vllm_config.cache_config
        if not cache.user_specified_block_size:
            cache.block_size = default_block_tokens(vllm_config, cache.block_size)

    @wraps(prefer)
    def preferred_block_size(cls: Any, backends: Any, default_block_size: int, vllm_config: Any) -> Any:
        return prefer(cls, backends, default_block_tokens(vllm_config, default_block_size), vllm_config)

    def default_block_tokens(vllm_config: Any, stock: int) -> int:
        """Tokens of a block where nobody says how many; without this backend as many as vLLM takes."""
        if vllm_config.attention_config.backend is not sparse:
            return stock
        from vllm_sparse.backend.cpu import DEFAULT_BLOCK_TOKENS

        return DEFAULT_BLOCK_TOKENS

    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    CpuPlatform._preferred_block_size_for_backends = classmethod(preferred_block_size)
