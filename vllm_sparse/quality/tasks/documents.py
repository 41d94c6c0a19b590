"""Which kinds of tasks there are, and the documents that hold them."""

from __future__ import annotations

from collections.abc import Collection
from random import Random

from vllm_sparse.quality.corpus import Corpus
from vllm_sparse.quality.tasks import code, prose, records, talk, topics
from vllm_sparse.quality.tasks.draft import to_length
from vllm_sparse.quality.tasks.task import CountTokens, Document

_FAMILIES = {
    "prose": (prose.draft, prose.PROSE_KINDS),
    "keys": (prose.draft, prose.KEYS_KINDS),
    "code": (code.draft, code.KINDS),
    "json": (records.draft, records.KINDS),
    "topics": (topics.draft, topics.KINDS),
    "talk": (talk.draft, talk.KINDS),
}

FAMILIES: dict[str, tuple[str, ...]] = {family: kinds for family, (_, kinds) in _FAMILIES.items()}
"""Kinds of tasks that share one document, by the family of documents."""

KINDS: dict[str, str] = {kind: family for family, kinds in FAMILIES.items() for kind in kinds}
"""Family of each kind."""


def build_document(
    family: str, seed: int, number: int, tokens: int, corpus: Corpus, count: CountTokens, kinds: Collection[str]
) -> Document:
    """A document with one task of each kind asked for; equal arguments give equal documents.

    Args:
        family: of `FAMILIES`.
        seed: of the run.
        number: of the document; documents with other numbers hold other facts, at other depths.
        tokens: of a prompt with its answer prefix and its answer: the longest task of the document has so many or up to
            3 % fewer, none has more.
        corpus: real text.
        count: tokens of a conversation; asked at most six times.
        kinds: of the family's; others are ignored, so that one choice serves all families.

    Raises:
        ValueError: no kind of the family is asked for, the corpus has too little text, or `tokens` is too small.
    """
    wanted = [kind for kind in FAMILIES[family] if kind in kinds]
    if not wanted:
        raise ValueError(
            f"kinds {', '.join(sorted(kinds))}: none belongs to the family {family}, whose kinds are"
            f" {', '.join(FAMILIES[family])}; name one of them"
        )
    name = f"{family}-{number}"
    rng = Random(f"{seed}-{name}")
    draft, _ = _FAMILIES[family]
    return to_length(name, corpus.origin, draft(rng, number, tokens, corpus, wanted), tokens, count)
