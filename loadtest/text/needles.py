"""English-like text with needles in it, questions about the needles, and the score of an answer.

The same phrases and the same sentence grammar serve training (`loadtest.model.train`), the tests and the quality
measurements, so that what is measured is what the model was taught. Everything is drawn from the `random.Random` that
the caller passes: a fresh seed gives a fresh text, the same seed the same text.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from loadtest.text.words import (
    ACTION_VERBS,
    ADJECTIVES,
    ADVERBS,
    KEY_NOUNS,
    MONTHS,
    MOTION_VERBS,
    NAMES,
    PEOPLE,
    PLACES,
    PREPOSITIONS,
    THINGS,
    WEEKDAYS,
)

Style = Literal["prose", "stock", "rare"]

# The first phrasing is the main one: it is also the wording of every answer.
NEEDLE_FORMS: tuple[str, ...] = (
    "The code of the {key} is {value}.",
    "The code for the {key} is {value}.",
    "Remember that the code of the {key} is {value}.",
    "For the {key}, the code is {value}.",
    "The {key} has the code {value}.",
    "Note that the {key} has the code {value}.",
)
ANSWER_FORM = NEEDLE_FORMS[0]
QUESTION_FORMS: tuple[str, ...] = (
    "What is the code of the {key}?",
    "Tell me the code of the {key}.",
    "Which code does the {key} have?",
    "What is the code for the {key}?",
    "Give the code of the {key}.",
)
# Opening and closing of a question about several keys; the keys stand between them as "the A, the B and the C".
MULTI_QUESTION_FORMS: tuple[tuple[str, str], ...] = (
    ("What are the codes of", "?"),
    ("Tell me the codes of", "."),
    ("What are the codes for", "?"),
    ("Give the codes of", "."),
)
# Between the document and the question (or, without a chat, the beginning of the answer).
QUESTION_SEPARATOR = "\n\n"
SYSTEM_PROMPT = "You answer questions about the text."
STYLE_SHARES: dict[Style, float] = {"prose": 0.75, "stock": 0.1, "rare": 0.15}

_STOCK_SENTENCES = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "The snow is white.",
    "The day is long.",
    "Here we go again.",
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class NeedlePrompt:
    """A document with needles and a question about some of them.

    Attributes:
        text: the document, needles included.
        question: the question, without the document.
        keys: the keys asked for, in the order asked.
        answers: their values, five digits each, in the same order.
        depths: where their needles stand, as shares of the document's characters, in the same order.
    """

    text: str
    question: str
    keys: tuple[str, ...]
    answers: tuple[str, ...]
    depths: tuple[float, ...]

    @property
    def content(self) -> str:
        """The user's message: document and question."""
        return self.text + QUESTION_SEPARATOR + self.question

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation to send to a chat endpoint."""
        return [{"role": "user", "content": self.content}]

    @property
    def reference(self) -> str:
        """The answer in the wording the model was taught."""
        return " ".join(
            ANSWER_FORM.format(key=key, value=value) for key, value in zip(self.keys, self.answers, strict=True)
        )

    @property
    def completion_prompt(self) -> str:
        """The document and the beginning of the first answer, for a completion endpoint; " 48213." continues it."""
        beginning, _ = ANSWER_FORM.format(key=self.keys[0], value="|").split(" |")
        return self.text + QUESTION_SEPARATOR + beginning


def _article(word: str) -> str:
    """The indefinite article before `word`."""
    sounds_like_a_vowel = word[0] in "aeiou" and word not in ("useful", "useless", "university")
    return "an" if sounds_like_a_vowel or word == "honest" else "a"


def _noun_phrase(rng: random.Random, nouns: Sequence[str]) -> str:
    """A noun with article and perhaps adjectives: "the old mill", "an island"."""
    words = [rng.choice(nouns)]
    draw = rng.random()
    if draw < 0.55:
        words.insert(0, rng.choice(ADJECTIVES))
        if draw < 0.08:
            words.insert(0, rng.choice(ADJECTIVES))
    article = "the" if rng.random() < 0.7 else _article(words[0])
    return " ".join((article, *words))


def _subject(rng: random.Random) -> str:
    return rng.choice(NAMES) if rng.random() < 0.3 else _noun_phrase(rng, PEOPLE)


def _place(rng: random.Random) -> str:
    return f"{rng.choice(PREPOSITIONS)} {_noun_phrase(rng, PLACES)}"


def _thing(rng: random.Random) -> str:
    return _noun_phrase(rng, THINGS)


def _made_up_word(rng: random.Random) -> str:
    """A word or an identifier that no vocabulary holds, so that the tokenizer has to spell it."""
    word = "".join(rng.choices(_LETTERS, k=rng.randint(3, 9)))
    draw = rng.random()
    if draw < 0.3:
        return word.capitalize()
    return f"{word[:2].upper()}-{rng.randint(0, 9999)}" if draw < 0.5 else word


def _walked(rng: random.Random) -> str:
    adverb = f" {rng.choice(ADVERBS)}" if rng.random() < 0.5 else ""
    return f"{_subject(rng)} {rng.choice(MOTION_VERBS)}{adverb} {_place(rng)}"


def _handled(rng: random.Random) -> str:
    return f"{_subject(rng)} {rng.choice(ACTION_VERBS)} {_thing(rng)}"


def _handled_there(rng: random.Random) -> str:
    return f"{_subject(rng)} {rng.choice(ADVERBS)} {rng.choice(ACTION_VERBS)} {_thing(rng)} {_place(rng)}"


def _then(rng: random.Random) -> str:
    return f"{rng.choice(('when', 'while', 'after', 'before', 'because'))} {_walked(rng)}, {_handled(rng)}"


def _and(rng: random.Random) -> str:
    return f"{_walked(rng)} {rng.choice(('and', 'but'))} {rng.choice(ACTION_VERBS)} {_thing(rng)}"


def _was(rng: random.Random) -> str:
    noun = _noun_phrase(rng, PLACES if rng.random() < 0.5 else THINGS)
    return f"{noun} {rng.choice(('was', 'looked', 'seemed', 'became', 'remained'))} {rng.choice(ADJECTIVES)}"


def _there_was(rng: random.Random) -> str:
    adjective = rng.choice(ADJECTIVES)
    return f"there was {_article(adjective)} {adjective} {rng.choice(THINGS)} {_place(rng)}"


def _spoke(rng: random.Random) -> str:
    return f"{_subject(rng)} {rng.choice(('said', 'thought', 'knew', 'believed', 'hoped'))} that {_was(rng)}"


def _calendar(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.4:
        return f"in {rng.randint(1200, 2030)}, {_handled(rng)}"
    if draw < 0.7:
        return f"on {rng.choice(WEEKDAYS)}, {_walked(rng)}"
    return f"on the {rng.randint(1, 28)} of {rng.choice(MONTHS)}, {_handled_there(rng)}"


def _numbers(rng: random.Random) -> str:
    """Numbers that are nobody's code, five digits among them: a value alone must not give a needle away."""
    place = rng.choice(PLACES)
    draw = rng.random()
    if draw < 0.3:
        return f"the {place} was built in {rng.randint(1100, 2020)}"
    if draw < 0.5:
        return f"the {place} had {rng.randint(2, 999)} rooms"
    if draw < 0.7:
        return f"{_subject(rng)} counted {rng.randint(2, 9999)} trees {_place(rng)}"
    if draw < 0.85:
        return f"{_subject(rng)} sold the {rng.choice(THINGS)} for {rng.randint(10, 99999)} coins"
    return f"about {rng.randint(10000, 99999)} people lived near the {place}"


def _rare(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.4:
        return f"{_noun_phrase(rng, PEOPLE)} named {_made_up_word(rng)} {rng.choice(MOTION_VERBS)} {_place(rng)}"
    if draw < 0.7:
        return f"{_subject(rng)} {rng.choice(ACTION_VERBS)} the {_made_up_word(rng)} {_place(rng)}"
    return f"in {_made_up_word(rng)}, {_was(rng)}"


_PROSE_PATTERNS: tuple[Callable[[random.Random], str], ...] = (
    _walked,
    _walked,
    _handled,
    _handled_there,
    _then,
    _and,
    _was,
    _there_was,
    _spoke,
    _calendar,
    _numbers,
)


def sentence(rng: random.Random, style: Style = "prose") -> str:
    """One sentence, beginning with a capital letter; its only full stop is its last character."""
    body = _rare(rng) if style == "rare" and rng.random() < 0.4 else rng.choice(_PROSE_PATTERNS)(rng)
    return body[0].upper() + body[1:] + "."


def paragraphs(rng: random.Random, style: Style) -> Iterator[list[str]]:
    """Endless paragraphs of 3 to 12 sentences; "stock" repeats a few sentences over and over."""
    stock: tuple[str, ...] = _STOCK_SENTENCES
    if style == "stock" and rng.random() < 0.6:
        stock = tuple(sentence(rng) for _ in range(rng.randint(2, 8)))
    while True:
        if style == "stock":
            yield list(stock)
        else:
            yield [sentence(rng, style) for _ in range(rng.randint(3, 12))]


def paragraph_separator(rng: random.Random) -> str:
    """What stands between two paragraphs: most often an empty line."""
    return "\n\n" if rng.random() < 0.85 else "\n"


def filler(rng: random.Random, sentences: int) -> str:
    """Text of at least `sentences` sentences without needles, in sections of changing style; ends in an empty line."""
    parts: list[str] = []
    made = 0
    while made < sentences:
        style = rng.choices(tuple(STYLE_SHARES), weights=tuple(STYLE_SHARES.values()))[0]
        section = min(sentences - made, rng.randint(30, 600))
        source = paragraphs(rng, style)
        end = made + section
        while made < end:
            paragraph = next(source)
            made += len(paragraph)
            parts += (" ".join(paragraph), paragraph_separator(rng))
    parts[-1] = "\n\n"
    return "".join(parts)


def pick_form(rng: random.Random, forms: Sequence[str], main_share: float) -> str:
    """The first of `forms` with probability `main_share`, else one of the others."""
    return forms[0] if rng.random() < main_share else rng.choice(forms[1:])


def ask(rng: random.Random, keys: Sequence[str], main_share: float = 0.5) -> str:
    """A question about `keys`, which must not be empty; the first phrasing with probability `main_share`."""
    if len(keys) == 1:
        return pick_form(rng, QUESTION_FORMS, main_share).format(key=keys[0])
    opening, closing = MULTI_QUESTION_FORMS[0] if rng.random() < main_share else rng.choice(MULTI_QUESTION_FORMS[1:])
    return f"{opening} {', '.join(f'the {key}' for key in keys[:-1])} and the {keys[-1]}{closing}"


def _body(rng: random.Random, budget: int, count_tokens: Callable[[str], int], style: Style) -> list[str]:
    """Filler sentences of about `budget` tokens, each with the white space that stands before it."""
    units: list[str] = []
    lead = ""
    for paragraph in paragraphs(rng, style):
        cost = count_tokens(lead + " ".join(paragraph))
        leads = [lead] + [" "] * (len(paragraph) - 1)
        pieces = [before + words for before, words in zip(leads, paragraph, strict=True)]
        if cost > budget:
            for piece in pieces:
                budget -= count_tokens(piece)
                # A needle can stand only after a sentence, so there is always one.
                if budget < 0 and units:
                    break
                units.append(piece)
            break
        units += pieces
        budget -= cost
        lead = paragraph_separator(rng)
    return units


def needle_prompt(
    rng: random.Random,
    tokens_target: int,
    count_tokens: Callable[[str], int],
    needles: int = 1,
    asked: int = 1,
    *,
    style: Style = "prose",
    main_share: float = 0.5,
    depths: Sequence[float] | None = None,
) -> NeedlePrompt:
    """A fresh document with needles, and a question about some of them.

    Args:
        rng: the source of every choice.
        tokens_target: tokens of document and question together; met to within one sentence (about 15 tokens).
        count_tokens: the number of tokens of a piece of text, special tokens not counted.
        needles: needles in the document, each with its own key and value.
        asked: how many of them the question asks for (the model was taught 1 to 4).
        style: of the sentences around the needles.
        main_share: probability of the main phrasing, for each needle and for the question.
        depths: where to put the needles asked for, as shares of the document (0 begins, 1 ends it), one per key in
            the order asked; by default every needle stands at a random place.

    Raises:
        ValueError: `asked` is not in 1..`needles`, there are too few nouns for `needles`, `depths` has another length
            than `asked` or leaves 0..1, or the needles do not fit into `tokens_target`.
    """
    if not 1 <= asked <= needles <= len(KEY_NOUNS):
        raise ValueError(f"asked={asked} must be in 1..needles, and needles={needles} at most {len(KEY_NOUNS)}")
    if depths is not None and (len(depths) != asked or not all(0.0 <= depth <= 1.0 for depth in depths)):
        raise ValueError(f"depths must be {asked} numbers between 0 and 1")
    keys = rng.sample(KEY_NOUNS, needles)
    values = [str(value) for value in rng.sample(range(10_000, 100_000), needles)]
    question = ask(rng, keys[:asked], main_share)
    sentences = [
        " " + pick_form(rng, NEEDLE_FORMS, main_share).format(key=key, value=value)
        for key, value in zip(keys, values, strict=True)
    ]
    budget = tokens_target - count_tokens(QUESTION_SEPARATOR + question) - sum(map(count_tokens, sentences))
    if budget <= 0:
        raise ValueError(f"{needles} needles and the question do not fit into {tokens_target} tokens")
    units = _body(rng, budget, count_tokens, style)
    # A needle follows a sentence on the same line; places[i] is the number of filler sentences before needle i.
    places = [rng.randint(1, len(units)) for _ in range(needles)]
    for number, depth in enumerate(depths or ()):
        places[number] = max(1, round(depth * len(units)))
    for number in sorted(range(needles), key=lambda number: places[number], reverse=True):
        units.insert(places[number], sentences[number])
    text = "".join(units)
    found = tuple(text.index(sentences[number]) / len(text) for number in range(asked))
    return NeedlePrompt(text, question, tuple(keys[:asked]), tuple(values[:asked]), found)


def score(prompt: NeedlePrompt, output_text: str) -> float:
    """Share (0..1) of the values asked for that occur in `output_text` as numbers of their own."""
    numbers = set(re.findall(r"\d+", output_text))
    return sum(answer in numbers for answer in prompt.answers) / len(prompt.answers)
