"""A model's run over prompts, with dense attention, that shows full layers' queries, keys and values to an observer.

Layers with a sliding window are computed with it and shown to nobody: methods count layers with full attention alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from vllm_sparse.config import model_layers

ATTENTION_NAME = "vllm_sparse_calibration"
# Queries of a layer with a window that are computed at once.
WINDOW_STEP = 1024

Observer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], str]
"""Is shown a layer's number among those with full attention, its query ``[heads, tokens, head_size]``, key and value
``[kv_heads, tokens, head_size]``, rotary positions applied, and its softmax scale; layers come in order, prompt after
prompt. Returns what to print, or nothing."""


def text_config(model_name: str) -> Any:
    """The model's configuration, as transformers reads it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model_name).get_text_config()


def full_layers(config: Any) -> list[int]:
    """Indices of the layers with full attention, which are those that methods count and that an observer is shown.

    Args:
        config: of `text_config`.

    Raises:
        ValueError: there are none, or layers of a kind that is not computed here.
    """
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError("its attention logits have a soft cap, which is not computed here")
    if config.model_type == "gpt_oss":
        raise ValueError("its attention has sinks, which are not computed here")
    if "chunked_attention" in (model_layers.layer_kinds(config) or ()):
        raise ValueError("some of its layers attend in chunks, which is not computed here")
    full = model_layers.full_layers(config, config.num_hidden_layers)
    if not full:
        raise ValueError("none of its layers has full attention, so none could be sparse")
    return full


def config_and_layers(parser: argparse.ArgumentParser, model_name: str) -> tuple[Any, int]:
    """`text_config` and how many layers have full attention.

    Ends the command where there is no such model, or none that is computed here.
    """
    try:
        config = text_config(model_name)
        return config, len(full_layers(config))
    except (OSError, ValueError) as error:
        parser.error(f"{model_name}: {str(error).strip().splitlines()[0]}")


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Causal attention of a whole prompt: ``[1, tokens, heads, head_size]``, contiguous.

    Args:
        query: ``[1, heads, tokens, head_size]``.
        key: ``[1, kv_heads, tokens, head_size]``.
        value: likewise.
        scale: softmax scale.
        window: tokens that each one reads, itself included; None: all before it.
    """
    group, tokens = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    attend = torch.nn.functional.scaled_dot_product_attention
    if window is None or window >= tokens:
        output = attend(query, key, value, is_causal=True, scale=scale)
    else:
        parts = []
        for start in range(0, tokens, WINDOW_STEP):
            stop, first = min(start + WINDOW_STEP, tokens), max(start - window + 1, 0)
            position = torch.arange(first, stop, device=query.device)
            ahead = position.unsqueeze(0) - torch.arange(start, stop, device=query.device).unsqueeze(1)
            mask = (ahead <= 0) & (ahead > -window)
            near = slice(first, stop)
            parts.append(attend(query[:, :, start:stop], key[:, :, near], value[:, :, near], mask, scale=scale))
        output = torch.cat(parts, 2)
    return output.transpose(1, 2).contiguous()


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
        observer: sees every layer with full attention.

    Yields:
        Number of each prompt, from 1 on, after all its layers were seen.

    Raises:
        ValueError: of `full_layers`.
    """
    from transformers import AttentionInterface, AutoModel

    attention = _ObservedAttention(observer, len(prompts), full_layers(text_config(model_name)))
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

    def __init__(self, observer: Observer, prompts: int, layers: Sequence[int]) -> None:
        self.observer = observer
        self.prompts = prompts
        self.numbers = {layer: number for number, layer in enumerate(layers)}
        self.prompt = 0

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        begin = time.monotonic()
        number = self.numbers.get(module.layer_idx)
        if number is None:
            return dense_attention(query, key, value, scaling, sliding_window), None
        found = self.observer(number, query[0], key[0], value[0], scaling)
        if found:
            print(
                f"prompt {self.prompt} of {self.prompts}, {query.shape[2]} tokens, "
                f"layer {number + 1} of {len(self.numbers)}: {found} ({time.monotonic() - begin:.1f} s)",
                flush=True,
            )
        return dense_attention(query, key, value, scaling, None), None
