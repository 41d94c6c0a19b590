"""Whole time of many prompts that arrive together, short and long ones mixed: dense, and by each prefill method.

    python -m loadtest.benchmarks.engine.burst --model qwen2.5-coder-0.5b --requests 24 --tokens 8192 32768 \
        --methods dhsa flexprefill sale hip streaming

On a small model the host bounds such a burst, on a large one the device: so `--chunk` (tokens of a step) and the model
decide what is measured. Prompts are fresh random tokens, of the lengths of `--tokens` in turn; with `--needle-prompts`
the bundled model's retrieval prompts. Each line is the median of `--repeats` runs after one that is not counted; runs
of different methods take turns. The time is from the first request's arrival to the last one's last token.

Requests ask to be sparse whether or not it pays (`sparse_unprofitable`) from a context of `--min-tokens` on, and every
decode step is dense. Only these methods are enabled, so that no graphs of others are captured at start-up. `--mixed`
adds a run in which the requests have the methods in turn, so that a step holds chunks of several.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.benchmarks.engine.latency import AS_ASKED, make_prompt
from loadtest.offline import DensityReader, engine
from vllm_sparse.methods.registry import DEFAULT_METHODS, PREFILL_METHODS

DEFAULT_PREFILL = [name for name in PREFILL_METHODS if name in DEFAULT_METHODS]
HEADER = "| variant | density | seconds | tokens/s | ratio |\n|---|---|---|---|---|"


@dataclass(frozen=True)
class Burst:
    """Medians of one variant.

    Attributes:
        name: of the variant.
        seconds: of the whole burst.
        prompt_tokens: of all its prompts.
        density: mean of the sparse prompt chunks; None if nothing sparse ran.
    """

    name: str
    seconds: float
    prompt_tokens: int
    density: float | None


def line(burst: Burst, dense: Burst) -> str:
    """A line of the Markdown table; the ratio is the dense backend's time over the line's."""
    density = "1" if burst.density is None else f"{burst.density:.3f}"
    return (
        f"| {burst.name} | {density} | {burst.seconds:.3f} | {burst.prompt_tokens / burst.seconds:.0f} "
        f"| {dense.seconds / burst.seconds:.2f}x |"
    )


def variants_of(methods: Sequence[str], mixed: bool, min_tokens: int) -> dict[str, list[dict[str, Any]]]:
    """Sampling extras of each variant; requests take them in turn."""
    by_method = {name: [AS_ASKED | {"sparse_prefill": name, "sparse_min_tokens": min_tokens}] for name in methods}
    variants: dict[str, list[dict[str, Any]]] = {"SPARSE, dense": [{}], **by_method}
    if mixed:
        variants["mixed"] = [extras for one in by_method.values() for extras in one]
    return variants


def run_burst(llm: Any, prompts: list[list[int]], extras: list[dict[str, Any]], output_tokens: int) -> float:
    """Seconds until all of the prompts, which arrive together, have their outputs."""
    from vllm import SamplingParams

    vllm_engine = llm.llm_engine
    started = time.perf_counter()
    for number, (prompt, own) in enumerate(zip(prompts, itertools.cycle(extras), strict=False)):
        sampling = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True, extra_args=own or None)
        sampling.detokenize = False
        vllm_engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    while vllm_engine.has_unfinished_requests():
        vllm_engine.step()
    return time.perf_counter() - started


def measure(
    llm: Any, variants: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace, vocabulary: int
) -> Iterator[Burst]:
    """Run every variant; variants take turns, so that drift hits all of them alike."""
    read_density = DensityReader()
    rng = random.Random(0)
    lengths = list(itertools.islice(itertools.cycle(arguments.tokens), arguments.requests))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    densities: dict[str, dict[str, float]] = {}
    for repeat in range(-1, arguments.repeats):
        for name, extras in variants.items():
            prompts = [make_prompt(rng, length, vocabulary, arguments.needle_prompts) for length in lengths]
            took = run_burst(llm, prompts, extras, arguments.output_tokens)
            densities[name] = read_density()
            if repeat >= 0:
                seconds[name].append(took)
    for name, times in seconds.items():
        prefill = [density for key, density in densities[name].items() if key.startswith("prefill/")]
        mean = statistics.mean(prefill) if prefill else None
        yield Burst(name, statistics.median(times), sum(lengths), mean)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="lengths of prompts, in turn")
    parser.add_argument("--methods", nargs="+", choices=list(PREFILL_METHODS), default=DEFAULT_PREFILL)
    parser.add_argument("--mixed", action="store_true", help="one more run, of requests with all these methods")
    parser.add_argument("--min-tokens", type=int, default=2048, help="shorter contexts run dense")
    parser.add_argument("--needle-prompts", action="store_true", help="retrieval prompts of the bundled model")
    parser.add_argument("--output-tokens", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens")
    parser.add_argument("--dense-backend", help="backend to compare with; default: FLASH_ATTN, CPU_ATTN on the CPU")
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON of further engine arguments")
    arguments = parser.parse_args()

    from vllm.platforms import current_platform

    baseline = arguments.dense_backend or ("CPU_ATTN" if current_platform.is_cpu() else "FLASH_ATTN")
    settings = {
        "max_num_batched_tokens": arguments.chunk,
        "max_model_len": max(arguments.tokens) + arguments.output_tokens,
        **arguments.engine,
    }
    sparse = {"additional_config": {"sparse": {"methods": arguments.methods}}, **settings}
    lengths = "/".join(map(str, arguments.tokens))
    print(f"{arguments.requests} prompts of {lengths} tokens, chunk {arguments.chunk}, {settings}")
    print(HEADER, flush=True)
    dense: Burst | None = None
    runs: tuple[tuple[str, dict[str, list[dict[str, Any]]], dict[str, Any]], ...] = (
        (baseline, {baseline: [{}]}, settings),
        ("SPARSE", variants_of(arguments.methods, arguments.mixed, arguments.min_tokens), sparse),
    )
    for backend, variants, own in runs:
        with engine(arguments.model, backend, **own) as llm:
            vocabulary = llm.llm_engine.model_config.get_vocab_size()
            for burst in measure(llm, variants, arguments, vocabulary):
                dense = dense or burst
                print(line(burst, dense), flush=True)


if __name__ == "__main__":
    main()
