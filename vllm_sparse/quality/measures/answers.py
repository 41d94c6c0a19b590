"""Tasks: questions about long real texts, asked of every variant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vllm_sparse.quality.measures.context import Context, dense_and
from vllm_sparse.quality.records import TaskRecord
from vllm_sparse.quality.schedule import Job, Once
from vllm_sparse.quality.tasks.documents import KINDS, build_document
from vllm_sparse.quality.tasks.scoring import score
from vllm_sparse.quality.tasks.task import Document, Task
from vllm_sparse.quality.variants import Variant

QUESTION_CHARACTERS = 600
KEPT_DOCUMENTS = 32
# Enough query blocks for every method to choose in, where only so much of a prompt is computed.
FRESH_TOKENS = 1024


def answer_jobs(
    context: Context,
    variants: Sequence[Variant],
    lengths: Sequence[int],
    kinds: Sequence[str],
    documents: int,
    share_documents: bool,
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
        share_documents: of a sparse prompt too, only the last `FRESH_TOKENS` and the question are computed anew.
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
                        tasks = build_once(place).tasks
                        prompts = [context.tokenizer.chat(task.messages, task.answer_prefix) for task in tasks]
                        if share_documents:
                            prompts = apart_at_the_end(prompts)
                        shared = share_documents or not variant.sparse_prefill
                        return [
                            _ask(context, variant, Prompt(*place, number, shared), task, prompt)
                            for number, (task, prompt) in enumerate(zip(tasks, prompts, strict=True))
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
                prompt = context.tokenizer.chat(task.messages, task.answer_prefix)
                length = 1 << (len(prompt) + task.answer_tokens - 1).bit_length()
                return [_ask(context, variant, Prompt(length, "own", number, 0, False), task, prompt)]

            yield Job(f"{group}/{variant.name}", group, ask)


@dataclass(frozen=True)
class Prompt:
    """Which prompt it is.

    Attributes:
        length_tokens: asked for.
        family: of the document.
        document: its number.
        number: of the question.
        shared: it may use cached blocks of other questions about the document.
    """

    length_tokens: int
    family: str
    document: int
    number: int
    shared: bool


def apart_at_the_end(prompts: Sequence[list[int]]) -> list[list[int]]:
    """Prompts with a common beginning, each without another number of tokens `FRESH_TOKENS` before they part.

    So the prefix cache serves them up to there, and what follows is long enough to be computed sparsely.
    """
    common = 0
    while all(common < len(prompt) and prompt[common] == prompts[0][common] for prompt in prompts):
        common += 1
    place = max(common - FRESH_TOKENS, 0)
    return [prompt[:place] + prompt[place + number :] for number, prompt in enumerate(prompts)]


def _ask(context: Context, variant: Variant, place: Prompt, task: Task, prompt: list[int]) -> TaskRecord:
    own_blocks = () if place.shared else (place.number,)
    salt = context.salt(variant, place.length_tokens, place.family, place.document, *own_blocks)
    extras = context.extras(variant, place.length_tokens)
    answer = context.model.complete(prompt, task.answer_tokens, extras, salt)
    return TaskRecord(
        variant=variant.name,
        length_tokens=place.length_tokens,
        kind=task.kind,
        document=place.document,
        prompt=place.number,
        score=score(task, answer.text),
        text=answer.text,
        answers=task.answers,
        prompt_tokens=len(prompt),
        depth=task.depth,
        question=f"{task.messages[-1]['content'][-QUESTION_CHARACTERS:]}\n{task.answer_prefix}",
    )
