"""Retrieval accuracy of sparse settings beside dense, on the same fresh needle prompts.

    python -m loadtest.quality.accuracy --model loadtest/model/weights --tokens 32768 --prompts 100 \
        --variant 'flexprefill={"sparse_prefill": "flexprefill"}'
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from loadtest.quality.text import NeedlePrompt, needle_prompt, score
from loadtest.serving.engine import DensityReader, engine


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768], help="prompt tokens")
    parser.add_argument("--needles", type=int, default=1, help="needles in a prompt")
    parser.add_argument("--asked", type=int, default=1, help="needles asked for")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=20261122)
    parser.add_argument("--variant", action="append", default=[], help="NAME=JSON of sampling extras; repeatable")
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON of further engine arguments")
    arguments = parser.parse_args()

    variants: dict[str, dict[str, Any]] = {"dense": {}}
    for variant in arguments.variant:
        name, _, extras = variant.partition("=")
        variants[name] = json.loads(extras)

    from vllm import SamplingParams

    print("| prompt tokens | needles | asked | variant | density prefill | density decode | right | same as dense |")
    print("|---|---|---|---|---|---|---|---|")
    with engine(str(Path(arguments.model)), "SPARSE", **arguments.engine) as llm:
        tokenizer = llm.get_tokenizer()
        read_density = DensityReader()
        for length in arguments.tokens:
            rng = random.Random(arguments.seed + length)

            def count(text: str) -> int:
                return len(tokenizer.encode(text, add_special_tokens=False))

            # Room for the chat template's own tokens.
            prompts: list[NeedlePrompt] = [
                needle_prompt(rng, length - 32, count, arguments.needles, arguments.asked)
                for _ in range(arguments.prompts)
            ]
            dense_texts: list[str] = []
            for name, extras in variants.items():
                sampling = SamplingParams(temperature=0, max_tokens=16 * arguments.asked + 8, extra_args=extras or None)
                outputs = llm.chat([prompt.messages for prompt in prompts], sampling, use_tqdm=False)
                texts = [output.outputs[0].text for output in outputs]
                dense_texts = dense_texts or texts
                right = sum(score(prompt, text) for prompt, text in zip(prompts, texts, strict=True))
                same = sum(first == second for first, second in zip(texts, dense_texts, strict=True))
                density = {key.partition("/")[0]: f"{value:.3f}" for key, value in read_density().items()}
                print(
                    f"| {length} | {arguments.needles} | {arguments.asked} | {name} | {density.get('prefill', '1')} "
                    f"| {density.get('decode', '1')} | {right:.1f} / {len(prompts)} | {same} / {len(prompts)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
