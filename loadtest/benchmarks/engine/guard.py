"""What the guard costs and what it catches: the same requests with and without `sparse_min_recall`, on one engine.

    python -m loadtest.benchmarks.engine.guard --model loadtest/model/weights --needle-prompts --floor 0.8 \
        --cases 32768 8x32768 \
        --variant 'flexprefill+tidal={"sparse_prefill": "flexprefill", "sparse_decode": "tidal"}' \
        --variant 'window 64={"sparse_prefill": "streaming", "streaming_recent_tokens": 64}' \
        --variant 'decode window 64={"sparse_decode": "streaming", "streaming_recent_tokens": 64}'

Variants take turns, each without the guard and then with it, on fresh prompts. Times are medians of `--repeats` runs,
as `latency` measures them. A selector that is broken on purpose, such as a window of 64 tokens, should go dense in
every run ("caught"), an intact one in none. Layers are those of all requests of a run, mean over the runs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from dataclasses import dataclass, field
from typing import Any

from loadtest.benchmarks.engine.latency import AS_ASKED, Case, make_prompt, run_together
from loadtest.offline import engine, read_totals

CHECKS, LAYERS = "vllm_sparse_guard_checks_total", "vllm_sparse_guard_layers_total"
HEADER = (
    "| requests | prompt tokens | variant | guard | TTFT s | TPOT ms | layers checked | layers sent dense | caught |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


@dataclass
class Runs:
    """Runs of one variant in one case, with or without the guard.

    Attributes:
        ttft_seconds: of each run.
        tpot_seconds: likewise, of those in which all requests decode together.
        checks: layers checked in each run.
        layers: layers sent dense in each run.
    """

    ttft_seconds: list[float] = field(default_factory=list)
    tpot_seconds: list[float] = field(default_factory=list)
    checks: list[float] = field(default_factory=list)
    layers: list[float] = field(default_factory=list)

    def line(self, case: Case, name: str, guard: str) -> str:
        """A line of the Markdown table."""
        tpot = f"{statistics.median(self.tpot_seconds) * 1e3:.2f}" if self.tpot_seconds else "-"
        caught = sum(layers > 0 for layers in self.layers)
        return (
            f"| {case.requests} | {case.prompt_tokens} | {name} | {guard} | {statistics.median(self.ttft_seconds):.3f} "
            f"| {tpot} | {statistics.mean(self.checks):.0f} | {statistics.mean(self.layers):.1f} "
            f"| {caught} of {len(self.layers)} |"
        )


def measure(
    llm: Any, variants: dict[str, dict[str, Any]], case: Case, arguments: argparse.Namespace, rng: random.Random
) -> dict[tuple[str, float], Runs]:
    """Run every variant with the guard's floor at 0 and at `--floor`, after one run of each that does not count."""
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    runs = {(name, floor): Runs() for name in variants for floor in (0.0, arguments.floor)}
    for repeat in range(-1, arguments.repeats):
        for (name, floor), found in runs.items():
            prompts = [
                make_prompt(rng, case.prompt_tokens, vocabulary, arguments.needle_prompts) for _ in range(case.requests)
            ]
            before = read_totals(CHECKS, LAYERS)
            extras = {**variants[name], "sparse_min_recall": floor}
            ttft, tpot = run_together(llm, prompts, extras, arguments.output_tokens)
            after = read_totals(CHECKS, LAYERS)
            if repeat < 0:
                continue
            found.ttft_seconds.append(ttft)
            found.tpot_seconds += [] if tpot is None else [tpot]
            found.checks.append(after[CHECKS] - before[CHECKS])
            found.layers.append(after[LAYERS] - before[LAYERS])
    return runs


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--cases", type=Case.parse, nargs="+", default=[Case(1, 32768)], metavar="[REQUESTSx]TOKENS")
    parser.add_argument("--floor", type=float, default=0.8, help="sparse_min_recall; default: %(default)s")
    parser.add_argument("--needle-prompts", action="store_true", help="retrieval prompts of the bundled model")
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens")
    parser.add_argument("--variant", action="append", required=True, help="NAME=JSON of sampling extras; repeatable")
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON of further engine arguments")
    arguments = parser.parse_args()

    variants: dict[str, dict[str, Any]] = {}
    for variant in arguments.variant:
        name, _, extras = variant.partition("=")
        variants[name] = AS_ASKED | json.loads(extras)
    chosen = {
        method
        for extras in variants.values()
        for method in (extras.get("sparse_prefill"), extras.get("sparse_decode"))
        if method is not None
    }
    # A server that guards by default: its CUDA graphs hold guarded rows too.
    settings = {
        "max_num_batched_tokens": arguments.chunk,
        "max_model_len": max(case.prompt_tokens for case in arguments.cases) + arguments.output_tokens,
        "additional_config": {"sparse": {"methods": sorted(chosen), "min_recall": arguments.floor}},
        **arguments.engine,
    }
    print(f"floor {arguments.floor}, {arguments.output_tokens} output tokens, {settings}")
    print(HEADER, flush=True)
    rng = random.Random(0)
    with engine(arguments.model, "SPARSE", **settings) as llm:
        for case in arguments.cases:
            for (name, floor), runs in measure(llm, variants, case, arguments, rng).items():
                print(runs.line(case, name, "off" if floor == 0 else str(floor)), flush=True)


if __name__ == "__main__":
    main()
