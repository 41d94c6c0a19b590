"""Facts and passages in real prose."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random

from vllm_sparse.quality.corpus import Corpus
from vllm_sparse.quality.tasks.draft import Draft, Planted, Question, depth_of, fill, in_one_text, spread
from vllm_sparse.quality.tasks.words import Words

# Kinds that stand in one text. In 2K tokens, more facts than this confuse a model of 135M parameters.
PROSE_KINDS = ("one_needle", "two_places", "counting", "copy_passage")
KEYS_KINDS = ("one_of_many_keys", "several_values", "several_keys")

_KEYS = 12
_VALUES = 4
_QUOTED_WORDS = 5
_BEGINNING_WORDS = 8
_COPIED_WORDS = 20


def draft(rng: Random, number: int, tokens: int, corpus: Corpus, kinds: Collection[str]) -> Draft:
    """One long prose text; each kind has a wording of its own, so that no fact answers the question of another."""
    words = Words(rng)
    planted: list[Planted] = []
    questions: list[Question] = []
    passage = ""
    if "one_needle" in kinds:
        key, value = words.key(), words.number()
        fact = f"The magic number of the {key} is {value}."
        planted.append(Planted(depth_of(rng, number), fact))
        questions.append(
            Question(
                "one_needle",
                f"What is the magic number of the {key}?",
                f"The magic number of the {key} is",
                (value,),
                16,
                place=fact,
            )
        )
    if "one_of_many_keys" in kinds:
        # Single words and this wording: with two words a key and prices, a model of 135M parameters answered none.
        keys = [(words.word(), words.number()) for _ in range(_KEYS)]
        facts = [f"The magic number for {key} is {value}." for key, value in keys]
        # The one that is asked for stands in the stratum of the document, the others anywhere.
        depths = [depth_of(rng, number, 3), *spread(rng, _KEYS - 1)]
        planted += [Planted(depth, fact) for depth, fact in zip(depths, facts, strict=True)]
        questions.append(
            Question(
                "one_of_many_keys",
                f"What is the magic number for {keys[0][0]}?",
                f"The magic number for {keys[0][0]} is",
                (keys[0][1],),
                16,
                place=facts[0],
            )
        )
    if "several_values" in kinds:
        key, values = words.key(), tuple(words.number() for _ in range(_VALUES))
        planted += [
            Planted(depth, f"One of the lucky numbers of the {key} is {value}.")
            for depth, value in zip(spread(rng, _VALUES), values, strict=True)
        ]
        questions.append(
            Question(
                "several_values",
                f"What are the lucky numbers of the {key}? Name all of them.",
                f"The lucky numbers of the {key} are a)",
                values,
                80,
            )
        )
    if "several_keys" in kinds:
        keys = [(words.word(), words.number()) for _ in range(_VALUES)]
        planted += [
            Planted(depth, f"The weight of the {key} is {value} grams.")
            for depth, (key, value) in zip(spread(rng, _VALUES), keys, strict=True)
        ]
        rng.shuffle(keys)
        named = [key for key, _ in keys]
        questions.append(
            Question(
                "several_keys",
                f"What is the weight of the {', of the '.join(named[:-1])} and of the {named[-1]}?",
                f"The weights in grams are: the {named[0]}:",
                tuple(value for _, value in keys),
                80,
            )
        )
    if "two_places" in kinds:
        pairs = [(words.key(), words.person(), words.number()) for _ in range(3)]
        depths = [depth_of(rng, number, 5), depth_of(rng, number, 8), *(rng.random() for _ in range(4))]
        facts = []
        for key, person, value in pairs:
            facts += [f"The owner of the {key} is {person}.", f"The phone number of {person} is {value}."]
        planted += [Planted(depth, fact) for depth, fact in zip(depths, facts, strict=True)]
        key, person, value = pairs[0]
        questions.append(
            Question(
                "two_places",
                f"Who is the owner of the {key}, and what is the phone number of the owner?",
                f"The owner of the {key} is",
                (person, value),
                40,
            )
        )
    if "counting" in kinds:
        times = rng.randint(2, 9)
        planted += [Planted(depth, f"A bell rang in {words.person()}'s house.") for depth in spread(rng, times)]
        questions.append(
            Question(
                "counting",
                "How many bells rang in the text?",
                "The number of bells that rang is",
                (str(times),),
                8,
                "number",
            )
        )
    if "copy_passage" in kinds:
        passage = _passage(rng, corpus, _forbidden(words))
        own = passage.split()
        planted.append(Planted(depth_of(rng, number, 1), passage))
        questions.append(
            Question(
                "copy_passage",
                # The question quotes less than the answer begins with: else its last words would be found in the
                # question, and what follows there would be copied.
                f"Copy the paragraph of the text that begins with: {' '.join(own[:_QUOTED_WORDS])} ...",
                " ".join(own[:_BEGINNING_WORDS]),
                (" ".join(own[_BEGINNING_WORDS : _BEGINNING_WORDS + _COPIED_WORDS]),),
                48,
                "words_in_order",
                place=passage,
            )
        )
    forbidden = _forbidden(words)
    if passage:
        forbidden.append(" ".join(passage.split()[:_QUOTED_WORDS]))
    filler = fill(corpus.paragraphs, rng, tokens, forbidden)
    return Draft(filler, planted, questions, in_one_text("Read this text. A question about it follows."))


def _forbidden(words: Words) -> list[str]:
    """What the real text must not say, because it would be an answer or the wording of a fact."""
    wordings = ["magic number", "lucky number", "phone number", "weight of the", "bell rang"]
    # Single words may stand in the text; what is said of them stands in facts alone.
    return wordings + [each for each in sorted(words.given) if not each.isalpha()]


def _passage(rng: Random, corpus: Corpus, forbidden: Sequence[str]) -> str:
    """A paragraph that is long enough to be continued."""
    needed = _BEGINNING_WORDS + _COPIED_WORDS
    long = [
        paragraph
        for paragraph in corpus.paragraphs
        if len(paragraph.split()) >= needed and not any(each.lower() in paragraph.lower() for each in forbidden)
    ]
    if not long:
        raise ValueError(
            f"{corpus.origin}: copy_passage needs a paragraph of {needed} words, none found among"
            f" {len(corpus.paragraphs)} paragraphs; add prose"
        )
    return rng.choice(long)
