"""Functions of real files, and chains of assignments between them."""

from __future__ import annotations

import re
from collections.abc import Collection
from random import Random

from vllm_sparse.quality.corpus import Corpus, Function
from vllm_sparse.quality.tasks.draft import Draft, Planted, Question, depth_of, fill, in_one_text, spread
from vllm_sparse.quality.tasks.words import Words

KINDS = ("function_lookup", "variable_chain")

_CHAINS = 3
_VARIABLES = 4
_LOOKED_UP_WORDS = (5, 20)
_LONG_NUMBER = re.compile(r"\d{5,}")


def draft(rng: Random, number: int, tokens: int, corpus: Corpus, kinds: Collection[str]) -> Draft:
    """A file of functions, no two with one name."""
    words = Words(rng)
    planted: list[Planted] = []
    questions: list[Question] = []
    forbidden: list[str] = []
    asked: Function | None = None
    if "function_lookup" in kinds:
        asked = _asked(rng, corpus)
        told = _first_line(asked)
        forbidden.append(told)
        planted.append(Planted(depth_of(rng, number), asked.source))
        questions.append(
            Question(
                "function_lookup",
                f"How does the function `{asked.name}` begin? Write its first lines as they stand in the file.",
                # Up to the quotes: after a whole line, a model may think that it has answered.
                _beginning(asked),
                (told,),
                64,
                "words_in_order",
                place=asked.source,
            )
        )
    if "variable_chain" in kinds:
        chains = [([words.variable() for _ in range(_VARIABLES)], words.number()) for _ in range(_CHAINS)]
        for names, value in chains:
            lines = [f"{name} = {before}" for name, before in zip(names, [value, *names], strict=False)]
            planted += [Planted(depth, line) for depth, line in zip(spread(rng, _VARIABLES), lines, strict=True)]
        names, value = chains[0]
        forbidden += sorted(words.given)
        questions.append(
            Question(
                "variable_chain",
                f"What is `{names[-1]}` assigned? Follow the assignments of variables back to a number, and name each.",
                # A small model that is left the choice says any number.
                f"`{names[-1]}` is assigned the variable `",
                (*names[-2::-1], value),
                80,
            )
        )
    names_given = {asked.name} if asked else set()
    pool = []
    for function in rng.sample(corpus.functions, len(corpus.functions)):
        if function.name not in names_given and not _LONG_NUMBER.search(function.source):
            names_given.add(function.name)
            pool.append(function.source)
    return Draft(
        fill(pool, rng, tokens, forbidden),
        planted,
        questions,
        in_one_text("Read this Python file. A question about it follows."),
        last_part="line",
    )


def _beginning(function: Function) -> str:
    return f'{function.signature}\n    """'


def _first_line(function: Function) -> str:
    return function.docstring.partition("\n")[0].strip()


def _asked(rng: Random, corpus: Corpus) -> Function:
    """A function whose documentation is told by its first line, and by no other function's."""
    least, most = _LOOKED_UP_WORDS
    firsts: dict[str, list[Function]] = {}
    for function in corpus.functions:
        if function.docstring:
            firsts.setdefault(_first_line(function).lower(), []).append(function)
    found = [
        functions[0]
        for first, functions in firsts.items()
        if len(functions) == 1
        and least <= len(first.split()) <= most
        and functions[0].source.startswith(f"{_beginning(functions[0])}{_first_line(functions[0])}")
        and not _LONG_NUMBER.search(functions[0].source)
    ]
    if not found:
        raise ValueError(
            f"{corpus.origin}: function_lookup needs Python functions with docstrings of {least} to {most} words in"
            f" the first line, none found among {len(corpus.functions)} functions; add .py files"
        )
    return rng.choice(found)
