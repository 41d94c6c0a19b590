"""One JSON object of many records."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from random import Random

from vllm_sparse.quality.corpus import Corpus
from vllm_sparse.quality.tasks.draft import Draft, Message, Planted, Question, depth_of, fill
from vllm_sparse.quality.tasks.words import Words

KINDS = ("json_lookup",)

_NOTE_CHARS = 90


def draft(rng: Random, number: int, tokens: int, corpus: Corpus, kinds: Collection[str]) -> Draft:
    """Keys of two words, each with a number and the beginning of a real paragraph; one number is asked for."""
    words = Words(rng)

    def record(paragraph: str) -> tuple[str, str, str]:
        key, value = words.key(), words.number()
        note = paragraph[:_NOTE_CHARS].rpartition(" ")[0]
        fields = json.dumps({"number": int(value), "note": note}, ensure_ascii=False)
        return key, value, f'"{key}": {fields}'

    paragraphs = fill(corpus.paragraphs, rng, 3 * tokens, ())  # of which a record takes a third or more
    if not paragraphs:
        raise ValueError(f"{corpus.origin}: {', '.join(kinds)} needs paragraphs of prose, none found; add prose")
    (key, value, asked), *others = [record(paragraph) for paragraph in paragraphs]
    question = Question(
        "json_lookup",
        f'What is the number of "{key}"?',
        f'"{key}": {{"number":',
        (value,),
        16,
        place=asked,
    )
    return Draft([text for _, _, text in others], [Planted(depth_of(rng, number), asked)], [question], _object)


def _object(parts: Sequence[str]) -> Sequence[Message]:
    # Of a record that is cut, the note ends early; one without a note is left out.
    complete = [part if part.endswith('"}') else f'{part}"}}' for part in parts if '"note": "' in part]
    lines = ",\n".join(f"  {part}" for part in complete)
    return ({"role": "user", "content": f"Read this JSON object. A question about it follows.\n\n{{\n{lines}\n}}"},)
