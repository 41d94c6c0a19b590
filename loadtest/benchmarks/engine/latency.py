"""TTFT and TPOT of the whole engine: the dense backend that vLLM would use, this one dense, this one sparse.

    python -m loadtest.benchmarks.engine.latency --model loadtest/model/weights --cases 16384 32768 \
        --variant 'flexprefill+tidal={"sparse_prefill": "flexprefill", "sparse_decode": "tidal"}'

A case is ``TOKENS`` or ``REQUESTSxTOKENS``, so many fresh prompts that arrive together. Each line is the median of
`--repeats` runs. TTFT counts from the moment that the first request is scheduled to the first token of the last, TPOT
is the mean time per token while all requests decode; it takes as many output tokens as bring all of them to that.
Prompts are random tokens, or with `--needle-prompts` the bundled
model's retrieval prompts, whose attention is as sparse as real text's. Dense variants warm up in their first case only:
their kernels do not depend on the length, and a long dense prompt takes minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loadtest.offline import DensityReader, engine
from loadtest.text.needles import needle_prompt
from loadtest.text.tokenizer import build_tokenizer, chat_text, count_tokens

# What is measured is a method, also where it does not pay.
AS_ASKED = {"sparse_unprofitable": "sparse"}


@dataclass(frozen=True)
class Case:
    """Prompts that arrive together."""

    requests: int
    prompt_tokens: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """Read ``TOKENS`` or ``REQUESTSxTOKENS``.

        Raises:
            argparse.ArgumentTypeError: it is neither.
        """
        found = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", text)
        if found is None:
            raise argparse.ArgumentTypeError(
                f"{text!r} is neither TOKENS nor REQUESTSxTOKENS, such as 32768 or 8x32768"
            )
        return cls(int(found[1] or 1), int(found[2]))


@dataclass(frozen=True)
class Measurement:
    """Medians of one variant in one case."""

    name: str
    case: Case
    ttft_seconds: float
    tpot_seconds: float | None
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
) -> Iterator[Measurement]:
    """Run every variant in every case; variants take turns, so that drift hits all of them alike."""
    read_density = DensityReader()
    rng = random.Random(0)
    warm: set[str] = set()
    for case in arguments.cases:
        times: dict[str, list[tuple[float, float | None]]] = {name: [] for name in variants}
        densities: dict[str, dict[str, float]] = {}
        for repeat in range(-1, arguments.repeats):
            for name, extras in variants.items():
                if repeat < 0 and name in warm:
                    continue
                prompts = [
                    make_prompt(rng, case.prompt_tokens, vocabulary, arguments.needle_prompts)
                    for _ in range(case.requests)
                ]
                measured = run_together(llm, prompts, extras, arguments.output_tokens)
                if repeat >= 0:
                    times[name].append(measured)
                densities[name] = read_density()
                if not extras or arguments.one_warm_up:
                    warm.add(name)
        for name, pairs in times.items():
            ttft = statistics.median(first for first, _ in pairs)
            per_token = [tpot for _, tpot in pairs if tpot is not None]
            yield Measurement(name, case, ttft, statistics.median(per_token) if per_token else None, densities[name])


def run_together(
    llm: Any, prompts: list[list[int]], extras: dict[str, Any], output_tokens: int
) -> tuple[float, float | None]:
    """TTFT and TPOT of prompts that arrive together, in seconds."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True, extra_args=extras or None)
    sampling.detokenize = False
    vllm_engine = llm.llm_engine
    for number, prompt in enumerate(prompts):
        vllm_engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    counts = [0] * len(prompts)
    steps: list[tuple[float, list[int]]] = []
    metrics = []
    while vllm_engine.has_unfinished_requests():
        for output in vllm_engine.step():
            counts[int(output.request_id)] = len(output.outputs[0].token_ids)
            if output.finished:
                metrics.append(output.metrics)
        steps.append((time.perf_counter(), list(counts)))
    ttft = max(m.first_token_ts for m in metrics) - min(m.scheduled_ts for m in metrics)
    return ttft, time_per_step(steps, output_tokens)


def time_per_step(steps: list[tuple[float, list[int]]], output_tokens: int) -> float | None:
    """Mean time per token from the last request's first token to the first request's last one.

    Args:
        steps: after each step its end in seconds, and the tokens that each request has by then.
        output_tokens: of each request.

    Returns:
        Seconds, or None if a request ends before the last one begins: they never decode together.
    """
    together = [(end, counts) for end, counts in steps if min(counts) > 0]
    last = next(number for number, (_, counts) in enumerate(together) if max(counts) == output_tokens)
    (first_end, first_counts), (last_end, last_counts) = together[0], together[last]
    tokens = last_counts[0] - first_counts[0]
    return (last_end - first_end) / tokens if tokens else None


HEADER = (
    "| requests | prompt tokens | variant | density prefill | density decode | TTFT s | ratio | TPOT ms | ratio |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def line(m: Measurement, dense: Measurement) -> str:
    """A line of the Markdown table; ratios are the dense backend's time over the line's."""
    tpot, dense_tpot = m.tpot_seconds, dense.tpot_seconds
    per_token = "-" if tpot is None else f"{tpot * 1e3:.2f}"
    ratio = "-" if tpot is None or dense_tpot is None else f"{dense_tpot / tpot:.2f}x"
    by_phase = {key.partition("/")[0]: f"{value:.3f}" for key, value in m.density.items()}
    return (
        f"| {m.case.requests} | {m.case.prompt_tokens} | {m.name} | {by_phase.get('prefill', '1')} "
        f"| {by_phase.get('decode', '1')} | {m.ttft_seconds:.3f} | {dense.ttft_seconds / m.ttft_seconds:.2f}x "
        f"| {per_token} | {ratio} |"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--cases",
        type=Case.parse,
        nargs="+",
        default=[Case(1, 16384), Case(1, 32768)],
        metavar="[REQUESTSx]TOKENS",
        help="prompts that arrive together, and their tokens",
    )
    parser.add_argument("--needle-prompts", action="store_true", help="retrieval prompts of the bundled model")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--one-warm-up",
        action="store_true",
        help="warm sparse variants up in the first case only; others may then compile a kernel in a counted run",
    )
    parser.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens")
    parser.add_argument("--dense-backend", help="backend to compare with; default: FLASH_ATTN, CPU_ATTN on the CPU")
    parser.add_argument("--variant", action="append", default=[], help="NAME=JSON of sampling extras; repeatable")
    parser.add_argument("--no-own-dense", action="store_true", help="do not measure this backend's dense requests")
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON of further engine arguments")
    arguments = parser.parse_args()

    from vllm.platforms import current_platform

    baseline = arguments.dense_backend or ("CPU_ATTN" if current_platform.is_cpu() else "FLASH_ATTN")
    variants: dict[str, dict[str, Any]] = {} if arguments.no_own_dense else {"SPARSE, dense": {}}
    for variant in arguments.variant:
        name, _, extras = variant.partition("=")
        variants[name] = AS_ASKED | json.loads(extras)
    settings = {
        "max_num_batched_tokens": arguments.chunk,
        "max_model_len": max(case.prompt_tokens for case in arguments.cases) + arguments.output_tokens,
        **arguments.engine,
    }
    print(f"chunk {arguments.chunk}, {arguments.output_tokens} output tokens, {settings}")
    print(HEADER, flush=True)
    dense: dict[Case, Measurement] = {}
    runs: tuple[tuple[str, dict[str, dict[str, Any]]], ...] = ((baseline, {baseline: {}}), ("SPARSE", variants))
    for backend, chosen in runs:
        with engine(arguments.model, backend, **settings) as llm:
            vocabulary = llm.llm_engine.model_config.get_vocab_size()
            for measurement in measure(llm, chosen, arguments, vocabulary):
                print(line(measurement, dense.setdefault(measurement.case, measurement)), flush=True)


if __name__ == "__main__":
    main()
