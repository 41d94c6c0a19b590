"""A model's run over prompts, with dense attention, that shows each layer's queries, keys and values to an observer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

ATTENTION_NAME = "vllm_sparse_calibration"

Observer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], str]
"""Is shown a layer's index, its query ``[heads, tokens, head_size]``, key and value ``[kv_heads, tokens, head_size]``,
rotary positions applied, and its softmax scale; layers come in order, prompt after prompt. Returns what to print, or
nothing."""


def text_config(model_name: str) -> Any:
    """The model's configuration, as transformers reads it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model_name).get_text_config()


def observe(model_name: str, prompts: Sequence[list[int]], device: str, observer: Observer) -> None:
    """Run the model over prompts, printing a line a layer; arguments as in `observe_each`."""
    for _ in observe_each(model_name, prompts, device, observer):
        pass


def observe_each(model_name: str, prompts: Sequence[list[int]], device: str, observer: Observer) -> Iterator[int]:
    """Run the model over prompts, one whenever the next number is asked for.

    Args:
        model_name: name or folder, as transformers loads it.
        prompts: token ids of each prompt.
        device: where the model runs.
        observer: sees every layer.

    Yields:
        Number of each prompt, from 1 on, after all its layers were seen.
    """
    from transformers import AttentionInterface, AutoModel

    attention = _ObservedAttention(observer, len(prompts), text_config(model_name).num_hidden_layers)
    # Before the model is loaded, which looks the name up.
    AttentionInterface.register(ATTENTION_NAME, attention)
    model = AutoModel.from_pretrained(model_name, dtype="auto", attn_implementation=ATTENTION_NAME).to(device).eval()
    for prompt in prompts:
        attention.prompt += 1
        with torch.inference_mode():
            model(input_ids=torch.tensor([prompt], device=device), use_cache=False)
        yield attention.prompt


class _ObservedAttention:
    """Attention for transformers: shows the layer's inputs, prints what was found, goes on with the dense output."""

    def __init__(self, observer: Observer, prompts: int, layers: int) -> None:
        self.observer = observer
        self.prompts = prompts
        self.layers = layers
        self.prompt = 0

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        begin = time.monotonic()
        found = self.observer(module.layer_idx, query[0], key[0], value[0], scaling)
        if found:
            print(
                f"prompt {self.prompt} of {self.prompts}, {query.shape[2]} tokens, "
                f"layer {module.layer_idx + 1} of {self.layers}: {found} ({time.monotonic() - begin:.1f} s)",
                flush=True,
            )
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return output.transpose(1, 2).contiguous(), None
