"""Run by test_hybrid.py in a process of its own: `LLM(...)` over token ids, log probabilities as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

GENERATED = 8
# Each step is made to choose it, so that all runs see the same text.
FORCED_TOKEN = 5


def run(model_folder: str, backend: str, prompts: list[list[int]], extras: list[dict[str, Any]]) -> list[Any]:
    """Log probabilities, one list per extras, one per prompt: of the prompt's tokens, then of the generated ones."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model_folder,
        attention_backend=backend or None,
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 28,
        max_num_batched_tokens=512,
        max_model_len=4096,
        block_size=32,
    )
    results = []
    for chosen in extras:
        params = SamplingParams(
            temperature=0,
            max_tokens=GENERATED,
            ignore_eos=True,
            allowed_token_ids=[FORCED_TOKEN],
            logprobs=0,
            prompt_logprobs=0,
            extra_args=chosen or None,
        )
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        results.append([_logprobs(output) for output in outputs])
    return results


def _logprobs(output: Any) -> list[float]:
    generated = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    tokens = [*output.prompt_token_ids[1:], *output.outputs[0].token_ids]
    return [of_token[token].logprob for of_token, token in zip(generated, tokens, strict=True)]


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(run(**task)))
