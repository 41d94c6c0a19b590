"""Asks a served model by the openai package: dense, sparse as a stream, and with a knob that is refused.

Usage, in the repository's root: .venv/bin/python -m examples.openai_client --url http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import argparse
import os
import random
import time
from typing import Any

import openai

from loadtest.text.needles import needle_prompt
from loadtest.text.tokenizer import build_tokenizer, count_tokens

SPARSE = {"sparse_prefill": "dhsa", "sparse_decode": "tidal", "sparse_min_tokens": 1024}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="needle", help="served model name")
    parser.add_argument("--tokens", type=int, default=5000, help="length of the prompt in the bundled model's tokens")
    arguments = parser.parse_args()
    client = openai.OpenAI(base_url=arguments.url, api_key=os.environ.get("OPENAI_API_KEY", "none"))

    tokenizer = build_tokenizer()
    question = needle_prompt(
        random.Random(2), arguments.tokens, lambda text: count_tokens(tokenizer, text), needles=3, asked=1
    )
    messages: Any = question.messages
    print(f"right answer: {question.reference}")

    started = time.perf_counter()
    dense = client.chat.completions.create(model=arguments.model, messages=messages, max_tokens=24, temperature=0)
    print(f"dense: {dense.choices[0].message.content!r} after {time.perf_counter() - started:.1f} s")

    # Sparse settings travel in the field vllm_xargs, which the openai package does not know.
    started = time.perf_counter()
    stream = client.chat.completions.create(
        model=arguments.model,
        messages=messages,
        max_tokens=24,
        temperature=0,
        stream=True,
        extra_body={"vllm_xargs": SPARSE},
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    print(f"sparse: {text!r} after {time.perf_counter() - started:.1f} s")

    try:
        client.chat.completions.create(
            model=arguments.model,
            messages=messages,
            max_tokens=24,
            extra_body={"vllm_xargs": {**SPARSE, "dhsa_density": 2}},
        )
    except openai.BadRequestError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main()
