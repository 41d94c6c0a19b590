"""Speed and density: each variant's requests alone on the server, beside dense ones about the same text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vllm_sparse.quality.measures.context import Context, dense_and
from vllm_sparse.quality.measures.texts import Text, texts
from vllm_sparse.quality.records import SpeedRecord
from vllm_sparse.quality.schedule import Job, Once
from vllm_sparse.quality.variants import Variant

GENERATED_TOKENS = 64


def speed_jobs(context: Context, variants: Sequence[Variant], lengths: Sequence[int], repeats: int) -> Iterator[Job]:
    """Jobs that time one request each; they have to run one after another, with nothing else on the server.

    The first of a variant at a length compiles what later ones have, and is not recorded.

    Args:
        context: of the run.
        variants: compared with dense.
        lengths: tokens of prompt and generation together.
        repeats: requests of each variant and length.
    """
    texts_of: Once[int, list[Text]] = Once(
        lambda length: texts(context, "speed", length - GENERATED_TOKENS, repeats + 1), len(lengths)
    )
    for length in lengths:
        for repeat in range(repeats):
            group = f"speed/{length}/{repeat}"
            for variant in dense_and(variants):

                def time(variant: Variant = variant, length: int = length, repeat: int = repeat) -> list[SpeedRecord]:
                    extras = context.extras(variant, length)
                    if not repeat:
                        prompt = texts_of(length)[-1][1]
                        context.model.time(prompt, GENERATED_TOKENS, extras, context.salt(variant, "warm", length))
                    context.model.fresh_density()
                    salt = context.salt(variant, "speed", length, repeat)
                    answer = context.model.time(texts_of(length)[repeat][1], GENERATED_TOKENS, extras, salt)
                    density = context.model.fresh_density()
                    return [
                        SpeedRecord(
                            variant=variant.name,
                            length_tokens=length,
                            repeat=repeat,
                            ttft_s=answer.first_token_s,
                            tpot_s=answer.rest_s / (GENERATED_TOKENS - 1),
                            prefill_density=density.get("prefill"),
                            decode_density=density.get("decode"),
                        )
                    ]

                yield Job(f"{group}/{variant.name}", group, time)
