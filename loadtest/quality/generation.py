"""Long generations with sparse decode settings beside dense ones: agreement and answers, thousands of tokens in.

    python -m loadtest.quality.generation --tokens 16384 26000 --generated 4000 \
        --variant 'tidal 1024={"sparse_decode": "tidal", "tidal_budget_tokens": 1024}'

Every variant generates the same conversations about long documents (`loadtest.quality.conversation`): the user's turns
are given, the answers are its own, greedy, all of it decoded token by token with the variant's settings. Then it
decodes the dense generation again, told what to say, and is asked at each position what it would have said.

* common prefix: tokens before the first one that differs from the dense generation's, mean over conversations.
* same: share of the answers' tokens that equal the dense generation's, position by position.
* agreement: share of all positions of the dense generation at which the variant, given the dense history, would go on
  with the same token as dense decoding. The history's tokens are decoded by the variant too, so that its own keys and
  values are in the cache.
* right: answers with the right value, in the first and the last quarter of the generation and in all of it.

The offline engine runs in this process on vLLM's model runner V1 (the one of the CPU; on CUDA set
VLLM_USE_V2_MODEL_RUNNER=0).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from loadtest.offline import DensityReader, engine
from loadtest.quality.conversation import FREE, Conversation, conversation, is_right
from loadtest.text.tokenizer import build_tokenizer
from vllm_sparse.quality.script import ScriptProcessor
from vllm_sparse.quality.served_model import SCRIPT_KEY


@dataclass(frozen=True)
class Generation:
    """One conversation as a variant generated it.

    Attributes:
        tokens: as long as the script.
        picks: what the model would have said at each position.
    """

    tokens: list[int]
    picks: list[int]


@dataclass(frozen=True)
class Measurement:
    """One line of the table.

    Attributes:
        variant: its name.
        density: KV tokens read over those in reach, in sparse layers.
        common_prefix: tokens, mean over the conversations.
        same: share of answer tokens.
        agreement: share of positions.
        right: of each conversation, whether each answer has the right value.
    """

    variant: str
    density: float
    common_prefix: float
    same: float
    agreement: float
    right: list[list[bool]]


def common_prefix(first: list[int], second: list[int]) -> int:
    """Tokens before the first difference of two lists of equal length."""
    return next((place for place, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), len(first))


def share_equal(first: list[int], second: list[int]) -> float:
    """Share of places at which two lists of equal length agree."""
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def compare(
    variant: str,
    density: float,
    conversations: list[Conversation],
    dense: list[Generation],
    own: list[Generation],
    told: list[Generation],
    tokenizer: Tokenizer,
) -> Measurement:
    """A line of the table.

    Args:
        variant: its name.
        density: as measured.
        conversations: the conversations.
        dense: their dense generations.
        own: the variant's, with its own answers.
        told: the variant's over the dense generations' tokens.
        tokenizer: of the bundled model.
    """

    def answer_tokens(talk: Conversation, generation: Generation) -> list[int]:
        return [token for token, given in zip(generation.tokens, talk.script, strict=True) if given == FREE]

    pairs = list(zip(conversations, dense, own, told, strict=True))
    return Measurement(
        variant,
        density,
        mean([common_prefix(d.tokens, o.tokens) for _, d, o, _ in pairs]),
        mean([share_equal(answer_tokens(talk, d), answer_tokens(talk, o)) for talk, d, o, _ in pairs]),
        mean([share_equal(d.picks, t.picks) for _, d, _, t in pairs]),
        [[is_right(answer, o.tokens, tokenizer) for answer in talk.answers] for talk, _, o, _ in pairs],
    )


def generate(llm: Any, prompts: list[list[int]], scripts: list[list[int]], extras: dict[str, Any]) -> list[Generation]:
    """Decode scripts greedily, all at once."""
    from vllm import SamplingParams

    settings = [
        SamplingParams(
            temperature=0,
            max_tokens=len(script),
            ignore_eos=True,
            detokenize=False,
            logprobs=1,
            extra_args={**extras, SCRIPT_KEY: script},
        )
        for script in scripts
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    generations = []
    for output in outputs:
        completion = output.outputs[0]
        picks = [next(token for token, one in place.items() if one.rank == 1) for place in completion.logprobs]
        generations.append(Generation(list(completion.token_ids), picks))
    return generations


def measure(
    llm: Any, variants: dict[str, dict[str, Any]], conversations: list[Conversation], tokenizer: Tokenizer
) -> Iterator[Measurement]:
    """Dense first, then every variant."""
    prompts = [talk.prompt for talk in conversations]
    scripts = [talk.script for talk in conversations]
    dense = generate(llm, prompts, scripts, {})
    told_tokens = [generation.tokens for generation in dense]
    read_density = DensityReader()
    for name, extras in {"dense": {}, **variants}.items():
        both = generate(llm, prompts * 2, scripts + told_tokens, extras)
        own, told = both[: len(prompts)], both[len(prompts) :]
        density = next((value for key, value in read_density().items() if key.startswith("decode/")), 1.0)
        yield compare(name, density, conversations, dense, own, told, tokenizer)


HEADER = (
    "| variant | density decode | common prefix | same | agreement | right, first quarter | last quarter | all |\n"
    "|---|---|---|---|---|---|---|---|"
)


def line(m: Measurement) -> str:
    """A line of the Markdown table."""
    quarters = [-(-len(answers) // 4) for answers in m.right]
    parts = (
        [answers[:quarter] for answers, quarter in zip(m.right, quarters, strict=True)],
        [answers[-quarter:] for answers, quarter in zip(m.right, quarters, strict=True)],
        m.right,
    )
    cells = [f"{sum(map(sum, part))} / {sum(map(len, part))}" for part in parts]
    return (
        f"| {m.variant} | {m.density:.3f} | {m.common_prefix:.0f} | {m.same:.3f} | {m.agreement:.4f} "
        f"| {' | '.join(cells)} |"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="loadtest/model/weights", help="folder of the bundled model")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[16384, 26000], help="prompt tokens, one conversation each"
    )
    parser.add_argument("--generated", type=int, default=4000, help="generated tokens of a conversation")
    parser.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens")
    parser.add_argument("--seed", type=int, default=20261125)
    parser.add_argument("--variant", action="append", default=[], help="NAME=JSON of sampling extras; repeatable")
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON of further engine arguments")
    arguments = parser.parse_args()

    tokenizer = build_tokenizer()
    conversations = [
        conversation(random.Random(arguments.seed + number), tokenizer, tokens, arguments.generated)
        for number, tokens in enumerate(arguments.tokens)
    ]
    variants = {}
    for variant in arguments.variant:
        name, _, extras = variant.partition("=")
        # Also where it does not pay.
        variants[name] = {"sparse_unprofitable": "sparse", **json.loads(extras)}
    settings = {
        "max_num_batched_tokens": arguments.chunk,
        "max_model_len": max(len(talk.prompt) + len(talk.script) for talk in conversations),
        "logits_processors": [f"{ScriptProcessor.__module__}:{ScriptProcessor.__qualname__}"],
        "async_scheduling": False,
        # The prompts are prefilled once a variant.
        "enable_prefix_caching": True,
        **arguments.engine,
    }
    for talk in conversations:
        print(f"prompt of {len(talk.prompt)} tokens, {len(talk.script)} generated, {len(talk.answers)} answers")
    print(HEADER, flush=True)
    with engine(arguments.model, "SPARSE", **settings) as llm:
        for measurement in measure(llm, variants, conversations, tokenizer):
            print(line(measurement), flush=True)


if __name__ == "__main__":
    main()
