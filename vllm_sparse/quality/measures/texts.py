"""Real texts of a length in tokens, for the measures that read or continue a text."""

from __future__ import annotations

import functools
import random

from vllm_sparse.quality.corpus import Kind
from vllm_sparse.quality.measures.context import Context

TEXT_KINDS: tuple[Kind, ...] = ("code", "prose")
Text = tuple[str, list[int]]
"""Kind and token ids."""


def texts(context: Context, purpose: str, length_tokens: int, count: int) -> list[Text]:
    """Kind and token ids of texts, code and prose in turn.

    Args:
        context: of the run.
        purpose: texts of different purposes are drawn apart.
        length_tokens: of each.
        count: of texts.
    """
    # The corpus counts each text that is drawn, by a request to the server.
    encode = functools.cache(context.tokenizer.text)
    found: dict[Kind, list[list[int]]] = {}
    for place, kind in enumerate(TEXT_KINDS):
        share = (count + len(TEXT_KINDS) - 1 - place) // len(TEXT_KINDS)
        rng = random.Random(f"{context.seed}-{purpose}-{length_tokens}-{kind}")
        drawn = context.corpus.texts(kind, length_tokens, share, rng, lambda text: len(encode(text)))
        found[kind] = [encode(text)[:length_tokens] for text in drawn]
    kinds = [TEXT_KINDS[number % len(TEXT_KINDS)] for number in range(count)]
    return [(kind, found[kind][number // len(TEXT_KINDS)]) for number, kind in enumerate(kinds)]
