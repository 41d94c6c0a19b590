"""``vllm-sparse inspect MODEL``: show what each layer and head keeps of one prompt.

The model runs over the prompt once, with dense attention, on a GPU or a CPU and without a server. Each layer's queries
and keys are given to the methods that --extras choose, and what they keep is drawn over the true attention. The page is
one HTML file without anything from elsewhere.

    vllm-sparse inspect MODEL --prompt prompt.txt --output page.html \\
      --extras '{"sparse_prefill": "flexprefill", "sparse_decode": "tidal", "sparse_min_tokens": 0}'
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from vllm_sparse.calibration.model import config_and_layers, observe
from vllm_sparse.calibration.prompts import read_prompts
from vllm_sparse.config.messages import SparseParamsError
from vllm_sparse.config.names import METHODS
from vllm_sparse.config.request import SparseParams, resolve
from vllm_sparse.config.server import parse_server_config
from vllm_sparse.inspect.kept import CHUNK_UNIT_TOKENS, DecodeInspection, KeptLayer, PromptInspection
from vllm_sparse.inspect.page import Inspected, render
from vllm_sparse.inspect.words import Words, read_words
from vllm_sparse.methods.decode import DecodeMethod
from vllm_sparse.methods.method import Method
from vllm_sparse.methods.prefill import PrefillMethod
from vllm_sparse.step.eligibility import why_decode_is_dense

# Of a prompt, on the page.
SHOWN_CHARACTERS = 240


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="vllm-sparse inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="name or folder, as transformers loads it")
    parser.add_argument("--prompt", required=True, help="a text, or a file that holds one")
    parser.add_argument("--extras", required=True, help="a request's vllm_xargs, JSON")
    parser.add_argument("--output", type=Path, required=True, help="HTML file to write")
    parser.add_argument(
        "--additional-config", default="{}", help="as of vllm serve, JSON; by default all methods are on"
    )
    parser.add_argument(
        "--chunk",
        type=int,
        default=8192,
        help="tokens that the prompt is computed in, as --max-num-batched-tokens of vllm serve (default %(default)s)",
    )
    parser.add_argument(
        "--attention-up-to",
        type=int,
        default=16384,
        help="tokens of the longest prompt that is compared with the true attention (default %(default)s)",
    )
    parser.add_argument(
        "--mark",
        action="append",
        default=[],
        metavar="TEXT",
        help="text of the prompt to mark on the page, such as where the answer stands; may be repeated",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)"
    )
    given = parser.parse_args(arguments)
    if given.chunk < CHUNK_UNIT_TOKENS or given.chunk % CHUNK_UNIT_TOKENS:
        parser.error(f"--chunk {given.chunk}: a multiple of {CHUNK_UNIT_TOKENS} is allowed")
    if not given.output.parent.is_dir():
        parser.error(f"--output {given.output}: there is no folder {given.output.parent}")
    text = prompt_text(parser, given.prompt)
    config, layers = config_and_layers(parser, given.model)
    words = words_of(parser, given.model, text, config)
    prompt = words.tokens
    marks = [mark for wanted in given.mark for mark in marks_of(parser, wanted, text, words)]
    params = request_params(parser, given, config, layers, len(prompt))

    prefill, prefill_note = prompt_inspection(params, len(prompt), given.chunk, given.attention_up_to)
    decode, decode_note = decode_inspection(params, len(prompt), layers)
    if prefill is None and decode is None:
        parser.error(f"nothing of this prompt would be sparse. {prefill_note} {decode_note}")
    kept: dict[str, list[KeptLayer]] = {"prefill": [], "decode": []}

    def inspect(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> str:
        found = []
        for phase, inspection in (("prefill", prefill), ("decode", decode)):
            if inspection is not None:
                kept[phase].append(inspection.observe(layer, query, key, scale))
                found.append(f"{phase} {in_words(kept[phase][-1])}")
        return "; ".join(found)

    observe(given.model, [prompt], given.device, inspect)
    methods = [method.name for method in (params.prefill, params.decode) if method is not None]
    page = render(
        Inspected(
            f"What {' and '.join(dict.fromkeys(methods))} kept",
            {
                "model": given.model,
                "prompt": f"{len(prompt)} tokens: {shortened(text)}",
                "settings": given.extras,
                **{
                    phase: knobs_of(method)
                    for phase, method in (("prefill", params.prefill), ("decode", params.decode))
                },
            },
            kept["prefill"] or None,
            kept["decode"] or None,
            {"prefill": prefill_note, "decode": decode_note},
            prefill is not None and prefill.true_attention,
            words.words(),
            marks,
        )
    )
    given.output.write_text(page, encoding="utf-8")
    print(f"{given.output}: {len(page) / 1e6:.1f} MB")


def prompt_text(parser: argparse.ArgumentParser, prompt: str) -> str:
    """The text that ``--prompt`` gives or whose file it names; ends the command where there is none."""
    # A text may be longer than a path can be: os.path takes it for no file, where pathlib raises an error.
    if not os.path.isfile(prompt):
        if len(prompt.split()) < 2:
            parser.error(f"--prompt {prompt}: there is no such file, and a text has more than one word")
        return prompt
    try:
        return read_prompts(Path(prompt), 1)[0]
    except (OSError, ValueError) as error:
        parser.error(f"--prompt {prompt}: {error}")


def request_params(
    parser: argparse.ArgumentParser, given: argparse.Namespace, config: Any, layers: int, prompt_tokens: int
) -> SparseParams:
    """What ``--extras`` ask for, with a prompt of so many tokens; ends the command where they, or
    ``--additional-config``, are wrong."""
    objects = {}
    for option, text in (("--extras", given.extras), ("--additional-config", given.additional_config)):
        try:
            objects[option] = json.loads(text)
        except ValueError as error:
            parser.error(f"{option} {text}: no JSON: {error}")
        if not isinstance(objects[option], dict):
            parser.error(f"{option} {text}: a JSON object is allowed")
    additional = objects["--additional-config"]
    settings = additional.get("sparse", {})
    if isinstance(settings, dict):
        settings = {"methods": list(METHODS), **settings}
    try:
        server = parse_server_config({"sparse": settings}, layers, config.num_attention_heads)
    except ValueError as error:
        parser.error(str(error))
    try:
        params = resolve(objects["--extras"], server, layers, prompt_tokens)
    except SparseParamsError as error:
        parser.error(f"--extras: {error}")
    if params.is_dense:
        parser.error(
            f"--extras {given.extras}: nothing is sparse with them and {prompt_tokens} tokens; choose a method, such "
            'as {"sparse_prefill": "flexprefill"}, and knobs that leave something out'
        )
    return params


def words_of(parser: argparse.ArgumentParser, model: str, text: str, config: Any) -> Words:
    """Tokens of the prompt and their text; ends the command where the model cannot take as many or text is unknown."""
    from transformers import AutoTokenizer

    try:
        words = read_words(AutoTokenizer.from_pretrained(model), text)
    except ValueError as error:
        parser.error(f"{model}: {error}")
    if len(words.tokens) > config.max_position_embeddings:
        parser.error(
            f"--prompt: it has {len(words.tokens)} tokens, more than the {config.max_position_embeddings} of the model"
        )
    return words


def marks_of(parser: argparse.ArgumentParser, wanted: str, prompt: str, words: Words) -> list[tuple[int, int]]:
    """First token and the one after the last of each place where a text stands; ends the command if there is none."""
    starts = [match.start() for match in re.finditer(re.escape(wanted), words.text)] if wanted else []
    if wanted and not starts and wanted in prompt:
        parser.error(
            f"--mark {wanted!r}: the model's tokenizer writes it otherwise, in the prompt that it reads as "
            f"{shortened(words.text)!r}"
        )
    if not starts:
        parser.error(f"--mark {wanted!r}: a text that stands in the prompt is wanted")
    found = []
    for start in starts:
        stop = start + len(wanted)
        within = [token for token, (first, last) in enumerate(words.places) if first < stop and last > start]
        found.append((within[0], within[-1] + 1))
    return found


def prompt_inspection(
    params: SparseParams, tokens: int, chunk_tokens: int, attention_up_to: int
) -> tuple[PromptInspection | None, str]:
    """What shows the prompt's layers, None where all of it is dense; and a sentence on it."""
    method = params.prefill
    if method is None:
        return None, "The settings leave the prompt dense."
    inspection = PromptInspection(method, params.min_tokens, chunk_tokens, tokens <= attention_up_to)
    chunks = inspection.chunks(tokens)
    dense = [chunk for chunk in chunks if inspection.runs_dense(*chunk)]
    if len(dense) == len(chunks):
        reason = why_chunk_is_dense(method, params.min_tokens, *dense[-1])
        return None, f"The prompt of {tokens} tokens is dense, because {reason}."
    note = (
        f"{method.name} chose pages of {method.page_tokens} tokens for blocks of {method.query_block_tokens} queries."
    )
    if len(chunks) > 1:
        note += f" The prompt was computed in {len(chunks)} chunks of {chunk_tokens} tokens at most."
    if dense:
        reasons = Counter(why_chunk_is_dense(method, params.min_tokens, *chunk) for chunk in dense)
        note += "".join(f" {count} of them ran dense, because {reason}." for reason, count in reasons.items())
    if not inspection.true_attention:
        note += f" The true attention was left out, because the prompt is longer than {attention_up_to} tokens."
    return inspection, note


def why_chunk_is_dense(method: PrefillMethod, min_tokens: int, start: int, stop: int) -> str:
    """The cause that applies to a chunk of tokens `start` to ``stop - 1`` that runs dense, and what helps."""
    if stop <= min_tokens:
        return (
            f"its context of {stop} tokens is no longer than sparse_min_tokens {min_tokens}: give a longer prompt or a "
            "smaller sparse_min_tokens"
        )
    sparse_tokens = stop - max(start, min_tokens)
    said = (
        f"only {sparse_tokens} of its tokens come after"
        if min_tokens > start
        else f"it has only {sparse_tokens} tokens"
    )
    begins = f" sparse_min_tokens {min_tokens}" if min_tokens > start else ""
    return (
        f"{said}{begins}, and {method.name} leaves fewer than {method.min_query_tokens} dense: give a longer prompt"
        + (" or a smaller sparse_min_tokens" if begins else " or another --chunk")
    )


def decode_inspection(params: SparseParams, tokens: int, layers: int) -> tuple[DecodeInspection | None, str]:
    """What shows the decode step's layers, None where it is dense; and a sentence on it."""
    method = params.decode
    if method is None:
        return None, "The settings leave decoding dense."
    if why_decode_is_dense(method, params.min_tokens, tokens) is not None:
        if tokens < params.min_tokens:
            return None, (
                f"Decoding is dense, because the context of {tokens} tokens is shorter than sparse_min_tokens "
                f"{params.min_tokens}: give a longer prompt or a smaller sparse_min_tokens."
            )
        return None, (
            f"Decoding is dense, because the context of {tokens} tokens is no longer than the {method.budget_tokens} "
            f"tokens that {method.name} reads: give a longer prompt or a smaller budget."
        )
    note = f"What {method.name} chose for the prompt's last token, as if it had just been generated, token by token."
    return DecodeInspection(method, method.layer_roles(layers)), note


def in_words(layer: KeptLayer) -> str:
    """A layer's density and worst recall, for the progress that is printed."""
    if not layer.heads:
        return layer.role
    density = sum(head.density for head in layer.heads) / len(layer.heads)
    recall = [head.recall for head in layer.heads if head.recall is not None]
    return f"density {density:.3f}" + (f", worst recall {min(recall):.3f}" if recall else "")


def knobs_of(method: PrefillMethod | DecodeMethod | None) -> str:
    """A method and its knobs, on one line."""
    if method is None:
        return "dense"
    assert isinstance(method, Method)
    knobs = dataclasses.asdict(method)  # type: ignore[arg-type]
    said = (f"{knob} {value}" for knob, value in knobs.items() if value not in (None, "", ()))
    return f"{method.name}: {', '.join(said)}"


def shortened(text: str) -> str:
    """The beginning and the end of a text, on one line."""
    line = " ".join(text.split())
    if len(line) <= SHOWN_CHARACTERS:
        return line
    half = SHOWN_CHARACTERS // 2
    return f"{line[:half]} … {line[-half:]}"
