"""Run by test_offline.py in a process of its own: `LLM(...)` with sparse sampling parameters, results as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def run(
    model_folder: str, backend: str, chats: list[list[dict[str, str]]], extras: list[dict[str, Any] | None]
) -> dict[str, Any]:
    """Texts, one list per extras, one text per chat; and the error that a wrong value raises."""
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError

    llm = LLM(
        model_folder,
        attention_backend=backend or None,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 30,
        max_num_batched_tokens=2048,
        block_size=32,
        enable_prefix_caching=False,
        # On a GPU sparse attention does not pay for prompts of this length.
        additional_config={"sparse": {"unprofitable": "sparse", "prompt_cost": 1000}},
    )
    texts = []
    for chosen in extras:
        params = SamplingParams(temperature=0, max_tokens=16, extra_args=chosen)
        texts.append([output.outputs[0].text for output in llm.chat(chats, params, use_tqdm=False)])
        # The caller's object stays as it was.
        assert params.extra_args == chosen
    error = None
    try:
        llm.chat(chats, SamplingParams(extra_args={"sparse_decode": "tidall"}), use_tqdm=False)
    except VLLMValidationError as raised:
        error = str(raised)
    # Parameters per prompt.
    mixed = [SamplingParams(temperature=0, max_tokens=16, extra_args=chosen) for chosen in extras]
    outputs = llm.chat(chats[:1] * len(mixed), mixed, use_tqdm=False)
    return {"texts": texts, "error": error, "mixed": [output.outputs[0].text for output in outputs]}


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(run(**task)))
