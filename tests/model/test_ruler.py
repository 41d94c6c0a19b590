"""What the model is taught of RULER's tasks: samples as a server gets them, and a training run in miniature."""

from __future__ import annotations

import io
import itertools
import random

import pytest

torch = pytest.importorskip("torch")

from loadtest.model.network import Architecture, Network  # noqa: E402
from loadtest.model.ruler import MULTI_KEY, Samples, Stage, collate, exam, make_sample, train  # noqa: E402
from loadtest.model.train import Log  # noqa: E402
from loadtest.quality.tasks.ruler import TASKS  # noqa: E402
from loadtest.quality.tasks.task import share_found  # noqa: E402
from loadtest.text.tokenizer import END, build_tokenizer, chat_text, count_tokens  # noqa: E402

TOKENIZER = build_tokenizer()


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_is_the_chat_that_a_load_test_sends_and_its_answer_is_right(name: str) -> None:
    seed = random.randrange(2**32)
    task = TASKS[name](seed, 1600, lambda text: count_tokens(TOKENIZER, text))
    sample = make_sample(name, seed, 1600, several=False)
    text = TOKENIZER.decode(sample.tokens.tolist(), skip_special_tokens=False)
    beginning = chat_text(task.content) + task.answer_prefix
    assert text.startswith(beginning)
    assert text.endswith(END)
    assert TOKENIZER.encode(text, add_special_tokens=False).ids == sample.tokens.tolist()
    assert sample.answer_at == count_tokens(TOKENIZER, beginning)
    assert sample.answer[sample.answer_at :].all()
    assert not sample.answer[: sample.answer_at].any()
    assert share_found(task.answers, text[len(beginning) :]) == 1
    assert len(sample.tokens) - sample.answer_at <= task.answer_tokens + 1


def test_further_questions_are_answered_by_the_text() -> None:
    sample = make_sample(MULTI_KEY, random.randrange(2**32), 1600)
    turns = TOKENIZER.decode(sample.tokens.tolist(), skip_special_tokens=False).split("<|assistant|>\n")
    document, answers = turns[0], turns[1:]
    assert len(answers) == 9
    for answer in answers:
        key, value = answer.split(END)[0].removesuffix(".").split(" mentioned in the text is ")
        assert f"special uuids for {key.split()[-1]} is: {value}." in document


def test_batches_hold_what_fits_and_mark_the_answers() -> None:
    stage = Stage(2048, 8192, 1.0)
    for batch in itertools.islice(Samples(stage, random.randrange(2**32)), 6):
        assert batch.tokens.shape == batch.answer.shape
        assert len(batch.tasks) == len(batch.tokens)
        assert batch.answer.any(1).all()
        assert not batch.answer[batch.tokens == 0].any()
        assert batch.tasks.count(MULTI_KEY) in (0, len(batch.tasks))
    first, second = (next(iter(Samples(stage, seed))).tokens for seed in (1, 2))
    assert first.shape != second.shape or not torch.equal(first, second)
    short, long = make_sample("niah_single", 1, 500), make_sample("niah_single", 2, 900)
    assert collate([short, long]).tokens.shape == (2, len(long.tokens))


def test_training_lowers_the_loss_and_the_exam_says_what_is_right() -> None:
    torch.manual_seed(random.randrange(2**32))
    sizes = Architecture(TOKENIZER.get_vocab_size(), layers=2, longest=4096)
    network = Network(sizes, torch.float32)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    log = Log(io.StringIO())
    train(network, [Stage(1024, 2048, 1.0)], 8.0, 0, 1, log)
    changed = [name for name, weight in network.state_dict().items() if not torch.equal(weight, before[name])]
    assert len(changed) == len(before)
    exam(network, [1600], 1, 0, 1, log)
    assert isinstance(log.file, io.StringIO)
    # What a few steps teach is nothing.
    assert "test 1600 tokens, of 1: " + ", ".join(f"{name} 0" for name in TASKS) in log.file.getvalue()
