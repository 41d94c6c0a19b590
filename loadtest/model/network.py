"""The Llama architecture in plain PyTorch with Hugging Face's parameter names, and its export as such a folder.

Its first weights are random except in the attention of the first three layers, which begins as what any retrieval needs
and what training from random weights alone finds late or never: heads that look a fixed number of tokens back, and
heads that look for the place behind an earlier occurrence of the token just read. Training changes all of them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loadtest.text.tokenizer import BEGIN, END, PAD, SPECIALS

NORM_EPSILON = 1e-5
# The weights must stay small enough to live in the repository.
LARGEST_WEIGHTS = 16 * 1024 * 1024

# First weights. The embedding is large, so that the common part of all gradients does not soon make its rows alike; one
# of its dimensions is the same for all tokens, so that a head can look at places whatever stands there.
EMBEDDING_DEVIATION = 0.5
CONSTANT = 4 * EMBEDDING_DEVIATION
# Pairs of a head's dimensions that the rotation turns fast, for places, and slowly, for meeting over a distance.
FAST_PAIRS, SLOW_PAIRS = 12, 16
PLACE_SCORE = 8.0
MATCH_GAIN = 1.7
# For the layers after the first, by key/value head: how far back the token to compare is where the head reads, and how
# far where it looks. "harbour is 482", "harbour is 482 13"; "harbour has the code 482", "482 13".
MATCHES = (((1, 2), (2, 3)), ((1, 4), (0, 1)))


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
    rope_theta: float = 1e7
    longest: int = 34816

    @property
    def damping(self) -> float:
        """Makes what the layers add at first as large in sum as what one would."""
        return float((2 * self.layers) ** -0.5)

    @property
    def frequencies(self) -> Tensor:
        """[head size / 2] angles by which one token's step turns the pairs of a head's dimensions."""
        return self.rope_theta ** -(torch.arange(0, self.head_size, 2).float() / self.head_size)


class Linear(nn.Module):
    """A matrix without bias, kept in float32 and used in the activations' type."""

    def __init__(self, inputs: int, outputs: int, damping: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * damping * inputs**-0.5)

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

    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        self.head_size = sizes.head_size
        queries, keys = sizes.query_heads * sizes.head_size, sizes.kv_heads * sizes.head_size
        self.q_proj = Linear(sizes.hidden, queries)
        self.k_proj = Linear(sizes.hidden, keys)
        self.v_proj = Linear(sizes.hidden, keys)
        self.o_proj = Linear(queries, sizes.hidden, sizes.damping)

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

    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        self.gate_proj = Linear(sizes.hidden, sizes.mlp)
        self.up_proj = Linear(sizes.hidden, sizes.mlp)
        self.down_proj = Linear(sizes.mlp, sizes.hidden, sizes.damping)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One layer of the network."""

    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        self.input_layernorm = Norm(sizes.hidden)
        self.self_attn = Attention(sizes)
        self.post_attention_layernorm = Norm(sizes.hidden)
        self.mlp = Mlp(sizes)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cosine, sine)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what Hugging Face calls `model`."""

    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocabulary, sizes.hidden)
        nn.init.normal_(self.embed_tokens.weight, std=EMBEDDING_DEVIATION)
        blocks = [Block(sizes) for _ in range(sizes.layers)]
        self.layers = nn.ModuleList(blocks)
        self.norm = Norm(sizes.hidden)
        # Logits of deviation one, as the head's weights are the embedding's.
        nn.init.constant_(self.norm.weight, 1 / (EMBEDDING_DEVIATION * sizes.hidden**0.5))
        # The same for all tokens.
        self.embed_tokens.weight.data[:, 0] = CONSTANT
        _prepare_attention([block.self_attn for block in blocks], sizes)


@torch.no_grad()
def _prepare_attention(layers: list[Attention], sizes: Architecture) -> None:
    """Give the attention of the first layers the weights that the module's description tells.

    Head h of the first layer looks h + 1 tokens back and writes the token it finds there into a space of its own. The
    first head of each group in the layers after it compares two of these spaces as `MATCHES` tells, and copies the
    token it finds.
    """
    size, group = sizes.head_size, sizes.query_heads // sizes.kv_heads
    first = layers[0]
    query, key, value, out = (part.weight for part in (first.q_proj, first.k_proj, first.v_proj, first.o_proj))
    query.mul_(0.1)
    key.mul_(0.1)
    pair = torch.arange(FAST_PAIRS)
    # The first layer sees the embedding normalised; both sides together give `PLACE_SCORE` for each pair.
    seen = CONSTANT / (EMBEDDING_DEVIATION**2 + CONSTANT**2 / sizes.hidden) ** 0.5
    length = (PLACE_SCORE * size**0.5) ** 0.5 / seen
    for head in range(sizes.query_heads):
        angle = -(head + 1) * sizes.frequencies[:FAST_PAIRS]
        query[head * size + pair, 0] = length * angle.cos()
        query[head * size + size // 2 + pair, 0] = length * angle.sin()
    for head in range(sizes.kv_heads):
        key[head * size + pair, 0] = length
        # The same for all, so that what was found at different distances can be compared.
        value[head * size : (head + 1) * size] = value[:size]
    value[:, 0] = 0.0
    nn.init.orthogonal_(out)

    pair = torch.arange(size // 2 - SLOW_PAIRS, size // 2)
    rows = torch.cat((pair, pair + size // 2))
    # The embedding itself is smaller than what the first layer adds.
    itself = value[: len(rows)] / EMBEDDING_DEVIATION
    spaces = [itself, *(part.T[: len(rows)] for part in out.chunk(sizes.query_heads, dim=1))]
    for layer, matches in zip(layers[1:], MATCHES, strict=False):
        query, key, value, out = (part.weight for part in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj))
        query.mul_(0.1)
        key.mul_(0.1)
        for head, (here, there) in enumerate(matches):
            query[head * group * size + rows] = MATCH_GAIN * spaces[here]
            key[head * size + rows] = MATCH_GAIN * spaces[there]
            out[:, head * group * size : (head * group + 1) * size] = value[head * size : (head + 1) * size].T


class Network(nn.Module):
    """The language model; parameters in float32, activations in `dtype`."""

    def __init__(self, sizes: Architecture, dtype: torch.dtype) -> None:
        super().__init__()
        self.sizes = sizes
        self.dtype = dtype
        self.model = Decoder(sizes)
        angles = torch.outer(torch.arange(sizes.longest).float(), sizes.frequencies)
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
            x = block(x, cosine, sine)
        out: Tensor = self.model.norm(x)
        return out

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] of hidden states [..., hidden]; the head's weights are the embedding's."""
        return F.linear(hidden, self.model.embed_tokens.weight.to(hidden.dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))


def rounded_copy(network: Network) -> Network:
    """A copy whose weights are rounded to bfloat16, as the exported model's are."""
    copy = Network(network.sizes, network.dtype).to(network.get_buffer("cosine").device)
    copy.load_state_dict({name: weight.bfloat16().float() for name, weight in network.state_dict().items()})
    return copy.eval()


def write_configuration(sizes: Architecture, norm_epsilon: float, folder: Path) -> None:
    """Write config.json and generation_config.json of a bfloat16 model of these sizes into the existing `folder`."""
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
        "rms_norm_eps": norm_epsilon,
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


def export(network: Network, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors (bfloat16) into the existing `folder`.

    Raises:
        ValueError: the weights are larger than `LARGEST_WEIGHTS`.
    """
    write_configuration(network.sizes, NORM_EPSILON, folder)
    path = folder / "model.safetensors"
    weights = {name: weight.bfloat16().contiguous().cpu() for name, weight in network.state_dict().items()}
    save_file(weights, path, metadata={"format": "pt"})
    if path.stat().st_size >= LARGEST_WEIGHTS:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than {LARGEST_WEIGHTS}")


def load_weights(network: Network, folder: Path) -> None:
    """Read the weights that `export` wrote to `folder` into `network`, which must have the same sizes."""
    network.load_state_dict({name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()})
