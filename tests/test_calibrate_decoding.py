"""Told decoding: against the same model with stock attention and a mask of what the lists leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from vllm_sparse.calibration.decoding import Decoder, Everything

MODEL = Path(__file__).parents[1] / "loadtest" / "model" / "weights"
ANSWER_TOKENS = 6


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    made = Decoder(str(MODEL), "cpu")
    made.model.float()
    return made


@pytest.fixture(scope="module")
def stock() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.fixture
def prompt(generator: torch.Generator) -> list[int]:
    found: list[int] = torch.randint(3, 4000, (60,), generator=generator).tolist()
    return found


class Hidden:
    """Lists without some tokens."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden

    def listed(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, scores: torch.Tensor, scale: float
    ) -> torch.Tensor:
        tokens = torch.ones(scores.shape[3], dtype=torch.bool)
        tokens[self.hidden] = False
        return tokens.expand(scores.shape[0], 1, *scores.shape[2:])


def test_dense_decoding_is_the_models(decoder: Decoder, stock: Any, prompt: list[int]) -> None:
    prefix = decoder.prefill(prompt, ANSWER_TOKENS)
    # A prompt drawn at random may be answered with the end of the text, which ends ours from the second token on.
    stock.generation_config.eos_token_id = None
    expected = stock.generate(torch.tensor([prompt]), max_new_tokens=ANSWER_TOKENS, do_sample=False)
    said = len(prefix.said)
    assert prefix.said == expected[0, len(prompt) :].tolist()[:said]
    assert said == ANSWER_TOKENS or (said > 1 and prefix.said[-1] == decoder.tokenizer.eos_token_id)
    told = decoder.tell(prefix, Everything())
    assert told.divergence == pytest.approx(0, abs=1e-6)
    assert told.same == 1
    assert told.picks == prefix.logits.argmax(1).tolist()


def test_told_tokens_read_what_the_lists_leave(
    decoder: Decoder, stock: Any, prompt: list[int], generator: torch.Generator
) -> None:
    """The prompt reads everything, later tokens all but what is hidden from them in every layer."""
    prefix = decoder.prefill(prompt, ANSWER_TOKENS)
    hidden = torch.randperm(len(prompt), generator=generator)[:40]
    told = decoder.tell(prefix, Hidden(hidden))
    whole = torch.tensor([prompt + prefix.said[:-1]])
    seen = torch.ones(whole.shape[1], whole.shape[1], dtype=torch.bool).tril()
    seen[len(prompt) :, hidden] = False
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        logits = stock(input_ids=whole, attention_mask=mask.view(1, 1, *seen.shape)).logits[0, len(prompt) :]
        dense = stock(input_ids=whole).logits[0, len(prompt) :]
    ours, theirs = logits.log_softmax(1), dense.log_softmax(1)
    divergence = float((theirs.exp() * (theirs - ours)).sum(1).mean())
    # Logits are kept in half precision.
    assert told.divergence == pytest.approx(divergence, rel=0.05, abs=1e-3)
    assert told.divergence > 0.01, "what is hidden must matter for this test to say anything"
    assert prefix.cache.get_seq_length() == len(prompt), "told tokens do not stay in the cache"
