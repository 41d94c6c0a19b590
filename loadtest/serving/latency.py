"""TTFT and TPOT of the whole engine: the dense backend that vLLM would use, this one dense, this one sparse.

    python -m loadtest.serving.latency --model loadtest/model/weights --lengths 16384 32768 \
        --variant 'flexprefill+tidal={"sparse_prefill": "flexprefill", "sparse_decode": "tidal"}'

Each line is the median of `--repeats` runs of `--batch` equal-length fresh prompts; TTFT counts from the moment that
the request is scheduled, TPOT is the time after the first token over the tokens after it. Prompts are random tokens, or
with `--needle-prompts` the bundled model's retrieval prompts, whose attention is as sparse as real text's.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from dataclasses import dataclass
from typing import Any

from loadtest.model.tokenizer import build_tokenizer, chat_text, count_tokens
from loadtest.quality.text import needle_prompt
from loadtest.serving.engine import DensityReader, engine


@dataclass(frozen=True)
class Measurement:
    """Medians of one variant at one length."""

    name: str
    prompt_tokens: int
    ttft_seconds: float
    tpot_seconds: float
    density: dict[str, float]


def make_prompt(rng: random.Random, length: int, vocabulary: int, needle: bool) -> list[int]:
    """A fresh prompt of `length` tokens, or with `needle` of up to 64 less."""
    if not needle:
        return [rng.randrange(300, vocabulary) for _ in range(length)]
    tokenizer = build_tokenizer()
    prompt = needle_prompt(rng, length - 32, lambda text: count_tokens(tokenizer, text), needles=3)
    return list(tokenizer.encode(chat_text(prompt.content), add_special_tokens=False).ids)


def measure(
    llm: Any, variants: dict[str, dict[str, Any]], arguments: argparse.Namespace, vocabulary: int
) -> list[Measurement]:
    """Run every variant at every length; variants take turns, so that drift hits all of them alike."""
    from vllm import SamplingParams

    read_density = DensityReader()
    rng = random.Random(0)
    measurements = []
    for length in arguments.lengths:
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        densities: dict[str, dict[str, float]] = {}
        # One round more than counted: the first compiles kernels.
        for repeat in range(arguments.repeats + 1):
            for name, extras in variants.items():
                prompts = [
                    {"prompt_token_ids": make_prompt(rng, length, vocabulary, arguments.needle_prompts)}
                    for _ in range(arguments.batch)
                ]
                sampling = SamplingParams(
                    temperature=0, max_tokens=arguments.output_tokens, ignore_eos=True, extra_args=extras or None
                )
                sampling.detokenize = False
                outputs = llm.generate(prompts, sampling, use_tqdm=False)
                if repeat:
                    statistics_of = [output.metrics for output in outputs]
                    ttft = max(m.first_token_ts - m.scheduled_ts for m in statistics_of)
                    tpot = statistics.mean(
                        (m.last_token_ts - m.first_token_ts) / (arguments.output_tokens - 1) for m in statistics_of
                    )
                    times[name].append((ttft, tpot))
                densities[name] = read_density()
        for name, pairs in times.items():
            ttft, tpot = (statistics.median(column) for column in zip(*pairs, strict=True))
            measurements.append(Measurement(name, length, ttft, tpot, densities[name]))
    return measurements


def table(measurements: list[Measurement], baseline: str) -> str:
    """A Markdown table; ratios are the baseline's time over the line's."""
    lines = [
        "| prompt tokens | variant | density prefill | density decode | TTFT s | ratio | TPOT ms | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    dense = {m.prompt_tokens: m for m in measurements if m.name == baseline}
    for m in sorted(measurements, key=lambda m: m.prompt_tokens):
        by_phase = {key.partition("/")[0]: f"{value:.3f}" for key, value in m.density.items()}
        ttft_ratio, tpot_ratio = "", ""
        if m.prompt_tokens in dense:
            reference = dense[m.prompt_tokens]
            ttft_ratio = f"{reference.ttft_seconds / m.ttft_seconds:.2f}x"
            tpot_ratio = f"{reference.tpot_seconds / m.tpot_seconds:.2f}x"
        lines.append(
            f"| {m.prompt_tokens} | {m.name} | {by_phase.get('prefill', '1')} | {by_phase.get('decode', '1')} "
            f"| {m.ttft_seconds:.3f} | {ttft_ratio} | {m.tpot_seconds * 1e3:.2f} | {tpot_ratio} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 32768], help="prompt tokens")
    parser.add_argument("--needle-prompts", action="store_true", help="retrieval prompts of the bundled model")
    parser.add_argument("--batch", type=int, default=1, help="prompts at once")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens")
    parser.add_argument("--dense-backend", help="backend to compare with; default: FLASH_ATTN, CPU_ATTN on the CPU")
    parser.add_argument("--variant", action="append", default=[], help="NAME=JSON of sampling extras; repeatable")
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON of further engine arguments")
    arguments = parser.parse_args()

    from vllm.platforms import current_platform

    baseline = arguments.dense_backend or ("CPU_ATTN" if current_platform.is_cpu() else "FLASH_ATTN")
    variants: dict[str, dict[str, Any]] = {"SPARSE, dense": {}}
    for variant in arguments.variant:
        name, _, extras = variant.partition("=")
        variants[name] = json.loads(extras)
    settings = {
        "max_num_batched_tokens": arguments.chunk,
        "max_model_len": max(arguments.lengths) + arguments.output_tokens,
        **arguments.engine,
    }
    measurements = []
    runs: tuple[tuple[str, dict[str, dict[str, Any]]], ...] = ((baseline, {baseline: {}}), ("SPARSE", variants))
    for backend, chosen in runs:
        with engine(arguments.model, backend, **settings) as llm:
            vocabulary = llm.llm_engine.model_config.get_vocab_size()
            measurements += measure(llm, chosen, arguments, vocabulary)
    print(f"batch {arguments.batch}, chunk {arguments.chunk}, {arguments.output_tokens} output tokens, {settings}")
    print(table(measurements, baseline))


if __name__ == "__main__":
    main()
