"""Run by other tests in a process of its own: `LLM(...)` over token ids, log probabilities as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

GENERATED = 8
# Each step is made to choose it, so that all runs see the same text.
FORCED_TOKEN = 5
# Log probabilities of a step; the model is sure that the forced token comes again.
TOP = 5


def run(
    model_folder: str,
    backend: str,
    prompts: list[list[int]],
    extras: list[dict[str, Any]],
    dtype: str,
    options: dict[str, Any],
) -> list[Any]:
    """Log probabilities, one list per extras, one per prompt: of the prompt's tokens, then the largest of each step."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model_folder,
        attention_backend=backend or None,
        dtype=dtype,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 28,
        max_num_batched_tokens=512,
        max_model_len=4096,
        block_size=32,
        **options,
    )
    results = []
    for chosen in extras:
        params = SamplingParams(
            temperature=0,
            max_tokens=GENERATED,
            ignore_eos=True,
            allowed_token_ids=[FORCED_TOKEN],
            logprobs=TOP,
            prompt_logprobs=0,
            extra_args=chosen or None,
        )
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        results.append([_logprobs(output) for output in outputs])
    return results


def _logprobs(output: Any) -> list[float]:
    tokens = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
    of_prompt = [of_token[token].logprob for of_token, token in tokens]
    steps = [[found.logprob for found in of_token.values()] for of_token in output.outputs[0].logprobs]
    return [*of_prompt, *(logprob for step in steps for logprob in largest(step))]


def largest(logprobs: list[float]) -> list[float]:
    """Of a step, falling."""
    return sorted(logprobs, reverse=True)[:TOP]


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(run(**task)))
