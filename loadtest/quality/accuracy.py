"""Retrieval accuracy of sparse settings beside dense: the same fresh needle prompts, asked of a running server.

    make serve &
    python -m loadtest.quality.accuracy --tokens 32768 --prompts 100 \
        --variant 'flexprefill={"sparse_prefill": "flexprefill"}'

Prompts are counted in the bundled model's tokens. Densities are read from the server's `/metrics`, so nothing else
should use the server meanwhile.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from loadtest.text.needles import NeedlePrompt, needle_prompt, score
from loadtest.text.tokenizer import build_tokenizer, count_tokens

# The chat template's own tokens, with room to spare.
TEMPLATE_TOKENS = 32
ANSWER_TOKENS = 16


class Client:
    """Asks an OpenAI-compatible server.

    Args:
        url: of the server, without a path.
        model: served model name.
    """

    def __init__(self, url: str, model: str) -> None:
        self._url = url
        self._model = model
        self._densities: dict[tuple[str, str], tuple[float, float]] = {}

    def answer(self, prompt: NeedlePrompt, extras: dict[str, Any]) -> str:
        """The model's greedy answer.

        Raises:
            urllib.error.HTTPError: the server refused the request.
        """
        body = {
            "model": self._model,
            "messages": prompt.messages,
            "max_tokens": ANSWER_TOKENS * len(prompt.keys) + 8,
            "temperature": 0,
            "vllm_xargs": extras,
            # No prompt is prefilled by another variant's request.
            "cache_salt": f"accuracy-{time.monotonic_ns()}",
        }
        request = urllib.request.Request(
            f"{self._url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=3600) as response:
            text: str = json.load(response)["choices"][0]["message"]["content"]
            return text

    def fresh_density(self) -> dict[str, float]:
        """Mean density by phase since the last call."""
        with urllib.request.urlopen(f"{self._url}/metrics", timeout=60) as response:
            exposition = response.read().decode()
        totals: dict[tuple[str, str], list[float]] = {}
        for family in text_string_to_metric_families(exposition):
            for sample in family.samples if family.name == "vllm_sparse_density_ratio" else ():
                part = sample.name.rpartition("_")[2]
                if part in ("sum", "count"):
                    pair = totals.setdefault((sample.labels["phase"], sample.labels["method"]), [0.0, 0.0])
                    pair[part == "count"] += sample.value
        fresh = {}
        for key, (total, count) in totals.items():
            old_total, old_count = self._densities.get(key, (0.0, 0.0))
            if count > old_count:
                fresh[key[0]] = (total - old_total) / (count - old_count)
            self._densities[key] = (total, count)
        return fresh


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="needle", help="served model name")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768], help="prompt tokens")
    parser.add_argument("--needles", type=int, default=1, help="needles in a prompt")
    parser.add_argument("--asked", type=int, default=1, help="needles asked for")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--concurrency", type=int, default=4, help="requests at once")
    parser.add_argument("--seed", type=int, default=20261122)
    parser.add_argument("--variant", action="append", default=[], help="NAME=JSON of sampling extras; repeatable")
    parser.add_argument("--no-dense", action="store_true", help="only the variants, compared with the first")
    arguments = parser.parse_args()

    variants: dict[str, dict[str, Any]] = {} if arguments.no_dense else {"dense": {}}
    for variant in arguments.variant:
        name, _, extras = variant.partition("=")
        variants[name] = json.loads(extras)
    tokenizer = build_tokenizer()
    client = Client(arguments.url, arguments.model)
    client.fresh_density()
    print("| prompt tokens | needles | asked | variant | density prefill | density decode | right | same as first |")
    print("|---|---|---|---|---|---|---|---|")
    for length in arguments.tokens:
        rng = random.Random(arguments.seed + length)
        prompts = [
            needle_prompt(
                rng,
                length - TEMPLATE_TOKENS,
                lambda text: count_tokens(tokenizer, text),
                arguments.needles,
                arguments.asked,
            )
            for _ in range(arguments.prompts)
        ]
        first_texts: list[str] = []
        for name, extras in variants.items():
            with ThreadPoolExecutor(arguments.concurrency) as threads:
                texts = list(threads.map(lambda prompt, extras=extras: client.answer(prompt, extras), prompts))
            first_texts = first_texts or texts
            right = sum(score(prompt, text) for prompt, text in zip(prompts, texts, strict=True))
            same = sum(first == second for first, second in zip(texts, first_texts, strict=True))
            density = {phase: f"{value:.3f}" for phase, value in client.fresh_density().items()}
            print(
                f"| {length} | {arguments.needles} | {arguments.asked} | {name} | {density.get('prefill', '1')} "
                f"| {density.get('decode', '1')} | {right:.1f} / {len(prompts)} | {same} / {len(prompts)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
