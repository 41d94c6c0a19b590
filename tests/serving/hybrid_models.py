"""Tiny random models whose layers are of several kinds, with the bundled model's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

BUNDLED_MODEL = Path(__file__).parents[2] / "loadtest" / "model" / "weights"
WINDOW_TOKENS = 64
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

_WINDOW, _CHUNK, _LINEAR, _FULL = "sliding_attention", "chunked_attention", "linear_attention", "full_attention"
_COMMON: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "sliding_window": WINDOW_TOKENS,
    # Wide, so that the text depends on what is attended to.
    "initializer_range": 0.3,
}  # fmt: skip
_GEMMA = {"query_pre_attn_scalar": 32, "hidden_activation": "gelu_pytorch_tanh"}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        **_COMMON, **_GEMMA, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
        "num_hidden_layers": 8, "layer_types": [_WINDOW, _WINDOW, _FULL, _WINDOW, _WINDOW, _FULL, _WINDOW, _FULL],
    },
    # So many full layers that they lie in two cache groups.
    "mostly_full": {
        **_COMMON, **_GEMMA, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
        "num_hidden_layers": 6, "layer_types": [_FULL, _FULL, _WINDOW] * 2,
    },
    "gemma2": {
        **_COMMON, **_GEMMA, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "num_hidden_layers": 6,
        "layer_types": [_WINDOW, _FULL] * 3, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 30.0,
    },
    "gpt_oss": {
        **_COMMON, "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_hidden_layers": 6,
        "layer_types": [_WINDOW, _FULL] * 3, "head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "llama4": {
        **_COMMON, "architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "num_hidden_layers": 12,
        "layer_types": [_CHUNK, _CHUNK, _CHUNK, _FULL] * 3, "no_rope_layers": [1, 1, 1, 0] * 3,
        "attention_chunk_size": WINDOW_TOKENS, "sliding_window": None, "intermediate_size_mlp": 128,
        "num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
        "tie_word_embeddings": False,
    },
    # vLLM makes blocks no smaller than a linear layer's state, so that is small and a token's keys are large.
    "qwen3_next": {
        **_COMMON, "head_dim": 128, "num_key_value_heads": 4,
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "num_hidden_layers": 12,
        "layer_types": [_LINEAR, _LINEAR, _LINEAR, _FULL] * 3, "sliding_window": None, "linear_num_value_heads": 2,
        "linear_num_key_heads": 1, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def full_layers(name: str) -> list[int]:
    """Layers of a model that may be sparse."""
    return [layer for layer, kind in enumerate(CONFIGS[name]["layer_types"]) if kind == _FULL]


def write_model(name: str, folder: Path) -> Path:
    """Write a model with random weights, the same each time.

    Args:
        name: of `CONFIGS`.
        folder: is made.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    bundled = json.loads((BUNDLED_MODEL / "config.json").read_text())
    settings = {key: bundled[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")} | CONFIGS[name]
    model_type = settings.pop("model_type")
    config = AutoConfig.for_model(model_type, pad_token_id=None, **settings)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("sinks"):
                parameter.normal_()
    model.save_pretrained(folder)
    for file in _TOKENIZER_FILES:
        if (BUNDLED_MODEL / file).exists():
            shutil.copy(BUNDLED_MODEL / file, folder / file)
    return folder
