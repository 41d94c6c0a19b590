"""A model that decodes by any choice of tokens, in this process: dense prefill, then told tokens with lists.

A server's decode step of TidalDecode is this with one row at a time. Here all steps of an answer run at once, because
the tokens are told; each has the keys and values of those before it as the lists left them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from vllm_sparse.calibration.model import dense_attention, full_layers, text_config
from vllm_sparse.step.roles import Role

ATTENTION_NAME = "vllm_sparse_told_decoding"


class Lists(Protocol):
    """Which tokens the layers read."""

    def listed(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, scores: torch.Tensor, scale: float
    ) -> torch.Tensor | None:
        """What a layer reads; layers come in order.

        Args:
            layer: its number among those with full attention.
            query: ``[kv_heads, group, steps, head_size]``, rotary positions applied.
            key: ``[kv_heads, tokens, head_size]``, likewise; the last `steps` tokens are the queries' own.
            scores: float32 ``[kv_heads, group, steps, tokens]``, scaled, minus infinity beyond a step's own token.
            scale: softmax scale.

        Returns:
            bool ``[kv_heads, group or 1, steps, tokens]``, or None: everything.
        """


class Everything:
    """Dense decoding."""

    def listed(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, scores: torch.Tensor, scale: float
    ) -> torch.Tensor | None:
        """As of `Lists`."""
        return None


class RoleLists:
    """What layers read that choose or read the list of a layer before them; as of `Lists`.

    Args:
        roles: of each layer.
        choose: the list of a layer that chooses, from its query, key, scores and scale, as `Lists.listed` gets them.
    """

    def __init__(
        self,
        roles: Sequence[Role],
        choose: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor],
    ) -> None:
        self._roles = roles
        self._choose = choose
        self._lists = torch.empty(0)

    def listed(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, scores: torch.Tensor, scale: float
    ) -> torch.Tensor | None:
        """As of `Lists`."""
        if self._roles[layer].writes_list:
            self._lists = self._choose(query, key, scores, scale)
        return self._lists if self._roles[layer].reads_list else None


@dataclass(frozen=True)
class Prefix:
    """A prompt after its dense prefill.

    Attributes:
        tokens: of the prompt.
        cache: its keys and values, as transformers keeps them.
        said: ids that dense decoding generated.
        logits: float16 ``[said - 1, vocabulary]``, of dense decoding after each of `said` but the last.
    """

    tokens: int
    cache: Any
    said: list[int]
    logits: torch.Tensor


@dataclass(frozen=True)
class Told:
    """What a choice changed while it was told what dense decoding said.

    Attributes:
        divergence: Kullback-Leibler divergence of the next token from dense decoding's, nats, mean over positions.
        same: share of positions with dense decoding's most likely token.
        picks: ids of the most likely tokens; the first of the answer is the prefill's, and dense.
    """

    divergence: float
    same: float
    picks: list[int]


def _auto_class(model_name: str) -> Any:
    """What of transformers loads a model with its head: models that read images too are in a table of their own."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

    reads_text_alone = type(AutoConfig.from_pretrained(model_name)) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM if reads_text_alone else AutoModelForMultimodalLM


class Decoder:
    """A model.

    Args:
        model_name: name or folder, as transformers loads it.
        device: where it runs.

    Raises:
        ValueError: of `full_layers`.
    """

    def __init__(self, model_name: str, device: str) -> None:
        from transformers import AttentionInterface, AutoTokenizer

        self.lists: Lists = Everything()
        self._numbers = {layer: number for number, layer in enumerate(full_layers(text_config(model_name)))}
        # Before the model is loaded, which looks the name up.
        AttentionInterface.register(ATTENTION_NAME, self._attention)
        loaded = _auto_class(model_name).from_pretrained(model_name, dtype="auto", attn_implementation=ATTENTION_NAME)
        self.model = loaded.to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model_name)

    @torch.inference_mode()
    def prefill(self, prompt: Sequence[int], answer_tokens: int) -> Prefix:
        """Prefill a prompt and answer it, densely.

        Args:
            prompt: token ids.
            answer_tokens: at most, from 2 on; an end of the text ends it after these.
        """
        from transformers import DynamicCache

        self.lists = Everything()
        cache = DynamicCache()
        ids = torch.tensor([list(prompt)], device=self.model.device)
        said: list[int] = []
        while len(said) < answer_tokens and (len(said) < 2 or said[-1] != self.tokenizer.eos_token_id):
            logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            said.append(int(logits[0, -1].argmax()))
            ids = torch.tensor([said[-1:]], device=self.model.device)
        cache.crop(len(prompt) - cache.get_seq_length())
        prefix = Prefix(len(prompt), cache, said, torch.empty(0))
        return replace(prefix, logits=self._logits(prefix))

    def tell(self, prefix: Prefix, lists: Lists) -> Told:
        """Decode with a choice what dense decoding said."""
        self.lists = lists
        ours, dense = (logits.float().log_softmax(1) for logits in (self._logits(prefix), prefix.logits))
        picks = ours.argmax(1)
        return Told(
            float((dense.exp() * (dense - ours)).sum(1).mean()),
            float((picks == dense.argmax(1)).float().mean()),
            picks.tolist(),
        )

    @torch.inference_mode()
    def _logits(self, prefix: Prefix) -> torch.Tensor:
        ids = torch.tensor([prefix.said[:-1]], device=self.model.device)
        logits: torch.Tensor = self.model(input_ids=ids, past_key_values=prefix.cache, use_cache=True).logits[0]
        prefix.cache.crop(prefix.tokens - prefix.cache.get_seq_length())
        return logits.half()

    def _attention(
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
        """Attention for transformers: of a prompt, or of the tokens after it."""
        number = self._numbers.get(module.layer_idx)
        window = sliding_window if number is None else None
        heads, steps = query.shape[1:3]
        group = heads // key.shape[1]
        if steps == key.shape[2]:
            return dense_attention(query, key, value, scaling, window), None
        grouped = query[0].reshape(-1, group, *query.shape[2:])
        scores = grouped.float() @ key[0].float().transpose(1, 2).unsqueeze(1) * scaling
        positions = torch.arange(key.shape[2], device=key.device)
        own = positions[-steps:].unsqueeze(1)
        scores.masked_fill_(positions > own, -torch.inf)
        if window is not None:
            scores.masked_fill_(positions <= own - window, -torch.inf)
        listed = None if number is None else self.lists.listed(number, grouped, key[0], scores, scaling)
        if listed is not None:
            scores = scores.masked_fill(~listed, -torch.inf)
        output = (scores.softmax(3) @ value[0].float().unsqueeze(1)).flatten(0, 1)
        return output.transpose(0, 1).unsqueeze(0).to(query.dtype).contiguous(), None
