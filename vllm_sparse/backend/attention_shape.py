"""What the costs of steps depend on in the served model, read from vLLM's configuration."""

from __future__ import annotations

from typing import Any

from vllm_sparse.step.costs import AttentionShape


def attention_shape(vllm_config: Any, kv_cache_spec: Any, num_layers: int, held: range | None = None) -> AttentionShape:
    """A model's attention as this process has it.

    Args:
        vllm_config: of the server.
        kv_cache_spec: of the attention layers, one process's.
        num_layers: attention layers of the model.
        held: numbers of those that this process holds; None: all.
    """
    parallel = vllm_config.parallel_config
    query_heads = vllm_config.model_config.get_num_attention_heads(parallel)
    heads, kv_heads, head_size = query_heads, kv_cache_spec.num_kv_heads, kv_cache_spec.head_size
    linear_flops = linear_flops_of(vllm_config.model_config.hf_text_config, parallel.tensor_parallel_size)
    token_bytes = kv_cache_spec.page_size_bytes // kv_cache_spec.block_size
    return AttentionShape(num_layers, heads, kv_heads, head_size, token_bytes, linear_flops, held)


def linear_flops_of(config: Any, tensor_parallel_size: int) -> float:
    """Operations of a token in a layer's projections and its gated MLP, of one process; without experts' parts.

    Less than the model does at most. That only makes the host's time count more, and prompts dense that are in doubt.

    Args:
        config: the model's, as transformers has it.
        tensor_parallel_size: processes that share the layer.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    projections = 2 * hidden * head_size * (heads + kv_heads)
    mlp_size = getattr(config, "intermediate_size", 0)
    has_experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    # Some models have a list, a size for each layer.
    mlp = 3 * hidden * mlp_size if isinstance(mlp_size, int) and not has_experts else 0
    flops: float = 2 * (projections + mlp) / tensor_parallel_size
    return flops
