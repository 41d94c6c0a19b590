"""Decoding: next tokens of a variant that is told, token by token, what dense decoding said."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from vllm_sparse.quality.measures.context import Context, dense_and
from vllm_sparse.quality.measures.parts import means_of_parts
from vllm_sparse.quality.measures.texts import Text, texts
from vllm_sparse.quality.records import DENSE, DecodingRecord
from vllm_sparse.quality.schedule import Job, Once
from vllm_sparse.quality.served_model import NextTokens
from vllm_sparse.quality.variants import Variant

POSITIONS = 8


def decoding_jobs(
    context: Context,
    variants: Sequence[Variant],
    lengths: Sequence[int],
    count: int,
    told_tokens: int,
    by_script: bool,
) -> Iterator[Job]:
    """Jobs that tell each variant with sparse decoding how dense decoding continues one text.

    The variant's own keys and values of the told tokens are what it reads later, as in a generation of its own. Dense
    is told too: what differs there is the noise of the kernels.

    Args:
        context: of the run.
        variants: compared with dense; those that decode densely are left out.
        lengths: tokens of text and continuation together.
        count: texts of each length, code and prose in turn.
        told_tokens: tokens of the continuation.
        by_script: as of `ServedModel.told`.
    """
    texts_of: Once[int, list[Text]] = Once(
        lambda length: texts(context, "decoding", length - told_tokens, count), len(lengths)
    )

    def continue_densely(place: tuple[int, int]) -> NextTokens:
        length, number = place
        dense = Variant(DENSE)
        extras, salt = context.extras(dense, length), context.salt(dense, "decoding", length, number)
        return context.model.told(texts_of(length)[number][1], told_tokens, extras, salt)

    continued = Once(continue_densely, 8)
    for length in lengths:
        for number in range(count):
            group = f"decoding/{length}/{number}"
            for variant in dense_and([variant for variant in variants if variant.sparse_decode]):

                def tell(
                    variant: Variant = variant, length: int = length, number: int = number
                ) -> list[DecodingRecord]:
                    kind, prompt = texts_of(length)[number]
                    dense = continued((length, number))
                    extras, salt = context.extras(variant, length), context.salt(variant, "decoding", length, number)
                    own = context.model.told(prompt, dense.tokens, extras, salt, by_script)
                    pairs = list(zip(dense.top, own.top, strict=True))
                    divergences = [divergence(reference, other) for reference, other in pairs]
                    same = [next(iter(reference)) == next(iter(other)) for reference, other in pairs]
                    return [
                        DecodingRecord(
                            variant=variant.name,
                            length_tokens=length,
                            kind=kind,
                            document=number,
                            mean_divergence=sum(divergences) / len(divergences),
                            same_first=sum(same) / len(same),
                            divergence_by_position=means_of_parts(divergences, POSITIONS),
                            tokens=len(pairs),
                        )
                    ]

                yield Job(f"{group}/{variant.name}", group, tell)


def divergence(reference: Mapping[int, float], other: Mapping[int, float]) -> float:
    """KL divergence of a distribution from a reference, in nats, from the likeliest tokens of both.

    Tokens that are not among the likeliest of both count as one, which can only lower the divergence: with 20 tokens
    each the rest is rarely above a percent.

    Args:
        reference: log probability by token.
        other: likewise.
    """
    common = [token for token in reference if token in other]
    masses = [(math.exp(reference[token]), math.exp(other[token])) for token in common]
    # What rounding leaves below zero is nothing.
    rest = tuple(max(1 - sum(mass), 1e-9) for mass in zip(*masses, strict=True)) if masses else (1.0, 1.0)
    return math.fsum(p * math.log(p / max(q, 1e-30)) for p, q in [*masses, rest] if p > 0)
