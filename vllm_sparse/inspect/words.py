"""A prompt's tokens, and which of its characters each of them is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# What decoders write where the bytes of a character are not all there yet.
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class Words:
    """A prompt as the model reads it.

    Attributes:
        tokens: ids.
        text: the prompt. Of a tokenizer that knows no characters, what its tokens decode to: it may write letters and
            spaces otherwise than the prompt does, and has the tokens in it that were put around the prompt.
        places: first character of each token in `text`, and the one after the last. Tokens that are parts of one
            character share its place.
    """

    tokens: list[int]
    text: str
    places: list[tuple[int, int]]

    def words(self) -> list[str]:
        """The text of each token; of a character that several share, the first one's."""
        found, said = [], 0
        for start, stop in self.places:
            found.append(self.text[max(start, said) : stop])
            said = max(said, stop)
        return found


def read_words(tokenizer: Any, text: str) -> Words:
    """Tokenise a prompt.

    Args:
        tokenizer: of transformers.
        text: the prompt.

    Raises:
        ValueError: the tokenizer knows no characters, and what its tokens decode to depends on what comes after them.
    """
    # Not all that know none say so.
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, return_offsets_mapping=True)
        return Words(found["input_ids"], text, [(start, stop) for start, stop in found["offset_mapping"]])
    tokens: list[int] = tokenizer(text)["input_ids"]
    return Words(tokens, *_decoded(tokenizer, tokens))


def _decoded(tokenizer: Any, tokens: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """What the tokens decode to and the place of each in that.

    A token's text is what it adds to that of the tokens before it, for which the last few are enough: spaces at the
    beginning of a text, which decoders may drop, are theirs.
    """

    def decode(first: int, stop: int) -> str:
        text: str = tokenizer.decode(list(tokens[first:stop]), clean_up_tokenization_spaces=False)
        return text

    parts: list[str] = []
    places: list[tuple[int, int]] = []
    # Tokens from `first` on are decoded again, those before `known` have their places.
    first = known = position = 0
    for stop in range(1, len(tokens) + 1):
        before, now = decode(first, known), decode(first, stop)
        # Part of a character decodes to a sign that says so or to nothing, as a space that may be the last one does.
        if (now == before or now.endswith(_INCOMPLETE)) and stop < len(tokens):
            continue
        parts.append(now[len(before) :])
        places += [(position, position + len(parts[-1]))] * (stop - known)
        position += len(parts[-1])
        first, known = known, stop
    text = "".join(parts)
    whole = decode(0, len(tokens))
    if text != whole:
        at = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, whole, strict=False)))
        raise ValueError(
            f"its tokenizer, {type(tokenizer).__name__}, knows no characters, and its tokens decode to other text one "
            f"by one ({text[at : at + 20]!r}) than together ({whole[at : at + 20]!r}): which token says what cannot be "
            "told; give the model a tokenizer.json"
        )
    return text, places
