"""The Llama architecture in plain PyTorch with Hugging Face's parameter names, and its export as such a folder."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loadtest.model.tokenizer import BEGIN, END, PAD, SPECIALS

NORM_EPSILON = 1e-5
# The weights must stay small enough to live in the repository.
LARGEST_WEIGHTS = 16 * 1024 * 1024


@dataclass(frozen=True)
class Architecture:
    """Sizes of the network; `longest` is the context length in tokens."""

    vocabulary: int
    layers: int = 8
    hidden: int = 256
    query_heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    mlp: int = 704
    rope_theta: float = 5e5
    longest: int = 34816


class Linear(nn.Module):
    """A matrix without bias, kept in float32 and used in the activations' type."""

    def __init__(self, inputs: int, outputs: int, deviation: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * deviation)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Norm(nn.Module):
    """Root mean square normalisation, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPSILON)
        return scaled.to(x.dtype) * self.weight.to(x.dtype)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of x [batch, heads, length, head size] by angles [length, head size]."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


class Attention(nn.Module):
    """Causal attention with grouped key/value heads and rotary positions."""

    def __init__(self, sizes: Architecture, deviation: float, deviation_out: float) -> None:
        super().__init__()
        self.head_size = sizes.head_size
        queries, keys = sizes.query_heads * sizes.head_size, sizes.kv_heads * sizes.head_size
        self.q_proj = Linear(sizes.hidden, queries, deviation)
        self.k_proj = Linear(sizes.hidden, keys, deviation)
        self.v_proj = Linear(sizes.hidden, keys, deviation)
        self.o_proj = Linear(queries, sizes.hidden, deviation_out)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = (
            projection(x).view(batch, length, -1, self.head_size).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(
            _rotate(query, cosine, sine), _rotate(key, cosine, sine), value, is_causal=True, enable_gqa=True
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out


class Mlp(nn.Module):
    """The gated two-layer network after the attention."""

    def __init__(self, sizes: Architecture, deviation: float, deviation_out: float) -> None:
        super().__init__()
        self.gate_proj = Linear(sizes.hidden, sizes.mlp, deviation)
        self.up_proj = Linear(sizes.hidden, sizes.mlp, deviation)
        self.down_proj = Linear(sizes.mlp, sizes.hidden, deviation_out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One layer of the network."""

    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        deviation = 0.02
        deviation_out = deviation / (2 * sizes.layers) ** 0.5
        self.input_layernorm = Norm(sizes.hidden)
        self.self_attn = Attention(sizes, deviation, deviation_out)
        self.post_attention_layernorm = Norm(sizes.hidden)
        self.mlp = Mlp(sizes, deviation, deviation_out)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cosine, sine)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


BlockCall = Callable[[Block, Tensor, Tensor, Tensor], Tensor]


def call_block(block: Block, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Runs one block; a function of its own so that one compiled version serves all layers."""
    out: Tensor = block(x, cosine, sine)
    return out


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what Hugging Face calls `model`."""

    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocabulary, sizes.hidden)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = Norm(sizes.hidden)


class Network(nn.Module):
    """The language model; parameters in float32, activations in `dtype`.

    Attributes:
        run_block: how a block is run; a compiled `call_block` may be put here.
    """

    def __init__(self, sizes: Architecture, dtype: torch.dtype) -> None:
        super().__init__()
        self.sizes = sizes
        self.dtype = dtype
        self.run_block: BlockCall = call_block
        self.model = Decoder(sizes)
        exponents = torch.arange(0, sizes.head_size, 2).float() / sizes.head_size
        angles = torch.outer(torch.arange(sizes.longest).float(), sizes.rope_theta**-exponents)
        angles = torch.cat((angles, angles), dim=-1)
        # Rounded to the activations' type as inference engines do, so that training sees the same positions.
        self.register_buffer("cosine", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sine", angles.sin().to(dtype), persistent=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Final hidden states [batch, length, hidden] of tokens [batch, length]."""
        length = tokens.shape[1]
        x: Tensor = self.model.embed_tokens(tokens).to(self.dtype)
        cosine, sine = self.get_buffer("cosine")[:length], self.get_buffer("sine")[:length]
        for block in self.model.layers:
            assert isinstance(block, Block)
            x = self.run_block(block, x, cosine, sine)
        out: Tensor = self.model.norm(x)
        return out

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] of hidden states [..., hidden]; the head's weights are the embedding's."""
        return F.linear(hidden, self.model.embed_tokens.weight.to(hidden.dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))


def rounded_copy(network: Network) -> Network:
    """A copy whose weights are rounded to bfloat16, as the exported model's are; runs uncompiled."""
    copy = Network(network.sizes, network.dtype).to(network.get_buffer("cosine").device)
    copy.load_state_dict({name: weight.bfloat16().float() for name, weight in network.state_dict().items()})
    return copy.eval()


def export(network: Network, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors (bfloat16) into the existing `folder`.

    Raises:
        ValueError: the weights are larger than `LARGEST_WEIGHTS`.
    """
    sizes = network.sizes
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.mlp,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.query_heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPSILON,
        "max_position_embeddings": sizes.longest,
        # Older readers look for rope_theta, newer ones for rope_parameters.
        "rope_theta": sizes.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": SPECIALS.index(BEGIN),
        "eos_token_id": SPECIALS.index(END),
        "pad_token_id": SPECIALS.index(PAD),
    }
    generation = {
        "do_sample": False,
        "temperature": 0.0,
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
    }
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    path = folder / "model.safetensors"
    weights = {name: weight.bfloat16().contiguous().cpu() for name, weight in network.state_dict().items()}
    save_file(weights, path, metadata={"format": "pt"})
    if path.stat().st_size >= LARGEST_WEIGHTS:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than {LARGEST_WEIGHTS}")


def load_weights(network: Network, folder: Path) -> None:
    """Read the weights that `export` wrote to `folder` into `network`, which must have the same sizes."""
    network.load_state_dict({name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()})
