"""Prefill of one layer: selection, attention, recall and error of every method beside the dense kernel.

    python -m loadtest.benchmarks.kernels.prefill --lengths 32768 131072 --densities 0.05 0.1
    python -m loadtest.benchmarks.kernels.prefill --heads recorded --lengths 32768 \
        --query-heads 4 --kv-heads 2 --head-size 64

Every method is set to every density by its own main knob, so that methods are compared at equal cost; "true mass" is
the selection that knows the true attention. Times are medians; the dense kernel is timed anew beside each line. Kernel
efficiency is density x dense time / attention time: 1 would mean that skipping 90 % of the keys saves 90 % of the time.
"""

from __future__ import annotations

import argparse
import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loadtest.benchmarks.kernels.cache import Cache, write_cache
from loadtest.benchmarks.kernels.heads import Heads, recorded_heads, synthetic_heads
from loadtest.benchmarks.kernels.timing import median_seconds
from loadtest.benchmarks.kernels.truth import TrueMass, block_mass, recall
from vllm_sparse.backend.prefill import PromptChunk, attend_prompt_chunk
from vllm_sparse.methods.dhsa import Dhsa
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.hip import Hip
from vllm_sparse.methods.prefill import Layer, PrefillMethod
from vllm_sparse.methods.sale import Sale
from vllm_sparse.metrics import RowDensity
from vllm_sparse.pages import PageList, empty_lists
from vllm_sparse.step.chunks import PromptChunks, one_chunk
from vllm_sparse.step.plan import RowSpan

BUNDLED_MODEL = Path(__file__).parents[2] / "model" / "weights"
FIRST_LAYER = Layer(0, 0)
SEARCH_STEPS = 10
# The search stops within this share of the density asked for.
SEARCH_TOLERANCE = 0.03

# A method at a setting between 0 (sparsest) and 1 (dense), for a context; density grows with the setting.
Family = Callable[[float, int], PrefillMethod]
FAMILIES: dict[str, Family] = {
    "flexprefill": lambda setting, context: FlexPrefill(gamma=max(setting, 1e-3), min_budget_tokens=128),
    "sale": lambda setting, context: Sale(tau=10 ** (2 - 8 * setting)),
    "dhsa": lambda setting, context: Dhsa(density=max(setting, 1e-3), bound_weight=0.0, candidate_factor=1.0),
    "dhsa-two-stages-2x": lambda setting, context: _two_stages(setting, 2.0),
    "dhsa-two-stages-4x": lambda setting, context: _two_stages(setting, 4.0),
    "hip": lambda setting, context: Hip(stage_budget_tokens=_stage_tokens(setting, context)),
}


def _two_stages(setting: float, candidate_factor: float) -> Dhsa:
    return Dhsa(density=max(setting, 1e-3), bound_weight=0.5, candidate_factor=candidate_factor)


def _stage_tokens(setting: float, context: int) -> tuple[int, ...]:
    last = max(int(setting * context) // 256 * 256, 256)
    return max(4 * last, 512), max(2 * last, 512), last


@dataclass(frozen=True)
class Measurement:
    """One line of the table."""

    heads: str
    context: int
    chunk: int
    method: str
    density: float
    selection_seconds: float
    attention_seconds: float
    dense_seconds: float
    recall: float
    error: float

    @property
    def speedup(self) -> float:
        """Dense time over selection and attention together."""
        return self.dense_seconds / (self.selection_seconds + self.attention_seconds)

    @property
    def efficiency(self) -> float:
        """Of the attention kernel over the lists."""
        return self.density * self.dense_seconds / self.attention_seconds


def density_of(method: PrefillMethod, lists: PageList, heads: Heads) -> float:
    """KV tokens read over KV tokens in reach, as the server's metric counts them."""
    density = RowDensity("prefill", method.name)
    having = method.list_heads(heads.query.shape[1], heads.keys.shape[0])
    density.add(0, lists.kept_tokens, RowSpan(0, 0, heads.chunk, heads.context), method.query_block_tokens, having)
    return float(lists.kept_tokens.sum()) / (having * density.candidates)


def selector(method: PrefillMethod, cache: Cache) -> Callable[[], PageList]:
    """Chooses a method's lists for the cached chunk as a layer does; what a step prepares is prepared."""
    heads, page_size = cache.heads, cache.page_size(method.page_tokens)
    blocks = one_chunk(heads.chunk, heads.context, method.query_block_tokens, heads.query.device)
    prepared = method.prepare(blocks, [None])
    chunks = PromptChunks(blocks, heads.query, (cache.keys,), cache.block_table.unsqueeze(0), heads.scale)
    rows = blocks.blocks * method.list_heads(heads.query.shape[1], heads.keys.shape[0])

    def chosen() -> PageList:
        lists = empty_lists(rows, -(-heads.context // page_size), page_size, heads.query.device)
        method.select_chunks(chunks, [FIRST_LAYER], prepared, lists)
        return lists

    return chosen


def select(method: PrefillMethod, cache: Cache) -> PageList:
    """A method's lists for the cached chunk."""
    return selector(method, cache)()


def at_density(family: Family, density: float, cache: Cache) -> PrefillMethod:
    """The member of a family whose density on these heads comes nearest to the one asked for, by bisection."""
    low, high = 0.0, 1.0
    best, best_distance = family(1.0, cache.heads.context), float("inf")
    for _ in range(SEARCH_STEPS):
        setting = (low + high) / 2
        method = family(setting, cache.heads.context)
        found = density_of(method, select(method, cache), cache.heads)
        if abs(found - density) < best_distance:
            best, best_distance = method, abs(found - density)
        if best_distance <= SEARCH_TOLERANCE * density:
            break
        low, high = (setting, high) if found < density else (low, setting)
    return best


def measure(
    name: str, cache: Cache, families: dict[str, Family], densities: list[float], repeats: int
) -> Iterator[Measurement]:
    """Every method at every density on one layer's heads, and the selection that knows the truth."""
    heads = cache.heads
    mass = block_mass(heads)
    dense_output = cache.dense()
    executor = cache.executor
    for density in densities:
        methods = {label: at_density(family, density, cache) for label, family in families.items()}
        for label, method in {**methods, TrueMass.name: TrueMass(mass, density)}.items():
            lists = select(method, cache)
            output = torch.empty_like(heads.query)
            chunk = PromptChunk(heads.query, output, cache.kv_cache, cache.block_table, heads.scale)
            attend = functools.partial(attend_prompt_chunk, executor, method, lists, chunk)
            attend()
            error = (output.float() - dense_output.float()).norm() / dense_output.float().norm()
            yield Measurement(
                name,
                heads.context,
                heads.chunk,
                label,
                density_of(method, lists, heads),
                median_seconds(selector(method, cache), repeats),
                median_seconds(attend, repeats),
                # Beside each method again: a card's clock falls while it works.
                median_seconds(cache.dense, repeats),
                recall(mass, lists, method.query_block_tokens, heads.chunk, heads.context),
                float(error),
            )


def mean_of(measurements: list[Measurement]) -> Measurement:
    """One line for several layers of a model: means of everything."""
    first = measurements[0]
    names = ("density", "selection_seconds", "attention_seconds", "dense_seconds", "recall", "error")
    means = {name: sum(getattr(one, name) for one in measurements) / len(measurements) for name in names}
    return replace(first, **means)


HEADER = (
    "| heads | context | chunk | method | density | selection ms | of dense | attention ms | efficiency | dense ms "
    "| speed-up | recall | error |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(m: Measurement) -> str:
    """A line of the Markdown table."""
    return (
        f"| {m.heads} | {m.context} | {m.chunk} | {m.method} | {m.density:.3f} | {m.selection_seconds * 1e3:.2f} "
        f"| {m.selection_seconds / m.dense_seconds:.1%} | {m.attention_seconds * 1e3:.2f} | {m.efficiency:.2f} "
        f"| {m.dense_seconds * 1e3:.2f} | {m.speedup:.2f}x | {m.recall:.4f} | {m.error:.4f} |"
    )


def prompt_tokens(length: int, seed: int) -> list[int]:
    """A retrieval prompt of the bundled model."""
    from loadtest.benchmarks.engine.latency import make_prompt

    return make_prompt(random.Random(seed), length, 0, needle=True)


def layers_of(arguments: argparse.Namespace, length: int) -> Iterator[tuple[str, list[Heads]]]:
    """Heads to measure, by name; several layers of one name are averaged."""
    chunk = min(arguments.chunk, length)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.heads == "recorded":
        tokens = prompt_tokens(length, arguments.seed)
        yield "recorded", recorded_heads(arguments.model, tokens, min(chunk, len(tokens)), arguments.layers)
        return
    for concentration in arguments.concentrations:
        generator = torch.Generator(device).manual_seed(arguments.seed)
        sizes = (chunk, length, arguments.query_heads, arguments.kv_heads, arguments.head_size)
        yield f"synthetic {concentration:g}", [synthetic_heads(generator, *sizes, concentration, torch.bfloat16)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--heads", choices=["synthetic", "recorded"], default="synthetic")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072], help="tokens of context")
    parser.add_argument("--chunk", type=int, default=8192, help="query tokens, the last of the context")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.1, 0.25])
    parser.add_argument("--methods", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--concentrations", type=float, nargs="+", default=[4.0, 8.0], help="of synthetic heads")
    parser.add_argument("--query-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--model", default=str(BUNDLED_MODEL), help="model to record heads of")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3, 5, 7], help="to record; the mean is shown")
    parser.add_argument("--block-size", type=int, help="tokens of a KV-cache block; default: the backend's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> None:
    """Print the table line by line."""
    cuda = torch.cuda.is_available()
    block_size = arguments.block_size or (128 if cuda else 32)
    families = {name: FAMILIES[name] for name in arguments.methods}
    print(torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads")
    print(HEADER, flush=True)
    for length in arguments.lengths:
        for name, layers in layers_of(arguments, length):
            by_line: list[list[Measurement]] = []
            for heads in layers:
                generator = torch.Generator(heads.keys.device).manual_seed(arguments.seed)
                cache = write_cache(heads, block_size, generator)
                by_line.append(list(measure(name, cache, families, arguments.densities, arguments.repeats)))
            for of_layers in zip(*by_line, strict=True):
                print(line(mean_of(list(of_layers))), flush=True)


def main(argv: list[str] | None = None) -> Any:
    """Command line of `python -m loadtest.benchmarks.kernels.prefill`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
