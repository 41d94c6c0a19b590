"""Run by test_graphs_gpu.py in a process of its own: an engine on a GPU, and what its decode steps replay, as JSON."""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

# Longer than what the methods below read, so short that all prompts are done before the first answer is.
PROMPT_TOKENS, OUTPUT_TOKENS = 400, 24
SERVER = {
    "min_tokens": 0,
    # Contexts this short would run dense.
    "unprofitable": "sparse",
    "methods": ["tidal", "hip"],
    "tidal": {"budget_tokens": 128},
    "hip": {
        "stage_budget_tokens": [512, 256, 128],
        "refresh_steps": [8, 4, 2],
        "sink_tokens": 16,
        "recent_tokens": 64,
    },
}
TIDAL, HIP = {"sparse_decode": "tidal"}, {"sparse_decode": "hip"}
ROUNDS: dict[str, list[dict[str, Any]]] = {
    "alike": [TIDAL] * 3,
    "beside dense": [TIDAL, {}, TIDAL],
    "smaller budgets": [TIDAL, {**TIDAL, "tidal_budget_tokens": 96, "tidal_recent_tokens": 8}],
    "fewer sparse layers": [HIP, {**HIP, "hip_dense_layers": 2}, HIP],
    "other roles": [TIDAL, {**TIDAL, "tidal_dense_layers": 3}, {**TIDAL, "tidal_selection_reads": "everything"}],
    "other methods": [TIDAL, HIP, {}],
    "dense steps": [TIDAL, {**TIDAL, "tidal_dense_every_steps": 4}],
    "guarded": [TIDAL, {**TIDAL, "sparse_min_recall": 0.01}],
    "many": [TIDAL] * 300,
}


def run(model_folder: str) -> dict[str, Any]:
    """For each round the graphs that its steps replayed, the rows of the largest, and steps that replayed none."""
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError

    from vllm_sparse.backend import execution
    from vllm_sparse.backend.decode_graphs import current_graphs

    llm = LLM(
        model_folder,
        attention_backend="SPARSE",
        # Other tests may run on this GPU.
        kv_cache_memory_bytes=4 << 30,
        gpu_memory_utilization=0.1,
        max_num_seqs=320,
        max_model_len=2048,
        max_num_batched_tokens=16384,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        additional_config={"sparse": SERVER},
    )
    graphs = current_graphs()
    assert graphs is not None
    replays: Counter[tuple[str, int]] = Counter()
    outside = 0
    replayed, start_batch = graphs.replayed, execution._start_batch

    def count_replay(name: str, rows: int) -> None:
        replays[name, rows] += 1
        replayed(name, rows)

    def count_outside(plan: Any, *args: Any) -> Any:
        nonlocal outside
        # Steps with a prompt chunk have no FULL graph in vLLM either.
        outside += all(span.query_tokens == 1 for span in plan.spans)
        return start_batch(plan, *args)

    graphs.replayed = count_replay  # type: ignore[method-assign]
    execution._start_batch = count_outside  # type: ignore[assignment]
    rounds = {}
    for name, extras in ROUNDS.items():
        replays.clear()
        outside = 0
        prompts: Any = [{"prompt_token_ids": [random.randrange(5, 4000) for _ in range(PROMPT_TOKENS)]} for _ in extras]
        settings: dict[str, Any] = {"temperature": 0, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
        params = [SamplingParams(**settings, detokenize=False, extra_args=of_one) for of_one in extras]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == OUTPUT_TOKENS for output in outputs)
        names = Counter[str]()
        for (graph, _), count in replays.items():
            names[graph] += count
        rounds[name] = {"names": names, "most_rows": max((rows for _, rows in replays), default=0), "outside": outside}
    error = ""
    too_long = SamplingParams(max_tokens=4, extra_args={**TIDAL, "tidal_budget_tokens": 9000})
    try:
        llm.generate([{"prompt_token_ids": [5, 6, 7]}], too_long, use_tqdm=False)
    except VLLMValidationError as raised:
        error = str(raised)
    captured = {name: sorted(shape.num_reqs for shape in shapes) for name, shapes in graphs.captured.items()}
    return {"rounds": rounds, "error": error, "captured": captured}


if __name__ == "__main__":
    # The runner's state is looked at, so it has to live in this process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    Path(sys.argv[2]).write_text(json.dumps(run(sys.argv[1])))
