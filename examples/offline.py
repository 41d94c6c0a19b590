"""Asks the bundled model one question without a server, dense and with two sparse settings.

Usage, in the repository's root: .venv/bin/python -m examples.offline [--model FOLDER] [--tokens 5000]
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

from loadtest.text.needles import needle_prompt
from loadtest.text.tokenizer import build_tokenizer, count_tokens

BUNDLED_MODEL = Path(__file__).parents[1] / "loadtest" / "model" / "weights"
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dhsa": {"sparse_prefill": "dhsa", "sparse_min_tokens": 1024},
    "flexprefill + tidal": {
        "sparse_prefill": "flexprefill",
        "flexprefill_gamma": 0.95,
        "sparse_decode": "tidal",
        "sparse_min_tokens": 1024,
    },
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=BUNDLED_MODEL)
    parser.add_argument("--tokens", type=int, default=5000, help="length of the prompt")
    parser.add_argument("--dtype", default="auto", help="float32 on CPUs that emulate bfloat16")
    arguments = parser.parse_args()

    # Imported here, so that --help answers at once.
    from vllm import LLM, SamplingParams

    tokenizer = build_tokenizer()
    question = needle_prompt(
        random.Random(1), arguments.tokens, lambda text: count_tokens(tokenizer, text), needles=3, asked=1
    )
    # The same prompt is asked again and again, so the prefix cache is off: each answer is computed.
    llm = LLM(
        str(arguments.model),
        attention_backend="SPARSE",
        dtype=arguments.dtype,
        max_model_len=arguments.tokens + 512,
        enable_prefix_caching=False,
    )
    print(f"right answer: {question.reference}")
    for name, extras in SETTINGS.items():
        started = time.perf_counter()
        (answer,) = llm.chat(
            question.messages,
            SamplingParams(temperature=0, max_tokens=24, extra_args=extras),
            use_tqdm=False,
        )
        print(f"{name}: {answer.outputs[0].text.strip()!r} after {time.perf_counter() - started:.1f} s")


# Worker processes import this file again.
if __name__ == "__main__":
    main()
