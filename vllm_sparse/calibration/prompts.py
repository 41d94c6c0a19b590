"""Prompts to calibrate on: from a file, or random keys and values; and the options that choose them."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

# Pairs whose length tells how many fit, and room for pairs that are longer.
SAMPLE_PAIRS = 32
SPARE_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that all calibrations share."""
    parser.add_argument("model", help="name or folder, as transformers loads it")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--prompts",
        type=Path,
        help="a .jsonl file of strings or of objects with a prompt or text, else one text; best are prompts like "
        "those to be served; default: random keys and values, one of which is asked for",
    )
    parser.add_argument("--count", type=int, default=5, help="prompts, at most (default %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=16384, help="tokens of a prompt, the rest is cut off (default %(default)s)"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts (default %(default)s)")


def prompts_of(parser: argparse.ArgumentParser, given: argparse.Namespace) -> list[list[int]]:
    """Token ids of the prompts that the options choose; ends the command where they are wrong."""
    if not given.output.parent.is_dir():
        parser.error(f"--output {given.output}: there is no folder {given.output.parent}")
    try:
        texts = read_prompts(given.prompts, given.count) if given.prompts else None
    except (OSError, ValueError) as error:
        parser.error(f"--prompts {given.prompts}: {error}")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    if texts is None:
        texts = [pairs_text(random.Random(given.seed + n), given.tokens, tokenizer) for n in range(given.count)]
    return [tokenizer(text)["input_ids"][: given.tokens] for text in texts]


def read_prompts(path: Path, count: int) -> list[str]:
    """The first prompts of a file.

    Raises:
        ValueError: a line is no prompt, or the file holds none.
    """
    text = path.read_text()
    if path.suffix != ".jsonl":
        prompts = [text] if text.strip() else []
    else:
        prompts = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            entry = json.loads(line)
            prompt = entry.get("prompt", entry.get("text")) if isinstance(entry, dict) else entry
            if not isinstance(prompt, str):
                raise ValueError(f"line {number} is neither a string nor an object with a prompt or text")
            prompts.append(prompt)
    if not prompts:
        raise ValueError("the file holds no prompt")
    return prompts[:count]


def pairs_text(rng: random.Random, tokens: int, tokenizer: Any) -> str:
    """A JSON object of random keys and values, a question about one and its answer, of about `tokens` tokens.

    The kind of text that SALE's paper calibrates with (InfiniteBench's key-value retrieval).
    """

    def pairs(count: int) -> list[tuple[str, str]]:
        return [(f'"{rng.getrandbits(64):016x}"', f'"{rng.getrandbits(64):016x}"') for _ in range(count)]

    def text_of(some: list[tuple[str, str]]) -> str:
        key, value = rng.choice(some)
        held = ", ".join(f"{key}: {value}" for key, value in some)
        return f"Extract the value of a key from this JSON object.\n\n{{{held}}}\n\nKey: {key}\nThe value is {value}"

    few, more = (len(tokenizer(text_of(pairs(count)))["input_ids"]) for count in (1, 1 + SAMPLE_PAIRS))
    room = tokens - few - SPARE_TOKENS
    return text_of(pairs(1 + max(room * SAMPLE_PAIRS // (more - few), 0)))
