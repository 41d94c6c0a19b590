"""Real text of which each piece has a label."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random

from vllm_sparse.quality.corpus import Corpus
from vllm_sparse.quality.tasks.draft import Draft, Message, Question, fill
from vllm_sparse.quality.tasks.words import Words

KINDS = ("frequent_topics",)

_PIECE_CHARS = 160
# Of twenty pieces one after another, so many have the first label, the second, ...: the first three are the most
# frequent ones however many pieces there are, from twenty on.
_TIMES = (5, 4, 3, *[1] * 8)


def draft(rng: Random, number: int, tokens: int, corpus: Corpus, kinds: Collection[str]) -> Draft:
    """Pieces of real paragraphs, each after the label of its topic; the three most frequent labels are asked for."""
    words = Words(rng)
    topics = [words.word() for _ in _TIMES]
    paragraphs = fill(corpus.paragraphs, rng, 3 * tokens, topics)  # of which a piece is a third or more
    pieces = [
        paragraph if len(paragraph) <= _PIECE_CHARS else paragraph[:_PIECE_CHARS].rpartition(" ")[0]
        for paragraph in paragraphs
    ]
    labels: list[str] = []
    while len(labels) < len(pieces):
        twenty = [topic for topic, times in zip(topics, _TIMES, strict=True) for _ in range(times)]
        rng.shuffle(twenty)
        labels += twenty

    def render(parts: Sequence[str]) -> Sequence[Message]:
        if len(parts) < sum(_TIMES):
            raise ValueError(
                f"{', '.join(kinds)} needs {sum(_TIMES)} pieces of text, {tokens:,} tokens have room for {len(parts)};"
                " ask for a greater length"
            )
        lines = [f"[{label}] {part}" for label, part in zip(labels, parts, strict=False)]
        introduction = "Each paragraph of this text begins with its topic. A question about the topics follows."
        return ({"role": "user", "content": "\n\n".join([introduction, *lines])},)

    question = Question(
        "frequent_topics",
        "Which three topics occur most often?",
        "The three topics that occur most often are [",
        tuple(topics[:3]),
        24,
    )
    return Draft(pieces, [], [question], render)
