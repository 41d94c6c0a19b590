"""Queries, keys and values of an attention layer to measure on: built with known structure, or recorded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

SINK_TOKENS = 4
COLUMN_SHARE = 0.002
TOPICS = 256


@dataclass(frozen=True)
class Heads:
    """One layer's attention inputs for the last tokens of a context.

    Attributes:
        query: ``[chunk, query_heads, head_size]``, at the last positions.
        keys: ``[kv_heads, context, head_size]``.
        values: likewise.
        scale: softmax scale.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scale: float

    @property
    def chunk(self) -> int:
        """Query tokens."""
        return self.query.shape[0]

    @property
    def context(self) -> int:
        """Tokens in reach of the last query."""
        return self.keys.shape[1]


def synthetic_heads(
    generator: torch.Generator,
    chunk: int,
    context: int,
    query_heads: int,
    kv_heads: int,
    head_size: int,
    concentration: float,
    dtype: torch.dtype,
) -> Heads:
    """Heads that mix five patterns, each head in its own proportions.

    A quarter of the channels makes a band: rotations by position at frequencies spaced geometrically, as rotary
    embeddings have them, so that near keys score high; in every fourth head the keys' rotations lag, which moves the
    band to a distance. One channel gives the first tokens a high score for every query (sink), one gives 0.2 % of the
    positions one (columns). A quarter of the channels gives every key one of 256 topics and every run of 64 queries
    one of them, so that keys of that topic score high wherever they lie (needles). The rest is noise.

    Args:
        generator: on the device where the tensors are wanted.
        chunk: query tokens.
        context: tokens of the context, the chunk's included.
        query_heads: a multiple of `kv_heads`.
        kv_heads: heads of keys and values.
        head_size: at least 16.
        concentration: multiplies all pattern scores; about 1 attends almost evenly, 8 is sharp.
        dtype: of the result.
    """
    device = generator.device
    band_channels, topic_channels = head_size // 4, head_size // 4
    pairs = band_channels // 2
    positions = torch.arange(context, device=device).float()
    queries_at = positions[-chunk:]
    frequencies = 10000.0 ** -(torch.arange(pairs, device=device) / pairs)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    def rotations(at: torch.Tensor) -> torch.Tensor:
        angles = at.unsqueeze(-1) * frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=-1) / math.sqrt(pairs)

    lag = torch.where(torch.arange(kv_heads, device=device) % 4 == 3, uniform(kv_heads) * context / 4, 0.0).floor()
    in_columns = uniform(kv_heads, context) < COLUMN_SHARE
    codebook = torch.nn.functional.normalize(normal(TOPICS, topic_channels), dim=-1)
    key_topics = torch.randint(TOPICS, (kv_heads, context), generator=generator, device=device)
    query_topics = torch.randint(TOPICS, (-(-chunk // 64),), generator=generator, device=device)

    keys = normal(kv_heads, context, head_size)
    keys[..., :band_channels] = rotations(positions + lag.unsqueeze(1))
    keys[..., band_channels] = (positions < SINK_TOKENS).float()
    keys[..., band_channels + 1] = in_columns.float()
    topics_at = slice(band_channels + 2, band_channels + 2 + topic_channels)
    keys[..., topics_at] = codebook[key_topics]

    # Pattern scores in units of `concentration`, drawn for each head.
    weights = uniform(4, query_heads) * concentration * 2
    query = normal(chunk, query_heads, head_size)
    query[..., :band_channels] = rotations(queries_at).unsqueeze(1) * weights[0].unsqueeze(-1)
    query[..., band_channels] = weights[1]
    query[..., band_channels + 1] = weights[2]
    query[..., topics_at] = codebook[query_topics].repeat_interleave(64, dim=0)[:chunk].unsqueeze(1)
    query[..., topics_at] *= weights[3].unsqueeze(-1)
    noise = slice(topics_at.stop, None)
    query[..., noise] /= math.sqrt(max(head_size - topics_at.stop, 1))
    values = normal(kv_heads, context, head_size)
    return Heads(query.to(dtype), keys.to(dtype), values.to(dtype), 1.0)


@torch.no_grad()
def recorded_heads(model: str, token_ids: list[int], chunk: int, layers: list[int]) -> list[Heads]:
    """What a model's layers attend with, for the last tokens of a text.

    Args:
        model: folder or name that transformers loads.
        token_ids: of the text.
        chunk: last tokens to take queries of.
        layers: indices of the layers to record.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    recorded: dict[int, Heads] = {}

    def record(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[torch.Tensor, None]:
        if module.layer_idx in layers:
            last = query[0, :, -chunk:].transpose(0, 1).contiguous()
            recorded[module.layer_idx] = Heads(last, key[0].clone(), value[0].clone(), scaling)
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2), None

    AttentionInterface.register("record", record)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="record")
    network.to(device).eval().model(torch.tensor([token_ids], device=device), use_cache=False)
    return [recorded[layer] for layer in layers]
