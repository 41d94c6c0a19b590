"""Free generations: what is asked, what is counted of what was said, and what the report makes of it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparse.quality.command import _long_enough
from vllm_sparse.quality.corpus import Corpus
from vllm_sparse.quality.journal import Journal
from vllm_sparse.quality.measures.context import Context
from vllm_sparse.quality.measures.generation import generation_jobs, repeated_share
from vllm_sparse.quality.records import DENSE, GenerationRecord
from vllm_sparse.quality.report.summary import summarise
from vllm_sparse.quality.schedule import run_jobs
from vllm_sparse.quality.served_model import Answer, Prediction, ServedModel
from vllm_sparse.quality.tasks.scoring import common_subsequence
from vllm_sparse.quality.variants import DENSE_EXTRAS, Variant

LENGTH, GENERATED, DOCUMENTS = 400, 40, 6
TIDAL = Variant("tidal", {"sparse_decode": "tidal"})
HIP = Variant("hip", {"sparse_decode": "hip"})


class WordTokenizer:
    """A word is a token, whose id is its number in the order of appearance."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def text(self, text: str) -> list[int]:
        numbers = []
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
            numbers.append(self.words.index(word))
        return numbers

    def chat(self, messages: Sequence[Mapping[str, str]], answer_prefix: str) -> list[int]:
        return self.text(f"{messages[0]['content']} {answer_prefix}")


class CopyingModel:
    """Dense copies from the place that it is asked to begin at; others say a word of their own now and then.

    Dense is as sure of each word of the text as of none that others put between them.
    """

    is_sparse = True

    def __init__(self, tokenizer: WordTokenizer) -> None:
        self.tokenizer = tokenizer
        self.lock = threading.Lock()
        self.generating = self.most_generating = 0
        self.all_generate = threading.Event()
        self.salts: list[str] = []
        self.foreign = tokenizer.text("foreign")[0]

    def complete(
        self, prompt: Sequence[int], max_tokens: int, extras: Mapping[str, Any], salt: str, return_tokens: bool = False
    ) -> Answer:
        with self.lock:
            self.salts.append(salt)
            self.generating += 1
            self.most_generating = max(self.most_generating, self.generating)
            if self.generating == 3:
                self.all_generate.set()
        self.all_generate.wait(5)
        begin = prompt.index(prompt[-1]) + 1
        copied = list(prompt[begin : begin + max_tokens])
        method = extras.get("sparse_decode")
        if method != "dense":
            for place in range(0, max_tokens, 8 if method == "tidal" else 2):
                copied[place] = self.foreign
        with self.lock:
            self.generating -= 1
        return Answer(" ".join(self.tokenizer.words[token] for token in copied), tokens=tuple(copied))

    def predictions(self, prompt: Sequence[int], extras: Mapping[str, Any], salt: str) -> list[Prediction]:
        assert extras == DENSE_EXTRAS, "what was said is judged by dense"
        with self.lock:
            self.salts.append(salt)
        assert len(prompt) < LENGTH, "the request says a token more"
        return [Prediction(8.0, 5) if token == self.foreign else Prediction(0.5, 1) for token in prompt[1:]]


@pytest.fixture
def model() -> CopyingModel:
    return CopyingModel(WordTokenizer())


def measured(model: CopyingModel, tmp_path: Path, concurrency: int = 3) -> list[GenerationRecord]:
    paragraphs = tuple(
        " ".join(f"word{paragraph}x{place}" for place in range(12)) for paragraph in range(5 * LENGTH // 12)
    )
    corpus = Corpus("made up", paragraphs, (), {})
    context = Context(cast("ServedModel", model), model.tokenizer, corpus, 7, 0, "run")
    journal = Journal(tmp_path, {"model": "copying"}, [TIDAL, HIP])
    jobs = list(generation_jobs(context, [TIDAL, HIP], [LENGTH], DOCUMENTS, GENERATED))
    run_jobs("generation", jobs, journal, concurrency, 3)
    journal.close()
    return [record for record in journal.run.records if isinstance(record, GenerationRecord)]


def test_what_is_counted_of_a_generation(model: CopyingModel, tmp_path: Path) -> None:
    records = measured(model, tmp_path)
    assert len(records) == 3 * DOCUMENTS
    foreign = {DENSE: 0, "tidal": GENERATED // 8, "hip": GENERATED // 2}
    for record in records:
        wrong = foreign[record.variant]
        assert record.tokens == GENERATED
        assert record.common_prefix_tokens == (0 if wrong else GENERATED)
        assert record.agreement == pytest.approx(1 - wrong / GENERATED)
        assert record.agreement_by_part == pytest.approx([1 - wrong / GENERATED] * 4, abs=0.1)
        assert record.mean_loss == pytest.approx((8.0 * wrong + 0.5 * (GENERATED - wrong)) / GENERATED)
        assert record.repeated == 0
        assert (record.score == 1) == (not wrong)
    read = [salt for salt in model.salts if "-read-" in salt]
    assert len(read) == len(set(read)) == 3 * DOCUMENTS


def test_variants_of_a_text_generate_side_by_side(model: CopyingModel, tmp_path: Path) -> None:
    """None waits for dense before it begins."""
    measured(model, tmp_path)
    assert model.most_generating == 3


def test_the_report_compares_with_dense(model: CopyingModel, tmp_path: Path) -> None:
    tidal, hip = summarise(measured(model, tmp_path), [TIDAL, HIP], {}).generations
    assert (tidal.variant, hip.variant) == ("tidal", "hip")
    assert tidal.dense_score == hip.dense_score == 1
    assert tidal.agreement.mean == pytest.approx(-1 / 8)
    assert hip.agreement.mean == pytest.approx(-1 / 2)
    assert hip.agreement.interval is not None
    assert hip.agreement_by_part == pytest.approx([-1 / 2] * 4, abs=0.1)
    assert hip.loss.mean == pytest.approx(7.5 / 2)
    assert hip.difference.mean == pytest.approx(hip.score - 1)
    assert hip.repeated == 0


def test_records_of_earlier_versions_have_no_agreement() -> None:
    old = [GenerationRecord(name, 1024, "copy", 0, 9, 3, 0.5, (0.5,), "text") for name in (DENSE, "tidal")]
    (found,) = summarise(old, [TIDAL], {}).generations
    assert found.difference.pairs == 1
    assert found.agreement.pairs == found.loss.pairs == 0
    assert found.agreement_by_part == ()
    assert found.repeated is None


def test_lengths_that_leave_no_sparse_prompt_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert _long_enough("generation", [4096, 5024, 5025], 4000, 1024) == [5025]
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == [
        f"generation is not measured at {length} tokens" for length in (4096, 5024)
    ]


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 5))
def test_repeated_share_counts_each_run_that_stood_before(values: list[int], size: int) -> None:
    runs = [values[start : start + size] for start in range(len(values) - size + 1)]
    before = [run in runs[:place] for place, run in enumerate(runs)]
    assert repeated_share(values, size) == pytest.approx(sum(before) / len(before) if before else 0)


WORDS = st.lists(st.sampled_from("abcd"), max_size=24)


@given(WORDS, WORDS)
def test_common_subsequence_is_that_of_the_table(first: list[str], second: list[str]) -> None:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for row, word in enumerate(first, 1):
        for column, other in enumerate(second, 1):
            longer = max(table[row - 1][column], table[row][column - 1])
            table[row][column] = table[row - 1][column - 1] + 1 if word == other else longer
    assert common_subsequence(first, second) == table[-1][-1]
