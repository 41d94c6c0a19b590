"""Prompts to calibrate on: questions about real texts, or from a file; and the options that choose them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_sparse.quality.corpus import Corpus
from vllm_sparse.quality.served_model import LocalTokenizer
from vllm_sparse.quality.tasks.documents import KINDS, build_document
from vllm_sparse.quality.tasks.task import Task

# Kinds whose answers stand in few places of the text: what lists lose. In turn, so that few prompts meet many kinds.
TASK_KINDS = (
    "one_needle",
    "function_lookup",
    "several_keys",
    "variable_chain",
    "one_of_many_keys",
    "json_lookup",
    "several_values",
    "two_places",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that all calibrations share."""
    parser.add_argument("model", help="name or folder, as transformers loads it")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--prompts",
        type=Path,
        help="a .jsonl file of strings or of objects with a prompt or text, else one text; best are prompts like "
        "those to be served; default: questions about real texts, as vllm-sparse quality asks them",
    )
    parser.add_argument("--count", type=int, default=8, help="prompts, at most (default %(default)s)")
    parser.add_argument(
        "--tokens",
        type=int,
        default=16384,
        help="of a prompt; the rest of a file's is cut off (default %(default)s)",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the questions (default %(default)s)")


def prompts_of(parser: argparse.ArgumentParser, given: argparse.Namespace) -> list[list[int]]:
    """Token ids of the prompts that the options choose; ends the command where they are wrong."""
    if not given.output.parent.is_dir():
        parser.error(f"--output {given.output}: there is no folder {given.output.parent}")
    try:
        texts = read_prompts(given.prompts, given.count) if given.prompts else None
    except (OSError, ValueError) as error:
        parser.error(f"--prompts {given.prompts}: {error}")
    if texts is None:
        try:
            asked = task_prompts(given.model, TASK_KINDS, given.tokens, given.count, given.seed)
        except ValueError as error:
            parser.error(f"--tokens {given.tokens}: {error}")
        return [prompt.tokens for prompt in asked]
    tokenizer = LocalTokenizer(given.model, {})
    return [tokenizer.text(text)[: given.tokens] for text in texts]


@dataclass(frozen=True)
class TaskPrompt:
    """A question about a real text.

    Attributes:
        task: the question.
        tokens: ids up to and with the beginning of the answer.
    """

    task: Task
    tokens: list[int]


def task_prompts(model: str, kinds: Sequence[str], tokens: int, count: int, seed: int) -> list[TaskPrompt]:
    """Questions as `vllm-sparse quality` asks them, each about a text of its own.

    Args:
        model: whose tokenizer and chat template count, a folder or a name.
        kinds: of questions, in turn.
        tokens: of prompt and answer together; up to 3 % fewer.
        count: of prompts.
        seed: of the texts and of what is planted in them.

    Raises:
        ValueError: there is too little real text for so many tokens, or too few tokens for the questions.
    """
    tokenizer = LocalTokenizer(model, {})
    corpus = Corpus.installed()
    found = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        document = build_document(
            KINDS[kind], seed, number, tokens, corpus, lambda messages: len(tokenizer.chat(messages, "")), [kind]
        )
        task = document.tasks[0]
        found.append(TaskPrompt(task, tokenizer.chat(task.messages, task.answer_prefix)))
    return found


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
