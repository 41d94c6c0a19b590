"""Random traffic: requests of many lengths, methods and features, each by its own number of one seed."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any

from loadtest.robustness.extras import random_extras
from loadtest.robustness.server import CONFIG, LAYERS, MODEL_NAME
from loadtest.text.needles import needle_prompt
from loadtest.text.tokenizer import build_tokenizer, count_tokens
from vllm_sparse.config.names import DENSE

LEAST_PROMPT_TOKENS, MOST_PROMPT_TOKENS, MOST_GENERATED_TOKENS = 16, 3000, 96
TEXT_TOKENS, SHARED_PREFIXES = 20_000, 6
# The most that vLLM gives: many tokens of a text are about as likely.
TOP_LOGPROBS = 20
STRUCTURED: tuple[dict[str, Any], ...] = (
    {"regex": "[0-9]{5}( [0-9]{5}){0,8}"},
    {"choice": ["the grass", "the sky", "the sun"]},
)


@dataclass(frozen=True)
class Asked:
    """A request of the traffic.

    Attributes:
        number: of the request; with the seed it gives the request again.
        body: for the completion endpoint, unstreamed.
        aborted_after_events: the client goes away after so many events of the stream; None: it reads all.
        kinds: what it is counted as: its methods and its features.
    """

    number: int
    body: dict[str, Any]
    aborted_after_events: int | None
    kinds: tuple[str, ...]

    @property
    def is_dense(self) -> bool:
        """Nothing of it is sparse."""
        return "all dense" in self.kinds


def asked(seed: int, number: int) -> Asked:
    """Request `number` of the traffic of a seed."""
    draw = random.Random(f"{seed}/{number}")
    extras = random_extras(draw, CONFIG, LAYERS)
    methods = {phase: extras[f"sparse_{phase}"] for phase in ("prefill", "decode")}
    kinds = [f"{phase} {name}" for phase, name in methods.items()]
    kinds += ["all dense"] if set(methods.values()) == {DENSE} else []
    kinds += ["guarded"] if "sparse_min_recall" in extras else []
    tokens = round(LEAST_PROMPT_TOKENS * (MOST_PROMPT_TOKENS / LEAST_PROMPT_TOKENS) ** draw.random())
    text, place = _text(seed), draw.randrange(TEXT_TOKENS - MOST_PROMPT_TOKENS)
    prompt = list(text[place : place + tokens])
    if draw.random() < 0.4:
        start = draw.randrange(SHARED_PREFIXES) * 1000
        shared = draw.randint(1, tokens)
        prompt[:shared] = text[start : start + shared]
        kinds.append("shared prefix")
    body: dict[str, Any] = {
        "model": MODEL_NAME,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": draw.randint(1, MOST_GENERATED_TOKENS),
        "logprobs": TOP_LOGPROBS,
        "return_tokens_as_token_ids": True,
        "vllm_xargs": extras,
    }
    if draw.random() < 0.7:
        body["ignore_eos"] = True
    if draw.random() < 0.15:
        # vLLM takes n > 1 only where it samples. Without a seed: with one, vLLM ends on a CPU once a prompt is cut.
        body |= {"n": draw.randint(2, 4), "temperature": 1, "top_k": 1}
        kinds.append("n > 1")
    if draw.random() < 0.3:
        body["priority"] = draw.randint(-3, 3)
        kinds.append("priority")
    if draw.random() < 0.1:
        body["structured_outputs"] = draw.choice(STRUCTURED)
        body["ignore_eos"] = False
        kinds.append("structured")
    aborted = draw.randint(0, 20) if draw.random() < 0.1 else None
    kinds += ["aborted"] if aborted is not None else []
    return Asked(number, body, aborted, tuple(kinds))


@functools.lru_cache(maxsize=1)
def _text(seed: int) -> tuple[int, ...]:
    """Token ids of a long text."""
    tokenizer = build_tokenizer()
    prompt = needle_prompt(random.Random(seed), TEXT_TOKENS + 500, lambda text: count_tokens(tokenizer, text), 40)
    ids = tokenizer.encode(prompt.text).ids
    assert len(ids) >= TEXT_TOKENS
    return tuple(ids[:TEXT_TOKENS])
