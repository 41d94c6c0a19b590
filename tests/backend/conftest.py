"""A small model's attention layers as vLLM makes them: real configuration, layers, builder and implementation."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests import oracle

LAYERS, HEADS, KV_HEADS, HEAD_SIZE, SCALE = 8, 8, 2, 64, 0.12


@dataclass
class Engine:
    """What one worker holds.

    Attributes:
        config: vLLM's configuration, with the sparse backend.
        layers: attention layers.
        builder: the backend's metadata builder.
        stock: a stock implementation for comparison.
    """

    config: Any
    layers: list[Any]
    builder: Any
    stock: Any


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if not oracle.CPU_KERNEL:
        pytest.skip("vLLM is not the CPU build")
    from vllm.config import AttentionConfig, CacheConfig, ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, parallel_state
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    from vllm_sparse.hooks.logits_processor import SparseParamsProcessor
    from vllm_sparse.plugin import register

    register()
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(
        json.dumps({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HEADS * HEAD_SIZE,
            "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS, "head_dim": HEAD_SIZE, "vocab_size": 128,
            "max_position_embeddings": 65536, "bos_token_id": 0, "eos_token_id": 1, "rms_norm_eps": 1e-5,
        })
    )  # fmt: skip
    config = VllmConfig(
        model_config=ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=8192),
        cache_config=CacheConfig(),
        attention_config=AttentionConfig(backend="sparse"),
        additional_config={"sparse": {"min_tokens": 64}},
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        initialize_model_parallel(1, 1)
        layers = [
            Attention(
                HEADS, HEAD_SIZE, SCALE, KV_HEADS, cache_config=config.cache_config,
                prefix=f"model.layers.{index}.self_attn.attn",
            )
            for index in range(LAYERS)
        ]  # fmt: skip
        SparseParamsProcessor(config, torch.device("cpu"), False)
        spec = layers[0].get_kv_cache_spec(config)
        names = [layer.layer_name for layer in layers]
        builder = layers[0].attn_backend.get_builder_cls()(spec, names, config, torch.device("cpu"))
        stock = CPUAttentionBackendImpl(HEADS, HEAD_SIZE, SCALE, KV_HEADS, None, None, "auto")
        yield Engine(config, layers, builder, stock)
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


@pytest.fixture(autouse=True)
def empty_table() -> Iterator[None]:
    from vllm_sparse.step.requests import TABLE

    TABLE.attach(slots_in_metadata=False)
    yield
    TABLE.attach(slots_in_metadata=False)
