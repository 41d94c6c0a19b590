"""Free generations of up to thousands of tokens: when a variant's parts from dense, and how good it is after that.

The model copies numbered paragraphs of a long real text word for word: each next word has to be fetched from the
context, so that a list that lost its place shows, and a generation that slipped can find its way back.

Small models do not copy thousands of tokens. So dense also reads what each variant said, in one prefill, and tells
which tokens it would have said itself and how likely each is, given what the variant had said before: that compares
every token, however far the two texts are apart. A text that repeats itself is likely to dense too, so repetition is
counted.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator, Sequence

from vllm_sparse.quality.measures.context import Context, dense_and
from vllm_sparse.quality.measures.parts import means_of_parts, parts_of
from vllm_sparse.quality.records import DENSE, GenerationRecord
from vllm_sparse.quality.schedule import Job, Once
from vllm_sparse.quality.served_model import Answer
from vllm_sparse.quality.tasks.scoring import common_subsequence, words_of
from vllm_sparse.quality.variants import Variant

KIND = "copy"
PARTS = 4
# Tokens of a run that is said again: text that is copied seldom has as long a run twice.
RUN_TOKENS = 16
# Rounds to bring a text to its length.
ROUNDS = 6


def generation_jobs(
    context: Context, variants: Sequence[Variant], lengths: Sequence[int], count: int, generated_tokens: int
) -> Iterator[Job]:
    """Jobs that let each variant generate one copy.

    Args:
        context: of the run.
        variants: compared with dense.
        lengths: tokens of prompt and generation together.
        count: generations of each length.
        generated_tokens: of each.
    """

    def copy_task(place: tuple[int, int]) -> tuple[list[int], list[str]]:
        return _copy_task(context, *place, generated_tokens)

    def generate_densely(place: tuple[int, int]) -> Answer:
        return generate(Variant(DENSE), place)

    def generate(variant: Variant, place: tuple[int, int]) -> Answer:
        extras, salt = context.extras(variant, place[0]), context.salt(variant, "generation", *place)
        return context.model.complete(task_of(place)[0], generated_tokens, extras, salt, return_tokens=True)

    task_of, dense_of = Once(copy_task, 8), Once(generate_densely, 8)
    for length in lengths:
        for number in range(count):
            place = (length, number)
            group = f"generation/{length}/{number}"
            for variant in dense_and(variants):

                def copy(variant: Variant = variant, place: tuple[int, int] = place) -> list[GenerationRecord]:
                    # Its own first: jobs that wait for dense keep others from running.
                    own = dense_of(place) if variant.name == DENSE else generate(variant, place)
                    dense = dense_of(place)
                    prompt, words = task_of(place)
                    scores = scores_by_part(words, words_of(own.text))
                    # The request says one token beyond what is read.
                    read = [*prompt, *own.tokens][: place[0] - 1]
                    extras, salt = context.extras(Variant(DENSE), place[0]), context.salt(variant, "read", *place)
                    said = context.model.predictions(read, extras, salt)[len(prompt) - 1 :]
                    agreed = [float(one.rank == 1) for one in said]
                    return [
                        GenerationRecord(
                            variant=variant.name,
                            length_tokens=place[0],
                            kind=KIND,
                            document=place[1],
                            tokens=len(own.tokens),
                            common_prefix_tokens=common_prefix(dense.tokens, own.tokens),
                            score=sum(scores) / len(scores),
                            score_by_part=scores,
                            text=own.text,
                            agreement=sum(agreed) / len(agreed),
                            agreement_by_part=means_of_parts(agreed, PARTS) if len(agreed) >= PARTS else (),
                            mean_loss=sum(one.loss for one in said) / len(said),
                            repeated=repeated_share(own.tokens, RUN_TOKENS),
                        )
                    ]

                yield Job(f"{group}/{variant.name}", group, copy)


def _copy_task(context: Context, length: int, number: int, generated_tokens: int) -> tuple[list[int], list[str]]:
    """Token ids of a prompt, and the words of what is to be copied, about as many as fit into the generation."""
    rng = random.Random(f"{context.seed}-copy-{length}-{number}")
    paragraphs = list(context.corpus.paragraphs)
    rng.shuffle(paragraphs)
    target = length - generated_tokens
    count = max(2, round(target / 60))
    prompt: list[int] = []
    best: tuple[list[int], list[str]] | None = None
    for _ in range(ROUNDS):
        chosen = [" ".join(paragraph.split()) for paragraph in paragraphs[:count]]
        first = len(chosen) // 3
        text = "\n\n".join(f"[{place}] {paragraph}" for place, paragraph in enumerate(chosen, 1))
        question = (
            f"{text}\n\nCopy the text above word for word, with the numbers in brackets, from paragraph [{first + 1}] "
            "on. Leave nothing out and add nothing."
        )
        prompt = context.tokenizer.chat([{"role": "user", "content": question}], f"[{first + 1}]")
        words = words_of(text[text.index(f"[{first + 1}] ") :])[1:]
        # About four words make five tokens or more.
        expected = words[: generated_tokens * 3 // 5]
        if len(prompt) <= target:
            best = prompt, expected
            if len(prompt) >= target * 0.97:
                break
        count = max(2, min(int(count * target * 0.99 / len(prompt)), len(paragraphs)))
    if best is None:
        raise ValueError(f"length {length}: too short to copy {generated_tokens} tokens of a text in it")
    return best


def scores_by_part(expected: Sequence[str], said: Sequence[str]) -> tuple[float, ...]:
    """Share of the words of each part of a text that were said, in order, where that part would be said.

    Args:
        expected: words of the text.
        said: words of the generation; a part is looked for among those at its place and a part to both sides.
    """
    size = max(1, len(expected) // PARTS)
    return tuple(
        common_subsequence(expected[part], said[max(0, part.start - size) : part.stop + size])
        / max(1, part.stop - part.start)
        for part in parts_of(len(expected), PARTS)
    )


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Values before the first difference of two lists."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))


def repeated_share(values: Sequence[Hashable], size: int) -> float:
    """Share of the runs of `size` adjacent values that stood before; 0 where there is no such run."""
    runs = [tuple(values[start : start + size]) for start in range(len(values) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
