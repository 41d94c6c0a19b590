"""Language: how well a prefill predicts real texts, as mean -log p, against dense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vllm_sparse.quality.measures.context import Context, dense_and
from vllm_sparse.quality.measures.parts import means_of_parts
from vllm_sparse.quality.measures.texts import Text, texts
from vllm_sparse.quality.records import LanguageRecord
from vllm_sparse.quality.schedule import Job, Once
from vllm_sparse.quality.variants import Variant

POSITIONS = 16


def language_jobs(context: Context, variants: Sequence[Variant], lengths: Sequence[int], count: int) -> Iterator[Job]:
    """Jobs that let each variant with a sparse prefill read one text.

    Args:
        context: of the run.
        variants: compared with dense; those whose prompts are dense are left out.
        lengths: tokens of the texts.
        count: texts of each length, code and prose in turn.
    """
    # The request says one token beyond the text.
    texts_of: Once[int, list[Text]] = Once(lambda length: texts(context, "language", length - 1, count), len(lengths))
    for length in lengths:
        for number in range(count):
            group = f"language/{length}/{number}"
            for variant in dense_and([variant for variant in variants if variant.sparse_prefill]):

                def read(
                    variant: Variant = variant, length: int = length, number: int = number
                ) -> list[LanguageRecord]:
                    kind, tokens = texts_of(length)[number]
                    extras, salt = context.extras(variant, length), context.salt(variant, "language", length, number)
                    losses = [one.loss for one in context.model.predictions(tokens, extras, salt)]
                    half = losses[len(losses) // 2 :]
                    return [
                        LanguageRecord(
                            variant=variant.name,
                            length_tokens=length,
                            kind=kind,
                            document=number,
                            mean_loss=sum(half) / len(half),
                            loss_by_position=means_of_parts(losses, POSITIONS),
                        )
                    ]

                yield Job(f"{group}/{variant.name}", group, read)
