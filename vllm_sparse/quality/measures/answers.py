"""Tasks: questions about long real texts, asked of every variant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vllm_sparse.quality.measures.context import Context, dense_and
from vllm_sparse.quality.records import TaskRecord
from vllm_sparse.quality.schedule import Job, Once
from vllm_sparse.quality.tasks.documents import KINDS, build_document
from vllm_sparse.quality.tasks.scoring import score
from vllm_sparse.quality.tasks.task import Document, Task
from vllm_sparse.quality.variants import Variant

QUESTION_CHARACTERS = 600
KEPT_DOCUMENTS = 32


def answer_jobs(
    context: Context, variants: Sequence[Variant], lengths: Sequence[int], kinds: Sequence[str], documents: int
) -> Iterator[Job]:
    """Jobs that ask each variant all questions about one document.

    Where a variant's prompts are dense, questions about a document share its cached blocks, which are exactly those
    that each would have computed. A sparse prompt is computed anew for each question, so that each is a prompt as a
    user sends it: what a prompt chunk chooses may depend on the question that ends it.

    Args:
        context: of the run.
        variants: compared with dense.
        lengths: tokens of prompt and answer together.
        kinds: of questions.
        documents: of each kind and length, one question each.
    """
    families: dict[str, list[str]] = {}
    for kind in kinds:
        families.setdefault(KINDS[kind], []).append(kind)

    def build(place: tuple[int, str, int]) -> Document:
        length, family, number = place
        count = lambda messages: len(context.tokenizer.chat(messages, ""))  # noqa: E731
        return build_document(family, context.seed, number, length, context.corpus, count, families[family])

    build_once = Once(build, KEPT_DOCUMENTS)
    for length in lengths:
        for family in families:
            for number in range(documents):
                place = (length, family, number)
                group = f"answers/{length}/{family}/{number}"
                for variant in dense_and(variants):

                    def ask(variant: Variant = variant, place: tuple[int, str, int] = place) -> list[TaskRecord]:
                        return [
                            _ask(context, variant, place, number, task)
                            for number, task in enumerate(build_once(place).tasks)
                        ]

                    yield Job(f"{group}/{variant.name}", group, ask)


def question_jobs(context: Context, variants: Sequence[Variant], tasks: Sequence[Task]) -> Iterator[Job]:
    """Jobs that ask each variant one of the user's own questions; its length is the next power of two.

    Args:
        context: of the run.
        variants: compared with dense.
        tasks: questions, each a document of its own.
    """
    for number, task in enumerate(tasks):
        group = f"questions/{number}"
        for variant in dense_and(variants):

            def ask(variant: Variant = variant, number: int = number, task: Task = task) -> list[TaskRecord]:
                tokens = len(context.tokenizer.chat(task.messages, task.answer_prefix)) + task.answer_tokens
                return [_ask(context, variant, (1 << (tokens - 1).bit_length(), "own", number), 0, task)]

            yield Job(f"{group}/{variant.name}", group, ask)


def _ask(context: Context, variant: Variant, place: tuple[int, str, int], number: int, task: Task) -> TaskRecord:
    length, family, document = place
    prompt = context.tokenizer.chat(task.messages, task.answer_prefix)
    own_blocks = (number,) if variant.sparse_prefill else ()
    salt = context.salt(variant, length, family, document, *own_blocks)
    extras = context.extras(variant, length)
    answer = context.model.complete(prompt, task.answer_tokens, extras, salt)
    return TaskRecord(
        variant=variant.name,
        length_tokens=length,
        kind=task.kind,
        document=document,
        prompt=number,
        score=score(task, answer.text),
        text=answer.text,
        answers=task.answers,
        prompt_tokens=len(prompt),
        depth=task.depth,
        question=f"{task.messages[-1]['content'][-QUESTION_CHARACTERS:]}\n{task.answer_prefix}",
    )
