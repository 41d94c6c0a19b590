"""A model with the cost of a large one and the answers of the bundled one: `python -m loadtest.model.widen FOLDER`.

It computes what the bundled model computes, inside the geometry of Llama-3.1-8B or another: load tests of a GPU then
see both what a method gains at that size and what it loses. Nothing that is added reaches the residual stream:

- The hidden state is followed by zeros. The mean of its squares shrinks accordingly, which the norms make up for.
- A head's pairs of dimensions lie apart by as much as the wider head turns more of them, so that each keeps its
  frequency; between them are zeros.
- Further heads are copies of real ones that nothing reads, and further layers copies of the attention of the layer
  before them: their attention is as sparse as the bundled model's, for methods that go by the heads' keys.
- Further rows of the MLP are random and not read either.

So half of each head, most of what the norms give and most of the matrices that write to the hidden state are zeros,
with which a GPU draws less power than with real weights. The number of operations and of bytes is the same.

The bundled model was trained to 34,816 positions. Without any scaling of them it answers single needles in 65,536
tokens as well, and most in 131,072 (`loadtest/RESULTS.md`).

TidalDecode's default layers would be copies, so `tidal.json` in the folder names the real ones in which it chooses:
`--additional-config '{"sparse": {"tidal": {"policy": "FOLDER/tidal.json"}}}'`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loadtest.model.network import NORM_EPSILON, Architecture, write_configuration
from loadtest.text.tokenizer import build_tokenizer, save_tokenizer
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.step.roles import Role

BUNDLED = Path(__file__).parent / "weights"
NOISE_DEVIATION = 0.02
INDEX = "model.safetensors.index.json"
TIDAL_POLICY = "tidal.json"


class GeometryError(Exception):
    """Sizes that the bundled model does not fit into, worded for the user."""


def bundled_sizes() -> Architecture:
    """The bundled model's sizes."""
    return Architecture(build_tokenizer().get_vocab_size())


def check_geometry(small: Architecture, wide: Architecture) -> None:
    """Refuse what `small` cannot be embedded in.

    Raises:
        GeometryError: a size is too small, or no multiple of what it must be.
    """
    for option, least, given in (
        ("--layers", small.layers, wide.layers),
        ("--hidden", small.hidden, wide.hidden),
        ("--heads", small.query_heads, wide.query_heads),
        ("--kv-heads", small.kv_heads, wide.kv_heads),
        ("--intermediate", small.mlp, wide.mlp),
        ("--max-position", small.longest, wide.longest),
    ):
        if given < least:
            raise GeometryError(f"{option} {given}: the bundled model has {least}; give that or more")
    if wide.head_size < small.head_size or wide.head_size % small.head_size:
        raise GeometryError(f"--head-dim {wide.head_size}: give a multiple of the bundled model's {small.head_size}")
    group = small.query_heads // small.kv_heads
    if wide.query_heads % wide.kv_heads or wide.query_heads // wide.kv_heads < group:
        raise GeometryError(
            f"--heads {wide.query_heads} --kv-heads {wide.kv_heads}: the heads must be a multiple of the KV heads, and "
            f"{group} or more for each, as in the bundled model"
        )


def _sources(small: Architecture, wide: Architecture) -> list[tuple[int, bool]]:
    """For each wide layer the small one that it is or copies, and whether it is a copy."""
    numbers = [number * small.layers // wide.layers for number in range(wide.layers)]
    return [(source, place > 0 and numbers[place - 1] == source) for place, source in enumerate(numbers)]


def tidal_roles(small: Architecture, wide: Architecture) -> list[Role]:
    """TidalDecode's role of each wide layer, as a policy names it: real ones have those of the small model's default.

    What layers that choose read themselves is not for roles of a policy to say (`Tidal.selection_reads`).
    """
    roles = Tidal(selection_reads="everything").layer_roles(small.layers)
    return [
        Role.READ if is_copy and roles[source] is Role.DENSE_AND_WRITE else roles[source]
        for source, is_copy in _sources(small, wide)
    ]


def widened(weights: Mapping[str, Tensor], small: Architecture, wide: Architecture) -> Iterator[dict[str, Tensor]]:
    """The wide model's parameters.

    Args:
        weights: of the small model, by Hugging Face's names.
        small: its sizes.
        wide: sizes that `check_geometry` accepts.

    Yields:
        The parameters of each layer, then those outside of layers; float32.
    """
    noise = torch.randn(
        max(wide.mlp, wide.query_heads * wide.head_size),
        wide.hidden,
        generator=torch.Generator().manual_seed(0),
    )
    widener = _Widener(small, wide, noise * NOISE_DEVIATION)
    for number, (source, is_copy) in enumerate(_sources(small, wide)):
        prefix = f"model.layers.{source}."
        layer = {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}
        made = widener.layer(layer, is_copy)
        yield {f"model.layers.{number}.{name}": weight for name, weight in made.items()}
    yield {
        "model.embed_tokens.weight": _padded(weights["model.embed_tokens.weight"], small.vocabulary, wide.hidden),
        "model.norm.weight": widener.norm(weights["model.norm.weight"]),
    }


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    return torch.nn.functional.pad(matrix.float(), (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))


class _Widener:
    """Widens parameters of one model.

    Args:
        small, wide: the sizes.
        noise: [rows, wide hidden] small numbers, at least as many rows as any matrix that reads the hidden state has.
    """

    def __init__(self, small: Architecture, wide: Architecture, noise: Tensor) -> None:
        self._small = small
        self._wide = wide
        self._noise = noise
        # Where the dimensions of a small head lie in a wide one; the two halves are rotated together.
        step = wide.head_size // small.head_size
        pair = torch.arange(small.head_size // 2) * step
        self._dimensions = torch.cat((pair, pair + wide.head_size // 2))
        small_group, wide_group = small.query_heads // small.kv_heads, wide.query_heads // wide.kv_heads
        # The small head that each wide one is or copies, and whether it is the one that is read.
        self._kv_heads = [head % small.kv_heads for head in range(wide.kv_heads)]
        self._query_heads = [
            kv_head * small_group + place % small_group for kv_head in self._kv_heads for place in range(wide_group)
        ]
        self._read = [
            head < small.kv_heads and place < small_group
            for head in range(wide.kv_heads)
            for place in range(wide_group)
        ]

    def norm(self, weight: Tensor) -> Tensor:
        """[wide hidden] of [small hidden]: the mean square over the wider vector is smaller."""
        scaled = weight.float() * math.sqrt(self._small.hidden / self._wide.hidden)
        return torch.nn.functional.pad(scaled, (0, self._wide.hidden - self._small.hidden))

    def layer(self, weights: Mapping[str, Tensor], is_copy: bool) -> dict[str, Tensor]:
        """A layer's parameters; of a copy nothing is added to the hidden state."""
        # Attention divides by the root of the head's size.
        sharpening = math.sqrt(self._wide.head_size / self._small.head_size)
        out, down = self._out(weights["self_attn.o_proj.weight"]), weights["mlp.down_proj.weight"]
        return {
            "input_layernorm.weight": self.norm(weights["input_layernorm.weight"]),
            "self_attn.q_proj.weight": self._heads(
                weights["self_attn.q_proj.weight"].float() * sharpening, self._query_heads
            ),
            "self_attn.k_proj.weight": self._heads(weights["self_attn.k_proj.weight"], self._kv_heads),
            "self_attn.v_proj.weight": self._heads(weights["self_attn.v_proj.weight"], self._kv_heads),
            "self_attn.o_proj.weight": torch.zeros_like(out) if is_copy else out,
            "post_attention_layernorm.weight": self.norm(weights["post_attention_layernorm.weight"]),
            "mlp.gate_proj.weight": self._beside_noise(weights["mlp.gate_proj.weight"]),
            "mlp.up_proj.weight": self._beside_noise(weights["mlp.up_proj.weight"]),
            "mlp.down_proj.weight": _padded(
                torch.zeros_like(down) if is_copy else down, self._wide.hidden, self._wide.mlp
            ),
        }

    def _heads(self, weight: Tensor, sources: list[int]) -> Tensor:
        """Rows of the wide heads, each from the small head that it is or copies."""
        small, wide = self._small, self._wide
        heads = torch.zeros(len(sources), wide.head_size, wide.hidden)
        real = weight.float().view(-1, small.head_size, small.hidden)[sources]
        # What meets the zeros of the hidden state need not be zero.
        heads[:, self._dimensions] = self._noise[: len(sources) * small.head_size].view(*real.shape[:2], wide.hidden)
        heads[:, self._dimensions, : small.hidden] = real
        return heads.flatten(0, 1)

    def _out(self, weight: Tensor) -> Tensor:
        """Columns of the wide query heads: zero for all copies."""
        small, wide = self._small, self._wide
        out = torch.zeros(wide.hidden, wide.query_heads, wide.head_size)
        real = weight.float().view(small.hidden, small.query_heads, small.head_size)
        for head, (source, is_read) in enumerate(zip(self._query_heads, self._read, strict=True)):
            if is_read:
                out[: small.hidden, head, self._dimensions] = real[:, source]
        return out.flatten(1)

    def _beside_noise(self, weight: Tensor) -> Tensor:
        """[wide MLP, wide hidden] with the small matrix at its beginning."""
        wide = self._noise[: self._wide.mlp].clone()
        wide[: weight.shape[0], : weight.shape[1]] = weight.float()
        return wide


def write_widened(wide: Architecture, folder: Path, model: Path = BUNDLED) -> None:
    """Write a model in another geometry as a Hugging Face folder in bfloat16, one file for each layer.

    Args:
        wide: its sizes.
        folder: is made; must not hold a model.
        model: folder of the bundled model, or of one of its sizes.

    Raises:
        GeometryError: the bundled model does not fit.
        FileExistsError: the folder holds a model.
    """
    small = bundled_sizes()
    check_geometry(small, wide)
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} holds a model already: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(build_tokenizer(), folder, wide.longest)
    weights = load_file(model / "model.safetensors")
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, shard in enumerate(widened(weights, small, wide), 1):
        name = f"model-{number:05}-of-{wide.layers + 1:05}.safetensors"
        rounded = {parameter: weight.bfloat16().contiguous() for parameter, weight in shard.items()}
        save_file(rounded, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(rounded, name)
        total_bytes += sum(weight.nbytes for weight in rounded.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    roles = {"roles": tidal_roles(small, wide)}
    (folder / TIDAL_POLICY).write_text(json.dumps(roles) + "\n", encoding="utf-8")
    # Last, so that a folder that was not finished is no model.
    write_configuration(wide, NORM_EPSILON * small.hidden / wide.hidden, folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to write the model to; 14 GB with the default sizes")
    parser.add_argument("--model", type=Path, default=BUNDLED, help="the model to widen, of the bundled one's sizes")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096, help="size of the hidden state")
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=14336, help="rows of the MLP")
    parser.add_argument("--max-position", type=int, default=69632, help="longest context in tokens")
    arguments = parser.parse_args()
    wide = Architecture(
        bundled_sizes().vocabulary,
        layers=arguments.layers,
        hidden=arguments.hidden,
        query_heads=arguments.heads,
        kv_heads=arguments.kv_heads,
        head_size=arguments.head_dim,
        mlp=arguments.intermediate,
        longest=arguments.max_position,
    )
    try:
        write_widened(wide, arguments.folder, arguments.model)
    except (GeometryError, FileExistsError) as error:
        sys.exit(f"loadtest.model.widen: {error}")


if __name__ == "__main__":
    main()
