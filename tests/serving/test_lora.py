"""LoRA adapters: what they compute, alone and among others, dense and sparse, and whose cached blocks they find."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.serving.server import MODEL_NAME, Server, random_prompt

RANK, TOP, GENERATED, PROMPT_TOKENS, MIN_TOKENS = 8, 5, 6, 900, 256
ADAPTER, OTHER_ADAPTER = "tuned", "tuned-otherwise"
CONFIGURATION = {"sparse": {"methods": ["dhsa", "flexprefill", "tidal", "tokentopk"], "min_tokens": MIN_TOKENS}}
# Budgets as long as the context.
EVERYTHING = {
    "sparse_prefill": "dhsa", "dhsa_budget_tokens": 4096, "sparse_decode": "tidal", "tidal_budget_tokens": 4096,
}  # fmt: skip
FEW = {**EVERYTHING, "dhsa_budget_tokens": 288, "tidal_budget_tokens": 128}
# Of log probabilities in float32: rounding, and more than rounding.
SAME, OTHER = 2e-3, 2e-2


def write_adapter(model_folder: Path, folder: Path, seed: int) -> Path:
    """A random adapter of all projections of attention, in the form that PEFT writes."""
    config = json.loads((model_folder / "config.json").read_text())
    hidden, head = config["hidden_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"q_proj": (hidden, query), "k_proj": (hidden, key), "v_proj": (hidden, key), "o_proj": (query, hidden)}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (inputs, outputs) in shapes.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{place}.lora_A.weight"] = 0.1 * torch.randn(RANK, inputs, generator=generator)
            weights[f"{place}.lora_B.weight"] = 0.1 * torch.randn(outputs, RANK, generator=generator)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(shapes), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "CAUSAL_LM"}))
    return folder


@pytest.fixture(scope="module")
def tuned_server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("lora")
    adapters = [
        f"{name}={write_adapter(model_folder, folder / name, seed)}"
        for seed, name in enumerate((ADAPTER, OTHER_ADAPTER))
    ]
    arguments = (
        *("--dtype", "float32", "--kv-cache-memory-bytes", "512M", "--max-model-len", "4096", "--enforce-eager"),
        *("--max-num-batched-tokens", "1024", "--enable-prompt-tokens-details"),
        *("--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", "2", "--lora-modules", *adapters),
        *("--additional-config", json.dumps(CONFIGURATION)),
    )
    server = Server(model_folder, arguments, folder / "log", {"VLLM_PLUGINS": "sparse"})
    try:
        yield server
    finally:
        server.stop()


def complete(server: Server, model: str, prompt: list[int], extras: dict[str, Any]) -> tuple[dict[str, float], int]:
    """Log probabilities of the likeliest first tokens, and how many of the prompt's tokens were cached."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": GENERATED,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": TOP,
        "vllm_xargs": extras,
    }
    reply = server.post("/v1/completions", body)
    assert reply.status == 200, reply.raw
    return reply.body["choices"][0]["logprobs"]["top_logprobs"][0], reply.cached_tokens


def difference(one: dict[str, float], other: dict[str, float]) -> float:
    """Largest difference of tokens that both tell, infinite if they tell too few in common."""
    common = one.keys() & other.keys()
    return max(abs(one[token] - other[token]) for token in common) if len(common) >= TOP - 1 else float("inf")


@pytest.mark.usefixtures("no_server")
class TestAdapters:
    def test_lists_of_everything_give_what_dense_gives(self, tuned_server: Server) -> None:
        prompt = random_prompt(1, PROMPT_TOKENS)
        found = {}
        for model in (MODEL_NAME, ADAPTER, OTHER_ADAPTER):
            found[model], _ = complete(tuned_server, model, prompt, {})
            everything, _ = complete(tuned_server, model, prompt, EVERYTHING)
            few, _ = complete(tuned_server, model, prompt, FEW)
            assert difference(found[model], everything) < SAME, model
            assert difference(found[model], few) > OTHER, model
        assert difference(found[MODEL_NAME], found[ADAPTER]) > OTHER
        assert difference(found[ADAPTER], found[OTHER_ADAPTER]) > OTHER

    def test_each_gets_among_others_what_it_gets_alone(self, tuned_server: Server) -> None:
        """Two adapters, dense and sparse in one batch.

        Without requests of the model itself: vLLM 0.32 computes them with an adapter's weights on a CPU, if there are
        others with adapters in the batch, with and without this plugin.
        """
        models = [ADAPTER, OTHER_ADAPTER, OTHER_ADAPTER, ADAPTER]
        asked = [
            (model, random_prompt(10 + number, PROMPT_TOKENS), FEW if number % 2 else {})
            for number, model in enumerate(models)
        ]
        alone = [complete(tuned_server, *one)[0] for one in asked]
        with ThreadPoolExecutor(len(asked)) as pool:
            together = list(pool.map(lambda one: complete(tuned_server, *one)[0], asked))
        for one, other, (model, _, extras) in zip(alone, together, asked, strict=True):
            assert difference(one, other) < SAME, (model, extras)

    @pytest.mark.parametrize("extras", [{}, FEW], ids=["dense", "sparse"])
    def test_no_adapter_finds_anothers_blocks(self, tuned_server: Server, extras: dict[str, Any]) -> None:
        prompt = random_prompt(50 + len(extras), PROMPT_TOKENS)
        for model in (MODEL_NAME, ADAPTER, OTHER_ADAPTER):
            assert complete(tuned_server, model, prompt, extras)[1] == 0, model
            assert complete(tuned_server, model, prompt, extras)[1] > PROMPT_TOKENS - 64, model
