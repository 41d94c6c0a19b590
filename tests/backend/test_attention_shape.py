"""What the costs of steps take from a model's configuration."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.step.measured import LLAMA_8B, QWEN_HALF_B
from vllm_sparse.backend.attention_shape import attention_shape, linear_flops_of

LLAMA: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8
}  # fmt: skip
QWEN: dict[str, Any] = {
    "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2
}  # fmt: skip


def served(config: dict[str, Any], tensor_parallel_size: int) -> Any:
    """vLLM's configuration, as far as it is read."""
    heads = config["num_attention_heads"] // tensor_parallel_size
    model = SimpleNamespace(hf_text_config=SimpleNamespace(**config), get_num_attention_heads=lambda parallel: heads)
    return SimpleNamespace(
        model_config=model, parallel_config=SimpleNamespace(tensor_parallel_size=tensor_parallel_size)
    )


def test_the_shape_of_one_process() -> None:
    spec = SimpleNamespace(num_kv_heads=8, head_size=128, block_size=128, page_size_bytes=128 * 8 * 2 * 128 * 2)
    shape = attention_shape(served(LLAMA, 1), spec, 32)
    assert replace(shape, linear_flops=LLAMA_8B.linear_flops) == LLAMA_8B
    half = SimpleNamespace(num_kv_heads=4, head_size=128, block_size=128, page_size_bytes=128 * 4 * 2 * 128 * 2)
    of_two = attention_shape(served(LLAMA, 2), half, 32)
    assert (of_two.query_heads, of_two.kv_heads, of_two.kv_token_bytes) == (16, 4, 2048)
    assert of_two.linear_flops == shape.linear_flops / 2


def test_operations_of_the_linear_layers() -> None:
    assert linear_flops_of(SimpleNamespace(**LLAMA), 1) == pytest.approx(LLAMA_8B.linear_flops, rel=0.01)
    assert linear_flops_of(SimpleNamespace(**QWEN), 1) == pytest.approx(QWEN_HALF_B.linear_flops, rel=0.01)
    wide_heads = linear_flops_of(SimpleNamespace(**LLAMA, head_dim=256), 1)
    assert wide_heads > linear_flops_of(SimpleNamespace(**LLAMA), 1)


def test_what_is_not_known_of_a_layer_counts_nothing() -> None:
    """Experts, and an MLP whose size differs by layer or stands under another name."""
    attention = 2 * 2 * 4096 * 128 * (32 + 8)
    assert linear_flops_of(SimpleNamespace(**LLAMA, num_local_experts=8), 1) == attention
    assert linear_flops_of(SimpleNamespace(**{**LLAMA, "intermediate_size": [8192, 16384]}), 1) == attention
    assert linear_flops_of(SimpleNamespace(hidden_size=4096, num_attention_heads=32), 1) == 2 * 2 * 4096 * 128 * 64
