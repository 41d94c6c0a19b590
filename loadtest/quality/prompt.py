"""Print a chat request about a needle prompt, for `curl -d @-`; the right answer goes to standard error."""

from __future__ import annotations

import argparse
import json
import random
import sys

from loadtest.text.needles import needle_prompt
from loadtest.text.tokenizer import build_tokenizer, count_tokens


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16000, help="length of the prompt in the bundled model's tokens")
    parser.add_argument("--needles", type=int, default=1, help="facts hidden in the text")
    parser.add_argument("--asked", type=int, default=1, help="facts asked for")
    parser.add_argument("--extras", type=json.loads, default={}, help="JSON of the request's vllm_xargs")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--model", default="needle", help="served model name")
    parser.add_argument("--seed", type=int, help="same seed, same prompt; default: a fresh one")
    arguments = parser.parse_args()
    tokenizer = build_tokenizer()
    prompt = needle_prompt(
        random.Random(arguments.seed),
        arguments.tokens,
        lambda text: count_tokens(tokenizer, text),
        arguments.needles,
        arguments.asked,
    )
    print(f"expected: {prompt.reference}", file=sys.stderr)
    body = {
        "model": arguments.model,
        "messages": prompt.messages,
        "max_tokens": 16 * arguments.asked + 8,
        "temperature": 0,
        "stream": arguments.stream,
        "vllm_xargs": arguments.extras,
    }
    print(json.dumps(body))


if __name__ == "__main__":
    main()
